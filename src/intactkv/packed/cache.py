"""`PackedCache`: a transformers cache of 2, 3, 4 or 8 bits a number, with each row's first tokens intact.

Every full-attention layer keeps its tokens in three parts: each row's first tokens (asked for by `keep`, or the intact
ones of an attached artifact) in full precision, outside the packed store and outside every shared scale; the newest
`residual` and a few more in full precision; all others packed (`store.py` has the layout). A token is rounded once,
when it leaves the newest ones. Layers with a sliding window or a recurrent state keep transformers' own cache layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from intactkv.attaching.locate import Sites
from intactkv.error import IntactKVError
from intactkv.packed.bits import hadamard
from intactkv.packed.lazy import LazyStates
from intactkv.packed.packing import Packing
from intactkv.packed.readable import Rounded, Stored
from intactkv.packed.rows import Rows
from intactkv.packed.steady import Steady, on_gpu, rows_of, serves
from intactkv.packed.store import Run, TokenStore

TOGETHER = 32  # tokens whose keys and values are rounded in one go


class PackedLayer(CacheLayerMixin):
    """One full-attention layer's tokens; the cache's `rows` say which of them are kept."""

    is_sliding = False
    is_croppable = True

    def __init__(self, packing: Packing, rows: Rows) -> None:
        super().__init__()
        self.packing, self.rows = packing, rows
        self._length = 0
        self.runs: list[Run] = []
        self.stores: list[TokenStore] = []  # of keys and of values
        self.tail: list[Tensor] = []  # (batch, head, token, dim) each
        self.kept: list[Tensor] = []  # (batch, head, kept, dim) each
        self.steady: Steady | None = None  # while it is there, it has the newest tokens, `runs` and `tail` are empty

    @property
    def length(self) -> int:
        """How many tokens are stored, kept ones and padding included."""
        return self._length if self.steady is None else self.steady.stored

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty buffers for these heads, widths, types and devices."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for i, x in enumerate((key_states, value_states)):
            tokens = self.packing.token_group if self.packing.keys == "per_channel" and i == 0 else 0
            self.stores.append(TokenStore(x, bits=self.packing.bits, group_size=self.packing.group_size, tokens=tokens))
            self.tail.append(x[:, :, :0])
            self.kept.append(x[:, :, :0])
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store this call's keys and values and return all of them, dense or lazily so."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] == 1 and self.steady_state() is not None:
            return self._step(key_states, value_states)
        self._settle()
        states, past = (key_states, value_states), self.length
        self._keep(states, past)
        before = self.runs.copy(), self.length - self.tail[0].shape[2]
        tail = [torch.cat([old, new], 2) for old, new in zip(self.tail, states, strict=True)]
        self._length += key_states.shape[2]
        self.tail = list(tail)
        waits = self._may_wait() and tail[0].shape[2] == 1 and bool(before[0])
        if not waits:
            self._flush()
        if self.packing.own == "full":
            if not before[0]:
                return tail[0], tail[1]
            stored = self._stored(before[0], before[1], tail, partial(self._take, tail[0]) if waits else None)
        else:
            if not self.runs:
                return self.tail[0], self.tail[1]
            stored = self._stored(self.runs, self.length - self.tail[0].shape[2], self.tail)
        return LazyStates(stored, 0), LazyStates(stored, 1)

    def steady_state(self) -> Steady | None:
        """Put the newest tokens into a ring, for decoding step by step, where kernels serve that: on a GPU."""
        if self.steady is not None or not self.is_initialized or not on_gpu(self.tail[0]):
            return self.steady
        self._flush()
        rows, packed = self.rows, self.length - self.tail[0].shape[2]
        whole = self.runs == ([Run(0, 0, packed)] if packed else []) and all(s.used == packed for s in self.stores)
        if not (whole and self.length >= rows.until and serves(self.packing, self.stores, rows, self.dtype)):
            return None
        self.steady = Steady(self.packing, self.stores, self.tail, self.kept, rows_of(rows, self.device))
        self.tail, self.runs = [], []
        return self.steady

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """`update` by one token of a layer that is held steady."""
        steady = self.steady
        if steady is None:
            raise RuntimeError("the layer is not held steady")
        standing = steady.store(key_states, value_states)
        if steady.clock is None:
            steady.advance()
        return LazyStates(standing, 0), LazyStates(standing, 1)

    def _settle(self) -> None:
        """Take the newest tokens out of the ring again, or pack the last step's, if nobody has who read it."""
        steady = self.steady
        if steady is None:
            self._flush()
            return
        self.tail, self.runs = steady.tail(), [Run(0, 0, steady.packed)] if steady.packed else []
        for store in self.stores:
            store.used = steady.packed
        self._length, self.steady = steady.stored, None

    def _keep(self, states: tuple[Tensor, Tensor], past: int) -> None:
        """Copy those of a call's tokens that are their row's first ones to `kept`."""
        rows, length = self.rows, states[0].shape[2]
        if rows.keep and not rows.padding_known:
            raise IntactKVError(
                f"the packed cache keeps each row's first {rows.keep} tokens and was not told where rows begin; open "
                "`with read_packed(model):` around the calls"
            )
        if rows.start is None or rows.count is None or past >= rows.until:
            return
        index = torch.arange(rows.widest, device=states[0].device)
        column = rows.start.to(index.device)[:, None] + index - past  # (batch, kept), columns of this call
        here = (column >= 0) & (column < length) & (index < rows.count.to(index.device)[:, None])
        for i, x in enumerate(states):
            batch, head, width, dim = self.kept[i].shape
            old = torch.cat([self.kept[i], x.new_zeros((batch, head, rows.widest - width, dim))], 2)
            at = column.clamp(0, length - 1)[:, None, :, None].expand(-1, head, -1, dim)
            self.kept[i] = torch.where(here[:, None, :, None], x.gather(2, at), old)

    def _flush(self) -> None:
        """Pack the oldest of the newest tokens, as many as are due."""
        together, count = self.packing.together, self.tail[0].shape[2] if self.tail else 0
        due = (count - self.packing.residual) // together * together
        if due <= 0:
            return
        column = self.length - count
        hidden = self._hidden(column, due) if self.packing.keys == "per_channel" else None
        states = [self._rotated(x[:, :, :due]) for x in self.tail]
        keys = self.stores[0]
        if due <= TOGETHER and not keys.token_group and states[0].shape == states[1].shape:
            # a few tokens cost little but calls: keys and values in one
            both = [x.chunk(2) for x in keys.rounded(torch.cat(states), None)]
            slot, _ = (store.put(*(x[i] for x in both)) for i, store in enumerate(self.stores))
        else:
            slot, _ = (store.append(x, hidden) for store, x in zip(self.stores, states, strict=True))
        self._packed(slot, due)

    def _packed(self, slot: int, due: int) -> None:
        """The tail's first `due` tokens have been stored from `slot` on."""
        column = self.length - self.tail[0].shape[2]
        self.tail = [x[:, :, due:].clone() for x in self.tail]
        last = self.runs[-1] if self.runs else None
        if last is not None and last.slot + last.length == slot:
            self.runs[-1] = Run(last.slot, last.column, last.length + due)
        else:
            self.runs.append(Run(slot, column, due))

    def _may_wait(self) -> bool:
        """Whether a decoding step's token is left in full precision until the step has read, or the next one begins.

        A compiled read (`fused.py`) packs it on its way, which spares a step's rounding its small operations.
        """
        packing = self.packing
        alone = packing.keys == "per_token" and not packing.residual
        return alone and packing.own == "full" and self.device.type == "cpu"

    def _take(self, token: Tensor, *rounded: Rounded) -> None:
        """Store the tail's one token, whose key is `token`, as rounded by who read it, if it still waits for that."""
        if self.tail and self.tail[0] is token:
            slot, _ = (store.put(*x) for store, x in zip(self.stores, rounded, strict=True))
            self._packed(slot, 1)

    def first_keys(self, column: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token head dim"]:
        """The keys at these columns that are kept in full precision, NaN where others or none stand."""
        batch, head, width, dim = self.kept[0].shape
        if not width:
            return self.kept[0].new_full((*column.shape, head, dim), torch.nan)
        start, count = self.rows.kept(self.length, self.device)
        index = column.to(self.device) - start[:, None]
        keys = self.kept[0].transpose(1, 2)[torch.arange(batch, device=self.device)[:, None], index.clamp(0, width - 1)]
        return keys.masked_fill(((index < 0) | (index >= count[:, None]))[:, :, None, None], torch.nan)

    def _hidden(self, column: int, count: int) -> Tensor | None:
        """Which of `count` columns must not enter a shared scale: padding before a row's start, and kept tokens."""
        if self.rows.start is None:
            return None
        start, kept = self.rows.kept(column + count, self.device)
        return (
            torch.arange(column, column + count, device=self.device) < torch.where(kept > 0, start + kept, 0)[:, None]
        )

    def _rotated(self, x: Tensor) -> Tensor:
        if not self.packing.hadamard:
            return x
        exact = torch.promote_types(x.dtype, torch.float32)
        return x.to(exact) @ hadamard(x.shape[-1], exact, x.device)

    def _stored(
        self,
        runs: list[Run],
        tail_column: int,
        tail: list[Tensor],
        take: Callable[[Rounded, Rounded], None] | None = None,
    ) -> Stored:
        rows = self.rows
        start = count = kept = None
        if rows.start is not None and rows.widest:
            start, count = rows.kept(tail_column, self.device)
            kept = (self.kept[0], self.kept[1])
        return Stored(
            tuple((run, self.stores[0].view(run), self.stores[1].view(run)) for run in runs),
            (tail[0], tail[1]),
            tail_column,
            kept,
            start,
            count,
            rows.uniform if tail_column >= rows.until else None,
            self.packing.hadamard,
            take,
        )

    def get_seq_length(self) -> int:
        """How many tokens are stored."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask for a call of `query_length` tokens."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: all but the first n for n > 0, the last -n for n < 0, as transformers has it."""
        self._settle()
        length = min(tokens_to_remove, self.length) if tokens_to_remove > 0 else max(0, self.length + tokens_to_remove)
        tail_column = self.length - (self.tail[0].shape[2] if self.tail else 0)
        self.tail = [x[:, :, : max(0, length - tail_column)] for x in self.tail]
        self._length = length
        runs = [Run(r.slot, r.column, min(r.length, length - r.column)) for r in self.runs if r.column < length]
        if length < tail_column:
            for store in self.stores:
                store.cut(runs[-1].slot + runs[-1].length if runs else 0)
            self._align()
        self.runs = runs

    def _align(self) -> None:
        """Both stores go on at the same slot."""
        used = max(store.used for store in self.stores)
        for store in self.stores:
            store.used = used

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        self._length, self.runs, self.stores, self.tail, self.kept, self.steady = 0, [], [], [], [], None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self.map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized:
            self.map(lambda x: x.to(self.device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer by `change(buffer)`."""
        self._settle()
        for store in self.stores:
            store.map(change)
        self.tail, self.kept = [change(x) for x in self.tail], [change(x) for x in self.kept]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, idle capacity included."""
        newest = self.tail if self.steady is None else self.steady.ring
        full = sum(x.numel() * x.element_size() for x in (*newest, *self.kept))
        return full + sum(store.nbytes for store in self.stores)


class PackedCache(Cache):
    """A cache for one model whose full-attention layers are packed as `packing` says.

    Give it to `model(...)` or `model.generate(...)` as `past_key_values`. Inside `with read_packed(model):` decoding
    reads the packed tokens block by block; without it every step makes one layer dense at a time. `keep` needs
    `read_packed`, which tells the cache where padded rows begin; an attached artifact tells it by itself.

        with ik.read_packed(model):
            model.generate(**inputs, past_key_values=ik.PackedCache(model.config, ik.Packing(bits=4, keep=4)))
    """

    def __init__(self, config: PreTrainedConfig, packing: Packing | None = None, *, offloading: bool = False) -> None:
        self.packing, self.rows = packing or Packing(), Rows()
        self.rows.keep = self.packing.keep
        layers = [
            PackedLayer(self.packing, self.rows) if type(layer) is DynamicLayer else layer
            for layer in DynamicCache(config=config).layers
        ]
        if not any(isinstance(layer, PackedLayer) for layer in layers):
            raise IntactKVError(
                f"{config.model_type} has no full-attention layer that could be packed; use its own cache"
            )
        super().__init__(layers=layers, offloading=offloading)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed layers' buffers, idle capacity included."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, PackedLayer))

    def keep_sites(self, sites: Sites, batch: int, past: int) -> None:
        """Keep the tokens at `sites` of the call that begins after `past` tokens in full precision."""
        if len(sites):
            self.rows.keep_sites(sites, batch, past)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, as each layer does."""
        super().crop(tokens_to_remove)
        self.rows.cut(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rows.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        self.rows.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.rows.map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self.rows.map(lambda x: x[indices.to(x.device)])
