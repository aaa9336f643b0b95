"""A packed layer on a GPU from one decoding step to the next, with its newest tokens in a ring.

The kernels of `step.py` do a step's whole work, so nothing is allocated but the answer, and nothing is decided on the
host but where the layer stands; with a clock not even that. What else is asked of the layer (a prompt, a crop, other
rows) first takes the tokens out of the ring again: `PackedLayer` does so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from intactkv.error import IntactKVError
from intactkv.packed.launch import FUSED, Kept, on_device
from intactkv.packed.packing import Packing
from intactkv.packed.readable import Stored
from intactkv.packed.rows import Rows
from intactkv.packed.store import Run, TokenStore

if TYPE_CHECKING:
    from intactkv.packed.kernel import Sharing

STEADY_ROWS = 64  # queries to a key head that the kernel takes


@lru_cache(maxsize=1)
def _triton() -> bool:
    return find_spec("triton") is not None


def on_gpu(x: Tensor) -> bool:
    """Whether `x` is where the kernels run."""
    return x.is_cuda and _triton()


def capturing() -> bool:
    """Whether a CUDA graph is captured now; transformers then makes a mask also where nothing is hidden."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@dataclass(slots=True)
class Standing:
    """What one call of a layer reads: its columns below `read` packed, from there to `stored` in the ring.

    With a clock the two numbers are those in it when the kernels run (`step.py`).
    """

    layer: Steady
    stored: int
    read: int

    def like(self, which: int) -> tuple[Tensor, int]:
        """As `Stored.like`."""
        return self.layer.ring[which], self.stored + 1

    def dense(self, which: int) -> Float[Tensor, "batch head token dim"]:
        """As `Stored.dense`."""
        return self.in_parts().dense(which)

    def in_place(
        self, query: Tensor, mask: Tensor | None, *, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor | None:
        """As `Readable.in_place`: by the kernels, for one token that sees everything."""
        sees_all = mask is None or capturing()  # `Captured` has run the step before, where the mask was None
        if not (sees_all and query.shape[2] == 1 and query.shape[1] // self.layer.ring[0].shape[1] <= STEADY_ROWS):
            return None
        return self.layer.attend(query, self, Scores(scaling, softcap, sinks))

    def in_parts(self) -> Stored:
        """As `Readable.in_parts`: for PyTorch's way of reading them."""
        layer = self.layer
        if layer.clock is not None:
            raise IntactKVError(
                "this model's attention reads dense keys and values, which a CUDA graph cannot replay as they grow; "
                "use read_packed without graphs=True"
            )
        key, value = (store.buffers for store in layer.stores)
        run = Run(0, 0, self.read)
        runs = ((run, key.slice(0, self.read), value.slice(0, self.read)),) if self.read else ()
        rows, start, count = layer.rows, None, None
        if rows is not None:
            start = rows[:, 1]
            count = torch.minimum((self.read - start).clamp(min=0), rows[:, 2])
        tail = unrolled(layer.ring, self.read, self.stored + 1)
        kept = None if rows is None else layer.kept
        return Stored(runs, tail, self.read, kept, start, count, (0, 0) if rows is None else None, False)


class Scores(NamedTuple):
    """What is done to scores: queries are scaled, scores bent by `softcap`, and `sinks` take their share."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None


class Steady:
    """The state of one layer between decoding steps; `stored` columns in all, the first `packed` of them packed."""

    clock: Tensor | None = None  # while a CUDA graph is captured

    def __init__(
        self, packing: Packing, stores: list[TokenStore], tail: list[Tensor], kept: list[Tensor], rows: Tensor | None
    ) -> None:
        self.packing, self.stores, self.rows = packing, stores, rows
        self.kept = (kept[0].contiguous(), kept[1].contiguous())
        self.packed = stores[0].used
        self.stored = self.packed + tail[0].shape[2]
        self.size = packing.residual + packing.together
        place = torch.arange(self.packed, self.stored, device=tail[0].device) % self.size
        rings = [x.new_zeros((*x.shape[:2], self.size, x.shape[3])).index_copy_(2, place, x) for x in tail]
        self.ring = rings[0], rings[1]
        self._launches: dict[Any, Any] = {}  # by what they were made for, as long as buffers, rows and clock stay

    @property
    def due(self) -> bool:
        """Whether the next token fills the ring."""
        return self.stored + 1 - self.packed == self.size

    @property
    def read(self) -> int:
        """How many columns the next token's call reads packed."""
        return self.packed + (self.packing.together if self.due and self.packing.own == "rounded" else 0)

    def store(self, key: Tensor, value: Tensor) -> Standing:
        """Store one token `(batch, head, 1, dim)` and say what its call reads; `advance` goes on to the next."""
        if self.clock is None and self.packed + self.packing.together >= self.stores[0].codes.shape[2]:
            self._launches.clear()
            for each in self.stores:
                each.reserve(self.packed + self.packing.together)
        key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
        like = (key.dtype, key.stride(), value.stride())
        launch = self._launches.get(like)
        if launch is None:
            launch = self._launches[like] = self._storing(key, value)
        with on_device(key):
            launch((key, value), self.stored, self.packed)
        return Standing(self, self.stored, self.read)

    def _storing(self, key: Tensor, value: Tensor) -> Kept:
        from intactkv.packed import step

        keys, values = self.stores
        batch, heads = key.shape[:2]
        return Kept(
            step.store, (batch * heads, 2),
            (
                *self.ring, keys.codes, keys.scale, keys.low, values.codes, values.scale, values.low,
                self.rows, self.clock, heads, *key.stride()[:2], *value.stride()[:2],
                keys.codes.shape[2], values.codes.shape[2],
            ),
            DIM=key.shape[3], DIM_V=value.shape[3], BITS=keys.bits, GROUP=keys.token_group, RING=self.size,
            TOGETHER=self.packing.together, CLOCK=self.clock is not None, ROWS=self.rows is not None,
            enable_fp_fusion=False,
        )  # fmt: skip

    def attend(
        self, query: Float[Tensor, "batch head 1 dim"], at: Standing, scores: Scores
    ) -> Float[Tensor, "batch 1 head dim_v"]:
        """Attention of one token's queries, not yet scaled, over all tokens."""
        query = query.contiguous()
        sinks = None if scores.sinks is None else scores.sinks.data_ptr()
        like = (query.dtype, query.shape, scores.scaling, scores.softcap, sinks)
        launches = self._launches.get(like)
        if launches is None:
            launches = self._launches[like] = self._attending(query, scores)
        sharing, finish, shape = launches
        with on_device(query):
            shares = sharing(query, at.read)
            out = query.new_empty(shape)
            finish((query, shares, out), at.stored, at.read)
        return out

    def _attending(self, query: Tensor, scores: Scores) -> tuple[Sharing, Kept, tuple[int, ...]]:
        from intactkv.packed import step
        from intactkv.packed.kernel import Sharing

        key, value = (store.buffers for store in self.stores)
        (batch, heads, _, dim), kv_heads = query.shape, key.codes.shape[1]
        live = heads // kv_heads
        sharing = Sharing(
            query.view(batch, kv_heads, live, dim), key, value, len(key), begin=self.rows, softcap=scores.softcap,
            exact=query.dtype == torch.float32, scaling=scores.scaling, clock=self.clock,
        )  # fmt: skip
        finish = Kept(
            step.finish, (live, batch * kv_heads),
            (
                *self.kept, *self.ring, self.rows, scores.sinks, self.clock,
                kv_heads, live, sharing.splits, self.kept[0].shape[2], scores.scaling, scores.softcap or 0.0,
            ),
            DIM=dim, DIM_V=value.dim, SPLITS=_power(sharing.splits), RING=self.size, ROWS=self.rows is not None,
            SINKS=scores.sinks is not None, CAP=scores.softcap is not None, CLOCK=self.clock is not None, BLOCK=16,
            **FUSED,
        )  # fmt: skip
        return sharing, finish, (batch, 1, heads, value.dim)

    def advance(self) -> None:
        """A token more is stored."""
        self.packed += self.packing.together if self.due else 0
        self.stored += 1

    def prepare(self, room: int, rows: Tensor | None) -> None:
        """Buffers for so many tokens more, and rows that begin there: what a CUDA graph holds fast."""
        for store in self.stores:
            store.reserve(self.stored + room)
        self.rows = rows
        self._launches.clear()

    @contextmanager
    def following(self, clock: Int[Tensor, "3"]) -> Iterator[None]:
        """While it is open, the kernels read on the device where the layer stands, and the host decides nothing."""
        self.clock = clock
        self._launches.clear()
        try:
            yield
        finally:
            self.clock = None
            self._launches.clear()

    def tail(self) -> list[Tensor]:
        """The newest tokens out of the ring."""
        return list(unrolled(self.ring, self.packed, self.stored))


def serves(packing: Packing, stores: list[TokenStore], rows: Rows, dtype: torch.dtype) -> bool:
    """Whether the kernels do what a layer of this packing needs; its tokens must lie in one run besides."""
    from intactkv.packed.kernel import fits

    keys, values = stores
    group = packing.token_group if packing.keys == "per_channel" else 1
    return (
        not packing.hadamard
        and group & (group - 1) == 0
        and fits(keys.buffers, values.buffers, 1)
        and dtype in (torch.float16, torch.bfloat16, torch.float32)
        and (rows.padding_known or not rows.keep)
    )


def rows_of(rows: Rows, device: torch.device, first: Int[Tensor, "batch"] | None = None) -> Tensor | None:
    """`rows` as the kernels take them, None where every row sees all and keeps nothing; `first` is behind padding."""
    if rows.start is None or rows.count is None or not rows.widest:
        if first is None:
            return None
        return torch.stack([first, torch.zeros_like(first), torch.zeros_like(first)], 1).contiguous()
    start, count = rows.start.to(device), rows.count.to(device)
    return torch.stack([torch.zeros_like(start) if first is None else first, start, count], 1).contiguous()


def unrolled(ring: tuple[Tensor, Tensor], begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Columns `begin` to `end` of keys and values out of their rings."""
    place = torch.arange(begin, end, device=ring[0].device) % ring[0].shape[2]
    return ring[0][:, :, place], ring[1][:, :, place]


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
