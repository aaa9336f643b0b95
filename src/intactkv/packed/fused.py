"""Attention over one block of packed tokens for a compiler, in a form that leaves nothing dense, not even the block.

Scores and sums of values are written as sums of products over the stored planes, one row of queries after another, not
as matrix products: inductor then unpacks, scales, multiplies and adds in registers, in one pass over the bytes for all
rows of a key head. A matrix product would need the block as numbers in memory first, eight times the bytes at 4 bits,
written and read again.

What this gives up: every row is unrolled, so compiling takes some seconds for each layout (bits, scales, heads, rows),
and for more rows than `ROWS` the matrix product is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor

from intactkv.packed.attention import Partial, Step, attend, whole_groups
from intactkv.packed.bits import planes
from intactkv.packed.store import Packed

ROWS = 8
NARROWEST = 16  # numbers under one scale and in one plane: a vector register's worth
SHORT = 64  # tokens
SCORES = 2**16  # of one block, all rows together: they stay in a core's second-level cache


class Layout(NamedTuple):
    """What is known when compiling; batch and tokens are not."""

    bits: int
    heads: int
    rows: int
    dims: tuple[int, int]  # of keys and of values
    groups: tuple[int, int]  # numbers that share a scale per token; 0: keys have scales per channel


def layout(query: Tensor, key: Packed, value: Packed) -> Layout | None:
    """The layout of these shapes, None for those that are not served."""
    groups = (0 if key.token_group else key.dim // key.scale.shape[3], value.dim // value.scale.shape[3])
    for packed, group in zip((key, value), groups, strict=True):
        wide = packed.dim // (8 if packed.bits == 3 else 8 // packed.bits)
        if min(wide, group or wide) < NARROWEST or (group and wide % group and group % wide):
            return None
    rows = query.shape[2]
    return Layout(key.bits, query.shape[1], rows, (key.dim, value.dim), groups) if rows <= ROWS else None


def fused_step(query: Tensor, key: Packed, value: Packed) -> Step | None:
    """`attend` for these shapes, compiled, with a block's scores for transient memory; None where it does not serve."""
    known = layout(query, key, value)
    if known is None:
        return None
    tokens = max(SHORT, SCORES // (len(query) * known.heads * known.rows))
    return Step(partial(blockwise, compiled(known)), whole_groups(tokens, key))


def blockwise(
    function: Callable[..., tuple[Tensor, Tensor, Tensor]],
    query: Tensor,
    key: Packed,
    value: Packed,
    seen: Tensor | None,
    state: Partial,
    softcap: float | None,
) -> Partial:
    """`attend` by a function of a layout, for blocks that are whole groups of tokens; others are made dense."""
    each = key.token_group or 1
    if len(key) < SHORT or len(key) % each:  # the end: not worth a compilation of its own
        return attend(query, key, value, seen, state, softcap)

    def split(x: Tensor) -> Tensor:  # tokens into groups, so that a group's scales are found without a division
        return x.unflatten(2, (-1, each))

    keys = (key.scale[:, :, :, None], key.low[:, :, :, None]) if key.token_group else (split(key.scale), split(key.low))
    values = (split(value.codes), split(value.scale), split(value.low))
    seen = None if seen is None else seen.contiguous().unflatten(3, (-1, each))  # strides are compiled in
    return Partial(*function(query, split(key.codes), *keys, *values, seen, *state, softcap))


@lru_cache(maxsize=64)
def compiled(known: Layout) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`written_out`, compiled: one graph for any batch and any number of tokens."""
    function = written_out(known)
    # torch counts recompilations for each code object and gives up at eight, so each layout has one of its own
    code = function.__code__.replace(co_name="attend_" + "_".join(map(str, (*known[:3], *known.dims, *known.groups))))
    own = FunctionType(code, function.__globals__, code.co_name, closure=function.__closure__)
    return torch.compile(own, dynamic=True)


def written_out(known: Layout) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`attention.attend` on plain tensors of one layout, every row and plane by itself."""

    def attend(
        query: Tensor, codes: Tensor, scale: Tensor, low: Tensor, v_codes: Tensor, v_scale: Tensor, v_low: Tensor,
        seen: Tensor | None, acc: Tensor, peak: Tensor, total: Tensor, softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        _fix(known, query, codes, v_codes)
        keys = list(_pieces(codes, scale, low, known.bits, known.groups[0], query.dtype))
        scores = torch.stack([_scores(query[:, :, row], keys) for row in range(known.rows)], 2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        top = torch.maximum(peak, scores.amax((-2, -1))[..., None])
        weight, faded = torch.exp(scores - top[..., None]), torch.exp(peak - top)
        values = [x for _, x in _pieces(v_codes, v_scale, v_low, known.bits, known.groups[1], query.dtype)]
        sums = [
            torch.cat([(weight[:, :, row, :, :, None] * x).sum((2, 3)) for x in values], -1)
            for row in range(known.rows)
        ]
        return acc * faded + torch.stack(sums, 2), top, total * faded + weight.sum((-2, -1))[..., None]

    return attend


def _fix(known: Layout, query: Tensor, codes: Tensor, v_codes: Tensor) -> None:
    """Sizes that a comparison names are constants to the compiler, all others are not."""
    sizes = (query.shape[1:], (codes.shape[1], codes.shape[4]), (v_codes.shape[1], v_codes.shape[4]))
    wide = [dim * known.bits // 8 for dim in known.dims]
    if sizes != ((known.heads, known.rows, known.dims[0]), (known.heads, wide[0]), (known.heads, wide[1])):
        raise RuntimeError(f"{sizes} are not of {known}")


def _pieces(
    codes: Tensor, scale: Tensor, low: Tensor, bits: int, group: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Neighbouring numbers `(batch, head, group, token, number)` under one scale, and where they begin in the head."""
    scale, low = scale.to(dtype), low.to(dtype)
    for i, plane in enumerate(planes(codes, bits)):
        wide = plane.shape[-1]
        step = min(wide, group or wide)
        for at in range(0, wide, step):
            begin = i * wide + at
            here = slice(begin // group, begin // group + 1) if group else slice(begin, begin + step)
            yield begin, plane[..., at : at + step].to(dtype) * scale[..., here] + low[..., here]


def _scores(query: Tensor, keys: list[tuple[int, Tensor]]) -> Tensor:
    """One row's scores `(batch, head, group, token)`."""
    products = [query[:, :, None, None, begin : begin + x.shape[-1]] * x for begin, x in keys]
    return sum(products[1:], products[0]).sum(-1)
