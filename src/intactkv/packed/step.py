"""A decoding step of a packed layer on a GPU in three Triton kernels: store a token, attend to packed ones, finish.

`store` puts a token's key and value into the ring of newest tokens, where column c stands at c % ring, and, when the
ring is full, rounds and packs its oldest ones, bit for bit as `bits.py` does. `kernel.Sharing` is the second.
`finish` merges its shares with attention over the kept and the newest tokens and writes the answer.

Where a layer stands is three numbers: columns stored before this step, columns packed before it, columns read packed.
The kernels take them as numbers, or from a tensor on the device, the clock, which `tick` moves on by a token: so a CUDA
graph can replay the step. `rows` is `(batch, 3)`: each row's first real column, its start and its count (`rows.py`).

What this gives up: rotations, several scales within a head, token groups that are no power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from intactkv.packed import bits, kernel
from intactkv.packed.attention import FLOOR

SLACK, WIDER, SMALLEST = tl.constexpr(bits.SLACK), tl.constexpr(bits.WIDER), tl.constexpr(bits.SMALLEST)
FLOOR_ = tl.constexpr(FLOOR)
LOG2E = tl.constexpr(1.4426950408889634)
ROUNDER = tl.constexpr(1.5 * 2**23)  # adding and subtracting it rounds half to even
merged = kernel.merged


@triton.jit(do_not_specialize=["stored", "packed"])
def store(
    key, value, stored, packed, ring_k, ring_v, k_codes, k_scale, k_low, v_codes, v_scale, v_low, rows, clock,
    heads, kb, kh, vb, vh, room_k, room_v,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, RING: tl.constexpr,
    TOGETHER: tl.constexpr, CLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store one token's key (second axis of the grid 0) or value (1) of one head, and pack what is due."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    if CLOCK:
        stored, packed = tl.load(clock), tl.load(clock + 1)
    hidden = 0  # columns before it enter no shared scale
    if ROWS and GROUP > 0:
        start, count = tl.load(rows + b * 3 + 1), tl.load(rows + b * 3 + 2)
        kept = tl.minimum(tl.maximum(packed + GROUP - start, 0), count)
        hidden = tl.where(kept > 0, start + kept, 0)
    if tl.program_id(1) == 0:
        wide: tl.constexpr = DIM * BITS // 8
        scales = bh * (room_k // GROUP) * DIM if GROUP > 0 else bh * room_k
        _put(key + b * kb + h * kh, ring_k + bh * RING * DIM, k_codes + bh * room_k * wide, k_scale + scales,
             k_low + scales, stored, packed, hidden, DIM, BITS, GROUP, RING, TOGETHER)  # fmt: skip
    else:
        wide_v: tl.constexpr = DIM_V * BITS // 8
        _put(value + b * vb + h * vh, ring_v + bh * RING * DIM_V, v_codes + bh * room_v * wide_v,
             v_scale + bh * room_v, v_low + bh * room_v, stored, packed, 0, DIM_V, BITS, 0, RING,
             TOGETHER)  # fmt: skip


@triton.jit
def _put(
    x, ring, codes, scale, low, stored, packed, hidden,
    DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, RING: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    WIDE: tl.constexpr = DIM // PLANES
    at = tl.arange(0, PLANES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    new = tl.load(x + at)
    tl.store(ring + (stored % RING) * DIM + at, new)
    if stored + 1 - packed == RING:
        if GROUP == 0:
            for column in range(packed, packed + TOGETHER):
                token = tl.load(ring + (column % RING) * DIM + at)
                token = tl.where(column == stored, new, token).to(tl.float32)  # others may not see the ring's yet
                bad = tl.sum(tl.sum(token * 0.0, 1), 0)  # NaN for a token with a NaN or an infinity
                lowest = tl.min(tl.min(token, 1), 0) + bad
                low_, scale_ = _scale(lowest, tl.max(tl.max(token, 1), 0) + bad, BITS)
                steps = _steps(token, low_.to(tl.float32), scale_.to(tl.float32), BITS)
                _bytes(codes + column * (DIM * BITS // 8), steps, BITS, PLANES, WIDE)
                tl.store(low + column, low_)
                tl.store(scale + column, scale_)
        else:
            columns = packed + tl.arange(0, GROUP)
            place = (columns % RING)[:, None, None] * DIM + at[None, :, :]
            tokens = tl.where((columns == stored)[:, None, None], new[None, :, :], tl.load(ring + place))
            tokens = tokens.to(tl.float32)
            out = (columns < hidden)[:, None, None]
            whole = hidden >= packed + GROUP  # nothing but hidden tokens: any finite scale will do
            bad = tl.sum(tl.where(out, 0.0, tokens * 0.0), 0)
            lowest = tl.min(tl.where(out, tl.where(whole, 0.0, float("inf")), tokens), 0) + bad
            highest = tl.max(tl.where(out, tl.where(whole, 0.0, float("-inf")), tokens), 0) + bad
            low_, scale_ = _scale(lowest, highest, BITS)
            steps = _steps(tokens, low_.to(tl.float32)[None, :, :], scale_.to(tl.float32)[None, :, :], BITS)
            _group_bytes(codes + columns * (DIM * BITS // 8), steps, BITS, PLANES, WIDE)
            tl.store(low + (packed // GROUP) * DIM + at, low_)
            tl.store(scale + (packed // GROUP) * DIM + at, scale_)


@triton.jit
def _scale(lowest, highest, BITS: tl.constexpr):
    """`low` and `scale` in half precision; the launch forbids fused products, for the same bits as PyTorch's."""
    LEVELS: tl.constexpr = 2**BITS - 1
    low = (lowest - tl.abs(lowest) * SLACK - SMALLEST).to(tl.float16)
    return low, ((highest - low.to(tl.float32)) * (WIDER / LEVELS) + SMALLEST).to(tl.float16)


@triton.jit
def _steps(x, low, scale, BITS: tl.constexpr):
    """The codes of numbers, as integers."""
    steps = tl.minimum(tl.maximum(tl.div_rn(x - low, scale), 0.0), 2.0**BITS - 1)
    return ((steps + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def _bytes(at, steps, BITS: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr):
    """Store one token's codes `(plane, WIDE)` as `bits.py` lays them out."""
    plane, j = tl.arange(0, PLANES)[:, None], tl.arange(0, WIDE)
    if BITS == 3:
        low, odd = (steps & 3) << (plane // 2 * 2), plane % 2
        tl.store(at + j, tl.sum(tl.where(odd == 0, low, 0), 0).to(tl.uint8))
        tl.store(at + WIDE + j, tl.sum(tl.where(odd == 1, low, 0), 0).to(tl.uint8))
        tl.store(at + 2 * WIDE + j, tl.sum((steps >> 2) << plane, 0).to(tl.uint8))
    else:
        tl.store(at + j, tl.sum(steps << (plane * BITS), 0).to(tl.uint8))


@triton.jit
def _group_bytes(at, steps, BITS: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr):
    """Store the codes `(token, plane, WIDE)` of tokens at `at`."""
    plane, place = tl.arange(0, PLANES)[None, :, None], at[:, None] + tl.arange(0, WIDE)[None, :]
    if BITS == 3:
        low, odd = (steps & 3) << (plane // 2 * 2), plane % 2
        tl.store(place, tl.sum(tl.where(odd == 0, low, 0), 1).to(tl.uint8))
        tl.store(place + WIDE, tl.sum(tl.where(odd == 1, low, 0), 1).to(tl.uint8))
        tl.store(place + 2 * WIDE, tl.sum((steps >> 2) << plane, 1).to(tl.uint8))
    else:
        tl.store(place, tl.sum(steps << (plane * BITS), 1).to(tl.uint8))


@triton.jit(do_not_specialize=["stored", "read", "splits"])
def finish(
    query, shares, out, stored, read, kept_k, kept_v, ring_k, ring_v, rows, sinks, clock,
    heads, live, splits, kept, scaling, cap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, SPLITS: tl.constexpr, RING: tl.constexpr, ROWS: tl.constexpr,
    SINKS: tl.constexpr, CAP: tl.constexpr, CLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query head's answer: the shares, its row's kept tokens and the ring, merged; `live` rows to a key head."""
    r, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    if CLOCK:
        stored, read = tl.load(clock), tl.load(clock + 2)
    d, d_v = tl.arange(0, DIM), tl.arange(0, DIM_V)
    q = tl.load(query + (bh * live + r) * DIM + d).to(tl.float32) * scaling
    count = tl.num_programs(1).to(tl.int64) * splits * live
    sum_, m, weight = merged(shares, count, bh * splits * live + r, live, splits, DIM_V, SPLITS)
    first, kept_here, start = 0, 0, 0
    if ROWS:
        first, start = tl.load(rows + b * 3), tl.load(rows + b * 3 + 1)
        kept_here = tl.minimum(tl.maximum(read - start, 0), tl.load(rows + b * 3 + 2)).to(tl.int32)
        for begin in range(0, kept_here, BLOCK):
            t = begin + tl.arange(0, BLOCK)
            place = bh * kept + t
            m, weight, sum_ = _more(
                q, kept_k + place[:, None] * DIM + d[None, :], kept_v + place[:, None] * DIM_V + d_v[None, :],
                t < kept_here, m, weight, sum_, cap, CAP,
            )  # fmt: skip
    for begin in range(tl.maximum(read, first), stored + 1, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        place = bh * RING + column % RING
        m, weight, sum_ = _more(
            q, ring_k + place[:, None] * DIM + d[None, :], ring_v + place[:, None] * DIM_V + d_v[None, :],
            column <= stored, m, weight, sum_, cap, CAP,
        )  # fmt: skip
    if SINKS:  # a learned score that draws attention and gives nothing
        sink = tl.load(sinks + h * live + r).to(tl.float32)
        m_ = tl.maximum(m, sink)
        f = tl.exp2((m - m_) * LOG2E)
        weight, sum_ = weight * f + tl.exp2((sink - m_) * LOG2E), sum_ * f
    answer = sum_ / tl.maximum(weight, 1.2e-38)  # a row of padding sees nothing: zeros
    tl.store(out + (bh * live + r) * DIM_V + d_v, answer.to(out.dtype.element_ty))


@triton.jit
def _more(q, key, value, there, m, weight, sum_, cap, CAP: tl.constexpr):
    """The state of a softmax with a block of dense tokens more."""
    k = tl.load(key, there[:, None], 0.0).to(tl.float32)
    s = tl.sum(k * q[None, :], 1)
    if CAP:
        s = cap * (2 / (1 + tl.exp(-2 * s / cap)) - 1)
    s = tl.where(there, s, float("-inf"))
    m_ = tl.maximum(m, tl.max(s, 0))
    p, f = tl.exp2((s - m_) * LOG2E), tl.exp2((m - m_) * LOG2E)
    v = tl.load(value, there[:, None], 0.0).to(tl.float32)
    return m_, weight * f + tl.sum(p, 0), sum_ * f + tl.sum(p[:, None] * v, 0)


@triton.jit
def tick(clock, RING: tl.constexpr, TOGETHER: tl.constexpr, ROUNDED: tl.constexpr):
    """A token more is stored: move the clock on; `ROUNDED` calls read their own token as it will be stored."""
    stored, packed = tl.load(clock) + 1, tl.load(clock + 1)
    packed = tl.where(stored - packed == RING, packed + TOGETHER, packed)
    read = packed
    if ROUNDED:
        read = tl.where(stored + 1 - packed == RING, packed + TOGETHER, packed)
    tl.store(clock, stored)
    tl.store(clock + 1, packed)
    tl.store(clock + 2, read)
