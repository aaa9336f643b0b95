"""Attention over packed tokens for a compiler, in a form that leaves nothing dense: a block of them, or a whole step.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from intactkv.packed.attention import Partial, Step, attend, whole_groups
from intactkv.packed.bits import packed_per_token, planes
from intactkv.packed.readable import Rounded, Stored
from intactkv.packed.store import Packed

ROWS = 8
NARROWEST = 16  # numbers under one scale and in one plane: a vector register's worth
SHORT = 64  # tokens
SCORES = 2**16  # of one block, all rows together: they stay in a core's second-level cache
WHOLE = 2**19  # scores of one call without blocks: 2 MiB of transient memory


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
    return Step(partial(blockwise, compiled(known, block_attention)), whole_groups(_tokens(SCORES, query), key))


def fused_attention(query: Tensor, stored: Stored) -> Tensor | None:
    """Attention of one token's scaled queries `(batch, head, 1, dim)` over all stored tokens, in one compiled call.

    The answer is `(batch, 1, head, dim)`, or None where it does not serve: rows that do not begin alike, several runs
    of packed tokens, more of them than `WHOLE` allows. What it spares are some forty small operations, and blocks.
    """
    if stored.rotated or stored.uniform is None or len(stored.runs) != 1:
        return None
    run, key, value = stored.runs[0]
    batch, heads, _, dim = query.shape
    query = query.reshape(batch, key.codes.shape[1], -1, dim)
    known = layout(query, key, value)
    if known is None or not SHORT <= len(key) <= _tokens(WHOLE, query) or len(key) % (key.token_group or 1):
        return None
    start, count = stored.uniform
    hidden = min(max(start + count - run.column, 0), run.length) if count else 0
    if hidden == run.length:
        return None
    keys, values = stored.tail
    if stored.kept is not None and count:
        keys, values = (torch.cat([x[:, :, :count], y], 2) for x, y in zip(stored.kept, stored.tail, strict=True))
    written_out = whole_attention if stored.take is None else whole_step
    function = compiled(known, written_out, (batch == 1, keys.shape[2] == 1, min(hidden, 2), query.dtype))
    tensors = (key.codes, key.scale, key.low, value.codes, value.scale, value.low)
    out: Any = function(query, *tensors, hidden, keys, values)
    if stored.take is not None:
        out, *rounded = out
        stored.take(*rounded)
    answer: Tensor = out.view(batch, 1, heads, -1)
    return answer


def _tokens(scores: int, query: Tensor) -> int:
    """How many tokens give that many scores of queries `(batch, head, row, dim)`, and at least `SHORT`."""
    return max(SHORT, scores // query[..., 0].numel())


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
def compiled(
    known: Layout, written_out: Callable[[Layout], Callable[..., Any]], constants: tuple[Any, ...] = ()
) -> Callable[..., Any]:
    """A function for a layout, compiled: one graph for any batch and any number of tokens.

    `constants` are what else the compiler takes for constant: sizes of 1, small numbers, types.
    """
    function: Any = written_out(known)
    # torch counts recompilations for each code object and gives up at eight, so each layout has one of its own
    name = function.__name__ + "_" + "_".join(map(str, (*known[:3], *known.dims, *known.groups, *map(repr, constants))))
    code = function.__code__.replace(co_name=name)
    own = FunctionType(code, function.__globals__, name, closure=function.__closure__)
    # inductor would leave out rounding to float16 and back, and pack codes for scales other than those stored
    options: dict[str, Any] = {"emulate_precision_casts": True}
    if known.bits == 2 and known.groups[0]:  # and store dense what several rows read; other layouts it does only so
        options |= {"realize_reads_threshold": 64, "realize_opcount_threshold": 4096}
    return torch.compile(own, dynamic=True, options=options)


def block_attention(known: Layout) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`attention.attend` on plain tensors of one layout, every row and plane by itself."""

    def attend(
        query: Tensor, codes: Tensor, scale: Tensor, low: Tensor, v_codes: Tensor, v_scale: Tensor, v_low: Tensor,
        seen: Tensor | None, acc: Tensor, peak: Tensor, total: Tensor, softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        _fix(known, query, codes, v_codes)
        scores = _scores(known, query, codes, scale, low)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        top = torch.maximum(peak, scores.amax((-2, -1))[..., None])
        weight, faded = torch.exp(scores - top[..., None]), torch.exp(peak - top)
        acc = acc * faded + _sums(known, weight, v_codes, v_scale, v_low)
        return acc, top, total * faded + weight.sum((-2, -1))[..., None]

    return attend


def whole_attention(known: Layout) -> Callable[..., Tensor]:
    """Attention over packed tokens, all but the first `hidden`, and over `full` ones, on plain tensors, normalised."""

    def attend_all(
        query: Tensor, codes: Tensor, scale: Tensor, low: Tensor, v_codes: Tensor, v_scale: Tensor, v_low: Tensor,
        hidden: int, full: Tensor, v_full: Tensor,
    ) -> Tensor:  # fmt: skip
        dtype, query = query.dtype, query.to(torch.promote_types(query.dtype, torch.float32))
        if known.groups[0]:
            packed = [x[:, :, hidden:, None] for x in (codes, scale, low, v_codes, v_scale, v_low)]
        else:  # a group's tokens share a scale, so the first tokens are masked, not cut off
            groups = scale.shape[2]
            codes, v_codes, v_scale, v_low = (x.unflatten(2, (groups, -1)) for x in (codes, v_codes, v_scale, v_low))
            packed = [codes, scale[:, :, :, None], low[:, :, :, None], v_codes, v_scale, v_low]
        _fix(known, query, packed[0], packed[3])
        scores = _scores(known, query, *packed[:3])  # (batch, head, row, group, token)
        if not known.groups[0]:
            column = torch.arange(scores.shape[3] * scores.shape[4], device=query.device).view(scores.shape[3:])
            scores = scores.masked_fill(column < hidden, -torch.inf)
        exact = (query[:, :, :, None] * full.to(query.dtype)[:, :, None]).sum(-1)  # (batch, head, row, token)
        peak = torch.maximum(scores.amax((-2, -1)), exact.amax(-1))[..., None]
        weight, weights = torch.exp(scores - peak[..., None]), torch.exp(exact - peak)
        acc = _sums(known, weight, *packed[3:]) + (weights[..., None] * v_full.to(query.dtype)[:, :, None]).sum(3)
        total = weight.sum((-2, -1)) + weights.sum(-1)
        return (acc / total[..., None]).to(dtype)

    return attend_all


def whole_step(known: Layout) -> Callable[..., tuple[Tensor, Rounded, Rounded]]:
    """`whole_attention`, and the last of the `full` tokens packed: key and value."""
    attend_all = whole_attention(known)

    def step(*tensors: Any) -> tuple[Tensor, Rounded, Rounded]:
        key, value = (
            packed_per_token(x[:, :, -1:], bits=known.bits, group_size=group)
            for x, group in zip(tensors[-2:], known.groups, strict=True)
        )
        return attend_all(*tensors), key, value

    return step


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


def _scores(known: Layout, query: Tensor, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """Scores `(batch, head, row, group, token)`."""
    keys = list(_pieces(codes, scale, low, known.bits, known.groups[0], query.dtype))
    rows = []
    for row in range(known.rows):
        products = [query[:, :, row, None, None, begin : begin + x.shape[-1]] * x for begin, x in keys]
        rows.append(sum(products[1:], products[0]).sum(-1))
    return torch.stack(rows, 2)


def _sums(known: Layout, weight: Tensor, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """Values summed with the weights of `(batch, head, row, group, token)`, `(batch, head, row, dim)`."""
    values = [x for _, x in _pieces(codes, scale, low, known.bits, known.groups[1], weight.dtype)]
    rows = range(known.rows)
    return torch.stack(
        [torch.cat([(weight[:, :, row, :, :, None] * x).sum((2, 3)) for x in values], -1) for row in rows], 2
    )
