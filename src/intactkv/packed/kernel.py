"""Attention over packed tokens on a GPU: one Triton kernel reads the bytes as they lie, a second merges its splits.

Each program takes one key head of one row and a share of its tokens. A block's bytes are loaded once; every plane of
codes is multiplied with the matching slice of the query, so that nothing is interleaved, and scales stay out of the
products: q·(code * scale + low) = scale * (q·code) + low * Σq for scales per token; for scales per channel they go into
q once for each group of tokens. Products are of half-precision numbers with float32 sums. Codes are counted from the
middle of their range, which is exact. Queries and weights are brought to the largest one of their program or block
first, to stay within half precision's range; `exact` gives them in two parts, number and remainder.

What this gives up: shared scales within a head's numbers (`group_size` below the head's width) and token groups that
are no multiple of 16, for which `fits` says no and PyTorch does the work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from intactkv.packed.attention import FLOOR, Partial
from intactkv.packed.store import Packed

ROWS = 16  # the least that a matrix product takes
BLOCK = 64  # tokens
WARPS, STAGES = 1, 3
WAVES = 8  # programs for each multiprocessor, so that loads of one hide behind the work of others


def fits(key: Packed, value: Packed, rows: int) -> bool:
    """Whether the kernel serves these shapes: one scale a token or groups of 16 and more, heads of a power of two."""
    widths = all(x.dim >= 64 and x.dim & (x.dim - 1) == 0 for x in (key, value))
    groups = value.scale.shape[3] == 1 and not value.token_group
    groups &= key.token_group % 16 == 0 if key.token_group else key.scale.shape[3] == 1
    return widths and groups and rows <= 64


def packed_attention_gpu(
    query: Float[Tensor, "batch kv_head row dim"],
    key: Packed,
    value: Packed,
    *,
    begin: Int[Tensor, "batch"] | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    exact: bool = True,
) -> Partial:
    """`packed_attention` in two kernels; `exact` to float32, else to the half precision of the products."""
    batch, head, rows, _ = query.shape
    shares = attend_shares(query, key, value, len(key), begin=begin, mask=mask, softcap=softcap, exact=exact)
    out = Partial(*(query.new_empty((batch, head, rows, n), dtype=torch.float32) for n in (value.dim, 1, 1)))
    splits = shares.acc.shape[2]
    _merge[(rows, batch * head)](
        *shares, *out, rows, splits, DIM=value.dim, SPLITS=triton.next_power_of_2(splits), num_warps=4
    )
    return out


def attend_shares(
    query: Float[Tensor, "batch kv_head row dim"],
    key: Packed,
    value: Packed,
    tokens: int,
    *,
    begin: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    exact: bool = True,
    scaling: float = 1.0,
    clock: Int[Tensor, "3"] | None = None,
) -> Partial:
    """Attention over the first `tokens` packed tokens in shares, `(batch, kv_head, share, row, …)`, not yet merged.

    `begin` is `(batch,)`, a row's first visible token, or `(batch, 3)`, the rows of `step.py`. With a `clock`, how many
    tokens are read is what stands in it when the kernel runs, and the shares are made for `tokens` at most.
    """
    batch, head, rows, dim = query.shape
    block = _block(key)
    splits, share = _splits(batch * head, tokens, block, query.device)
    acc = query.new_empty((batch, head, splits, rows, value.dim), dtype=torch.float32)
    peak, total = (query.new_empty((batch, head, splits, rows), dtype=torch.float32) for _ in range(2))
    seen = None if mask is None else mask.expand(batch, head, rows, tokens)
    _attend[(splits, batch * head)](
        query.contiguous(), key.codes, key.scale, key.low, value.codes, value.scale, value.low, begin, seen,
        acc, peak, total, head, rows, tokens, share, softcap or 0.0,
        *key.codes.stride()[:3], *key.scale.stride()[:3],
        *value.codes.stride()[:3], *value.scale.stride()[:3],
        *((0,) * 4 if seen is None else seen.stride()), scaling, clock,
        DIM=dim, DIM_V=value.dim, BITS=key.bits, BITS_V=value.bits, TOKEN_GROUP=key.token_group, BLOCK=block,
        ROWS=max(ROWS, triton.next_power_of_2(rows)), BEGIN=0 if begin is None else begin.ndim,
        MASK=0 if seen is None else 1 if seen.dtype == torch.bool else 2, CAP=softcap is not None,
        EXACT=exact, ASM=query.is_cuda and torch.version.cuda is not None, CLOCK=clock is not None,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return Partial(acc, peak, total)


def _block(key: Packed) -> int:
    """Tokens of a block: all of one group, where scales are per channel."""
    block = BLOCK
    while key.token_group % block:
        block //= 2
    return block


def _splits(programs: int, tokens: int, block: int, device: torch.device) -> tuple[int, int]:
    """Into how many shares the tokens go, and the tokens of one, a multiple of `block`."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    blocks = max(1, triton.cdiv(tokens, block))
    wanted = max(1, min(blocks, WAVES * processors // programs, 256))
    share = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, share), share * block


@triton.jit
def _halves(word, shift: tl.constexpr, mask: tl.constexpr, middle: tl.constexpr, ASM: tl.constexpr):
    """`((byte >> shift) & mask) - middle` of every byte, in half precision."""
    if ASM:
        # four bytes at a time: 0x6400 | code is the half-precision number 1024 + code
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t;\n"
            f"shr.u32 t, $2, {shift};\n"
            f"and.b32 t, t, {mask};\n"
            "prmt.b32 $0, t, 0x64646464, 0x4140;\n"
            "prmt.b32 $1, t, 0x64646464, 0x4342;\n"
            f"mov.b32 t, {0x64006400 + middle * 0x10001};\n"
            "sub.rn.f16x2 $0, $0, t;\n"
            "sub.rn.f16x2 $1, $1, t; }",
            "=r,=r,r",
            args=[word],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    return ((word >> shift) & (mask & 0xFF)).to(tl.float16) - middle


@triton.jit
def _plane(low, high, PLANE: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr):
    """Codes `PLANE * WIDE` and following of every token less 2^(bits - 1), `(token, WIDE)`; see `bits.py`."""
    if BITS == 8:
        return _halves(low, 0, 0xFFFFFFFF, 128, ASM)
    if BITS == 4:
        return _halves(low, PLANE * 4, 0x0F0F0F0F, 8, ASM)
    if BITS == 2:
        return _halves(low, PLANE * 2, 0x03030303, 2, ASM)
    at = PLANE * 2 + tl.arange(0, WIDE) // (WIDE // 2)
    return _halves(low, PLANE * 2, 0x03030303, 4, ASM) + 4 * ((high >> at[None, :].to(tl.uint8)) & 1).to(tl.float16)


@triton.jit
def _query(at, live, scaling):
    return tl.load(at, live[:, None], 0.0).to(tl.float32) * scaling


@triton.jit
def visible_from(rows, b, packed):
    """The first of row b's `packed` columns that is read packed: behind padding and behind what is kept."""
    start, count = tl.load(rows + b * 3 + 1), tl.load(rows + b * 3 + 2)
    kept = tl.minimum(tl.maximum(packed - start, 0), count)
    return tl.maximum(tl.load(rows + b * 3), tl.where(kept > 0, start + kept, 0))


@triton.jit
def _turned(x, scale, low, MIDDLE: tl.constexpr):
    """`x` with a group's channel scales in it, and x * (low + scale * MIDDLE), to be summed over channels."""
    s = tl.load(scale).to(tl.float32)
    return x * s[None, :], x * (tl.load(low).to(tl.float32) + s * MIDDLE)[None, :]


@triton.jit
def _product_t(codes, x, sum_, EXACT: tl.constexpr):
    """`sum_` + codes @ x for x in float32 and within half precision's range."""
    number = x.to(tl.float16)
    sum_ = tl.dot(codes, number, sum_)
    if EXACT:
        rest = ((x - number.to(tl.float32)) * 2048).to(tl.float16)
        sum_ += tl.dot(codes, rest) * (1 / 2048)
    return sum_


@triton.jit
def _product(x, codes, sum_, EXACT: tl.constexpr):
    """`sum_` + x @ codes for x in float32 and within half precision's range."""
    number = x.to(tl.float16)
    sum_ = tl.dot(number, codes, sum_)
    if EXACT:  # the remainder in units of 2^-11, so that it is no subnormal number
        rest = ((x - number.to(tl.float32)) * 2048).to(tl.float16)
        sum_ += tl.dot(rest, codes) * (1 / 2048)
    return sum_


@triton.jit(do_not_specialize=["tokens"])
def _attend(
    query, k_codes, k_scale, k_low, v_codes, v_scale, v_low, begin, mask, acc, peak, total,
    heads, rows, tokens, share, cap,
    kb, kh, kt, ksb, ksh, kst, vb, vh, vt, vsb, vsh, vst, mb, mh, mr, mt, scaling, clock,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BITS: tl.constexpr, BITS_V: tl.constexpr, TOKEN_GROUP: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BEGIN: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
    EXACT: tl.constexpr, ASM: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """One head's attention over one share of its packed tokens."""
    if CLOCK:
        tokens = tl.load(clock + 2).to(tl.int32)
        share = tl.cdiv(tl.cdiv(tokens, BLOCK), tl.num_programs(0)) * BLOCK
    split, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    K: tl.constexpr = 1 if BITS == 8 else 2 if BITS == 4 else 4  # planes
    V: tl.constexpr = 1 if BITS_V == 8 else 2 if BITS_V == 4 else 4
    WK: tl.constexpr = DIM // K
    WV: tl.constexpr = DIM_V // V
    r, n, jk, jv = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, WK), tl.arange(0, WV)
    live = r < rows
    q_at = query + (bh * rows + r[:, None]) * DIM + jk[None, :]
    q0 = _query(q_at, live, scaling)
    q1, q2, q3 = q0, q0, q0
    size, sum_q = tl.max(tl.abs(q0), 1), tl.sum(q0, 1)
    if K >= 2:
        q1 = _query(q_at + WK, live, scaling)
        size, sum_q = tl.maximum(size, tl.max(tl.abs(q1), 1)), sum_q + tl.sum(q1, 1)
    if K == 4:
        q2 = _query(q_at + 2 * WK, live, scaling)
        q3 = _query(q_at + 3 * WK, live, scaling)
        size = tl.maximum(size, tl.maximum(tl.max(tl.abs(q2), 1), tl.max(tl.abs(q3), 1)))
        sum_q += tl.sum(q2, 1) + tl.sum(q3, 1)
    size = tl.maximum(tl.max(size, 0), 1e-30)  # one for all rows: it goes into the tokens' scales
    h0, h1, h2, h3 = q0 / size, q1 / size, q2 / size, q3 / size
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    MIDDLE_V: tl.constexpr = 2 ** (BITS_V - 1)

    first = 0
    if BEGIN == 1:
        first = tl.load(begin + b)
    if BEGIN == 2:
        first = visible_from(begin, b, tokens)
    m = tl.full((ROWS,), FLOOR_, tl.float32)
    total_ = tl.zeros((ROWS,), tl.float32)
    a0 = tl.zeros((ROWS, WV), tl.float32)
    a1, a2, a3 = a0, a0, a0
    low_sum = tl.zeros((ROWS,), tl.float32)
    unit = 1e-30
    k_codes += b * kb + h * kh
    v_codes += b * vb + h * vh
    k_scale += b * ksb + h * ksh
    k_low += b * ksb + h * ksh
    v_scale += b * vsb + h * vsh
    v_low += b * vsb + h * vsh
    end = tl.minimum(split * share + share, tokens)
    for start in range(split * share, end, BLOCK):
        t = start + n
        there = t < end
        v_s = tl.load(v_scale + t.to(tl.int64) * vst, there, 0.0).to(tl.float32)
        v_l = tl.load(v_low + t.to(tl.int64) * vst, there, 0.0).to(tl.float32)
        if TOKEN_GROUP == 0:
            scale = tl.load(k_scale + t.to(tl.int64) * kst, there, 0.0).to(tl.float32)
            low = tl.load(k_low + t.to(tl.int64) * kst, there, 0.0).to(tl.float32)
        k_at = k_codes + t[:, None].to(tl.int64) * kt + jk[None, :]
        k_bytes = tl.load(k_at, there[:, None], 0)
        k_high = k_bytes
        if BITS == 3:
            k_high = tl.load(k_codes + t[:, None].to(tl.int64) * kt + WK + (jk % (WK // 2))[None, :], there[:, None], 0)
        v_at = v_codes + t[:, None].to(tl.int64) * vt + jv[None, :]
        v_bytes = tl.load(v_at, there[:, None], 0)
        v_high = v_bytes
        if BITS_V == 3:
            v_high = tl.load(v_codes + t[:, None].to(tl.int64) * vt + WV + (jv % (WV // 2))[None, :], there[:, None], 0)
        x0, x1, x2, x3 = h0, h1, h2, h3
        if TOKEN_GROUP > 0:
            # scales per channel: into the query, once for this block, which lies within one group
            g = (start // TOKEN_GROUP) * kst
            x0, shifts = _turned(h0, k_scale + g + jk, k_low + g + jk, MIDDLE)
            if K >= 2:
                x1, more = _turned(h1, k_scale + g + WK + jk, k_low + g + WK + jk, MIDDLE)
                shifts += more
            if K == 4:
                x2, more2 = _turned(h2, k_scale + g + 2 * WK + jk, k_low + g + 2 * WK + jk, MIDDLE)
                x3, more3 = _turned(h3, k_scale + g + 3 * WK + jk, k_low + g + 3 * WK + jk, MIDDLE)
                shifts += more2 + more3
            shift = tl.sum(shifts, 1) * size
        st = tl.zeros((BLOCK, ROWS), tl.float32)
        st = _product_t(_plane(k_bytes, k_high, 0, BITS, WK, ASM), tl.trans(x0), st, EXACT)
        if K >= 2:
            st = _product_t(_plane(k_bytes, k_high, 1, BITS, WK, ASM), tl.trans(x1), st, EXACT)
        if K == 4:
            st = _product_t(_plane(k_bytes, k_high, 2, BITS, WK, ASM), tl.trans(x2), st, EXACT)
            st = _product_t(_plane(k_bytes, k_high, 3, BITS, WK, ASM), tl.trans(x3), st, EXACT)
        s = tl.trans(st)
        if TOKEN_GROUP > 0:
            s = s * size + shift[:, None]
        else:
            s = s * (size * scale)[None, :] + sum_q[:, None] * (low + scale * MIDDLE)[None, :]
        if CAP:
            s = cap * (2 / (1 + tl.exp(-2 * s / cap)) - 1)
        visible = there & (t >= first)
        s += tl.where(visible, 0.0, float("-inf"))[None, :]
        if MASK > 0:
            m_at = mask + b * mb + h * mh + r[:, None].to(tl.int64) * mr + t[None, :].to(tl.int64) * mt
            inside = live[:, None] & visible[None, :]
            if MASK == 1:
                s = tl.where(inside & (tl.load(m_at, inside, 0) != 0), s, float("-inf"))
            else:
                s = tl.where(inside, s + tl.load(m_at, inside, 0.0).to(tl.float32), float("-inf"))
        m_ = tl.maximum(m, tl.max(s, 1))
        p, faded = tl.exp2((s - m_[:, None]) * LOG2E), tl.exp2((m - m_) * LOG2E)
        m = m_
        total_ = total_ * faded + tl.sum(p, 1)
        low_sum = low_sum * faded + tl.sum(p * (v_l + v_s * MIDDLE_V)[None, :], 1)
        # `unit` is the scale that the sums so far are in; weights stay within half precision's range
        unit_ = tl.maximum(unit, tl.max(v_s, 0))
        w = p * (v_s / unit_)[None, :]
        f = (faded * (unit / unit_))[:, None]
        unit = unit_
        a0 = _product(w, _plane(v_bytes, v_high, 0, BITS_V, WV, ASM), a0 * f, EXACT)
        if V >= 2:
            a1 = _product(w, _plane(v_bytes, v_high, 1, BITS_V, WV, ASM), a1 * f, EXACT)
        if V == 4:
            a2 = _product(w, _plane(v_bytes, v_high, 2, BITS_V, WV, ASM), a2 * f, EXACT)
            a3 = _product(w, _plane(v_bytes, v_high, 3, BITS_V, WV, ASM), a3 * f, EXACT)
    row = (bh * tl.num_programs(0) + split) * rows + r
    at = acc + row[:, None] * DIM_V + jv[None, :]
    tl.store(at, a0 * unit + low_sum[:, None], live[:, None])
    if V >= 2:
        tl.store(at + WV, a1 * unit + low_sum[:, None], live[:, None])
    if V == 4:
        tl.store(at + 2 * WV, a2 * unit + low_sum[:, None], live[:, None])
        tl.store(at + 3 * WV, a3 * unit + low_sum[:, None], live[:, None])
    tl.store(peak + row, m, live)
    tl.store(total + row, total_, live)


@triton.jit
def _merge(
    acc, peak, total, acc_out, peak_out, total_out, rows, splits, DIM: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The splits of one row together."""
    r, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, DIM)
    row = (bh * splits + s) * rows + r
    there = s < splits
    m = tl.load(peak + row, there, FLOOR_)
    top = tl.max(m, 0)
    faded = tl.exp(m - top)
    whole = tl.sum(faded * tl.load(total + row, there, 0.0), 0)
    a = tl.load(acc + row[:, None] * DIM + d[None, :], there[:, None], 0.0)
    out = bh * rows + r
    tl.store(acc_out + out * DIM + d, tl.sum(a * faded[:, None], 0))
    tl.store(peak_out + out, top)
    tl.store(total_out + out, whole)


FLOOR_ = tl.constexpr(FLOOR)
LOG2E = tl.constexpr(1.4426950408889634)
