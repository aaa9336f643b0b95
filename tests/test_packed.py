"""Laws of the packed cache on tiny models: it equals rounding by hand, in any batch, padding and way of generating."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, PREFIX, VOCAB, build, by_name, padded, prompts, rounded
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from intactkv import IntactKVError, PackedCache, Packing, attach, capture, read_packed
from intactkv.attaching.locate import NEVER
from intactkv.packed import fused
from intactkv.packed.attention import Step, packed_attention
from intactkv.packed.bits import quantize
from intactkv.packed.cache import PackedLayer
from intactkv.packed.fused import block_attention, blockwise, fused_attention, fused_step, layout
from intactkv.packed.lazy import LazyStates
from intactkv.packed.packing import expected_bytes
from intactkv.packed.readable import Stored
from intactkv.packed.reads import _attend_stored, forward
from intactkv.packed.store import Packed

SETTINGS = {
    "per token": Packing(bits=4, keep=4, keys="per_token"),
    "residual": Packing(bits=3, keep=2, residual=3, keys="per_token"),
    "grouped": Packing(bits=2, group_size=8, keep=1, keys="per_token"),
    "rotated": Packing(bits=4, hadamard=True, keep=4, keys="per_token"),
    "per channel": Packing(bits=4, keys="per_channel", token_group=4, keep=3),
    "kivi": Packing(bits=2, keys="per_channel", token_group=4, residual=5, keep=3, hadamard=True),
    "paper": Packing(bits=4, keep=0, own="rounded", keys="per_token"),
    "none kept, 8 bits": Packing(bits=8, keys="per_token"),
}
each_setting = pytest.mark.parametrize("packing", SETTINGS.values(), ids=list(SETTINGS))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build(by_name("llama-gqa"), dtype=torch.float64)  # in float32, noise can tip a number over a rounding's edge


class DenseCache(DynamicCache):
    """The same tokens read densely by a stock attention: the lazy tensors are made dense at once."""

    def __init__(self, packed: PackedCache) -> None:
        super().__init__()
        self.packed = packed

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self.packed.update(*args, **kwargs)
        return key.clone(), value.clone()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.packed.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.packed.get_mask_sizes(query_length, layer_idx)


def told(model: PreTrainedModel, packing: Packing, mask: Tensor) -> PackedCache:
    cache = PackedCache(model.config, packing)
    cache.rows.set_padding(mask.bool(), 0)
    return cache


@torch.no_grad()
def stepwise(model: PreTrainedModel, ids: Tensor, cache: Any, mask: Tensor | None = None, chunk: int = 7) -> Tensor:
    """Logits of every token: a prompt of `chunk` tokens, then one by one, then three at a time."""
    edges = [0, chunk, *range(chunk + 1, chunk + 8), *range(chunk + 10, ids.shape[1], 3), ids.shape[1]]
    out = []
    for a, b in pairwise(edges):
        more: dict[str, Any] = {}
        if mask is not None:
            more["attention_mask"] = mask[:, :b]
            more["position_ids"] = (mask[:, :b].cumsum(1) - 1).clamp(min=0)[:, a:b]
        out.append(model(ids[:, a:b], past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(out, 1)


@each_setting
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_block_reads_equal_dense_reads(model: PreTrainedModel, packing: Packing, side: str) -> None:
    rows = [prompts(1, n, seed=n)[0] for n in ((24, 24, 24) if side == "none" else (24, 17, 20))]
    ids, mask, _ = padded(rows, "left" if side == "none" else side)
    dense = stepwise(model, ids, DenseCache(told(model, packing, mask)), mask)
    cache = PackedCache(model.config, packing)
    with read_packed(model):
        fast = stepwise(model, ids, cache, mask)
    real = mask.bool()
    assert torch.allclose(fast[real], dense[real], atol=1e-9)


@each_setting
def test_a_left_padded_batch_equals_its_rows_alone(model: PreTrainedModel, packing: Packing) -> None:
    if packing.keys == "per_channel":
        pytest.skip("groups of tokens begin at columns of the cache, so padding moves their edges")
    if packing.residual:
        pytest.skip("tokens are packed together by columns of the cache, so padding moves when")
    rows = [prompts(1, n, seed=n)[0] for n in (24, 17)]
    ids, mask, _ = padded(rows, "left")
    with read_packed(model):
        together = stepwise(model, ids, PackedCache(model.config, packing), mask, chunk=12)
        for i, row in enumerate(rows):
            pad = 24 - len(row)
            alone = stepwise(model, ids[i : i + 1], told(model, packing, mask[i : i + 1]), mask[i : i + 1], chunk=12)
            assert torch.allclose(together[i, pad:], alone[0, pad:], atol=1e-9)


def test_reading_rounded_is_rounding_by_hand_in_any_chunks(model: PreTrainedModel) -> None:
    """The paper's scheme: every token but the kept ones is rounded when written, and read so at once."""
    ids = prompts(2, 20)
    reference = HandRounded(model, bits=3, keep=2)
    expected = stepwise(model, ids, reference)
    for chunk in (1, 7, 12):
        with read_packed(model):
            got = stepwise(
                model,
                ids,
                PackedCache(model.config, Packing(bits=3, keep=2, own="rounded", keys="per_token")),
                chunk=chunk,
            )
        assert torch.allclose(got, expected, atol=1e-9)


class HandRounded(DynamicCache):
    """Rounds every number to its own scale by plain arithmetic, without any of our code's stores."""

    def __init__(self, model: PreTrainedModel, bits: int, keep: int) -> None:
        super().__init__(config=model.config)
        self.bits, self.keep = bits, keep

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *a: Any, **k: Any) -> Any:
        kept = max(0, self.keep - self.get_seq_length(layer_idx))

        def fake(x: Tensor) -> Tensor:
            codes, scale, low = quantize(x[:, :, kept:], bits=self.bits)
            return torch.cat([x[:, :, :kept], codes.double() * scale.double() + low.double()], 2)

        return super().update(fake(key_states), fake(value_states), layer_idx)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_architecture_generates_the_same_with_block_reads_and_dense(architecture: Any) -> None:
    model, atol = build(architecture), 1e-4
    if architecture.name not in ("gemma2", "bloom", "mpt"):  # whose padded rows are NaN in float64, in any cache
        model, atol = model.double(), 1e-9  # in float32 a number on an edge can tip over to the next code
        model.set_experts_implementation("eager")  # transformers' grouped one takes no float64
    packing = Packing(bits=8, keep=2, keys="per_token")
    rows = [prompts(1, n, seed=n)[0] for n in (12, 9)]
    ids, mask, _ = padded(rows, "right" if architecture.recurrent else "left")
    ids, mask = (ids[:1], mask[:1]) if architecture.recurrent else (ids, mask)
    kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    if DynamicLayer not in kinds:
        with pytest.raises(IntactKVError, match="no full-attention layer"):
            PackedCache(model.config, packing)
        return
    options: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True,
        "output_logits": True,
    }  # fmt: skip
    if architecture.name == "gemma2":
        model.set_attn_implementation("eager")  # transformers' SDPA leaves out the soft cap on scores; ours does not
    before = model.config._attn_implementation
    dense = model.generate(ids, past_key_values=told(model, packing, mask), **options)
    with read_packed(model):
        fast = model.generate(ids, past_key_values=PackedCache(model.config, packing), **options)
    assert model.config._attn_implementation == before
    assert torch.allclose(torch.stack(fast.logits), torch.stack(dense.logits), rtol=0, atol=atol)
    full = model.generate(ids, **options)
    assert (fast.logits[0] - full.logits[0]).abs().max() < 1e-4  # the prompt reads its own tokens in full


@each_setting
@pytest.mark.parametrize("way", ["beams", "prompt lookup", "assistant", "samples"])
def test_ways_of_generating(model: PreTrainedModel, packing: Packing, way: str) -> None:
    rows = [prompts(1, n, seed=n)[0] for n in ((15, 11) if way == "beams" else (15,))]
    ids, mask, _ = padded(rows, "left")
    options: dict[str, Any] = {
        "beams": {"num_beams": 3},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": TINY, "do_sample": False},
        "samples": {"do_sample": True, "num_return_sequences": 3},
    }[way]
    options = {"attention_mask": mask, "max_new_tokens": 12, **options}
    wide = mask.repeat_interleave(3, 0) if way in ("beams", "samples") else mask
    torch.manual_seed(0)
    dense = model.generate(ids, past_key_values=told(model, packing, wide), **options)
    torch.manual_seed(0)
    with read_packed(model):
        fast = model.generate(ids, past_key_values=PackedCache(model.config, packing), **options)
    assert torch.equal(fast, dense)


@pytest.mark.parametrize("packing", [Packing(bits=3), Packing(bits=3, keys="per_channel", token_group=4, residual=2)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_attached_artifact_stays_intact_in_the_packed_cache(side: str, packing: Packing) -> None:
    full = build(by_name("llama-gqa"))
    model = rounded(full)
    kv = capture(full, PREFIX)
    rows = [prompts(1, 20)[0], prompts(1, 14, seed=5)[0]]
    rows[1][2] = 9  # shares two tokens of the prefix only
    ids, mask, _ = padded(rows, side)
    cache = PackedCache(model.config, packing)
    partly = pytest.warns(UserWarning, match="row 1 agrees with only 2 of the 3 prefix tokens")
    with attach(model, kv), read_packed(model), partly if side == "right" else nullcontext():
        stepwise(model, ids, cache, mask)
    assert cache.rows.count is not None
    assert cache.rows.count.tolist() == [3, 2]
    for i, layer in enumerate(cache.layers):
        for j, intact in enumerate(kv.layers[i]):
            for r, m in enumerate((3, 2)):
                assert torch.equal(layer.kept[j][r, :, :m], intact[:, :m])
                at = int(mask[r].int().argmax())
                read = layer._stored(layer.runs, layer.length - layer.tail[0].shape[2], layer.tail).dense(j)
                assert torch.equal(read[r, :, at : at + m], intact[:, :m])


@pytest.mark.parametrize("packing", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("tokens", [1, 3])
def test_one_read_in_float32_equals_dense_attention_to_1e_5(packing: Packing, tokens: int) -> None:
    """4 query heads a key head, a left-padded row, two runs (a crop inside a group), random data of width 32."""
    g = torch.Generator().manual_seed(0)
    cache = PackedCache(build(by_name("llama-gqa")).config, packing)
    real = torch.ones(2, 300, dtype=torch.bool)
    real[1, :37] = False
    cache.rows.set_padding(real, 0)
    cache.update(*torch.randn(2, 2, 2, 300, 32, generator=g), 0)
    cache.layers[0].crop(-51)
    key, value = cache.update(*torch.randn(2, 2, 2, tokens, 32, generator=g), 0)
    columns = torch.arange(249 + tokens)
    mask = (columns <= 249 + torch.arange(tokens)[:, None]) & (columns >= torch.tensor([0, 37])[:, None, None])
    query = torch.randn(2, 8, tokens, 32, generator=g)
    module = torch.nn.Module()
    module.num_key_value_groups = 4  # type: ignore[assignment]
    fast = forward(module, query, key, value, mask[:, None], scaling=0.3)[0]
    dense = sdpa_attention_forward(module, query, key + 0, value + 0, mask[:, None], scaling=0.3)[0]
    assert torch.allclose(fast, dense, atol=1e-5)


def test_attached_generation_equals_a_cache_filled_by_hand() -> None:
    full = build(by_name("llama-gqa"))
    model = rounded(full)
    kv = capture(full, PREFIX)
    ids, mask, _ = padded([prompts(1, 16)[0], prompts(1, 11, seed=3)[0]], "left")
    options: dict[str, Any] = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    with attach(model, kv), read_packed(model):
        out = model.generate(ids, attention_mask=mask, past_key_values=PackedCache(model.config, Packing(8)), **options)
    for r in range(2):
        row = ids[r][mask[r].bool()][None]
        cache = PackedCache(model.config, Packing(8))
        cache.rows.set_padding(torch.ones(1, row.shape[1], dtype=torch.bool), 0)
        cache.rows._set(cache.rows.start, torch.full((1,), len(kv)))
        for layer, (key, value) in kv.layers.items():
            cache.update(key[None], value[None], layer)
        alone = model.generate(row, past_key_values=cache, **options)
        assert torch.allclose(torch.stack(out.logits)[:, r], torch.stack(alone.logits)[:, 0], atol=5e-3)


def test_padding_must_be_told(model: PreTrainedModel) -> None:
    with pytest.raises(IntactKVError, match="read_packed"):
        model(prompts(2), past_key_values=PackedCache(model.config, Packing(keep=4, keys="per_token")))


def test_reading_twice_is_refused_and_removing_leaves_no_trace(model: PreTrainedModel) -> None:
    before = copy.copy(vars(model))
    handle = read_packed(model)
    with pytest.raises(IntactKVError, match="already"):
        read_packed(model)
    handle.remove()
    handle.remove()
    assert not model._forward_pre_hooks
    assert vars(model).keys() == before.keys()


def test_reset_gives_an_empty_cache(model: PreTrainedModel) -> None:
    cache = PackedCache(model.config, Packing(keep=4, keys="per_token"))
    with read_packed(model):
        first = stepwise(model, prompts(2), cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(stepwise(model, prompts(2), cache), first)


@each_setting
def test_a_cache_cropped_to_nothing_serves_rows_that_begin_elsewhere(model: PreTrainedModel, packing: Packing) -> None:
    """Kept are the first tokens of the rows that are there now, not of those that were."""
    ids = prompts(2, 24)
    before, now = (torch.ones_like(ids) for _ in range(2))
    now[1, :5] = 0
    cache = PackedCache(model.config, packing)
    with read_packed(model):
        expected = stepwise(model, ids, PackedCache(model.config, packing), now)
        stepwise(model, ids, cache, before)
        cache.crop(-24)
        assert cache.get_seq_length() == 0
        assert torch.allclose(stepwise(model, ids, cache, now)[now.bool()], expected[now.bool()], atol=1e-9)


@each_setting
def test_a_copy_goes_its_own_way(model: PreTrainedModel, packing: Packing) -> None:
    """A prompt's cache is copied and continued twice; each continuation equals one from the start."""
    prompt, first, second = prompts(2, 12), prompts(2, 8, seed=3), prompts(2, 8, seed=4)
    with read_packed(model), torch.no_grad():
        cache = PackedCache(model.config, packing)
        model(prompt, past_key_values=cache)
        copied = copy.deepcopy(cache)
        for again, more in ((cache, first), (copied, second)):
            fresh = PackedCache(model.config, packing)
            model(prompt, past_key_values=fresh)
            for at in range(8):
                got = model(more[:, at : at + 1], past_key_values=again).logits
                assert torch.equal(got, model(more[:, at : at + 1], past_key_values=fresh).logits)


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False], ids=["block reads", "dense reads"])
def test_a_compiled_model_decodes_the_same(model: PreTrainedModel, fast: bool) -> None:
    """Tracing breaks at the cache and at our attention, and goes on behind them."""
    ids, packing = prompts(2, 16), Packing(bits=4, keep=2, keys="per_token")

    def steps(forward: Any) -> Tensor:
        cache = told(model, packing, torch.ones_like(ids))
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache)
            return torch.cat([forward(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 16)], 1)

    with read_packed(model) if fast else nullcontext():
        assert torch.allclose(steps(torch.compile(model, backend="eager")), steps(model), atol=1e-9)


KINDS = {"one scale": {}, "grouped": {"group_size": 32}, "per channel": {"keys": "per_channel"}}
HIDING = {
    "all seen": {},
    "begin": {"begin": torch.tensor([0, 70])},
    "mask": {"mask": torch.arange(192).expand(2, 1, 1, -1) % 7 > 0, "softcap": 2.0},
    "additive": {"mask": (torch.arange(192) % 5 * -3.0).expand(2, 2, 3, -1), "begin": torch.tensor([3, 0])},
}


def packed_block(bits: int, kind: dict[str, Any], tokens: int = 192, dim: int = 128) -> tuple[Tensor, Packed, Packed]:
    """Queries of three rows, and packed keys and values; one channel of the keys is far larger than the others."""
    g = torch.Generator().manual_seed(bits)
    cache = PackedCache(TINY.config, Packing(bits=bits, **kind))
    key, value = torch.randn(2, 2, 2, tokens, dim, generator=g)
    key[..., 5] *= 30
    cache.update(key, value, 0)
    layer = cache.layers[0]
    return torch.randn(2, 2, 3, dim, generator=g) / dim**0.5, *(s.view(layer.runs[0]) for s in layer.stores)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_attention_written_out_for_compilers_equals_matrix_products(bits: int, kind: dict[str, Any]) -> None:
    query, key, value = packed_block(bits, kind)
    known = layout(query, key, value)
    assert known is not None
    step = Step(partial(blockwise, block_attention(known)), 64)
    for hiding in HIDING.values():
        for plain, fast in zip(
            packed_attention(query, key, value, **hiding),
            packed_attention(query, key, value, **hiding, step=step),
            strict=True,
        ):
            assert torch.allclose(plain, fast, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "kind", "hidden"),
    [(4, "one scale", list(HIDING)), (4, "per channel", ["begin"]), (2, "grouped", ["all seen"])],
)
def test_the_compiled_form_equals_the_plain_one_and_is_compiled_once(bits: int, kind: str, hidden: list[str]) -> None:
    """Once for each way of hiding tokens, whatever their number."""
    graphs = torch._dynamo.utils.counters["stats"]
    for hiding in (HIDING[name] for name in hidden):
        before = graphs["unique_graphs"]
        for tokens in (192, 128, 160):
            query, key, value = packed_block(bits, KINDS[kind], tokens)
            cut = {k: x[..., :tokens] if k == "mask" else x for k, x in hiding.items()}
            step = fused_step(query, key, value)
            assert step is not None
            expected = packed_attention(query, key, value, **cut)
            for plain, fast in zip(expected, packed_attention(query, key, value, **cut, step=step), strict=True):
                assert torch.allclose(plain, fast, atol=1e-5, rtol=1e-5)
        assert graphs["unique_graphs"] <= before + 1


def one_step(packing: Packing, tokens: int, *, dtype: torch.dtype, start: int = 0) -> tuple[Tensor, Stored]:
    """A token's scaled queries, six heads on two, and what two rows' layer gives them to read."""
    g = torch.Generator().manual_seed(tokens)
    cache = PackedCache(TINY.config, packing)
    cache.rows.set_padding(torch.arange(tokens).expand(2, -1) >= torch.tensor([[0], [start]]), 0)
    key, value = torch.randn(2, 2, 2, tokens, 128, generator=g).to(dtype)
    key[..., 5] *= 30
    cache.update(key, value, 0)
    token = torch.randn(2, 2, 2, 1, 128, generator=g).to(dtype)
    lazy, _ = cache.update(token[0], token[1], 0)
    assert isinstance(lazy, LazyStates)
    assert isinstance(lazy.stored, Stored)
    return torch.randn(2, 6, 1, 128, generator=g).to(dtype) / 128**0.5, lazy.stored


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout's functions as they are written, since compiling them takes seconds."""
    monkeypatch.setattr(fused, "compiled", lambda known, written_out, constants=(): written_out(known))


STEPS = {
    "one scale": Packing(bits=4, keep=4, keys="per_token"),
    "none kept": Packing(bits=2, group_size=32, keys="per_token"),
    "[BOS], residual": Packing(bits=3, keep=1, residual=5, keys="per_token"),
    "KIVI": Packing(bits=4, keys="per_channel", residual=32, keep=4),
    "KIVI, none kept": Packing(bits=8, keys="per_channel"),
}


@pytest.mark.parametrize("packing", STEPS.values(), ids=list(STEPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("not_compiled")
def test_a_step_written_out_as_one_equals_its_parts(packing: Packing, dtype: torch.dtype) -> None:
    query, stored = one_step(packing, 200, dtype=dtype)
    whole = fused_attention(query, stored)
    parts = _attend_stored(query, stored, mask=None, softcap=None, sinks=None, compile=False)
    assert whole is not None
    assert (whole.dtype, whole.shape) == (dtype, (2, 1, 6, 128))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    without = _attend_stored(query, one_step(packing, 199, dtype=dtype)[1], mask=None, softcap=None, sinks=None,
                             compile=False)  # fmt: skip
    assert not torch.allclose(without, parts, rtol=0, atol=2e-2)  # the bound can tell


def test_a_step_is_not_written_out_as_one_where_that_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "compiled", None)  # is not even asked for
    for packing, tokens, start in (
        (Packing(bits=4, keep=4, keys="per_token"), 200, 7),  # padded
        (Packing(bits=4, hadamard=True, keys="per_token"), 200, 0),
        (Packing(bits=4, keep=4, keys="per_token"), 40, 0),  # short
        (Packing(bits=4, keep=70, keys="per_token"), 70, 0),  # nothing packed but what is kept
        (Packing(bits=4, keys="per_token"), 50_000, 0),  # more than WHOLE allows
    ):
        assert fused_attention(*one_step(packing, tokens, dtype=torch.float32, start=start)) is None
    stored = one_step(Packing(bits=4, keys="per_token"), 200, dtype=torch.float32)[1]
    twice = replace(stored, runs=stored.runs * 2)
    assert fused_attention(torch.randn(2, 6, 1, 128), twice) is None


def packed_by_reading(packing: Packing, dtype: torch.dtype) -> None:
    """Decoding steps that read, and so pack, their own token leave what steps that nobody reads leave."""
    g = torch.Generator().manual_seed(packing.bits)
    prompt, *tokens = (torch.randn(2, 2, 2, n, 128, generator=g).to(dtype) for n in (100, 1, 1, 1, 1, 3))
    caches = [PackedCache(TINY.config, packing) for _ in range(2)]
    for cache in caches:
        cache.rows.set_padding(torch.ones(2, 100, dtype=torch.bool), 0)
        cache.update(*prompt, 0)
        for token in tokens:
            key, _ = cache.update(*token, 0)
            assert isinstance(key, LazyStates)
            assert isinstance(key.stored, Stored)
            if cache is caches[0] and token.shape[3] == 1:
                used = cache.layers[0].stores[0].used
                for _ in range(2):  # the second read finds it packed
                    assert fused_attention(torch.randn(2, 6, 1, 128, generator=g).to(dtype), key.stored) is not None
                    assert cache.layers[0].stores[1].used == used + 1
    read, not_read = (cache.layers[0] for cache in caches)
    assert read.runs == not_read.runs
    assert read.length == not_read.length == 107
    for a, b in zip(read.stores, not_read.stores, strict=True):
        assert a.used == b.used == 107
        for name in ("codes", "scale", "low"):
            assert torch.equal(getattr(a, name), getattr(b, name))


TAKING: dict[str, dict[str, Any]] = {
    "one scale": {"keys": "per_token"},
    "grouped": {"keys": "per_token", "group_size": 32, "keep": 2},
}


@pytest.mark.parametrize("kind", TAKING.values(), ids=list(TAKING))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("not_compiled")
def test_a_token_is_packed_alike_by_its_read_and_without(bits: int, kind: dict[str, Any], dtype: torch.dtype) -> None:
    packed_by_reading(Packing(bits=bits, **kind), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "kind"), [(2, "one scale"), (3, "one scale"), (8, "grouped")])
def test_a_token_is_packed_alike_by_its_compiled_read(bits: int, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        packed_by_reading(Packing(bits=bits, **TAKING[kind]), dtype)


@pytest.mark.usefixtures("not_compiled")
def test_a_late_read_packs_nothing() -> None:
    for change in (
        lambda cache: cache.update(*torch.randn(2, 2, 2, 1, 128), 0),
        lambda cache: cache.crop(-1),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reset(),
    ):
        cache = PackedCache(TINY.config, Packing(bits=4, keys="per_token"))
        cache.update(*torch.randn(2, 2, 2, 100, 128), 0)
        key, _ = cache.update(*torch.randn(2, 2, 2, 1, 128), 0)
        change(cache)
        held = [(store.used, store.codes.clone()) for store in cache.layers[0].stores]
        assert fused_attention(torch.randn(2, 6, 1, 128), key.stored) is not None
        for store, (used, codes) in zip(cache.layers[0].stores, held, strict=True):
            assert store.used == used
            assert torch.equal(store.codes, codes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one scale", "KIVI"])
def test_a_compiled_step_equals_its_parts_and_is_compiled_once(name: str) -> None:
    graphs, made = torch._dynamo.utils.counters["stats"], []
    for tokens in (200, 331, 264):
        query, stored = one_step(STEPS[name], tokens, dtype=torch.float32)
        whole = fused_attention(query, stored)
        assert whole is not None
        parts = _attend_stored(query, stored, mask=None, softcap=None, sinks=None, compile=False)
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
        made.append(graphs["unique_graphs"])
    assert made[0] == made[2]


def decoded(packing: Packing, steps: int) -> Iterator[tuple[PackedLayer, LazyStates]]:
    """A layer after each of so many decoding steps behind a prompt of 100 tokens, three rows, and the keys it gave."""
    cache = PackedCache(TINY.config, packing)
    cache.rows.set_padding(torch.ones(3, 100, dtype=torch.bool), 0)
    cache.update(*torch.randn(2, 3, 2, 100, 128), 0)
    for _ in range(steps):
        key, _ = cache.update(*torch.randn(2, 3, 2, 1, 128), 0)
        assert isinstance(key, LazyStates)
        yield cache.layers[0], key


@pytest.mark.parametrize("packing", STEPS.values(), ids=list(STEPS))
def test_a_buffer_is_never_full(packing: Packing) -> None:
    """A full one has other strides, of one piece, for which a compiled read would be compiled anew."""
    grown = set()
    for layer, _ in decoded(packing, 100):
        for store in layer.stores:
            grown.add(len(store.codes[0, 0]))
            assert store.used < len(store.codes[0, 0])
            assert not any(x.is_contiguous() for x in (store.view(layer.runs[0]).codes, store.view(layer.runs[0]).low))
    assert len(grown) > 1


@pytest.mark.slow
def test_a_growing_buffer_is_read_by_the_same_compiled_step() -> None:
    graphs, made = torch._dynamo.utils.counters["stats"], set()
    for _, key in decoded(STEPS["one scale"], 100):
        assert isinstance(key.stored, Stored)
        assert fused_attention(torch.randn(3, 6, 1, 128), key.stored) is not None
        made.add(graphs["unique_graphs"])
    assert len(made) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "keys"), [(2, "per_token"), (2, "per_channel"), (4, "per_token")])
def test_a_compiled_step_makes_nothing_dense(bits: int, keys: Any) -> None:
    query, stored = one_step(Packing(bits=bits, keys=keys, keep=4), 4096, dtype=torch.bfloat16)
    fused_attention(query, stored)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        assert fused_attention(query, stored) is not None
    now = most = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    scores = 4 * 2 * 6 * 4096
    assert scores <= most <= 3 * scores  # dense keys alone would be 8 MiB, 42 times the scores


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("keys", ["per_token", "per_channel"])
def test_bytes_are_what_the_formula_says(bits: int, keys: Any) -> None:
    layer = PackedLayer(Packing(bits=bits, keys=keys), PackedCache(build(by_name("llama-gqa")).config).rows)
    layer.update(torch.randn(2, 2, 1024, 64), torch.randn(2, 2, 1024, 64))
    used = sum(
        t[:, :, : t.shape[2] * 1024 // store.codes.shape[2]].numel() * t.element_size()
        for store in layer.stores for t in (store.codes, store.scale, store.low)
    )  # fmt: skip
    assert used == expected_bytes(layer.packing, (2, 2, 1024, 64))
    assert layer.nbytes <= used * 1.07


def test_no_step_copies_the_whole_cache(model: PreTrainedModel) -> None:
    cache = PackedCache(model.config, Packing(4, keys="per_token"))
    with read_packed(model):
        model(prompts(1, 40), past_key_values=cache)
        buffers = [s.codes.data_ptr() for layer in cache.layers for s in layer.stores]
        for _ in range(20):
            model(torch.tensor([[9]]), past_key_values=cache)
    assert buffers == [s.codes.data_ptr() for layer in cache.layers for s in layer.stores]


def test_lazy_states_are_dense_for_any_operation(model: PreTrainedModel) -> None:
    cache = PackedCache(model.config, Packing(4, keys="per_token"))
    model(prompts(1, 10), past_key_values=cache)
    new = torch.randn(1, 2, 1, 16)
    key, value = cache.update(new, new, 0)
    assert isinstance(key, LazyStates)
    assert key.shape == (1, 2, 11, 16)
    assert torch.equal((key + 0)[:, :, -1:], new)
    assert torch.equal(torch.cat([value, value], 2)[:, :, :11], value.contiguous())


def test_bad_settings_are_refused() -> None:
    for wrong in ({"bits": 5}, {"keys": "both"}, {"keep": -1}, {"own": "x"}, {"token_group": 0}):
        with pytest.raises(IntactKVError):
            Packing(**wrong)  # type: ignore[arg-type]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(1, 12)),
        st.tuples(st.just("reorder"), st.integers(0, 2**16)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.integers(0, 2**16)),
        st.tuples(st.just("offload"), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(SETTINGS)), OPERATIONS, st.integers(0, 2**16))
def test_kept_tokens_are_bit_identical_and_others_rounded_once_after_any_sequence(
    name: str, operations: list[tuple[str, int]], seed: int
) -> None:
    """A plain tensor of what was given goes through the same operations beside the cache."""
    packing, g = SETTINGS[name], torch.Generator().manual_seed(seed)
    cache = PackedCache(TINY.config, packing)
    pad = torch.tensor([0, 3])
    cache.rows.set_padding(torch.arange(12) >= pad[:, None], 0)
    given_ = torch.zeros(2, 2, 0, 16)
    read: Tensor | None = None  # what the last look saw

    def update(n: int) -> None:
        nonlocal given_
        new = torch.randn(len(given_), 2, n, 16, generator=g)
        past = given_.shape[2]
        given_ = torch.cat([given_, new], 2)
        if not cache.rows.padding_known or cache.rows.until >= NEVER:  # a crop took a row's beginning away
            cache.rows.set_padding(torch.arange(past, past + n) >= pad[:, None], past)
        cache.update(new, new, 0)

    def rows(change: Callable[[Tensor], Tensor]) -> None:
        nonlocal given_, pad, read
        given_, pad = change(given_), change(pad)
        read = None if read is None else change(read)

    update(12)
    for operation, number in operations:
        layer, batch = cache.layers[0], len(given_)
        pick = torch.randint(0, batch, (batch,), generator=torch.Generator().manual_seed(number))
        if operation == "update":
            update(number)
        elif operation == "crop":
            number = min(number, given_.shape[2])
            cache.crop(-number)
            given_ = given_[:, :, : given_.shape[2] - number]
            read = None if read is None else read[:, :, : given_.shape[2]]
        elif operation == "reorder":
            cache.reorder_cache(pick)
            rows(lambda x: x[pick])  # noqa: B023 (called at once)
        elif operation == "repeat" and batch < 8:
            cache.batch_repeat_interleave(2)
            rows(lambda x: x.repeat_interleave(2, 0))
        elif operation == "select":
            cache.batch_select_indices(pick[:1])
            rows(lambda x: x[pick[:1]])  # noqa: B023
        elif operation == "offload":
            layer.offload()
            layer.prefetch()
        tail = layer.length - layer.tail[0].shape[2]
        assert cache.get_seq_length() == given_.shape[2]
        now = layer._stored(layer.runs, tail, layer.tail).dense(1)
        for r, first in enumerate(pad.tolist()):
            assert torch.equal(now[r, :, first : first + packing.keep], given_[r, :, first : first + packing.keep])
        assert torch.equal(now[:, :, tail:], given_[:, :, tail:])
        if read is not None:  # what was packed then is, bit for bit, what is read now; the rest was rounded since
            same = read[:, :, : now.shape[2]] == now[:, :, : read.shape[2]]
            assert bool((same | (read == given_[:, :, : read.shape[2]])[:, :, : same.shape[2]]).all())
        read = now


def test_vocabulary_of_prompts() -> None:
    assert int(prompts().max()) < VOCAB


TINY = build(by_name("llama-gqa"))


def test_attention_maps_that_are_never_formed_are_refused() -> None:
    model = build(by_name("llama-gqa"))
    with read_packed(model), pytest.raises(IntactKVError, match="output_attentions=True asks for maps"):
        model(torch.arange(8, 16)[None], output_attentions=True)
