"""Laws of packing and rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intactkv import IntactKVError
from intactkv.packed.bits import (
    BITS,
    dequantize,
    dequantize_channels,
    hadamard,
    pack,
    packed_bytes,
    quantize,
    quantize_channels,
    unpack,
)

quick = settings(max_examples=60, deadline=None)
bits_ = st.sampled_from(BITS)
seeds = st.integers(0, 2**20)


def strided(shape: tuple[int, ...], order: str, make: object) -> torch.Tensor:
    """The same numbers in another layout: as they are, transposed in memory, or every second one of twice as many."""
    x = make(shape)  # type: ignore[operator]
    if order == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if order == "gaps":
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    return x


orders = st.sampled_from(["contiguous", "transposed", "gaps"])


@quick
@given(bits_, st.integers(1, 5), st.integers(0, 4), st.integers(1, 6), orders, seeds)
def test_unpacking_undoes_packing(bits: int, rows: int, tokens: int, eights: int, order: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = strided(
        (rows, tokens, 8 * eights), order, lambda s: torch.randint(0, 2**bits, s, generator=g, dtype=torch.uint8)
    )
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, tokens, 8 * eights * bits // 8) == (rows, tokens, packed_bytes(8 * eights, bits))
    assert torch.equal(unpack(packed, bits), codes)


def test_the_layout_is_the_documented_one() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [j | (j + 8) << 4 for j in range(8)]
    two = codes % 4
    assert pack(two, 2).tolist() == [sum(int(two[j + 4 * p]) << 2 * p for p in range(4)) for j in range(4)]
    three = codes % 8
    low = [sum(int(three[j + 4 * p] & 3) << 2 * p for p in range(4)) for j in range(4)]
    high = [sum(int(three[j + 2 * p] >> 2) << p for p in range(8)) for j in range(2)]
    assert pack(three, 3).tolist() == low + high


@quick
@given(bits_, st.sampled_from([None, 8, 16]), st.floats(-4, 3), st.floats(-100, 100), orders, seeds)
def test_the_error_is_at_most_half_a_scale(
    bits: int, group_size: int | None, size: float, offset: float, order: str, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = strided((2, 3, 32), order, lambda s: torch.randn(s, generator=g, dtype=torch.float64) * 10**size + offset)
    codes, scale, low = quantize(x, bits=bits, group_size=group_size)
    back = dequantize(pack(codes, bits), scale, low, bits=bits, dtype=torch.float64)
    bound = scale.double().repeat_interleave(32 // scale.shape[-1], -1) / 2
    assert bool(((x - back).abs() <= bound * (1 + 1e-9)).all())


@quick
@given(bits_, st.sampled_from([1, 4, 8]), st.floats(-4, 3), seeds)
def test_the_error_per_channel_is_at_most_half_a_scale_where_tokens_are_not_hidden(
    bits: int, token_group: int, size: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 16, 8, generator=g, dtype=torch.float64) * 10**size
    hidden = torch.rand(2, 16, generator=g) < 0.3
    x[hidden[:, None].expand(2, 3, 16)] *= 1000  # what is hidden may be anything
    codes, scale, low = quantize_channels(x, bits=bits, token_group=token_group, hidden=hidden)
    back = dequantize_channels(pack(codes, bits), scale, low, bits=bits, dtype=torch.float64)
    within = (x - back).abs() <= scale.double().repeat_interleave(token_group, 2) / 2 * (1 + 1e-9)
    assert bool((within | hidden[:, None, :, None]).all())
    loud = quantize_channels(x * (1 + hidden[:, None, :, None]), bits=bits, token_group=token_group, hidden=hidden)
    assert torch.equal(loud[1], scale)
    assert torch.equal(loud[2], low)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e9])
@pytest.mark.parametrize("bits", BITS)
def test_a_number_that_cannot_be_stored_spoils_its_whole_group_and_no_other(bad: float, bits: int) -> None:
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    x[0, 3] = bad
    codes, scale, low = quantize(x, bits=bits, group_size=16)
    back = dequantize(pack(codes, bits), scale, low, bits=bits, dtype=torch.float32)
    assert not bool(back[0, :16].isfinite().any())
    assert bool(back[0, 16:].isfinite().all())
    assert bool(back[1].isfinite().all())


def test_a_constant_group_reads_back_as_it_was_to_half_precision() -> None:
    for number in (0.0, 1.0, -3.7, 1e-6, 60000.0):
        x = torch.full((1, 16), number)
        back = dequantize(*(lambda c, s, z: (pack(c, 4), s, z))(*quantize(x, bits=4)), bits=4, dtype=torch.float32)
        assert torch.allclose(back, x, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dim", [1, 2, 64, 128])
def test_the_hadamard_rotation_undoes_itself(dim: int) -> None:
    h = hadamard(dim, torch.float64, torch.device("cpu"))
    assert torch.allclose(h @ h, torch.eye(dim, dtype=torch.float64), atol=1e-12)


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    for wrong in (
        lambda: pack(torch.zeros(1, 12, dtype=torch.uint8), 3),
        lambda: packed_bytes(16, 5),
        lambda: quantize(torch.zeros(1, 16), bits=4, group_size=5),
        lambda: hadamard(48, torch.float32, torch.device("cpu")),
    ):
        with pytest.raises(IntactKVError, match=r"use|multiples|set"):
            wrong()
