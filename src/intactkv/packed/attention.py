"""Attention over packed tokens without making them dense: a block at a time, merged as flash-decoding does.

`packed_attention` is the boundary for kernels: plain tensors in, one `Partial` out. Softmax over several parts (kept
tokens, packed runs, newest tokens) is exact because each part returns its own peak and total with it:
out = Σ_i e^(peak_i - peak) acc_i / Σ_i e^(peak_i - peak) total_i (Dao et al., Flash-Decoding, 2023).

What this gives up: rows of queries are few (a decoding step, a few guesses to verify); for a long prompt's chunk a
dense copy of one layer and the library's own kernel is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from intactkv.packed.store import Packed

# Numbers (not bytes) of one dense block of keys: half a core's second-level cache in float32 on today's machines
BLOCK_NUMBERS = 2**18
FLOOR = -1e30  # a peak below all scores, so that e^(-inf - peak) is 0 and never NaN


class Partial(NamedTuple):
    """Attention over some of the tokens: Σ e^(s - peak) v, the peak of the scores s, and Σ e^(s - peak)."""

    acc: Float[Tensor, "batch kv_head row dim"]
    peak: Float[Tensor, "batch kv_head row 1"]
    total: Float[Tensor, "batch kv_head row 1"]


class Step(NamedTuple):
    """How one block is done, `attend` or what equals it, and how many tokens a block has."""

    attend: Callable[..., Partial]
    tokens: int


def packed_attention(
    query: Float[Tensor, "batch kv_head row dim"],
    key: Packed,
    value: Packed,
    *,
    begin: Int[Tensor, "batch"] | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    step: Step | None = None,
) -> Partial:
    """Attention of a few queries over one run of packed tokens; transient memory is one dense block of K and of V.

    `query` is already scaled (and rotated, where keys are), float32 or float64, with the query heads of one key head
    and their tokens together as rows: row = (head within the group) * tokens + token. Packed token t of batch row b is
    seen where t >= begin[b] (None: everywhere) and where `mask`, broadcastable to `(batch, kv_head, row, token)`, is
    True or, additive, is added. `softcap` bounds scores by softcap * tanh(score / softcap). `step` does one block.
    """
    step = step or dense_step(key)
    state = empty_partial(query, value.dim)
    for first in range(0, len(key), step.tokens):
        last = min(first + step.tokens, len(key))
        seen = None if mask is None else mask[..., first:last]
        if begin is not None:
            here = torch.arange(first, last, device=query.device) >= begin[:, None, None, None]
            seen = here if seen is None else _both(here, seen)
        state = step.attend(query, key.slice(first, last), value.slice(first, last), seen, state, softcap)
    return state


def attend(
    query: Tensor,
    key: Packed | Tensor,
    value: Packed | Tensor,
    seen: Tensor | None,
    state: Partial,
    softcap: float | None,
    *,
    unbiased: bool = False,
) -> Partial:
    """`state` with one more block of tokens, packed or dense; in the query's dtype.

    `unbiased` takes half of its variance from the score of a rounded key. A score that is off by e weighs e^e times as
    much; over errors of mean 0 and variance v that is e^(v/2) on average, which tokens in full precision lose.
    """
    variance = key.variance(query) if unbiased and isinstance(key, Packed) else None
    key = key.dense(query.dtype) if isinstance(key, Packed) else key.to(query.dtype)
    value = value.dense(query.dtype) if isinstance(value, Packed) else value.to(query.dtype)
    scores = query @ key.transpose(-1, -2)  # (batch, kv_head, row, token)
    if softcap is not None:
        bounded = torch.tanh(scores / softcap)
        scores = softcap * bounded
        if variance is not None:
            variance = variance * (1 - bounded.square()).square()  # by the bound's slope there
    if variance is not None:
        scores = scores - variance / 2
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    peak = torch.maximum(state.peak, scores.amax(-1, keepdim=True))
    weight, faded = torch.exp(scores - peak), torch.exp(state.peak - peak)
    return Partial(state.acc * faded + weight @ value, peak, state.total * faded + weight.sum(-1, keepdim=True))


def empty_partial(query: Tensor, dim: int) -> Partial:
    """The state before the first block; `dim` is the values' width."""
    rows = query.new_full((*query.shape[:3], 1), FLOOR)
    return Partial(query.new_zeros((*query.shape[:3], dim)), rows, torch.zeros_like(rows))


def merged(parts: Sequence[Partial]) -> Partial:
    """Attention over the tokens of all parts together."""
    peak = parts[0].peak
    for part in parts[1:]:
        peak = torch.maximum(peak, part.peak)
    faded = [torch.exp(part.peak - peak) for part in parts]
    acc, total = parts[0].acc * faded[0], parts[0].total * faded[0]
    for part, fade in zip(parts[1:], faded[1:], strict=True):
        acc, total = acc + part.acc * fade, total + part.total * fade
    return Partial(acc, peak, total)


def dense_step(key: Packed, *, compile: bool = False, unbiased: bool = False) -> Step:
    """Blocks are made dense, and multiplied as matrices."""
    batch, head = key.codes.shape[:2]
    return Step(
        _compiled_attend() if compile else partial(attend, unbiased=unbiased),
        whole_groups(max(64, BLOCK_NUMBERS // (batch * head * key.dim)), key),
    )


def whole_groups(tokens: int, key: Packed) -> int:
    """`tokens` or a few more, so that blocks end where groups of tokens under one scale do."""
    return -(-tokens // key.token_group) * key.token_group if key.token_group else tokens


@lru_cache(maxsize=1)
def _compiled_attend() -> Callable[..., Partial]:
    return torch.compile(attend)


def _both(here: Tensor, mask: Tensor) -> Tensor:
    return here & mask if mask.dtype == torch.bool else mask.masked_fill(~here, -torch.inf)
