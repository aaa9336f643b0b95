"""Packed keys or values of one layer, in buffers that grow geometrically.

The storage layout, per layer, once for keys and once for values; all tensors contiguous (row-major) and on the layer's
device, `capacity` slots of which the first `used` hold tokens:

- `codes` uint8 `(batch, head, capacity, dim * bits / 8)`: a token's codes, packed as `bits.py` lays out.
- `scale`, `low` float16, x ≈ code * scale + low:
  - scales **per token**: `(batch, head, capacity, dim / group_size)`; slot t, channel d uses `[t, d // group_size]`.
  - scales **per channel** (`token_group` > 0): `(batch, head, capacity / token_group, dim)`; slot t, channel d uses
    `[t // token_group, d]`. Slots are filled by whole groups.

A read takes a `Packed`: views of a run of slots, with the buffers' strides (batch stride `head * capacity * bytes`,
head stride `capacity * bytes`, token stride `bytes`, byte stride 1; scales likewise), so nothing is copied.

A slot is a column of the cache, except after a crop inside a group of per-channel scales: the rest of that group stays
empty and the next token begins a new one, because a token is rounded once and a scale belongs to those it was made for.
`Run` says which columns a run of slots holds; nearly always there is one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from intactkv.packed.bits import (
    SCALE_DTYPE,
    dequantize,
    dequantize_channels,
    pack,
    packed_bytes,
    packed_per_token,
    quantize_channels,
)

GROWTH = 1.25  # of a full buffer: how much is copied and how much lies idle are both bounded


@dataclass(frozen=True)
class Run:
    """`length` slots from `slot` on that hold the cache's columns from `column` on."""

    slot: int
    column: int
    length: int


@dataclass(frozen=True)
class Packed:
    """A run of packed tokens: plain tensors as the file's docstring lays out; `token_group` is 0 for scales per
    token."""

    codes: UInt8[Tensor, "batch head token bytes"]
    scale: Float[Tensor, "batch head group dim"]
    low: Float[Tensor, "batch head group dim"]
    bits: int
    token_group: int = 0

    def __len__(self) -> int:
        return self.codes.shape[2]

    @property
    def dim(self) -> int:
        return self.codes.shape[3] * 8 // self.bits

    def slice(self, begin: int, end: int) -> Packed:
        """Tokens `begin` to `end`; with scales per channel both must be at a group's edge, or `end` at the end."""
        if self.token_group:
            groups = slice(begin // self.token_group, -(-end // self.token_group))
            scale, low = self.scale[:, :, groups], self.low[:, :, groups]
        else:
            scale, low = self.scale[:, :, begin:end], self.low[:, :, begin:end]
        return replace(self, codes=self.codes[:, :, begin:end], scale=scale, low=low)

    def variance(self, query: Float[Tensor, "batch head row dim"]) -> Float[Tensor, "batch head row token"]:
        """Variance of `query`'s products with the numbers, each of which was anywhere in a step: Σ q² step² / 12."""
        square, step = query.square(), self.scale.to(query.dtype).square() / 12
        if not self.token_group:
            return square.unflatten(-1, (step.shape[-1], -1)).sum(-1) @ step.transpose(-1, -2)
        by_group = square @ step.transpose(-1, -2)
        return by_group.repeat_interleave(self.token_group, -1)[..., : len(self)]

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "batch head token dim"]:
        """The numbers, `(batch, head, token, dim)`; for a `dtype` of half precision computed in float32 first."""
        exact = torch.promote_types(dtype, torch.float32)
        if not self.token_group:
            return dequantize(self.codes, self.scale, self.low, bits=self.bits, dtype=exact).to(dtype)
        whole = len(self) // self.token_group
        parts, edge = [], whole * self.token_group
        for tokens, groups in ((slice(0, edge), slice(0, whole)), (slice(edge, None), slice(whole, None))):
            if self.codes[:, :, tokens].shape[2]:
                scales = self.scale[:, :, groups], self.low[:, :, groups]
                parts.append(dequantize_channels(self.codes[:, :, tokens], *scales, bits=self.bits, dtype=exact))
        return torch.cat(parts, 2).to(dtype) if parts else self.codes.new_zeros(0).to(dtype)


class TokenStore:
    """The growing buffers of one layer's keys, or of its values."""

    def __init__(self, like: Float[Tensor, "batch head token dim"], *, bits: int, group_size: int | None, tokens: int):
        batch, head, _, dim = like.shape
        self.bits, self.group_size, self.token_group = bits, group_size, tokens
        self.used = 0
        groups = 1 if group_size is None else max(1, dim // group_size)
        self.codes = like.new_empty((batch, head, 0, packed_bytes(dim, bits)), dtype=torch.uint8)
        self.scale = like.new_empty((batch, head, 0, dim if tokens else groups), dtype=SCALE_DTYPE)
        self.low = torch.empty_like(self.scale)

    def append(self, x: Float[Tensor, "batch head token dim"], hidden: Bool[Tensor, "batch token"] | None) -> int:
        """Round and pack `x` behind what is there and return its first slot; `hidden` tokens enter no shared scale."""
        return self.put(*self.rounded(x, hidden))

    def rounded(self, x: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Packed codes, scale and low of `x` as this store holds them."""
        if not self.token_group:
            return packed_per_token(x, bits=self.bits, group_size=self.group_size)
        codes, scale, low = quantize_channels(x, bits=self.bits, token_group=self.token_group, hidden=hidden)
        return pack(codes, self.bits), scale, low

    def put(self, codes: Tensor, scale: Tensor, low: Tensor) -> int:
        """Store what `rounded` gave behind what is there and return its first slot."""
        slot, end = self.used, self.used + codes.shape[2]
        self.reserve(end)
        self.codes[:, :, slot:end] = codes
        per = self.token_group or 1
        self.scale[:, :, slot // per : end // per] = scale
        self.low[:, :, slot // per : end // per] = low
        self.used = end
        return slot

    @property
    def buffers(self) -> Packed:
        """All slots, idle ones included."""
        return Packed(self.codes, self.scale, self.low, bits=self.bits, token_group=self.token_group)

    def view(self, run: Run) -> Packed:
        """The packed tokens of `run`, not copied."""
        per = self.token_group or 1
        slots, groups = (
            slice(run.slot, run.slot + run.length),
            slice(run.slot // per, -(-(run.slot + run.length) // per)),
        )
        scales = self.scale[:, :, groups], self.low[:, :, groups]
        return Packed(self.codes[:, :, slots], *scales, bits=self.bits, token_group=self.token_group)

    def cut(self, used: int) -> None:
        """Forget all slots from `used` on; appending goes on at the next whole group."""
        per = self.token_group or 1
        self.used = -(-used // per) * per

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer by `change(buffer)`."""
        self.codes, self.scale, self.low = (change(t) for t in (self.codes, self.scale, self.low))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, idle slots included."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.low))

    def reserve(self, slots: int) -> None:
        """Make room for `slots` slots in all, and for some more: a full buffer's strides would be compiled anew."""
        capacity = self.codes.shape[2]
        if slots < capacity:
            return
        # the first call allocates for a prompt and a short answer; later ones grow by a share of the whole
        wanted = max(slots, int(capacity * GROWTH)) + 64
        per = self.token_group or 1
        wanted = -(-wanted // per) * per
        self.codes = _grown(self.codes, wanted)
        self.scale = _grown(self.scale, wanted // per)
        self.low = _grown(self.low, wanted // per)


def _grown(buffer: Tensor, capacity: int) -> Tensor:
    batch, head, held, last = buffer.shape
    larger = buffer.new_zeros((batch, head, capacity, last))
    larger[:, :, :held] = buffer
    return larger
