"""The search for the shortest prefix: its logic on known pivots, and on models where they are planted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import build, by_name
from planted import BOS, planted

from intactkv import IntactKVError
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.pivots import discover
from intactkv.pivots.discover import (
    MOST_TOKENS,
    TRIES,
    first_of_chat,
    opening,
    pieces,
    prefix_of,
    search,
    shortest_prefix,
)

Left = Callable[[Sequence[int]], Counter[int]]


def text_with(pivots: dict[int, int], *, start: int | None = None) -> Left:
    """A text in which these ids are pivots so many times, each until it stands in the prefix."""

    def left(prefix: Sequence[int]) -> Counter[int]:
        here = Counter({token: n for token, n in pivots.items() if token not in prefix})
        if start is not None and not prefix:
            here[start] += 10
        return here

    return left


def result(left: Left, *, start: int | None = None, first: int | None = None) -> list[int]:
    return prefix_of(shortest_prefix(left, start=start, first=first))


@given(pivots=st.dictionaries(st.integers(5, 60), st.integers(1, 9), min_size=1, max_size=6))
def test_every_pivot_joins_the_prefix_and_nothing_else_does(pivots: dict[int, int]) -> None:
    assert sorted(result(text_with(pivots))) == sorted(pivots)
    with_start = result(text_with(pivots, start=1), start=1)
    assert with_start[0] == 1
    assert sorted(with_start[1:]) == sorted(pivots)


def test_one_token_that_stands_for_others_is_all_that_stays() -> None:
    """A sink that is there already keeps others from becoming one: the frequent token joins first, in vain."""

    def left(prefix: Sequence[int]) -> Counter[int]:
        if 7 in prefix:
            return Counter()
        return Counter({5: 9, 7: 3}) if 5 not in prefix else Counter({7: 3})

    assert result(left) == [7]
    shorter = [p for n in range(2) for p in combinations((5, 7), n) if not left(p)]
    assert shorter == [(7,)]


def test_a_positional_pivot_needs_one_token_and_takes_the_chats_first() -> None:
    def left(prefix: Sequence[int]) -> Counter[int]:
        return Counter() if prefix else Counter({8: 3, 9: 2})

    assert result(left) == [8]
    assert result(left, first=4) == [4]


def test_no_pivots_and_pivots_that_stay_are_said_so() -> None:
    with pytest.raises(IntactKVError, match="no pivots on this text"):
        result(lambda prefix: Counter(), start=1)
    with pytest.raises(IntactKVError, match=r"behind the prefix \[1\] 4 pivots are left, token 7 3 times"):
        result(lambda prefix: Counter({7: 3, 8: 1}) if prefix else Counter({1: 9, 7: 3}), start=1)


@given(seed=st.integers(0, 1000))
def test_the_number_of_measurements_is_bounded(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    calls = []

    def left(prefix: Sequence[int]) -> Counter[int]:
        calls.append(prefix)
        return Counter({int(t): 1 for t in torch.randint(20, (6,), generator=generator)})

    trials = shortest_prefix(left, start=1)
    assert len(trials) == len(calls) <= 2 + MOST_TOKENS * (TRIES + 1)
    assert len(trials[-1].prefix) <= MOST_TOKENS


def test_the_planted_pivot_is_found_and_no_more() -> None:
    ids = torch.randint(8, 97, (6, 40), generator=torch.Generator().manual_seed(3))
    assert prefix_of(search(planted(), ids, start=BOS)) == [BOS]
    trials = search(build(by_name("llama-gqa")), ids, start=BOS)
    assert len(trials) == 1
    assert trials[0].pivots == 0


def test_a_positional_pivot_of_a_model_without_bos() -> None:
    model = build(by_name("opt"))
    with torch.no_grad():
        model.model.decoder.embed_positions.weight[2, 5] = 200.0  # OPT's position 0
    ids = torch.randint(8, 97, (6, 40), generator=torch.Generator().manual_seed(3))
    (token,) = prefix_of(search(model, ids))
    assert token in ids[:, 0].tolist()
    assert prefix_of(search(model, ids, chat=90)) == [90]


def test_the_embedded_models_prefix_is_bos() -> None:
    tokenizer, full = load_tokenizer(MODEL), load_model(MODEL, dtype=torch.float32)
    assert opening(tokenizer) == first_of_chat(tokenizer) == tokenizer.bos_token_id
    assert discover(full, tokenizer, TEXT.read_text()[:4000]) == [tokenizer.bos_token_id]
    with pytest.raises(IntactKVError, match="too few to look for pivots"):
        discover(full, tokenizer, "A few words.")
    assert pieces(range(200)).shape == (4, 50)
