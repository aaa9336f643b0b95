"""Laws of finding the prefix: the tensor maths equal loops that a reader can check by eye."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from intactkv.attaching.locate import Sites, first_real, hidden_prefix, locate, sequence_starts

many = settings(deadline=None, max_examples=120)
PAD = 9

Row = list[int]
Flags = list[bool]


def located(ids: Row, prefix: Row, real: Flags, positions: Row, matched: int) -> Flags:
    """Which tokens of one row are prefix tokens, token by token."""
    inside: Flags = []
    seen_real = False
    for t, (token, here, p) in enumerate(zip(ids, real, positions, strict=True)):
        begins = p == 0
        goes_on = t > 0 and inside[t - 1] and p == positions[t - 1] + 1
        carries_on = not seen_real and matched >= p  # an earlier call ended inside the prefix
        agrees = 0 <= p < len(prefix) and token == prefix[p]
        inside.append(here and agrees and (begins or goes_on or carries_on))
        seen_real = seen_real or here
    return inside


def hides(ids: Row, prefix: Row, real: Flags) -> bool:
    """Whether the masked tokens right before the first real one are the prefix or its beginning."""
    if not any(real):
        return False
    before = ids[: real.index(True)]
    return any(before[-m:] == prefix[:m] for m in range(1, min(len(prefix), len(before)) + 1))


def call(ids: list[Row], prefix: Row, real: list[Flags], positions: list[Row], matched: Row) -> list[Flags]:
    tensors = {"real": torch.tensor(real), "positions": torch.tensor(positions), "matched": torch.tensor(matched)}
    return locate(torch.tensor(ids), torch.tensor(prefix), **tensors).tolist()


prefixes = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@st.composite
def anything(draw: st.DrawFn) -> tuple[Any, ...]:
    """Any ids, mask, positions and carried counts, sensible or not."""
    prefix, batch, length = draw(prefixes), draw(st.integers(1, 3)), draw(st.integers(1, 9))

    def rows(cell: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(st.lists(cell, min_size=length, max_size=length), min_size=batch, max_size=batch))

    climbing = st.lists(st.integers(-1, 6), min_size=batch, max_size=batch)
    positions = draw(
        st.just(rows(st.integers(-2, 7))) | climbing.map(lambda s: [list(range(x, x + length)) for x in s])
    )
    matched = draw(st.lists(st.integers(0, len(prefix)), min_size=batch, max_size=batch))
    return rows(st.integers(0, 2)), prefix, rows(st.booleans()), positions, matched


@st.composite
def padded(draw: st.DrawFn) -> tuple[Any, ...]:
    """Rows as they come from tokenizers: packed sequences that often begin with the prefix, padded on one side."""
    prefix, left = draw(prefixes), draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        row, positions = [], []
        for _ in range(draw(st.integers(0, 3))):
            shared = prefix[: draw(st.integers(0, len(prefix)))]
            sequence = shared + draw(st.lists(st.integers(0, 2), max_size=3))
            row, positions = row + sequence, positions + list(range(len(sequence)))
        rows.append((row, positions))
    width = max(1, *(len(row) for row, _ in rows))

    def filled(row: list[Any], pad: Any) -> list[Any]:
        fill = [pad] * (width - len(row))
        return fill + row if left else row + fill

    pad = draw(st.sampled_from([PAD, prefix[0]]))
    ids, positions = [filled(row, pad) for row, _ in rows], [filled(p, draw(st.sampled_from([0, 1]))) for _, p in rows]
    return ids, prefix, [filled([True] * len(row), False) for row, _ in rows], positions, [0] * len(rows)


@many
@given(case=anything() | padded())
@example(case=([[0]], [0], [[True]], [[-1]], [0]))  # a negative position is no place in the prefix
@example(case=([[1, 0, 1]], [0, 1], [[True, True, True]], [[0, 1, 2]], [2]))
@example(case=([[0, 1, 0, 1, 2]], [0, 1, 2], [[True] * 5], [[0, 1, 0, 1, 2]], [0]))  # packed
def test_locate_equals_the_loop(case: tuple[Any, ...]) -> None:
    ids, prefix, real, positions, matched = case
    want = [located(i, prefix, r, p, m) for i, r, p, m in zip(ids, real, positions, matched, strict=True)]
    assert call(ids, prefix, real, positions, matched) == want


@many
@given(case=padded())
def test_a_row_gets_its_longest_common_prefix_and_padding_nothing(case: tuple[Any, ...]) -> None:
    ids, prefix, real, positions, matched = case
    inside = call(ids, prefix, real, positions, matched)
    for row, mask, place, found in zip(ids, real, positions, inside, strict=True):
        starts = [t for t, (here, p) in enumerate(zip(mask, place, strict=True)) if here and p == 0]
        expected = [False] * len(row)
        for start, stop in pairwise([*starts, len(row)]):
            for p, t in enumerate(range(start, stop)):
                if p == len(prefix) or not mask[t] or row[t] != prefix[p]:
                    break
                expected[t] = True
        assert found == expected


@many
@given(case=padded(), data=st.data())
def test_chunks_find_what_one_call_finds(case: tuple[Any, ...], data: st.DataObject) -> None:
    ids, prefix, real, positions, _ = case
    ids, real, positions = ids[:1], real[:1], positions[:1]
    if sum(r and p == 0 for r, p in zip(real[0], positions[0], strict=True)) > 1:
        return  # packed rows come without a cache, so never in chunks
    want, got, carried = call(ids, prefix, real, positions, [0])[0], [], [0]
    cuts = sorted({0, len(ids[0]), *data.draw(st.lists(st.integers(0, len(ids[0])), max_size=3))})
    for a, b in pairwise(cuts):
        chunk = call([ids[0][a:b]], prefix, [real[0][a:b]], [positions[0][a:b]], carried)[0]
        reached = [p + 1 for p, found in zip(positions[0][a:b], chunk, strict=True) if found]
        carried = [max([*carried, *reached])]
        got += chunk
    assert got == want


@many
@given(case=anything() | padded())
@example(case=([[0, 0, 1, 2]], [0, 0, 1], [[False] * 3 + [True]], [[0] * 4], [0]))  # begins with its own beginning
@example(case=([[0, 1, 2, 0, 1, 2]], [0, 1, 2, 0, 1], [[False] * 5 + [True]], [[0] * 6], [0]))
@example(case=([[0, 1, 2]], [0, 1], [[False] * 3], [[0] * 3], [0]))  # nothing but padding
def test_hidden_prefix_equals_the_loop(case: tuple[Any, ...]) -> None:
    ids, prefix, real, _, _ = case
    got = hidden_prefix(torch.tensor(ids), torch.tensor(prefix), real=torch.tensor(real)).tolist()
    assert got == [hides(i, prefix, r) for i, r in zip(ids, real, strict=True)]


@settings(many, max_examples=50)
@given(prefix=prefixes)
def test_a_prefix_that_is_masked_is_always_noticed(prefix: Row) -> None:
    ids = torch.tensor([[PAD, PAD, *prefix, 5, 5]])
    for hidden in range(1, len(prefix) + 1):
        real = torch.arange(ids.shape[1])[None] >= 2 + hidden
        assert hidden_prefix(ids, torch.tensor(prefix), real=real).tolist() == [True]
    assert hidden_prefix(ids, torch.tensor(prefix), real=ids != PAD).tolist() == [False]


@many
@given(case=anything())
def test_starts_and_first_tokens_equal_the_loop(case: tuple[Any, ...]) -> None:
    _, _, real, positions, matched = case
    firsts = first_real(torch.tensor(real)).tolist()
    assert firsts == [[here and not any(row[:t]) for t, here in enumerate(row)] for row in real]
    starts = sequence_starts(torch.tensor(real), torch.tensor(positions), torch.tensor(matched)).tolist()
    assert starts == [
        [here and (p == 0 or (first and m >= p)) for here, first, p in zip(r, f, ps, strict=True)]
        for r, f, ps, m in zip(real, firsts, positions, matched, strict=True)
    ]


def found(ids: list[Row], prefix: Row, **more: Any) -> Tensor:
    rows = torch.tensor(ids)
    given = {
        "real": torch.ones_like(rows, dtype=torch.bool),
        "positions": torch.arange(rows.shape[1]).expand_as(rows),
        "matched": torch.zeros(len(rows), dtype=torch.int64),
        **more,
    }
    return locate(rows, torch.tensor(prefix), **given)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_call_shorter_than_the_prefix_is_prefix_as_far_as_it_goes(length: int) -> None:
    assert found([[4, 5, 6, 7][:length]], [4, 5, 6, 7, 8]).tolist() == [[True] * length]


def test_only_padding_and_no_tokens_hold_no_prefix() -> None:
    padding = torch.zeros(2, 3, dtype=torch.bool)
    assert not found([[4, 5, 6], [4, 4, 4]], [4, 5], real=padding).any()
    assert not hidden_prefix(torch.tensor([[4, 5, 6], [4, 4, 4]]), torch.tensor([4, 5]), real=padding).any()
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert hidden_prefix(none, torch.tensor([4, 5]), real=none.bool()).tolist() == [False, False]


def test_rows_do_not_see_each_other() -> None:
    inside = found([[4, 5, 6], [4, 6, 5], [6, 5, 4], [5, 6, 4]], [4, 5, 6])
    assert inside.tolist() == [[True] * 3, [True, False, False], [False] * 3, [False] * 3]


def test_a_count_carried_too_low_does_not_carry_on() -> None:
    at_two = torch.tensor([[2, 3]])
    assert found([[6, 7]], [4, 5, 6, 7], positions=at_two, matched=torch.tensor([2])).all()
    assert not found([[6, 7]], [4, 5, 6, 7], positions=at_two, matched=torch.tensor([1])).any()
    again = torch.tensor([[1, 2]])  # a cache that was cropped: tokens that come again are prefix tokens still
    assert found([[5, 6]], [4, 5, 6, 7], positions=again, matched=torch.tensor([4])).all()


def test_inputs_stay_as_they_are_and_broadcast_positions_may_be_views() -> None:
    ids, prefix = torch.tensor([[4, 5, 6], [4, 5, 5]]), torch.tensor([4, 5, 6])
    given = {"real": torch.ones(2, 3, dtype=torch.bool), "matched": torch.tensor([0, 0])}
    positions = torch.arange(3).expand(2, 3)
    before = [t.clone() for t in (ids, prefix, *given.values())]
    assert locate(ids, prefix, positions=positions, **given).tolist() == [[True] * 3, [True, True, False]]
    hidden_prefix(ids, prefix, real=given["real"])
    assert all(torch.equal(a, b) for a, b in zip(before, (ids, prefix, *given.values()), strict=True))


def test_sites_count_and_move_together() -> None:
    sites = Sites(*(torch.tensor(x) for x in ([0, 0, 1], [2, 3, 0], [0, 1, 0])))
    assert len(sites) == 3
    moved = sites.to(torch.device("meta"))
    assert {t.device.type for t in (moved.row, moved.col, moved.index)} == {"meta"}
