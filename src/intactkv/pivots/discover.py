"""The shortest prefix that leaves no pivot outside it, found by measurement.

Greedy, as in PrefixQuant (arXiv 2410.05265): the token that is a pivot most often joins the prefix, the text is
measured again behind it, until no pivot is left; then every token of the prefix that is not needed is dropped.
What counts is always what the model does behind the prefix, never how frequent a token is (KVSink, arXiv 2508.04257).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from intactkv.capturing.prefix import chat_prefix
from intactkv.error import IntactKVError
from intactkv.pivots.classify import PIVOT, outside
from intactkv.pivots.measure import measure

MOST_TOKENS = 8
TRIES = 4  # candidates for each place of the prefix

WINDOWS, WINDOW = 16, 256  # what `discover` measures on: 4096 tokens in each pass


@dataclass(frozen=True)
class Trial:
    """One measurement: this prefix, how often each token id is still a pivot outside it, and whether it was kept."""

    prefix: tuple[int, ...]
    left: dict[int, int]
    kept: bool

    @property
    def pivots(self) -> int:
        """How many pivots stand outside the prefix, over all windows."""
        return sum(self.left.values())


def discover(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: str | Sequence[int]) -> list[int]:
    """The shortest prefix ids behind which `data`, a text or token ids without [BOS], holds no pivot.

    It begins with the tokenizer's [BOS] where there is one. At most `2 + MOST_TOKENS · (TRIES + 1)` batched passes
    over 16 windows of 256 tokens; usually two. Raises `IntactKVError` where the model has no pivots, where no prefix
    of up to 8 tokens removes them all, and where the data are too short.

        kv = capture(model, discover(model, tokenizer, text), tokenizer=tokenizer)
    """
    tokens = tokenizer(data, add_special_tokens=False, verbose=False).input_ids if isinstance(data, str) else data
    trials = search(model, pieces(tokens), start=opening(tokenizer), chat=first_of_chat(tokenizer))
    return prefix_of(trials)


def prefix_of(trials: Sequence[Trial]) -> list[int]:
    """The prefix that a search ended with. Raises `IntactKVError` where it found none, in one sentence."""
    best = [trial for trial in trials if trial.kept][-1]
    if not best.prefix and not best.pivots:
        raise IntactKVError(
            f"the model has no pivots on this text (no hidden state is {PIVOT:.0f} times the median token's); there is "
            "nothing worth keeping intact, or name a prefix yourself"
        )
    if best.pivots:
        token, count = max(best.left.items(), key=lambda item: item[1])
        raise IntactKVError(
            f"behind the prefix {list(best.prefix)} {best.pivots} pivots are left, token {token} {count} times, and no "
            "further token removes them; name a prefix yourself"
        )
    return list(best.prefix)


def search(
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    *,
    start: int | None = None,
    chat: int | None = None,
) -> list[Trial]:
    """`shortest_prefix` on `windows` of plain text: the trials, of which the last one kept is the result.

    `start` is the id that every prompt begins with, and so any prefix; `chat` one that is tried first where there is
    none and any first token is a pivot.
    """

    def left(prefix: Sequence[int]) -> Counter[int]:
        begins = prefix or ([] if start is None else [start])
        head = torch.tensor(begins, dtype=torch.int64).expand(len(windows), -1)
        return outside(measure(model, torch.cat([head, windows.cpu()], 1)), len(prefix))

    return shortest_prefix(left, start=start, first=chat)


def shortest_prefix(
    left: Callable[[Sequence[int]], Counter[int]], *, start: int | None = None, first: int | None = None
) -> list[Trial]:
    """Greedy search over prefixes, given what counts the pivots that a prefix leaves. No model in it.

    A prefix grows by the most frequent remaining pivot that lowers their number, of up to `TRIES`; then tokens other
    than `start` and `first` that turn out not to be needed are dropped, from the last. The first trial is the text as
    it is, with nothing intact; if that holds no pivot it is the only one.
    """
    trials: list[Trial] = []

    def tried(prefix: Sequence[int], better: Callable[[int], bool]) -> Trial:
        counts = left(prefix)
        trials.append(Trial(tuple(prefix), dict(counts), kept=better(counts.total())))
        return trials[-1]

    bare = tried([], lambda n: True)
    if not bare.pivots:
        return trials
    best = bare if start is None else tried([start], lambda n: True)
    while best.pivots and len(best.prefix) < MOST_TOKENS:
        candidates = [token for token, _ in Counter(best.left).most_common(TRIES)]
        if not best.prefix and first is not None:
            candidates = [first, *candidates][:TRIES]
        now = best
        for token in candidates:
            trial = tried([*now.prefix, token], lambda n: n < now.pivots)  # noqa: B023 (called at once)
            if trial.kept:
                best = trial
                break
        if best is now:
            break
    begins = best.prefix[:1] in ((start,), (first,))  # as prompts do: without it no prompt has the prefix
    for i in range(len(best.prefix) - 1, 0 if begins else -1, -1):
        if len(best.prefix) > 1:
            shorter = [*best.prefix[:i], *best.prefix[i + 1 :]]
            known = [trial for trial in trials if list(trial.prefix) == shorter]
            trial = known[0] if known else tried(shorter, lambda n: n <= best.pivots)  # noqa: B023
            if not known and trial.kept:
                best = trial
    return trials


def pieces(tokens: Sequence[int], *, count: int = WINDOWS, length: int = WINDOW) -> Int[Tensor, "window token"]:
    """The first `count` windows of a token stream; shorter ones where it has too few tokens for them.

    Raises `IntactKVError` where fewer than 4 windows of 32 tokens are left.
    """
    length = min(length, len(tokens) // 4)
    if length < 32:
        raise IntactKVError(f"{len(tokens)} tokens are too few to look for pivots in; give at least 128")
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)[:count]


def behind(
    prefix: Sequence[int], tokens: Sequence[int], *, count: int = 4, length: int = 64
) -> Int[Tensor, "window token"]:
    """A few short windows of a token stream, each behind `prefix`: enough to see where pivots are."""
    windows = pieces(tokens, count=count, length=length)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(windows), -1), windows], 1)


def opening(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer puts in front of every text, None if it puts none there."""
    ids = tokenizer("a").input_ids
    return ids[0] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else None


def first_of_chat(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first id of every conversation, None without a chat template."""
    return None if tokenizer.chat_template is None else chat_prefix(tokenizer)[0]
