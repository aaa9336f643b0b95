"""The basis of a quantized model's keys and values: what is exact in real arithmetic is recovered, the rest refused."""

from __future__ import annotations

import copy
import warnings
from functools import cache

import pytest
import torch
from models import PREFIX, build, by_name, prompts, reference_logits, rounded
from test_laws import differ
from torch import Tensor
from transformers import PreTrainedModel

from intactkv import IntactKV, IntactKVError, capture
from intactkv.basis.compare import Shown, align, basis, describe, embedding_change, show_noise
from intactkv.basis.relate import FLOOR, MIXED, nearest_rotation, relate, rescaled, slopes
from intactkv.checkpoint.load import load_model
from intactkv.demo import MODEL

P, DIM = len(PREFIX), 16


def kinds(full: PreTrainedModel, model: PreTrainedModel, part: str) -> set[str]:
    return {r.kind for r in basis(full, model) if r.part == part}


def hadamard(dim: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / dim**0.5


@torch.no_grad()
def value_scaled(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with v_proj's rows divided by s and o_proj's columns multiplied: AWQ's, on MHA models."""
    model = copy.deepcopy(model)
    for i, layer in enumerate(model.model.layers):
        s = 2 ** torch.randn(64, generator=torch.Generator().manual_seed(i))
        layer.self_attn.v_proj.weight /= s[:, None]
        layer.self_attn.o_proj.weight *= s[None, :]
    return model


@torch.no_grad()
def key_scaled(model: PreTrainedModel) -> PreTrainedModel:
    """A scale moved from k_proj into q_proj, equal in both channels of a RoPE pair: SmoothQuant's and OmniQuant's."""
    model = copy.deepcopy(model)
    for i, layer in enumerate(model.model.layers):
        s = 2 ** torch.randn(4, DIM // 2, generator=torch.Generator().manual_seed(i))
        s = torch.cat([s, s], 1).flatten()
        layer.self_attn.k_proj.weight /= s[:, None]
        layer.self_attn.q_proj.weight *= s[:, None]
    return model


@torch.no_grad()
def value_rotated(model: PreTrainedModel, rotation: Tensor) -> PreTrainedModel:
    """Values rotated within each head and rotated back in o_proj: QuaRot's and SpinQuant's R2."""
    model = copy.deepcopy(model)
    r = torch.block_diag(*[rotation.float()] * 4)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.copy_(r.T @ layer.self_attn.v_proj.weight)
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight @ r)
    return model


@torch.no_grad()
def stream_rotated(model: PreTrainedModel) -> PreTrainedModel:
    """The residual stream rotated and the norms folded into what follows them: QuaRot's and SpinQuant's R1."""
    model = copy.deepcopy(model)
    r = hadamard(64).float()
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ r)
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, [getattr(layer.self_attn, f"{n}_proj") for n in "qkv"]),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        ):
            for reader in readers:
                reader.weight.copy_((reader.weight * norm.weight) @ r)
            norm.weight.fill_(1)
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.copy_(r.T @ writer.weight)
    model.lm_head.weight.copy_((model.lm_head.weight * model.model.norm.weight) @ r)
    model.model.norm.weight.fill_(1)
    return model


@pytest.fixture(scope="module")
def mha() -> PreTrainedModel:
    model = build(by_name("llama-mha"), tie_word_embeddings=False)
    with torch.no_grad():  # norms that are not all ones
        for i, parameter in enumerate(p for n, p in model.named_parameters() if "norm" in n):
            parameter.copy_(1 + 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(i)))
    return model


REWRITES = {
    "values scaled": (value_scaled, "same", "scale"),
    "keys scaled": (key_scaled, "scale", "same"),
    "values rotated by Hadamard": (lambda m: value_rotated(m, hadamard(DIM)), "same", "rotation"),
    "values rotated": (
        lambda m: value_rotated(
            m, torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3)))[0]
        ),
        "same",
        "rotation",
    ),
    "stream rotated": (stream_rotated, "same", "same"),
    "stream and values rotated": (lambda m: value_rotated(stream_rotated(m), hadamard(DIM)), "same", "rotation"),
    "values and keys scaled": (lambda m: key_scaled(value_scaled(m)), "scale", "scale"),
}


@pytest.mark.parametrize("name", REWRITES)
@pytest.mark.parametrize("bits", [16, 8, 4, 3])
@torch.no_grad()
def test_an_equal_rewrite_is_recovered_through_rounding(mha: PreTrainedModel, name: str, bits: int) -> None:
    rewrite, key, value = REWRITES[name]
    if name == "values scaled":
        key, value = "same", "scale"
    rewritten = rewrite(mha)
    assert differ(rewritten(prompts()).logits, mha(prompts()).logits) <= 1e-4  # it is the same function
    model = rewritten if bits == 16 else rounded(rewritten, bits)
    found = basis(mha, model)
    assert {r.kind for r in found if r.part == "key"} == {key}
    assert {r.kind for r in found if r.part == "value"} == {value}
    want, raw = capture(rewritten, PREFIX), capture(mha, PREFIX)
    kv = align(raw, found)
    assert kv.provenance["basis"] == describe(found)
    for layer, pair in want.layers.items():
        for ours, theirs, before in zip(kv.layers[layer], pair, raw.layers[layer], strict=True):
            error = (ours - theirs).norm() / theirs.norm()
            assert error <= (1e-4 if bits == 16 else {8: 4e-3, 4: 0.05, 3: 0.12}[bits])
            if key != "same" and ours is kv.layers[layer][0]:
                assert error < 0.5 * (before - theirs).norm() / theirs.norm()
    if bits == 16:
        row = prompts()[0]
        assert differ(reference_logits(rewritten, kv, row), mha(row[None]).logits[0, P:]) <= 1e-3


@torch.no_grad()
def rounded_as(model: PreTrainedModel, bits: int, levels: str, group: int) -> PreTrainedModel:
    """Rounded to nearest: levels from the group's minimum ("float", as HQQ and GGUF's _1 have it), with a whole zero
    point, symmetric around 0, or with a whole zero point in the window of least error (learned clipping)."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or "embed" in name or "lm_head" in name:
            continue
        w = parameter.reshape(-1, group)
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        if levels == "float":
            scale = (high - low) / (2**bits - 1)
            parameter.copy_((((w - low) / scale).round() * scale + low).view_as(parameter))
            continue
        if levels == "symmetric":
            high = w.abs().amax(1, keepdim=True)
            low = -high
        best, least = w, torch.full_like(low, torch.inf)
        for clip in torch.linspace(0.4, 1, 13) if levels == "clipped" else (1.0,):
            scale = clip * (high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)
            zero = torch.full_like(low, -(2 ** (bits - 1))) if levels == "symmetric" else (clip * low / scale).round()
            q = (((w / scale).round() - zero).clamp(0, 2**bits - 1) + zero) * scale
            error = (q - w).square().sum(1, keepdim=True)
            best, least = torch.where(error < least, q, best), torch.minimum(error, least)
        parameter.copy_(best.view_as(parameter))
    return model


LEVELS = ["float", "whole", "symmetric", "clipped"]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "qwen3", "gemma3", "phi3", "deepseek-v3"])
def test_rounding_of_any_kind_is_no_change_of_basis(name: str, levels: str, bits: int) -> None:
    full, kv, shown = built(name)
    assert align(kv, basis(shown, rounded_as(full, bits, levels, 32 if name != "deepseek-v3" else 8))) is kv


@cache
def built(name: str) -> tuple[PreTrainedModel, IntactKV, Shown]:
    """A full model, its intact KV and what it shows, for all ways of rounding it."""
    full = build(by_name(name))
    return full, capture(full, PREFIX), show_noise(full)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_rounding_with_biases_is_no_change_of_basis(name: str, bits: int) -> None:
    full, kv, shown = built(name)
    assert align(kv, basis(shown, rounded(full, bits))) is kv


@pytest.fixture(scope="module")
def trained() -> PreTrainedModel:
    return load_model(str(MODEL), dtype=torch.float32)


@pytest.fixture(scope="module")
def shown(trained: PreTrainedModel) -> Shown:
    return show_noise(trained, windows=torch.arange(512).view(4, 128))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("levels", LEVELS)
def test_rounding_of_a_trained_model_is_no_change_of_basis(
    trained: PreTrainedModel, shown: Shown, levels: str, bits: int
) -> None:
    # its rows have heavy tails and its activations a mean, from which all of the false refusals came
    found = basis(shown, rounded_as(trained, bits, levels, 128))
    assert {r.kind for r in found} == {"same"}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("bits", [4, 3, 2])
@torch.no_grad()
def test_a_mild_scale_is_found_in_every_layer_of_a_trained_model(
    trained: PreTrainedModel, shown: Shown, levels: str, bits: int
) -> None:
    spread = {4: 0.08, 3: 0.12, 2: 0.3}[bits]  # of the logarithm of the scale; AWQ's are 0.08 to 0.25 here
    rewritten, scales = copy.deepcopy(trained), []
    for i, layer in enumerate(rewritten.model.layers):
        scale = (spread * torch.randn(128, generator=torch.Generator().manual_seed(i))).exp()
        layer.self_attn.v_proj.weight *= scale[:, None]  # o_proj does not matter here
        scales.append(scale.view(2, 64))
    served = rounded_as(rewritten, bits, levels, 128)
    found = [r for r in basis(shown, served) if r.part == "value"]
    assert {r.kind for r in found} == {"scale"}
    for r in found:
        wrong = r.transform.diagonal() / scales[r.layer][r.head] - 1
        assert wrong.std() < 0.5 * spread  # half of what no alignment at all gets wrong


@torch.no_grad()
def test_what_is_no_rewrite_of_the_model_is_refused(mha: PreTrainedModel) -> None:
    kv = capture(mha, PREFIX)
    shuffled = copy.deepcopy(mha)
    for layer in shuffled.model.layers:
        for name in "qkv":
            weight = getattr(layer.self_attn, f"{name}_proj").weight
            weight.copy_(weight.view(4, DIM, 64)[[1, 2, 3, 0]].reshape(64, 64))
        weight = layer.self_attn.o_proj.weight
        weight.copy_(weight.view(64, 4, DIM)[:, [1, 2, 3, 0]].reshape(64, 64))
    assert differ(shuffled(prompts()).logits, mha(prompts()).logits) <= 1e-4
    with pytest.raises(IntactKVError, match="no scaled or rotated form"):
        align(kv, basis(mha, shuffled))
    other = build(by_name("llama-mha"), seed=5, tie_word_embeddings=False)
    with pytest.raises(IntactKVError, match="embeddings are neither equal nor rotated"):
        basis(mha, other)
    same_embeddings = copy.deepcopy(other)
    same_embeddings.model.embed_tokens.weight.copy_(mha.model.embed_tokens.weight)
    with pytest.raises(IntactKVError, match="no scaled or rotated form"):
        align(kv, basis(mha, same_embeddings))
    fewer = build(by_name("llama-gqa"), tie_word_embeddings=False)
    fewer.model.embed_tokens.weight.copy_(mha.model.embed_tokens.weight)
    with pytest.raises(IntactKVError, match="shape"):
        basis(mha, fewer)


def tuned(model: PreTrainedModel, rate: float, steps: int = 20) -> PreTrainedModel:
    """A fine-tune of `model` on a few random windows."""
    model = copy.deepcopy(model).train()
    ids, optimizer = prompts(8, 24), torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_another_fine_tune_is_warned_about_and_a_far_one_refused(mha: PreTrainedModel) -> None:
    kv = capture(mha, PREFIX)
    for rate in (1e-4, 1e-3):
        model = tuned(mha, rate)
        assert FLOOR < embedding_change(mha, model) < MIXED
        for served in (model, rounded(model, 4)):
            with pytest.warns(UserWarning, match="another fine-tune of the same base"):
                basis(mha, served)
    with pytest.raises(IntactKVError, match=r"not another fine-tune|no scaled or rotated form"):
        align(kv, basis(mha, tuned(mha, 0.1)))


@pytest.mark.parametrize("bits", [16, 2])
def test_rounding_and_bfloat16_are_not_warned_about(mha: PreTrainedModel, bits: int) -> None:
    model = copy.deepcopy(mha).bfloat16().float() if bits == 16 else rounded(mha, bits)
    for rewritten in (model, stream_rotated(model)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            basis(mha, rewritten)


def test_relate_and_rotation_are_right_on_known_data() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    r = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    assert torch.allclose(nearest_rotation(a, a @ r), r, atol=1e-12)
    noisy = a @ hadamard(8) + 0.1 * torch.randn(400, 8, generator=generator, dtype=torch.float64)
    assert torch.equal(nearest_rotation(a, noisy), hadamard(8).sign() / 8**0.5)

    def kind(b: Tensor) -> str:
        full, model = (a[None, :200], a[None, 200:]), (b[None, :200], b[None, 200:])
        (scaled,) = rescaled([slopes(full, model)])
        return relate(full, model, 0, scaled=scaled)[0]

    def noise(rows: int, dim: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64)

    assert kind(a) == "same"
    assert kind(a + 0.3 * noise(400, 8)) == "same"
    assert kind(2 * a) == "scale"
    assert kind(a * torch.linspace(0.7, 1.3, 8) + 0.1 * noise(400, 8)) == "scale"
    assert kind(a * torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1])) == "scale"
    assert kind(a @ r) == "rotation"
    assert kind(a @ r + 0.3 * noise(400, 8)) == "rotation"
    assert kind(a @ noise(8, 8)) == "other"
    assert kind(noise(400, 8)) == "other"


def test_what_a_full_model_shows_stands_for_it(mha: PreTrainedModel) -> None:
    model = rounded(stream_rotated(mha), 4)
    together, apart = basis(mha, model), basis(show_noise(mha), model)
    assert {r.kind for r in together} == {"same"}  # the stream's rotation is undone, keys and values stay
    for one, other in zip(together, apart, strict=True):
        assert (one.layer, one.part, one.head, one.kind) == (other.layer, other.part, other.head, other.kind)
        assert one.residual == other.residual
