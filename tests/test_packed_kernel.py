"""The Triton kernel equals the PyTorch way, here under Triton's interpreter; `benchmarks/gpu.py` checks it on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from intactkv.packed import kernel
from intactkv.packed.attention import packed_attention
from intactkv.packed.kernel import fits, packed_attention_gpu
from intactkv.packed.store import Run, TokenStore

pytestmark = pytest.mark.usefixtures("interpreter")

BATCH, HEAD, DIM = 2, 2, 64


def packed(x: torch.Tensor, bits: int, token_group: int = 0) -> Any:
    store = TokenStore(x, bits=bits, group_size=None, tokens=token_group)
    store.append(x, None)
    return store.view(Run(0, 0, x.shape[2]))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "half"])
@pytest.mark.parametrize("token_group", [0, 32], ids=["per-token", "per-channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kernel_equals_pytorch(bits: int, token_group: int, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(bits)
    monkeypatch.setattr(kernel, "programs_at_once", lambda *asked: 2 * BATCH * HEAD)  # shares of two blocks and one
    tokens = 96 if token_group else 150
    key, value = (torch.randn(BATCH, HEAD, tokens, DIM) for _ in range(2))
    query = torch.randn(BATCH, HEAD, 3, DIM) * 0.4
    k, v = packed(key, bits, token_group), packed(value, bits)
    assert fits(k, v, 3)
    for settings in settings_of(tokens) if exact else settings_of(tokens)[1:3]:  # masks know no precision
        want = packed_attention(query, k, v, **settings)
        got = packed_attention_gpu(query, k, v, exact=exact, **settings)
        near = 1e-5 if exact else 4e-3
        torch.testing.assert_close(got.acc / got.total, want.acc / want.total, atol=near, rtol=near)
        torch.testing.assert_close(got.peak + got.total.log(), want.peak + want.total.log(), atol=near, rtol=near)


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 3000))
def test_shares_cover_all_blocks_and_none_waits_for_a_place(rows: int, blocks: int, places: int) -> None:
    splits = kernel._splits(rows, blocks, places)
    each = -(-blocks // splits)
    assert (splits - 1) * each < blocks <= splits * each  # none is empty
    assert splits == 1 or splits * rows <= places
    assert splits <= kernel.AT_ONCE or each >= kernel.LEAST


def test_more_shares_than_are_merged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(kernel, "BLOCK", 16)
    monkeypatch.setattr(kernel, "_splits", lambda rows, blocks, places: blocks)
    key, value = torch.randn(1, 1, 16 * (kernel.AT_ONCE + 2), DIM), torch.randn(1, 1, 16 * (kernel.AT_ONCE + 2), DIM)
    k, v, query = packed(key, 4), packed(value, 4), torch.randn(1, 1, 2, DIM) * 0.4
    want, got = packed_attention(query, k, v), packed_attention_gpu(query, k, v, exact=True)
    torch.testing.assert_close(got.acc / got.total, want.acc / want.total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.peak + got.total.log(), want.peak + want.total.log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("exact", "unit"), [(True, 1), (False, 1), (False, 2**24)])
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 128), (128, 64), (256, 256)])
@pytest.mark.parametrize(("bits", "bits_v", "token_group"), [(2, 3, 0), (3, 8, 16), (4, 2, 48), (8, 4, 0)])
def test_widths_and_bits_of_keys_and_values_may_differ(
    bits: int,
    bits_v: int,
    token_group: int,
    dim: int,
    dim_v: int,
    exact: bool,
    unit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "UNIT", unit)
    monkeypatch.setattr(kernel, "programs_at_once", lambda *asked: 2 * HEAD)  # two shares
    torch.manual_seed(0)
    key, value = torch.randn(1, HEAD, 96, dim), torch.randn(1, HEAD, 96, dim_v)
    query = torch.randn(1, HEAD, 9, dim) * 0.3
    k, v = packed(key, bits, token_group), packed(value, bits_v)
    want, got = packed_attention(query, k, v), packed_attention_gpu(query, k, v, exact=exact)
    near = 1e-5 if exact else 4e-3
    torch.testing.assert_close(got.acc / got.total, want.acc / want.total, atol=near, rtol=near)
    torch.testing.assert_close(got.peak + got.total.log(), want.peak + want.total.log(), atol=near, rtol=near)


def settings_of(tokens: int) -> list[dict[str, Any]]:
    additive = torch.randn(BATCH, 1, 3, tokens)
    additive[:, :, :, 5] = -torch.inf
    return [
        {},
        {"begin": torch.tensor([0, 70])},
        {"mask": torch.rand(BATCH, 1, 1, tokens) > 0.3, "softcap": 2.0},
        {"mask": additive, "begin": torch.tensor([3, 0])},
    ]


def test_a_row_that_sees_nothing_weighs_nothing() -> None:
    x = torch.randn(BATCH, HEAD, 64, DIM)
    query, begin = torch.randn(BATCH, HEAD, 1, DIM), torch.tensor([64, 0])
    got = packed_attention_gpu(query, packed(x, 4), packed(x, 4), begin=begin)
    assert bool((got.total[0] == 0).all())
    assert bool((got.acc[0] == 0).all())
    assert bool((got.total[1] > 0).all())


def test_large_queries_and_scales_do_not_overflow() -> None:
    torch.manual_seed(0)
    key, value = torch.randn(BATCH, HEAD, 64, DIM) * 1e-3, torch.randn(BATCH, HEAD, 64, DIM) * 1e4
    query = torch.randn(BATCH, HEAD, 4, DIM) * 1e6
    k, v = packed(key, 8), packed(value, 8)
    want, got = packed_attention(query, k, v), packed_attention_gpu(query, k, v)
    assert bool(torch.isfinite(got.acc).all())
    torch.testing.assert_close(got.peak, want.peak, rtol=2e-3, atol=0)
