"""Unbiased reads of a packed cache: rounded keys weigh on average what they would have weighed exact."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, build, by_name, padded, prompts
from test_packed import SETTINGS, each_setting
from torch import Tensor
from transformers import PreTrainedModel

from intactkv import IntactKVError, PackedCache, Packing, attach, capture, read_packed
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.packed.bits import hadamard
from intactkv.packed.reads import forward, unbiased_forward
from intactkv.packed.store import TokenStore
from intactkv.texts import read_text

REFUSED = [
    "gpt-j", "falcon-rotary", "falcon-alibi", "bloom", "mpt", "stablelm", "qwen3-next",  # attention of their own
    "deepseek-v3",  # MLA
    "mistral-sliding", "llama4",  # nothing to pack
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build(by_name("llama-gqa"), dtype=torch.float64)


def filled(model: PreTrainedModel, packing: Packing, tokens: int) -> tuple[Tensor, Any, Any]:
    """Queries of the last `tokens` of 61, and what one layer of a cache gives back: two rows, one begins later."""
    cache = PackedCache(model.config, packing)
    mask = torch.ones(2, 61, dtype=torch.bool)
    mask[1, :7] = False
    cache.rows.set_padding(mask, 0)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    torch.manual_seed(0)
    key, value = (torch.randn(2, heads, 61, dim, dtype=torch.float64) for _ in range(2))
    for a, b in pairwise((0, 20, 40, 61 - tokens, 61)):
        lazy = cache.update(key[:, :, a:b], value[:, :, a:b], 0)
    return torch.randn(2, model.config.num_attention_heads, tokens, dim, dtype=torch.float64), *lazy


def by_hand(
    query: Tensor, key: Any, value: Any, mask: Tensor, *, scaling: float, softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dense attention with the variance of each rounded number's error, number by number."""
    stored = key.stored.in_parts()
    dense, values, heads = stored.dense(0), stored.dense(1), query.shape[1] // stored.tail[0].shape[1]
    steps = torch.zeros_like(dense)
    for run, packed, _ in stored.runs:
        scale = packed.scale.double()
        if packed.token_group:
            each = scale.repeat_interleave(packed.token_group, 2)[:, :, : len(packed)]
        else:
            each = scale.repeat_interleave(packed.dim // scale.shape[-1], -1)
        steps[:, :, run.column : run.column + len(packed)] = each
    for row in range(len(query) if stored.kept is not None else 0):  # kept tokens are exact
        begin, count = int(stored.start[row]), int(stored.count[row])
        steps[row, :, begin : begin + count] = 0
    dense, values, steps = (x.repeat_interleave(heads, 1) for x in (dense, values, steps))
    turned = query @ hadamard(query.shape[-1], query.dtype, query.device) if stored.rotated else query
    scores = scaling * (query @ dense.transpose(-1, -2))
    variance = torch.einsum("bhqd,bhkd->bhqk", (scaling * turned) ** 2, steps**2 / 12)
    if softcap is not None:
        variance = (
            variance
            * torch.func.vmap(torch.func.grad(lambda s: softcap * torch.tanh(s / softcap)))(scores.flatten())
            .view_as(scores)
            .square()
        )
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores - variance / 2).masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., :61] @ values).transpose(1, 2)


@each_setting
@pytest.mark.parametrize("tokens", [1, 3, 18])  # a step, a few guesses, a chunk of a prompt
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"s_aux": torch.linspace(-1, 1, 4)}], ids=["", "cap", "sinks"])
def test_half_of_the_variance_is_taken_from_scores_of_rounded_keys(
    model: PreTrainedModel, packing: Packing, tokens: int, more: dict[str, Any]
) -> None:
    query, key, value = filled(model, packing, tokens)
    columns = torch.arange(61)
    mask = (columns <= columns[61 - tokens :, None])[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :7] = False
    module = model.model.layers[0].self_attn
    found, _ = unbiased_forward(module, query, key, value, mask, scaling=0.7, **more)
    want = by_hand(query, key, value, mask, scaling=0.7, **more)
    torch.testing.assert_close(found, want, atol=1e-9, rtol=0)
    plain, _ = forward(module, query, key, value, mask, scaling=0.7, **more)
    assert (plain - want).abs().max() > (1e-4 if packing.bits < 8 else 1e-7)


@pytest.mark.parametrize("token_group", [0, 32])
def test_rounded_keys_weigh_on_average_what_exact_ones_do(token_group: int) -> None:
    torch.manual_seed(0)
    key, query = 2 * torch.randn(1, 1, 4096, 64), torch.randn(1, 1, 32, 64) / 4
    store = TokenStore(key, bits=3, group_size=None, tokens=token_group)
    store.append(key, None)
    packed = store.buffers.slice(0, 4096)
    exact, scores = (query @ x.transpose(-1, -2) for x in (key, packed.dense(torch.float32)))
    ratios = (scores - exact).exp().mean(-1), (scores - exact - packed.variance(query) / 2).exp().mean(-1)
    assert ratios[0].mean() > 1.1
    assert ratios[1].mean() == pytest.approx(1, abs=0.03)


@torch.no_grad()
def test_on_a_trained_model_the_kl_falls_and_more_so_with_a_token_intact() -> None:
    full, tokenizer = load_model(MODEL, dtype=torch.float32), load_tokenizer(MODEL)
    ids = torch.tensor(tokenizer(read_text(TEXT), add_special_tokens=False, verbose=False).input_ids[: 4 * 119])
    ids = torch.cat([torch.full((4, 1), tokenizer.bos_token_id), ids.view(4, 119)], 1)
    want = full(ids).logits[:, 40:].log_softmax(-1)

    def kl(keep: int, unbiased: bool) -> float:
        cache = PackedCache(full.config, Packing(bits=2, keep=keep, residual=8, keys="per_token"))
        with read_packed(full, unbiased=unbiased):
            out = [full(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise((0, 24, *range(40, 121, 8)))]
        found = torch.cat(out, 1)[:, 40:].log_softmax(-1)
        return float((want.exp() * (want - found)).sum(-1).mean())

    figures = {(keep, unbiased): kl(keep, unbiased) for keep in (0, 1) for unbiased in (False, True)}
    assert figures[1, True] < 0.8 * figures[1, False], figures
    assert figures[0, True] < figures[0, False], figures


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gemma3", "gpt-neox", "cohere2"])
def test_a_padded_batch_equals_its_rows_alone_and_an_artifact_stays_intact(name: str) -> None:
    model = build(by_name(name), dtype=torch.float64)
    kv = capture(model, prompts(1, 3)[0])
    packing = Packing(bits=3, residual=2, keys="per_token")
    rows = [torch.cat([kv.ids, prompts(1, n, seed=n)[0]]) for n in (21, 15)]
    ids, mask, _ = padded(rows, "left")
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True,
                                "return_dict_in_generate": True}  # fmt: skip

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        cache = PackedCache(model.config, packing)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
        return torch.stack(out.logits, 1)

    with attach(model, kv):
        with read_packed(model):
            biased = logits(ids, mask)
        with read_packed(model, unbiased=True):
            together = logits(ids, mask)
            alone = [logits(row[None], torch.ones(1, len(row), dtype=torch.int64)) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-9, rtol=0)
    assert (together - biased).abs().max() > 1e-6
    assert torch.equal(together[:, 0], biased[:, 0])  # a first prompt reads nothing rounded


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_architecture_is_read_unbiased_or_refused(architecture: Any) -> None:
    model, ids = build(architecture), prompts(2, 24)

    def last(unbiased: bool) -> Tensor:
        cache = PackedCache(model.config, Packing(bits=2, keys="per_token"))
        with read_packed(model, unbiased=unbiased):
            model(ids[:, :12], past_key_values=cache)
            return model(ids[:, 12:14], past_key_values=cache).logits

    if architecture.name in REFUSED:
        with pytest.raises(IntactKVError, match=r"leave it out|no full-attention layer"):
            last(unbiased=True)
    else:
        assert (last(unbiased=True) - last(unbiased=False)).abs().max() > 1e-4


def test_what_cannot_be_unbiased_is_refused(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for way in ("compile", "graphs"):
        monkeypatch.setattr("intactkv.packed.reads.on_gpu", lambda x: True)
        with pytest.raises(IntactKVError, match="neither compiled nor from graphs"):
            read_packed(model, unbiased=True, **{way: True})
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    with pytest.raises(IntactKVError, match="LlamaForCausalLM does not; leave it out"):
        read_packed(model, unbiased=True)
    with read_packed(model):
        pass
    query, key, value = filled(model, SETTINGS["per token"], 1)
    mask, module = torch.ones(2, 1, 1, 61, dtype=torch.bool), model.model.layers[0].self_attn
    with pytest.raises(IntactKVError, match="neither dropout nor a position bias"):
        unbiased_forward(module, query, key, value, mask, dropout=0.1)
