"""Laws of capture: what is recorded is what the model's own cache gets, and the model is left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, PREFIX, VOCAB, Architecture, build, by_name
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from intactkv import IntactKV, attach, capture
from intactkv.artifact.digest import weights_digest
from intactkv.artifact.fingerprint import fingerprint
from intactkv.capturing.live import tokenizer_digest
from intactkv.error import IntactKVError

LONG = [*PREFIX, *range(9, 22)]  # twice the sliding windows of the tiny models
SEVERAL = [
    "llama-gqa",
    "mistral-sliding",
    "gpt2",
    "gemma3",
    "deepseek-v3",
    "falcon-alibi",
    "bloom",
    "qwen3-moe",
    "gpt-oss",
]
SEVERAL += ["gemma3n", "lfm2"]
several = pytest.mark.parametrize("name", SEVERAL)
llama = by_name("llama-gqa")


def bits(kv: IntactKV) -> dict[str, Any]:
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, t in kv.tensors.items()
    }


def tiny(**more: Any) -> LlamaForCausalLM:
    """A Llama of two layers."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_hidden_layers": 2, **more})).eval()


def refused(make: Callable[[], Any], message: str) -> None:
    """Raises our error with a message of one sentence."""
    with pytest.raises(IntactKVError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# ------------------------------------------------------------------------------------------------ what is recorded


@torch.no_grad()
@several
def test_full_attention_layers_are_recorded_as_a_cache_holds_them(name: str) -> None:
    model = build(by_name(name))
    kv, cache = capture(model, LONG), DynamicCache(config=model.config)
    out = model(torch.tensor([LONG]), past_key_values=cache)
    compared = 0
    for i, layer in enumerate(cache.layers):
        if i in kv.layers and not layer.is_sliding:
            assert torch.equal(kv.layers[i][0], layer.keys[0])
            assert torch.equal(kv.layers[i][1], layer.values[0])
            compared += 1
    assert compared > 0 or name == "mistral-sliding"
    assert kv.ids.tolist() == LONG
    assert kv.logits.shape == out.logits.shape[1:]
    if name != "gemma3n":  # which caps them after the head
        assert torch.equal(kv.logits, out.logits[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2", "gemma3", "gpt-oss", "cohere2", "llama4"])
def test_a_prefix_longer_than_the_window_is_recorded_whole(name: str) -> None:
    model = build(by_name(name))
    kv, cache = capture(model, LONG), DynamicCache(config=model.config)
    model(torch.tensor([LONG]), past_key_values=cache)
    cut = 0
    for i, (key, value) in kv.layers.items():
        assert key.shape[1] == value.shape[1] == len(LONG)
        kept = cache.layers[i].keys.shape[2]  # a window keeps the last ones only
        assert torch.equal(key[:, -kept:], cache.layers[i].keys[0])
        assert torch.equal(value[:, -kept:], cache.layers[i].values[0])
        cut += kept < len(LONG)
    assert cut > 0, "no layer dropped anything: the test says nothing"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_a_shorter_prefix_is_the_beginning_of_a_longer_one(architecture: Architecture) -> None:
    if architecture.recurrent:
        pytest.skip("recurrent layers compute chunks of another size in another order")
    model = build(architecture)
    short, long = capture(model, LONG[:5]), capture(model, LONG)
    assert short.layers.keys() == long.layers.keys()
    for i, pair in short.layers.items():
        for part, whole in zip(pair, long.layers[i], strict=True):
            torch.testing.assert_close(part, whole[:, :5], rtol=0, atol=10 * architecture.tolerance)


def test_multi_head_latent_attention_keeps_keys_and_values_of_different_width() -> None:
    kv = capture(build(by_name("deepseek-v3")), PREFIX)
    for key, value in kv.layers.values():
        assert key.shape[:2] == value.shape[:2]
        assert key.shape[2] != value.shape[2]
    assert kv.nbytes == sum(t.numel() for pair in kv.layers.values() for t in pair) * 4


def test_layers_without_keys_and_values_of_their_own_have_no_entry() -> None:
    gemma = build(by_name("gemma3n"))
    assert list(capture(gemma, PREFIX).layers) == [0, 1, 2]  # the fourth shares
    assert gemma.config.num_kv_shared_layers == 1
    assert list(capture(build(by_name("lfm2")), PREFIX).layers) == [1]  # between convolutions
    assert list(capture(build(by_name("qwen3-next")), PREFIX).layers) == [1, 3]  # between linear attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keys_values_and_logits_keep_the_models_dtype(dtype: torch.dtype) -> None:
    kv = capture(tiny().to(dtype), PREFIX)
    assert {t.dtype for t in kv.tensors.values()} == {torch.int64, dtype}
    assert kv.provenance["dtype"] == str(dtype).removeprefix("torch.")


def test_an_artifact_owns_its_memory() -> None:
    model, ids = tiny(), torch.tensor(PREFIX)
    kv = capture(model, ids)
    before = bits(kv)
    for tensor in kv.tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), "it keeps more alive"
        assert not tensor.requires_grad
    ids.zero_()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert bits(kv) == before


def test_capture_is_deterministic_and_says_where_it_comes_from() -> None:
    model = tiny()
    kv = capture(model, PREFIX)
    assert bits(capture(model, PREFIX)) == bits(capture(tiny(), PREFIX)) == bits(kv)
    assert kv.fingerprint == fingerprint(model.config)
    assert kv.provenance == {
        "model": "", "revision": None, "weights": weights_digest(model), "dtype": "float32", "tokenizer": None,
        "basis": "full", "calibration": None,
    }  # fmt: skip


class Vocabulary:
    """All of a tokenizer that its digest reads."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in reversed(list(enumerate(self.tokens)))}


def test_a_tokenizers_digest_is_of_its_numbering() -> None:
    digest = tokenizer_digest(Vocabulary("a", "b", "c"))
    assert digest == tokenizer_digest(Vocabulary("a", "b", "c"))
    assert len({digest, *(tokenizer_digest(Vocabulary(*t)) for t in ("acb", "ab", "abcd", ("a", "bc")))}) == 5
    assert capture(tiny(), PREFIX, tokenizer=Vocabulary("a", "b", "c")).provenance["tokenizer"] == digest


# ------------------------------------------------------------------------------------------------ which ids


@pytest.mark.parametrize(
    "ids",
    [
        tuple(PREFIX), torch.tensor(PREFIX), torch.tensor(PREFIX, dtype=torch.int32), np.array(PREFIX), range(1, 4),
        torch.tensor(PREFIX, dtype=torch.uint8), np.array(PREFIX, dtype=np.int16), [np.int64(1), 5, 7],
    ],
    ids=lambda ids: f"{type(ids).__name__} {getattr(ids, 'dtype', '')}",
)  # fmt: skip
def test_ids_may_come_as_any_flat_integers(ids: Any) -> None:
    kv = capture(tiny(), ids)
    assert kv.ids.tolist() == [int(i) for i in ids]
    assert kv.ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, -1], f"holds id -1, outside 0…{VOCAB - 1}, the model's vocabulary; take the ids from"),
        ([1, VOCAB], f"holds id {VOCAB}, outside 0…{VOCAB - 1}, the model's vocabulary; take the ids from"),
        (torch.tensor([200], dtype=torch.uint8), "holds id 200, outside"),
        (list(range(90, 10**4)), f"holds id {VOCAB}, outside"),
        ([], r"shape \(0,\); give one flat, non-empty list"),
        (torch.zeros(0, dtype=torch.int64), r"shape \(0,\); give one flat, non-empty list"),
        ([PREFIX], r"shape \(1, 3\); give one flat, non-empty list"),
        (7, r"shape \(\); give one flat, non-empty list"),
        ([1, 5.5], "holds torch.float32 numbers; give integer ids"),
        ([1, 5.0], "holds torch.float32 numbers; give integer ids"),
        (torch.tensor([1.0, 5.0], dtype=torch.float64), "holds torch.float64 numbers; give integer ids"),
        ([True, False], "holds torch.bool numbers; give integer ids"),
        ([1j], "holds torch.complex64 numbers; give integer ids"),
        ("<s>", "is no list of token ids .*; give one flat list of integers"),
        (["<s>", "user"], "is no list of token ids .*; give one flat list of integers"),
        ({"input_ids": [1, 5]}, "is no list of token ids .*; give one flat list of integers"),
        ([[1], [5, 7]], "is no list of token ids .*; give one flat list of integers"),
        ([1, None], "is no list of token ids .*; give one flat list of integers"),
        ([2**70], "is no list of token ids .*; give one flat list of integers"),
        (None, "is no list of token ids .*; give one flat list of integers"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_other_ids_are_refused(ids: Any, message: str) -> None:
    refused(lambda: capture(tiny(), ids), message)


# ------------------------------------------------------------------------------------------ the model stays as it was


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """Everything that a capture could leave behind."""
    modules = {
        name: (module.training, set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    tensors = {name: (id(p), p.requires_grad, p.grad is None, p._version) for name, p in model.named_parameters()}
    return modules, tensors, model.config.to_dict(), torch.get_rng_state().tolist(), torch.is_grad_enabled()


def mixed(model: PreTrainedModel) -> None:
    """Training mode with one part in eval mode, as where a part is frozen."""
    model.train()
    model.model.layers[1].eval()
    model.model.layers[1].self_attn.q_proj.train()


@pytest.mark.parametrize("mode", [nn.Module.train, nn.Module.eval, mixed], ids=["training", "eval", "mixed"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(mode: Callable[[Any], Any], fails: bool, monkeypatch: Any) -> None:
    model = tiny()
    mode(model)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    before = state(model)
    if fails:
        with monkeypatch.context() as patch:
            patch.setattr(type(model.model.layers[1].mlp), "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                capture(model, PREFIX)
    else:
        capture(model, PREFIX)
    assert state(model) == before


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = tiny().train()
    before = state(model)
    refused(lambda: capture(model, [VOCAB]), "outside")
    assert state(model) == before


def test_dropout_is_off_while_capturing() -> None:
    torch.manual_seed(0)
    model = build(by_name("gpt2"), attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5)
    want = bits(capture(model, PREFIX))
    model.train()
    cache = DynamicCache(config=model.config)
    model(torch.tensor([PREFIX]), past_key_values=cache)
    assert not torch.equal(cache.layers[1].keys[0], capture(model, PREFIX).layers[1][0]), "there is no dropout at all"
    assert bits(capture(model, PREFIX)) == want
    assert model.training


def test_gradient_checkpointing_and_frozen_modes_do_not_matter() -> None:
    model = tiny()
    want = bits(capture(model, PREFIX))
    model.train()
    model.gradient_checkpointing_enable()
    assert bits(capture(model, PREFIX)) == want
    assert model.is_gradient_checkpointing
    model.config.use_cache = False
    assert bits(capture(model, PREFIX)) == want
    with torch.inference_mode():
        assert bits(capture(model, PREFIX)) == want


# ------------------------------------------------------------------------------------------------ from a path


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_capture_from_a_path_equals_capture_from_the_model_in_float32(stored: torch.dtype, tmp_path: Path) -> None:
    tiny().to(stored).save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    kv = capture(model, PREFIX)
    for path in (tmp_path / "model", str(tmp_path / "model")):
        loaded = capture(path, PREFIX)
        assert loaded.layers[0][0].dtype == torch.float32
        assert bits(loaded) == bits(kv)
        assert loaded.fingerprint == kv.fingerprint
        assert loaded.provenance == kv.provenance
        assert loaded.provenance["model"] == str(path)
        attach(model, loaded).remove()


def test_paths_without_a_causal_lm_are_refused(tmp_path: Path) -> None:
    refused(lambda: capture(tmp_path / "absent" / "model", PREFIX), "is not a folder; give a model's folder")
    (tmp_path / "empty").mkdir()
    message = "cannot be loaded as a causal LM"
    refused(lambda: capture(tmp_path / "empty", PREFIX), message)
    t5().save_pretrained(tmp_path / "t5")
    refused(lambda: capture(tmp_path / "t5", PREFIX), message)
    tiny().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(lambda: capture(tmp_path / "cut", PREFIX), message)


def test_a_path_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.v_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: capture(tmp_path, PREFIX), "missing keys such as model.layers.1.self_attn.v_proj.weight")


def test_a_quantized_model_is_refused_or_told() -> None:
    model = tiny()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    refused(lambda: capture(model, PREFIX), r"quantized already \(gptq\); give the full-precision one")
    assert capture(model, PREFIX, allow_quantized=True).provenance["quantized"] == "gptq"
    assert "quantized" not in capture(tiny(), PREFIX).provenance


# ------------------------------------------------------------------------------------------------ which models


def t5() -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config).eval()


def test_encoder_decoders_are_refused() -> None:
    refused(lambda: capture(t5(), PREFIX), "t5 is an encoder-decoder; intact KV needs a decoder-only model")


def test_a_model_without_head_is_refused() -> None:
    base = LlamaModel(tiny().config)
    refused(lambda: capture(base, PREFIX), "LlamaModel has no output embedding; load it with AutoModelForCausalLM")


def test_an_attached_model_is_refused_until_it_is_detached() -> None:
    model = tiny()
    kv = capture(model, PREFIX)
    with attach(model, kv):
        refused(lambda: capture(model, PREFIX), "has an intact KV attached; remove it first")
    assert bits(capture(model, PREFIX)) == bits(kv)


def test_a_model_without_keys_and_values_is_refused() -> None:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    mamba = MambaForCausalLM(config).train()
    before = state(mamba)
    refused(
        lambda: capture(mamba, PREFIX), r"no layer of mamba called Cache.update.*; use a model with attention layers"
    )
    assert state(mamba) == before


def test_a_layer_that_updates_twice_is_refused() -> None:
    model = tiny()
    model.model.layers[1].self_attn.layer_idx = 0
    refused(lambda: capture(model, PREFIX), "layer 0 updates its cache twice in one forward; .* unsupported")


class Wrapper(nn.Module):
    """A model inside another module, as torch.compile and PEFT put it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny()


@pytest.mark.parametrize("make", [Wrapper, lambda: tiny().state_dict(), lambda: None, lambda: 3])
def test_what_is_no_model_is_refused(make: Callable[[], Any]) -> None:
    refused(
        lambda: capture(make(), PREFIX), "needs a transformers PreTrainedModel or a path, not .*; give it the model"
    )


class Logged(nn.Module):
    """A head that is called like any other."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.weight = inner.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)


def test_a_head_of_another_class_gives_the_same_logits() -> None:
    model = tiny()
    want = capture(model, PREFIX)
    model.set_output_embeddings(Logged(model.lm_head))
    assert torch.equal(capture(model, PREFIX).logits, want.logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_architecture_is_captured_without_a_warning(architecture: Architecture) -> None:
    model = build(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kv = capture(model, PREFIX)
    assert set(kv.layers) <= set(range(kv.fingerprint["num_hidden_layers"]))
    assert kv.logits.shape == (len(PREFIX), VOCAB)
    assert all(torch.isfinite(t).all() for t in kv.tensors.values())


def test_a_decoder_inside_a_multimodal_model_is_the_same_decoder() -> None:
    full = tiny()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **vision}
    llava = LlavaForConditionalGeneration(LlavaConfig(text_config=full.config, vision_config=vision)).eval()
    llava.model.language_model.load_state_dict(full.model.state_dict())
    llava.lm_head.load_state_dict(full.lm_head.state_dict())
    kv, inner = capture(full, PREFIX), capture(llava, PREFIX)
    assert bits(inner) == bits(kv)
    assert inner.fingerprint == kv.fingerprint
    with attach(llava, kv):
        assert llava(torch.tensor([[*PREFIX, 8]])).logits.shape == (1, 4, VOCAB)


@torch.no_grad()
def test_keys_and_values_that_are_not_finite_are_refused() -> None:
    for name, part in (("k_proj", "keys"), ("v_proj", "values")):
        model = build(llama)
        getattr(model.model.layers[2].self_attn, name).weight[0, 0] = float("nan")
        with pytest.raises(IntactKVError, match=f"the {part} of layer 2 hold NaN or infinity"):
            capture(model, PREFIX)


def test_a_bidirectional_model_is_refused() -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    torch.manual_seed(0)
    config = BertConfig(**sizes, num_attention_heads=4, initializer_range=0.15, is_decoder=True)
    model = BertLMHeadModel(config).eval()
    assert len(capture(model, PREFIX)) == len(PREFIX)
    config.is_decoder = False
    with pytest.raises(IntactKVError, match=r"bidirectional|Cache\.update"):
        capture(BertLMHeadModel(config).eval(), PREFIX)
    doge = build(by_name("llama-gqa"))
    for layer in doge.model.layers:
        layer.self_attn.is_causal = False
    doge.config._attn_implementation = "sdpa"
    with pytest.raises(IntactKVError, match="is bidirectional: a later token changes the first one's keys in layer 1"):
        capture(doge, PREFIX)
