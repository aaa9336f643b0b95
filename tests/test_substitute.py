"""Laws of putting the intact rows in place: the quick way and the general one say the same, and nothing leaks."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from intactkv.artifact import IntactKV
from intactkv.attaching.locate import Progress, Sites
from intactkv.attaching.substitute import Substitution
from intactkv.attaching.tensors import IntactTensors, put
from intactkv.error import IntactKVError

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


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slice", "expanded"])
@pytest.mark.parametrize("tokens", [PREFIX, TOKEN])
def test_an_empty_layer_begins_with_the_prefix(layout: str, tokens: int) -> None:
    """The quick way for a cache that appends: the same keys and values, and the model's own are left alone."""

    class Another(DynamicLayer):
        """Appends, but is not known to."""

    intact = torch.randn(2, HEAD, PREFIX, DIM)
    kv = IntactKV(torch.arange(PREFIX), {0: (intact[0], intact[1])}, torch.zeros(PREFIX, 7), {})
    x, y = rows(layout)[:, :, :tokens], rows(layout)[:, :, :tokens] + 1
    given, found = x.clone(), {}
    caches = {name: DynamicCache(config=LlamaConfig(num_hidden_layers=1)) for name in ("quick", "general")}
    caches["general"].layers[0] = Another()
    for name, cache in (*caches.items(), ("bare", DynamicCache())):
        call = Substitution(IntactTensors(kv), sites(PREFIX), past=0, length=tokens, logits_to_keep=0)
        call.enter(cache, Progress())
        with torch.no_grad():
            found[name] = cache.update(x.clone() if name == "general" else x, y.clone(), 0)
        assert call.seen == {0}
        assert cache.get_seq_length() == tokens
    assert torch.equal(x, given)
    for quick, general, bare, own, begin in zip(*found.values(), (x, y), intact, strict=True):
        assert torch.equal(quick, torch.cat([begin.expand(BATCH, -1, -1, -1), own[:, :, PREFIX:]], dim=2))
        assert torch.equal(quick, general)
        assert torch.equal(quick, bare)
        quick.zero_()  # the cache is its own: nothing of the artifact is written to
        assert bool(begin.any())


def test_an_empty_layer_of_another_shape_is_refused_before_it_is_touched() -> None:
    kv = IntactKV(torch.arange(PREFIX), {0: (torch.ones(1, PREFIX, DIM),) * 2}, torch.zeros(PREFIX, 7), {})
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=1))
    call = Substitution(IntactTensors(kv), sites(PREFIX), past=0, length=TOKEN, logits_to_keep=0)
    call.enter(cache, Progress())
    with pytest.raises(IntactKVError, match="layer 0 has"):
        cache.update(rows("contiguous"), rows("contiguous"), 0)
    assert cache.get_seq_length() == 0


def test_trained_rows_are_never_remembered() -> None:
    kv = IntactKV(torch.arange(PREFIX), {0: (torch.ones(HEAD, PREFIX, DIM, requires_grad=True),) * 2},
                  torch.zeros(PREFIX, 7), {})  # fmt: skip
    tensors, x = IntactTensors(kv), rows("contiguous")
    for _ in range(2):
        cache = DynamicCache(config=LlamaConfig(num_hidden_layers=1))
        call = Substitution(tensors, sites(PREFIX), past=0, length=TOKEN, logits_to_keep=0)
        call.enter(cache, Progress())
        key, _ = cache.update(x, x.clone(), 0)
        (gradient,) = torch.autograd.grad(key.sum(), kv.layers[0][0])
        assert torch.equal(gradient, torch.full_like(gradient, BATCH))
