"""Attention over packed tokens on a GPU: one Triton kernel reads the bytes as they lie, a second merges its splits.

Each program takes one key head of one row and a share of its tokens. A block's bytes are loaded once, as words of two
bytes; each plane of codes is multiplied with the query's numbers of the same places, so that nothing is interleaved.
Codes are not made into numbers at all: masked where they lie, their bits are subnormal half-precision numbers, code *
2^(place - 24), and the powers of two go into the query and the answer. Scales stay out of the products as well:
q·(code * scale + low) = scale * (q·code) + low * Σq for scales per token; scales per channel go into q once for each
group of tokens. Products are of half-precision numbers with float32 sums, transposed, so that a key head's few queries
are the short side of the product, which may be 8, and not the long one, which is 16 at least. Queries and weights are
brought to the largest one of their program or block first, to stay within half precision's range.

NVIDIA's matrix products take subnormal numbers but line their products up as if they were normal ones, so that of a
code of 2 bits about 14 bits of a product are left: enough for queries in half precision. `exact` gives queries and
weights in two parts, number and remainder, and makes codes normal numbers first (`UNIT`), for one conversion each. So
does ROCm, since some of AMD's products (MI200) take subnormal numbers for zero.

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
from intactkv.packed.launch import FUSED, Kept, on_device, programs_at_once
from intactkv.packed.store import Packed

ROWS = 8  # the least that a matrix product takes
UNIT = 2**24 if torch.version.hip is None else 1  # what codes are short of as numbers: as subnormal bits, or nothing
BLOCK = 64  # tokens
WARPS, STAGES = 1, 3
AT_ONCE = 64  # shares that are merged at once
LEAST = 8  # blocks of a share where there are more than that


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
    sharing = Sharing(query, key, value, len(key), begin=begin, mask=mask, softcap=softcap, exact=exact)
    with on_device(query):
        shares = sharing(query.contiguous(), len(key))
        out = Partial(*(query.new_empty((batch, head, rows, n), dtype=torch.float32) for n in (value.dim, 1, 1)))
        _merge[(rows, batch * head)](
            shares, *out, rows, sharing.splits, DIM=value.dim, SPLITS=triton.next_power_of_2(sharing.splits),
            **FUSED,
        )  # fmt: skip
    return out


class Sharing:
    """Attention over packed tokens in shares that are not yet merged, for queries like `query`, again and again.

    `begin` is `(batch,)`, a row's first visible token, or `(batch, 3)`, the rows of `step.py`. How many tokens are read
    is said in each call, or stands in `clock` when the kernel runs; the shares are made for `most` of them.
    """

    def __init__(
        self,
        query: Float[Tensor, "batch kv_head row dim"],
        key: Packed,
        value: Packed,
        most: int,
        *,
        begin: Tensor | None = None,
        mask: Tensor | None = None,
        softcap: float | None = None,
        exact: bool = True,
        scaling: float = 1.0,
        clock: Int[Tensor, "3"] | None = None,
    ) -> None:
        batch, head, rows, dim = query.shape
        block = _block(key)
        seen = None if mask is None else mask.expand(batch, head, rows, most)
        unit = 1 if exact else UNIT
        rest = (
            key.codes, key.scale, key.low, value.codes, value.scale, value.low, begin, seen,
            head, rows, softcap or 0.0,
            *key.codes.stride()[:2], *key.scale.stride()[:2], *value.codes.stride()[:2], *value.scale.stride()[:2],
            *((0,) * 4 if seen is None else seen.stride()), scaling, clock,
        )  # fmt: skip
        settings = {
            "DIM": dim, "DIM_V": value.dim, "BITS": key.bits, "BITS_V": value.bits, "TOKEN_GROUP": key.token_group,
            "BLOCK": block, "ROWS": max(ROWS, triton.next_power_of_2(rows)),
            "BEGIN": 0 if begin is None else begin.ndim,
            "MASK": 0 if seen is None else 1 if seen.dtype == torch.bool else 2, "CAP": softcap is not None,
            "EXACT": exact, "UNIT": unit, "ASM": query.is_cuda and unit > 1, "CLOCK": clock is not None,
            "num_warps": WARPS, "num_stages": STAGES, **FUSED,
        }  # fmt: skip
        with on_device(query):
            places = programs_at_once(_attend, (query, torch.float32, most, *rest), settings)
        self.splits = _splits(batch * head, triton.cdiv(most, block), places)
        self._numbers = batch * head * self.splits * rows * (value.dim + 2)
        self._launch = Kept(_attend, (self.splits, batch * head), rest, **settings)

    def __call__(self, query: Tensor, tokens: int) -> Float[Tensor, "share"]:
        """The shares over the first `tokens` tokens: sums `(batch, kv_head, split, row, dim_v)`, peaks, totals."""
        shares = query.new_empty(self._numbers, dtype=torch.float32)
        self._launch((query, shares), tokens)
        return shares


def _block(key: Packed) -> int:
    """Tokens of a block: all of one group, where scales are per channel."""
    block = BLOCK
    while key.token_group % block:
        block //= 2
    return block


def _splits(heads: int, blocks: int, places: int) -> int:
    """Shares that each of `heads` puts its `blocks` into: all find a place at once, as one that waits is waited for."""
    wanted = max(1, min(blocks, places // heads, max(AT_ONCE, blocks // LEAST), 256))
    return triton.cdiv(blocks, triton.cdiv(blocks, wanted))


@triton.jit
def _words(codes, tokens, u, there, WIDE: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr):
    """A block's codes, two bytes to a word, for `tokens` along one axis and words `u` along the other.

    There are WIDE words; where a row has fewer, zeros are last. Values are loaded `(word, token)`, turned, because a
    product reads words turned from shared memory at no cost, but codes only after another way through it.
    At 3 bits these are the low bits; the second and third are the words with the high bits, moved to stand above the
    low ones in planes of even bytes and of odd bytes.
    """
    WORDS: tl.constexpr = DIM * (2 if BITS == 3 else BITS) // 16
    at = codes.to(tl.pointer_type(tl.uint16)) + tokens * (DIM * BITS // 16)
    seen = there if WIDE == WORDS else there & (u < WORDS)
    words = tl.load(at + u, seen, 0)
    even, odd = words, words
    if BITS == 3:
        high = tl.load(at + WORDS + u % (WORDS // 2), seen, 0)
        half = (u // (WORDS // 2)).to(tl.uint16)
        even, odd = high << (2 - half), high >> (6 + half)
    return words, even, odd


@triton.jit
def _codes(words, even, odd, PLANE: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr):
    """One plane's codes, in half precision, times 2^(WIDTH * (PLANE // 2)) / UNIT: bits masked where they lie.

    Planes come in pairs, of the words' lower and upper bytes: plane i of the words has `bits.py`'s plane i // 2.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    SHIFT: tl.constexpr = PLANE % 2 * 8
    MASK: tl.constexpr = (2**WIDTH - 1) << (PLANE // 2 * WIDTH)
    HIGH: tl.constexpr = 1 << (PLANE // 2 * 2 + 2) if BITS == 3 else 0
    high = odd if PLANE % 2 else even
    if ASM:  # two words at a time
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t, u; shr.u32 t, $1, {SHIFT}; and.b32 t, t, {MASK * 0x10001};"
            f" and.b32 u, $2, {HIGH * 0x10001}; or.b32 $0, t, u; }}",
            "=r,r,r",
            args=[words, high],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    bits = (words >> SHIFT) & MASK
    if BITS == 3:
        bits |= high & HIGH
    return bits.to(tl.float16, bitcast=True) if UNIT > 1 else bits.to(tl.float16)


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
def visible_from(rows, b, packed):
    """The first of row b's `packed` columns that is read packed: behind padding and behind what is kept."""
    start, count = tl.load(rows + b * 3 + 1), tl.load(rows + b * 3 + 2)
    kept = tl.minimum(tl.maximum(packed - start, 0), count)
    return tl.maximum(tl.load(rows + b * 3), tl.where(kept > 0, start + kept, 0))


@triton.jit
def _query(query, live, scaling, DIM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """The query's numbers for each plane over the largest of all, `(word, row)`, the largest, and each row's sum."""
    WORDS: tl.constexpr = DIM * WIDTH // 16
    r, u = tl.arange(0, live.shape[0]), tl.arange(0, WIDE)
    at, there = query + r[None, :] * DIM + 2 * u[:, None], live[None, :] & (u < WORDS)[:, None]
    size, total = tl.full(live.shape, 1e-30, tl.float32), tl.zeros(live.shape, tl.float32)
    planes = ()
    for i in tl.static_range(16 // WIDTH):
        q = tl.load(at + (i // 2 * 2 * WORDS + i % 2), there, 0.0).to(tl.float32) * scaling
        size, total = tl.maximum(size, tl.max(tl.abs(q), 0)), total + tl.sum(q, 0)
        planes = planes + (q,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no star)
    size = tl.max(size, 0)  # one for all rows: it goes into the tokens' scales
    out = ()
    for i in tl.static_range(16 // WIDTH):
        out = out + (planes[i] / size,)  # type: ignore[assignment]  # noqa: RUF005
    return out, size, total


@triton.jit
def _token_scales(scale, low, at, there):
    """Scales and lows per token."""
    return tl.load(scale + at, there, 0.0).to(tl.float32), tl.load(low + at, there, 0.0).to(tl.float32)


@triton.jit
def _channel_scales(scale, low, there, DIM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """One group's scales and lows at the places of the words' codes, those of two planes in one number."""
    WORDS: tl.constexpr = DIM * WIDTH // 16
    u = tl.arange(0, WIDE)
    inside = u < tl.where(there, WORDS, 0)
    found = ()
    for i in tl.static_range(8 // WIDTH):
        scales = scale.to(tl.pointer_type(tl.uint32)) + (i * WORDS + u)
        lows = low.to(tl.pointer_type(tl.uint32)) + (i * WORDS + u)
        found = found + (tl.load(scales, inside, 0), tl.load(lows, inside, 0))  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def _one_of(pair, SECOND: tl.constexpr):
    """One of two half-precision numbers, in float32."""
    bits = (pair >> 16 if SECOND else pair).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scores(ys, words, even, odd, BITS: tl.constexpr, EXACT: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr):
    """Codes times what `_placed` or `_scaled` made of the query, `(token, row)`."""
    st = tl.zeros((words.shape[0], ys[0].shape[1]), tl.float32)
    for i in tl.static_range(16 // (2 if BITS == 3 else BITS)):
        st = _product(_codes(words, even, odd, i, BITS, UNIT, ASM), ys[i], st, EXACT)
    return st


@triton.jit
def _placed(xs, WIDTH: tl.constexpr):
    """The query without the powers of two by which codes of later planes are too large."""
    out = ()
    for i in tl.static_range(16 // WIDTH):
        out = out + (xs[i] * (1 / 2 ** (i // 2 * WIDTH)),)  # type: ignore[assignment]  # noqa: RUF005
    return out


@triton.jit
def _scaled(xs, scales, WIDTH: tl.constexpr):
    """`_placed` with a group's `_channel_scales` in it, and the group's lows times query, `(row)`."""
    out = ()
    shift = tl.zeros(xs[0].shape, tl.float32)
    for i in tl.static_range(16 // WIDTH):
        scale = _one_of(scales[i // 2 * 2], i % 2) * (1 / 2 ** (i // 2 * WIDTH))
        out = out + (xs[i] * scale[:, None],)  # type: ignore[assignment]  # noqa: RUF005
        shift += xs[i] * _one_of(scales[i // 2 * 2 + 1], i % 2)[:, None]
    return out, tl.sum(shift, 0)


@triton.jit
def _masked(s, mask, live, visible, mr, mt, MASK: tl.constexpr):
    """Scores with a mask, of truth values (1) or of numbers to add (2); `mask` is at the block's first token."""
    r, n = tl.arange(0, s.shape[1]), tl.arange(0, s.shape[0])
    at = mask + r[None, :].to(tl.int64) * mr + n[:, None].to(tl.int64) * mt
    inside = live[None, :] & visible[:, None]
    if MASK == 1:
        return tl.where(inside & (tl.load(at, inside, 0) != 0), s, float("-inf"))
    return tl.where(inside, s + tl.load(at, inside, 0.0).to(tl.float32) * LOG2E, float("-inf"))


@triton.jit
def _column_sums(x):
    """Sums over every eighth token, `(8, row)`: within a thread, in the layout of a product."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 8, 8, x.shape[1])), 0)


@triton.jit(do_not_specialize=["tokens"])
def _attend(
    query, shares, tokens, k_codes, k_scale, k_low, v_codes, v_scale, v_low, begin, mask,
    heads, rows, cap, kb, kh, ksb, ksh, vb, vh, vsb, vsh, mb, mh, mr, mt, scaling, clock,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BITS: tl.constexpr, BITS_V: tl.constexpr, TOKEN_GROUP: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BEGIN: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
    EXACT: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """One head's attention over one share of its packed tokens."""
    if CLOCK:
        tokens = tl.load(clock + 2).to(tl.int32)
    share = tl.cdiv(tl.cdiv(tokens, BLOCK), tl.num_programs(0)) * BLOCK
    split, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WIDTH_V: tl.constexpr = 2 if BITS_V == 3 else BITS_V
    WIDE: tl.constexpr = max(DIM * WIDTH // 16, 16)  # a product takes 16 at least
    WORDS_V: tl.constexpr = DIM_V * WIDTH_V // 16
    WIDE_V: tl.constexpr = max(WORDS_V, 16)
    r, n, u, u_v = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    live = r < rows
    xs, size, sum_q = _query(query + bh * rows * DIM, live, scaling, DIM, WIDTH, WIDE)
    first = 0
    if BEGIN == 1:
        first = tl.load(begin + b)
    if BEGIN == 2:
        first = visible_from(begin, b, tokens)
    base = (split * share).to(tl.int64)
    k_codes += b * kb + h * kh + base * (DIM * BITS // 8)
    v_codes += b * vb + h * vh + base * (DIM_V * BITS_V // 8)
    k_scales = b * ksb + h * ksh + (base // TOKEN_GROUP * DIM if TOKEN_GROUP > 0 else base)
    k_scale, k_low = k_scale + k_scales, k_low + k_scales
    v_scale += b * vsb + h * vsh + base
    v_low += b * vsb + h * vsh + base

    # a softmax's state, transposed and in powers of two: peaks, sums of weights, of weighted lows, of weighted codes
    m = tl.full((ROWS,), FLOOR_, tl.float32)
    totals, lows = tl.zeros((8, ROWS), tl.float32), tl.zeros((8, ROWS), tl.float32)
    accs = ()
    for _ in tl.static_range(16 // WIDTH_V):
        accs = accs + (tl.zeros((WIDE_V, ROWS), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    unit = 1e-30
    # scales are loaded a block ahead: nothing else hides how long they are under way
    left = tokens - split * share
    v_s, v_l = _token_scales(v_scale, v_low, n, n < left)
    if TOKEN_GROUP > 0:
        k_s = _channel_scales(k_scale, k_low, left > 0, DIM, WIDTH, WIDE)
    else:
        k_s = _token_scales(k_scale, k_low, n, n < left)
    for start in range(0, tl.minimum(share, left), BLOCK):
        t, t_ = start + n, start + BLOCK + n
        there = t < left
        v_s_, v_l_ = _token_scales(v_scale, v_low, t_, t_ < left)
        words, even, odd = _words(k_codes, t[:, None], u[None, :], there[:, None], WIDE, DIM, BITS)
        words_v, even_v, odd_v = _words(v_codes, t[None, :], u_v[:, None], there[None, :], WIDE_V, DIM_V, BITS_V)
        if TOKEN_GROUP > 0:
            g = (start + BLOCK) // TOKEN_GROUP * DIM
            k_s_ = _channel_scales(k_scale + g, k_low + g, start + BLOCK < left, DIM, WIDTH, WIDE)
            ys, shift = _scaled(xs, k_s, WIDTH)
            s = (_scores(ys, words, even, odd, BITS, EXACT, UNIT, ASM) * UNIT + shift[None, :]) * size
        else:
            k_s_ = _token_scales(k_scale, k_low, t_, t_ < left)
            st = _scores(_placed(xs, WIDTH), words, even, odd, BITS, EXACT, UNIT, ASM)
            s = st * (size * UNIT * k_s[0])[:, None] + sum_q[None, :] * k_s[1][:, None]
        if CAP:
            s = cap * (2 / (1 + tl.exp(-2 * s / cap)) - 1)
        visible = there & (split * share + t >= first)
        s = s * LOG2E + tl.where(visible, 0.0, float("-inf"))[:, None]
        if MASK > 0:
            s = _masked(s, mask + b * mb + h * mh + (base + start) * mt, live, visible, mr, mt, MASK)
        m_ = tl.maximum(m, tl.max(s, 0))
        p, faded = tl.exp2(s - m_[None, :]), tl.exp2(m - m_)
        m = m_
        totals = totals * faded[None, :] + _column_sums(p)
        lows = lows * faded[None, :] + _column_sums(p * v_l[:, None])
        # `unit` is the scale that the sums so far are in; weights stay within half precision's range
        unit_ = tl.maximum(unit, tl.max(v_s, 0))
        w = p * (v_s / unit_)[:, None]
        f = (faded * (unit / unit_))[None, :]
        unit = unit_
        sums = ()
        for i in tl.static_range(16 // WIDTH_V):
            codes = _codes(words_v, even_v, odd_v, i, BITS_V, UNIT, ASM)
            sums = sums + (_product(codes, w, accs[i] * f, EXACT),)  # type: ignore[assignment]  # noqa: RUF005
        accs = sums
        v_s, v_l, k_s = v_s_, v_l_, k_s_
    row = (bh * tl.num_programs(0) + split) * rows + r
    peak, total = beside(shares, tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * rows, DIM_V)
    at = shares + row[None, :] * DIM_V + 2 * u_v[:, None]
    for i in tl.static_range(16 // WIDTH_V):
        out = accs[i] * (unit * (UNIT / 2 ** (i // 2 * WIDTH_V))) + tl.sum(lows, 0)[None, :]
        tl.store(at + (i // 2 * 2 * WORDS_V + i % 2), out, live[None, :] & (u_v < WORDS_V)[:, None])
    tl.store(peak + row, m * (1 / LOG2E), live)
    tl.store(total + row, tl.sum(totals, 0), live)


@triton.jit
def beside(shares, count, DIM: tl.constexpr):
    """Where the peaks and the totals of `count` rows stand behind their sums."""
    peak = shares + count * DIM
    return peak, peak + count


@triton.jit
def _merge(
    shares, acc_out, peak_out, total_out, rows, splits, DIM: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The splits of one row together."""
    r, bh, d = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, DIM)
    count = tl.num_programs(1).to(tl.int64) * splits * rows
    sum_, top, whole = merged(shares, count, bh * splits * rows + r, rows, splits, DIM, SPLITS)
    out = bh * rows + r
    tl.store(acc_out + out * DIM + d, sum_)
    tl.store(peak_out + out, top)
    tl.store(total_out + out, whole)


@triton.jit
def merged(shares, count, first, step, splits, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """One row's shares together, `splits` rows of `count`, the `first` and every `step`-th: sums, peak, total."""
    BLOCK: tl.constexpr = min(SPLITS, AT_ONCE_)
    peak, total = beside(shares, count, DIM)
    s, d = tl.arange(0, SPLITS), tl.arange(0, DIM)
    top = tl.max(tl.load(peak + first + s * step, s < splits, FLOOR_), 0)
    whole, sum_ = 0.0, tl.zeros((DIM,), tl.float32)
    for begin in range(0, splits, BLOCK):
        share = begin + tl.arange(0, BLOCK)
        there, at = share < splits, first + share * step
        faded = tl.exp2((tl.load(peak + at, there, FLOOR_) - top) * LOG2E)
        whole += tl.sum(faded * tl.load(total + at, there, 0.0), 0)
        sum_ += tl.sum(faded[:, None] * tl.load(shares + at[:, None] * DIM + d[None, :], there[:, None], 0.0), 0)
    return sum_, top, whole


FLOOR_ = tl.constexpr(FLOOR)
AT_ONCE_ = tl.constexpr(AT_ONCE)
LOG2E = tl.constexpr(1.4426950408889634)
