"""Low-bit integers in bytes, and the rounding that makes them. Pure tensor maths.

Layout of packed codes: **planes, not neighbours**. The last axis of `dim` codes becomes `dim * bits / 8` bytes, and one
byte holds codes that stand far apart, so that unpacking is a few shifts of whole contiguous vectors:

- 8 bits: byte j is code j.
- 4 bits: byte j holds code j in bits 0-3 and code j + dim/2 in bits 4-7.
- 2 bits: byte j holds codes j, j + dim/4, j + dim/2, j + 3 dim/4, from the lowest bits to the highest.
- 3 bits: 8 codes take 3 bytes. First dim/4 bytes with the two low bits of every code, laid out as for 2 bits; then
  dim/8 bytes with the high bits, where byte j holds those of codes j, j + dim/8, …, j + 7 dim/8, from the lowest bit
  up.

Rounding is asymmetric and dynamic: a group of numbers from `low` to `high` becomes codes 0 … 2^bits - 1 with
x ≈ code * scale + low. `scale` and `low` are stored in half precision, and codes are computed from the stored ones,
`low` rounded down and `scale` up, so that |x - (code * scale + low)| ≤ scale / 2 holds for what is stored. A group with
a NaN or an infinity, or whose `scale` or `low` is beyond half precision's ±65504, reads back as NaN or infinite as a
whole: never as a plausible number.

Source: the paper's KV quantization (arXiv 2403.01241, asymmetric, per token and head) and KIVI (arXiv 2402.02750, keys
per channel). Both use an integer zero point; `low` as it is costs the same bytes and rounds less.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from intactkv.error import IntactKVError

BITS = (2, 3, 4, 8)
SCALE_DTYPE = torch.float16
# half a unit in the last place, and a little for the arithmetic, so that rounding cannot go the wrong way
SLACK, WIDER = torch.finfo(SCALE_DTYPE).eps * 0.51, 1 + torch.finfo(SCALE_DTYPE).eps
SMALLEST = torch.finfo(SCALE_DTYPE).tiny * torch.finfo(SCALE_DTYPE).eps


def packed_bytes(dim: int, bits: int) -> int:
    """How many bytes `dim` codes take; raises `IntactKVError` where they do not fill whole bytes."""
    if bits not in BITS:
        raise IntactKVError(f"bits={bits} is not supported; use one of {BITS}")
    whole = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    if dim % whole:
        raise IntactKVError(
            f"a head of {dim} numbers cannot be packed at {bits} bits, which takes multiples of {whole}"
        )
    return dim * bits // 8


def pack(codes: UInt8[Tensor, "*axes dim"], bits: int) -> UInt8[Tensor, "*axes bytes"]:
    """Codes below 2^bits along the last axis, packed into bytes as the file's docstring lays out."""
    packed_bytes(codes.shape[-1], bits)
    if bits == 8:
        return codes.clone()
    if bits == 3:
        return torch.cat([_into_planes(codes & 3, 2), _into_planes(codes >> 2, 1)], -1)
    return _into_planes(codes, bits)


def unpack(packed: UInt8[Tensor, "*axes bytes"], bits: int) -> UInt8[Tensor, "*axes dim"]:
    """The codes that `pack` packed."""
    return torch.cat(planes(packed, bits), -1)


def _into_planes(codes: Tensor, width: int) -> Tensor:
    planes = codes.chunk(8 // width, -1)
    packed = planes[0].clone(memory_format=torch.contiguous_format)
    for i, plane in enumerate(planes[1:], 1):
        packed = packed | (plane << (i * width))
    return packed


def planes(packed: UInt8[Tensor, "*axes bytes"], bits: int) -> list[UInt8[Tensor, "*axes code"]]:
    """Vectors of neighbouring codes, in order; at 3 bits eight of them, as wide as the part with the high bits."""
    if bits == 3:
        wide = packed.shape[-1] // 3
        low, high = packed[..., : 2 * wide], packed[..., 2 * wide :]
        return [((low[..., i % 2 * wide :][..., :wide] >> (i // 2 * 2)) & 3) | ((high >> i & 1) << 2) for i in range(8)]
    return [packed] if bits == 8 else [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]


def quantize(
    x: Float[Tensor, "*axes dim"], *, bits: int, group_size: int | None = None
) -> tuple[UInt8[Tensor, "*axes dim"], Float[Tensor, "*axes group"], Float[Tensor, "*axes group"]]:
    """Codes, scale and low of `x`, one scale for `group_size` neighbours on the last axis (None: all of it)."""
    grouped = x.unflatten(-1, (-1, _fitting(x.shape[-1], group_size)))
    grouped = grouped.to(torch.promote_types(x.dtype, torch.float32))
    codes, scale, low = _rounded(grouped, *grouped.aminmax(dim=-1), axis=-1, bits=bits)
    return codes.flatten(-2), scale, low


def packed_per_token(
    x: Float[Tensor, "*axes dim"], *, bits: int, group_size: int | None = None
) -> tuple[UInt8[Tensor, "*axes bytes"], Float[Tensor, "*axes group"], Float[Tensor, "*axes group"]]:
    """`quantize`, its codes packed: what a cache stores of tokens that have scales of their own."""
    codes, scale, low = quantize(x, bits=bits, group_size=group_size)
    return pack(codes, bits), scale, low


def quantize_channels(
    x: Float[Tensor, "batch head token dim"], *, bits: int, token_group: int, hidden: Tensor | None = None
) -> tuple[
    UInt8[Tensor, "batch head token dim"], Float[Tensor, "batch head group dim"], Float[Tensor, "batch head group dim"]
]:
    """Codes, scale and low of `x`, one scale for each channel of `token_group` tokens.

    Tokens that are `hidden`, `(batch, token)`, do not enter any scale; their codes mean nothing.
    """
    grouped = x.unflatten(2, (-1, token_group))
    lowest = highest = grouped
    if hidden is not None:
        out = hidden.unflatten(1, (-1, token_group))[:, None, :, :, None]
        none = out.all(3, keepdim=True)  # a group of hidden tokens only: any finite scale will do
        lowest = torch.where(out, torch.where(none, 0.0, math.inf).to(x.dtype), grouped)
        highest = torch.where(out, torch.where(none, 0.0, -math.inf).to(x.dtype), grouped)
    codes, scale, low = _rounded(grouped, lowest.amin(3), highest.amax(3), axis=3, bits=bits)
    return codes.flatten(2, 3), scale, low


def _rounded(x: Tensor, low: Tensor, high: Tensor, *, axis: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.promote_types(x.dtype, torch.float32)
    x, low, high = x.to(exact), low.to(exact), high.to(exact)
    levels = 2**bits - 1
    low_ = (low - low.abs() * SLACK - SMALLEST).to(SCALE_DTYPE)
    lowest = low_.to(exact)
    scale_ = ((high - lowest) * (WIDER / levels) + SMALLEST).to(SCALE_DTYPE)  # `step.py` does the same
    steps = (x - lowest.unsqueeze(axis)) / scale_.to(exact).unsqueeze(axis)
    return steps.round().clamp(0, levels).to(torch.uint8), scale_, low_


def dequantize(
    packed: UInt8[Tensor, "*axes bytes"], scale: Tensor, low: Tensor, *, bits: int, dtype: torch.dtype
) -> Float[Tensor, "*axes dim"]:
    """`code * scale + low` in `dtype`, with the scales of `quantize`, `(*axes, group)`.

    Plane by plane: compilers vectorise arithmetic on whole planes, and not on bytes that were put side by side first.
    """
    codes, scale, low = planes(packed, bits), scale.to(dtype), low.to(dtype)
    groups, wide = scale.shape[-1], codes[0].shape[-1]
    if groups == 1:
        return torch.cat([plane.to(dtype) * scale + low for plane in codes], -1)
    grouped = torch.cat([plane.to(dtype) for plane in codes], -1).unflatten(-1, (groups, len(codes) * wide // groups))
    return (grouped * scale[..., None] + low[..., None]).flatten(-2)


def dequantize_channels(
    packed: UInt8[Tensor, "batch head token bytes"],
    scale: Float[Tensor, "batch head group dim"],
    low: Float[Tensor, "batch head group dim"],
    *,
    bits: int,
    dtype: torch.dtype,
) -> Float[Tensor, "batch head token dim"]:
    """`code * scale + low` in `dtype`, with the scales of `quantize_channels`; tokens fill whole groups."""
    codes = torch.cat([plane.to(dtype) for plane in planes(packed, bits)], -1)
    grouped = codes.unflatten(2, (scale.shape[2], -1))
    return (grouped * scale.to(dtype)[:, :, :, None] + low.to(dtype)[:, :, :, None]).flatten(2, 3)


def _fitting(dim: int, group_size: int | None) -> int:
    if group_size is None:
        return dim
    if group_size < 1 or dim % group_size:
        raise IntactKVError(f"group_size={group_size} does not divide the head's {dim} numbers; use a divisor, or None")
    return group_size


@lru_cache(maxsize=32)
def hadamard(dim: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "dim dim"]:
    """Sylvester's Hadamard matrix over √dim: symmetric, and its own inverse."""
    if dim & (dim - 1):
        raise IntactKVError(f"a Hadamard rotation needs a power of two, not {dim} numbers; set hadamard=False")
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < dim:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / math.sqrt(dim)).to(device, dtype)
