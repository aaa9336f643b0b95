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

ROWS = 8  # the least that a matrix product takes
BLOCK = 64  # tokens
WARPS, STAGES = 1, 3
WAVES = 8  # programs for each multiprocessor, so that loads of one hide behind the work of others


def fits(query: Tensor, key: Packed, value: Packed) -> bool:
    """Whether the kernel serves these shapes: one scale a token or groups of 16 and more, heads of a power of two."""
    widths = all(x.dim >= 64 and x.dim & (x.dim - 1) == 0 for x in (key, value))
    groups = value.scale.shape[3] == 1 and not value.token_group
    groups &= key.token_group % 16 == 0 if key.token_group else key.scale.shape[3] == 1
    return widths and groups and query.shape[2] <= 64


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
    batch, head, rows, dim = query.shape
    tokens, block = len(key), _block(key)
    splits, share = _splits(batch * head, tokens, block, query.device)
    acc = query.new_empty((batch, head, splits, rows, value.dim), dtype=torch.float32)
    peak, total = (query.new_empty((batch, head, splits, rows), dtype=torch.float32) for _ in range(2))
    seen = None if mask is None else mask.expand(batch, head, rows, tokens)
    query = query.to(torch.float32).contiguous()
    _attend[(splits, batch * head)](
        query, key.codes, key.scale, key.low, value.codes, value.scale, value.low, begin, seen, acc, peak, total,
        head, rows, tokens, share, softcap or 0.0,
        *key.codes.stride()[:3], *key.scale.stride()[:3],
        *value.codes.stride()[:3], *value.scale.stride()[:3],
        *((0,) * 4 if seen is None else seen.stride()),
        DIM=dim, DIM_V=value.dim, BITS=key.bits, BITS_V=value.bits, TOKEN_GROUP=key.token_group, BLOCK=block,
        ROWS=max(ROWS, triton.next_power_of_2(rows)), BEGIN=begin is not None,
        MASK=0 if seen is None else 1 if seen.dtype == torch.bool else 2, CAP=softcap is not None,
        EXACT=exact, ASM=query.is_cuda and torch.version.cuda is not None,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    out = Partial(*(query.new_empty((batch, head, rows, n), dtype=torch.float32) for n in (value.dim, 1, 1)))
    _merge[(rows, batch * head)](
        acc, peak, total, *out, rows, splits, DIM=value.dim, SPLITS=triton.next_power_of_2(splits), num_warps=4
    )
    return out


def _block(key: Packed) -> int:
    """Tokens of a block: all of one group, where scales are per channel."""
    block = BLOCK
    while key.token_group % block:
        block //= 2
    return block


def _splits(programs: int, tokens: int, block: int, device: torch.device) -> tuple[int, int]:
    """Into how many shares the tokens go, and the tokens of one, a multiple of `block`."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    blocks = triton.cdiv(tokens, block)
    wanted = max(1, min(blocks, WAVES * processors // programs, 256))
    share = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, share), share * block


@triton.jit
def _words(codes, at, there, WORDS: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr):
    """Two bytes of codes at a time, `(token, WIDE)`, of which WORDS are there; at 3 bits those with the high bits too."""
    u = tl.arange(0, WIDE)
    at = codes.to(tl.pointer_type(tl.uint16)) + at[:, None]
    seen = there[:, None] if WIDE == WORDS else there[:, None] & (u < WORDS)[None, :]
    words = tl.load(at + u[None, :], seen, 0)
    high = words
    if BITS == 3:
        high = tl.load(at + WORDS + (u % (WORDS // 2))[None, :], seen, 0)
        high = high.to(tl.uint32) << (2 - u // (WORDS // 2))[None, :].to(tl.uint32)
    return words, high


@triton.jit
def _codes(words, high, I: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Plane I's codes times 2^(BITS * (I // 2) - 24): bits masked where they lie are subnormal numbers.

    Plane I has the codes of bytes of I's parity, see `bits.py`.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    SHIFT: tl.constexpr = I % 2 * 8
    MASK: tl.constexpr = (2**WIDTH - 1) << (I // 2 * WIDTH)
    if BITS == 3:
        bit = (high >> SHIFT) & (1 << (I // 2 * 2 + 2))
        return (((words >> SHIFT) & MASK) | bit.to(tl.uint16)).to(tl.float16, bitcast=True)
    if ASM:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; and.b32 $0, t, {MASK * 0x10001}; }}",
            "=r,r",
            args=[words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return ((words >> SHIFT) & MASK).to(tl.float16, bitcast=True)


@triton.jit
def _product(codes, x, sum_, EXACT: tl.constexpr):
    """`sum_` + codes @ x for x in float32 and within half precision's range."""
    number = x.to(tl.float16)
    sum_ = tl.dot(codes, number, sum_)
    if EXACT:  # the remainder in units of 2^-11, so that it is no subnormal number
        rest = ((x - number.to(tl.float32)) * 2048).to(tl.float16)
        sum_ += tl.dot(codes, rest) * (1 / 2048)
    return sum_


@triton.jit
def _attend(
    query, k_codes, k_scale, k_low, v_codes, v_scale, v_low, begin, mask, acc, peak, total,
    heads, rows, tokens, share, cap,
    kb, kh, kt, ksb, ksh, kst, vb, vh, vt, vsb, vsh, vst, mb, mh, mr, mt,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BITS: tl.constexpr, BITS_V: tl.constexpr, TOKEN_GROUP: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BEGIN: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
    EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One head's attention over one share of its packed tokens."""
    split, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    KEY_BITS: tl.constexpr = 2 if BITS == 3 else BITS
    VALUE_BITS: tl.constexpr = 2 if BITS_V == 3 else BITS_V
    K: tl.constexpr = 16 // KEY_BITS  # planes
    V: tl.constexpr = 16 // VALUE_BITS
    WORDS: tl.constexpr = DIM // K
    WORDS_V: tl.constexpr = DIM_V // V
    WIDE: tl.constexpr = max(WORDS, 16)
    WIDE_V: tl.constexpr = max(WORDS_V, 16)
    BYTES: tl.constexpr = DIM * BITS // 8
    BYTES_V: tl.constexpr = DIM_V * BITS_V // 8
    r, n, uk, uv = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    live = r < rows
    q_at = query + (bh * rows + r[None, :]) * DIM + 2 * uk[:, None]
    q_there = live[None, :] & (uk < WORDS)[:, None]
    size = tl.full((ROWS,), 1e-30, tl.float32)
    sum_q = tl.zeros((ROWS,), tl.float32)
    qs = ()
    for i in tl.static_range(K):
        q = tl.load(q_at + (i // 2 * 2 * WORDS + i % 2), q_there, 0.0)
        size = tl.maximum(size, tl.max(tl.abs(q), 0))
        sum_q += tl.sum(q, 0)
        qs = qs + (q,)
    size = tl.max(size, 0)  # one for all rows: it goes into the tokens' scales
    hs = ()
    xs = ()
    for i in tl.static_range(K):
        x = qs[i] / size
        hs = hs + (x,)
        xs = xs + (x * (1.0 / 2 ** (i // 2 * KEY_BITS)),)

    first = 0
    if BEGIN:
        first = tl.load(begin + b)
    m = tl.full((ROWS,), FLOOR_, tl.float32)
    totals = tl.zeros((8, ROWS), tl.float32)
    lows = tl.zeros((8, ROWS), tl.float32)
    accs = ()
    for i in tl.static_range(V):
        accs = accs + (tl.zeros((WIDE_V, ROWS), tl.float32),)
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
        v_s = tl.load(v_scale + t, there, 0.0).to(tl.float32)
        v_l = tl.load(v_low + t, there, 0.0).to(tl.float32)
        k_words, k_high = _words(k_codes + start.to(tl.int64) * BYTES, n * (BYTES // 2), there, WORDS, WIDE, BITS)
        v_words, v_high = _words(v_codes + start.to(tl.int64) * BYTES_V, n * (BYTES_V // 2), there, WORDS_V, WIDE_V, BITS_V)
        st = tl.zeros((BLOCK, ROWS), tl.float32)
        if TOKEN_GROUP > 0:
            # scales per channel: into the query, once for this block, which lies within one group
            g = (start // TOKEN_GROUP) * kst
            shift = tl.zeros((BLOCK, ROWS), tl.float32)
            for i in tl.static_range(K):
                at = g + (i // 2 * 2 * WORDS + i % 2) + 2 * uk
                scale = tl.load(k_scale + at, uk < WORDS, 0.0)
                low = tl.load(k_low + at, uk < WORDS, 0.0)
                st = _product(_codes(k_words, k_high, i, BITS, ASM), xs[i] * scale.to(tl.float32)[:, None], st, EXACT)
                shift = _product(tl.broadcast_to(low[None, :], (BLOCK, WIDE)), hs[i], shift, EXACT)
            s = st * (size * 16777216) + shift * size
        else:
            scale = tl.load(k_scale + t, there, 0.0).to(tl.float32)
            low = tl.load(k_low + t, there, 0.0).to(tl.float32)
            for i in tl.static_range(K):
                st = _product(_codes(k_words, k_high, i, BITS, ASM), xs[i], st, EXACT)
            s = st * (size * 16777216 * scale)[:, None] + sum_q[None, :] * low[:, None]
        if CAP:
            s = cap * (2 / (1 + tl.exp(-2 * s / cap)) - 1)
        visible = there & (t >= first)
        s = s * LOG2E + tl.where(visible, 0.0, float("-inf"))[:, None]
        if MASK > 0:
            m_at = mask + b * mb + h * mh + r[None, :].to(tl.int64) * mr + t[:, None].to(tl.int64) * mt
            inside = live[None, :] & visible[:, None]
            if MASK == 1:
                s = tl.where(inside & (tl.load(m_at, inside, 0) != 0), s, float("-inf"))
            else:
                s = tl.where(inside, s + tl.load(m_at, inside, 0.0).to(tl.float32) * LOG2E, float("-inf"))
        m_ = tl.maximum(m, tl.max(s, 0))
        p, faded = tl.exp2(s - m_[None, :]), tl.exp2(m - m_)
        m = m_
        totals = totals * faded[None, :] + tl.sum(tl.reshape(p, (BLOCK // 8, 8, ROWS)), 0)
        lows = lows * faded[None, :] + tl.sum(tl.reshape(p * v_l[:, None], (BLOCK // 8, 8, ROWS)), 0)
        # `unit` is the scale that the sums so far are in; weights stay within half precision's range
        unit_ = tl.maximum(unit, tl.max(v_s, 0))
        w = p * (v_s / unit_)[:, None]
        f = (faded * (unit / unit_))[None, :]
        unit = unit_
        new = ()
        for i in tl.static_range(V):
            new = new + (_product(tl.trans(_codes(v_words, v_high, i, BITS_V, ASM)), w, accs[i] * f, EXACT),)
        accs = new
    row = (bh * tl.num_programs(0) + split) * rows + r
    at = acc + row[None, :] * DIM_V + 2 * uv[:, None]
    low_sum = tl.sum(lows, 0)[None, :]
    for i in tl.static_range(V):
        out = accs[i] * (unit * (16777216 / 2 ** (i // 2 * VALUE_BITS))) + low_sum
        tl.store(at + (i // 2 * 2 * WORDS_V + i % 2), out, live[None, :] & (uv < WORDS_V)[:, None])
    tl.store(peak + row, m * (1 / LOG2E), live)
    tl.store(total + row, tl.sum(totals, 0), live)


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
