"""Which rows of an intact prefix belong where in an engine's paged cache, and when: no engine, no transformers.

Engines keep keys and values in blocks of a fixed number of tokens and know a block by its tokens alone. Whoever shares
the first m tokens of the prefix may share its blocks, so whoever shares them gets m intact rows: keys and values at a
position depend on no later token. An engine that gets them for whole prefixes only serves, from then on, its own
keys and values to requests with the whole prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from intactkv.error import IntactKVError

NULL_BLOCK = 0  # what vLLM puts where a sliding window has no block any more


def common_prefix(ids: Sequence[Any], prefix: Sequence[Any]) -> int:
    """How many items `ids` and `prefix` share from their beginning.

    >>> common_prefix([1, 2, 9, 4], [1, 2, 3])
    2
    """
    return next((i for i, (a, b) in enumerate(zip(ids, prefix, strict=False)) if a != b), min(len(ids), len(prefix)))


def rows_due(ids: Sequence[Any], prefix: Sequence[Any]) -> int:
    """How many intact rows a prompt stands on: of all tokens that it shares but its last, which is always computed.

    >>> rows_due([1, 2, 9, 4], [1, 2, 3]), rows_due([1, 2], [1, 2, 3]), rows_due([], [1, 2, 3])
    (2, 1, 0)
    """
    return min(common_prefix(ids, prefix), max(0, len(ids) - 1))


def head_slice(heads: int, rank: int, size: int) -> slice:
    """The key heads of one tensor-parallel rank of `size`; where there are fewer heads than ranks, they are replicated.

    Raises `IntactKVError` where heads and ranks do not divide each other.

    >>> head_slice(8, 1, 4), head_slice(2, 3, 4)
    (slice(2, 4, None), slice(1, 2, None))
    """
    if max(heads, size) % min(heads, size):
        raise IntactKVError(f"{heads} key heads cannot be split over {size} ranks; use a divisor or a multiple of them")
    first = rank * heads // size
    return slice(first, first + max(1, heads // size))


@dataclass(frozen=True)
class Rows:
    """Prefix positions `begin` to `end` of one request; `blocks[group]` are its first blocks in each cache group."""

    begin: int
    end: int
    blocks: tuple[tuple[int, ...], ...]

    def slots(self, group: int, block_size: int) -> list[tuple[int, int]]:
        """Each position and its slot in the group's cache; positions that a sliding window has let go are left out."""
        found = []
        for position in range(self.begin, self.end):
            block = self.blocks[group][position // block_size]
            if block != NULL_BLOCK:
                found.append((position, block * block_size + position % block_size))
        return found


@dataclass(frozen=True)
class Step:
    """What one step of the engine writes: `before` its forward, and `during` it, between a layer's own write and read.

    `before` are tokens that the engine does not compute, `during` such as it computes, or has computed, itself.
    """

    before: tuple[Rows, ...] = ()
    during: tuple[Rows, ...] = ()


@dataclass(frozen=True)
class Scheduled:
    """What the scheduler says of one request in a step: `count` tokens from `computed` on, and its blocks by group.

    `blocks` are all of its blocks where it is `admitted` in this step, anew or after a preemption, else the new ones.
    """

    request: str
    computed: int
    count: int
    blocks: tuple[Sequence[int], ...] | None
    admitted: bool


@dataclass
class _Request:
    ids: Sequence[int]  # grows while tokens are generated
    external: int
    matched: int
    done: int = 0  # rows below it are intact
    blocks: tuple[tuple[int, ...], ...] = field(default=())


class Plan:
    """The scheduler's side: which rows each step has to write. It holds a request only as long as rows are missing."""

    def __init__(self, prefix: Sequence[int], block_sizes: Sequence[int]) -> None:
        self.prefix, self.block_sizes = list(prefix), list(block_sizes)
        self._requests: dict[str, _Request] = {}

    @property
    def waiting(self) -> bool:
        """Whether a request has rows missing; where none has, a step needs nothing."""
        return bool(self._requests)

    def offer(self, ids: Sequence[int], computed: int) -> int:
        """How many tokens behind the first `computed` ones need not be computed; the last token always must be."""
        return max(0, rows_due(ids, self.prefix) - computed)

    def admit(self, request: str, ids: Sequence[int], external: int) -> None:
        """A request has got its blocks; `external` tokens of those offered are taken from the artifact."""
        matched = common_prefix(ids, self.prefix)
        if matched:
            self._requests[request] = _Request(ids, external, matched)

    def step(self, scheduled: Iterable[Scheduled]) -> Step:
        """What the step of these requests has to write."""
        before, during = [], []
        for each in scheduled:
            request = self._requests.get(each.request)
            if request is None:
                continue
            self._take_blocks(request, each)
            if each.admitted:  # what lies before is in the engine's own cache, where it came by this way
                request.done = each.computed - request.external
                before += self._rows(request, min(each.computed, request.matched))
            inside = request.matched < len(self.prefix)
            if inside:  # a short prompt may go on as the prefix does
                request.matched = common_prefix(request.ids, self.prefix)
                inside = request.matched == len(request.ids)
            during += self._rows(request, min(each.computed + each.count, request.matched))
            if request.done >= request.matched and not inside:
                del self._requests[each.request]
        return Step(tuple(before), tuple(during))

    def finish(self, request: str) -> None:
        """A request is gone."""
        self._requests.pop(request, None)

    def _rows(self, request: _Request, end: int) -> list[Rows]:
        if end <= request.done:
            return []
        rows = Rows(request.done, end, request.blocks)
        request.done = end
        return [rows]

    def _take_blocks(self, request: _Request, each: Scheduled) -> None:
        """Keep the blocks that the prefix can lie in."""
        given = each.blocks or tuple(() for _ in self.block_sizes)
        held = tuple(() for _ in self.block_sizes) if each.admitted else request.blocks
        request.blocks = tuple(
            (*old, *new)[: -(-len(self.prefix) // size)]
            for old, new, size in zip(held, given, self.block_sizes, strict=True)
        )


class Ledger:
    """The worker's side: whether every layer has written what a step promised."""

    def __init__(self, layers: Iterable[str]) -> None:
        self._layers = frozenset(layers)
        self._missing: set[str] = set()

    def promise(self) -> None:
        """A step has rows for every layer."""
        self._missing = set(self._layers)

    def take(self, layer: str) -> bool:
        """Whether `layer` still has to write them; it then counts as having done so."""
        if layer not in self._missing:
            return False
        self._missing.remove(layer)
        return True

    def left(self) -> list[str]:
        """The layers that have not written them; nothing is missing any more."""
        missing, self._missing = sorted(self._missing), set()
        return missing
