"""Laws of putting the intact rows in place: the quick way and the general one say the same, and nothing leaks."""

from __future__ import annotations

import pytest
import torch

from intactkv.kv import IntactKV
from intactkv.locate import Sites
from intactkv.substitute import IntactTensors, Substitution, put

BATCH, HEAD, TOKEN, DIM, PREFIX = 2, 3, 5, 4, 2


def sites(whole: int) -> Sites:
    """The first `PREFIX` columns of every row."""
    row = torch.arange(BATCH).repeat_interleave(PREFIX)
    col = torch.arange(PREFIX).repeat(BATCH)
    return Sites(row, col, col, whole)


def rows(layout: str) -> torch.Tensor:
    """Keys in the memory layouts that models hand over."""
    torch.manual_seed(0)
    if layout == "transposed":  # as q, k and v come out of a projection
        return torch.randn(BATCH, TOKEN, HEAD, DIM).transpose(1, 2)
    if layout == "slice":  # of a fused qkv
        return torch.randn(BATCH, HEAD, TOKEN, 3 * DIM)[..., DIM : 2 * DIM]
    if layout == "expanded":  # one head for all
        return torch.randn(BATCH, 1, TOKEN, DIM).expand(BATCH, HEAD, TOKEN, DIM)
    return torch.randn(BATCH, HEAD, TOKEN, DIM)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slice", "expanded"])
def test_one_slice_in_place_is_the_general_way(layout: str, grad: bool) -> None:
    x, intact = rows(layout), torch.randn(PREFIX, HEAD, DIM)
    expected = x.clone()
    for p in range(PREFIX):
        expected[:, :, p] = intact[p]
    before = x.clone()
    with torch.set_grad_enabled(grad):
        general = put(x, intact, sites(0), layer=0)
        assert torch.equal(x, before)  # a copy
        quick = put(x, intact, sites(PREFIX), layer=0)
    assert torch.equal(general, expected)
    assert torch.equal(quick, expected)
    in_place = not grad and layout != "expanded"
    assert torch.equal(x, expected if in_place else before)


def test_a_layer_whose_values_are_its_keys_gets_both() -> None:
    """Some attention layers cache one tensor as key and value; the intact ones may still differ (align)."""
    intact = torch.randn(2, HEAD, PREFIX, DIM)
    kv = IntactKV(torch.arange(PREFIX), {0: (intact[0], intact[1])}, torch.zeros(PREFIX, 7), {})
    call = Substitution(IntactTensors(kv), sites(PREFIX), past=0, length=TOKEN, logits_to_keep=0)
    x = rows("contiguous")
    with torch.no_grad():
        key, value = call.write(x, x, 0)
    assert torch.equal(key[:, :, :PREFIX], intact[0].expand(BATCH, -1, -1, -1))
    assert torch.equal(value[:, :, :PREFIX], intact[1].expand(BATCH, -1, -1, -1))
    assert torch.equal(key[:, :, PREFIX:], value[:, :, PREFIX:])
