"""A quantized checkpoint is packed on disk, is the textbook's rounding, and leaves no trace anywhere else."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from intactkv.error import IntactKVError
from intactkv.files import scratch_beside
from intactkv.quantizing import RTN, quantize

pytest.importorskip("llmcompressor")
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # how `dequantize` is given
logger = pytest.importorskip("loguru").logger

# |w - deq(q(w))| / scale may exceed 1/2 by this much: bfloat16 rounds w/scale itself to 8 significant bits.
EXCESS = {torch.float32: 1e-4, torch.bfloat16: 0.15}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GROUP = 32
ids = torch.arange(24).reshape(2, 12)

every_method = pytest.mark.parametrize(
    "method",
    [RTN(bits, GROUP, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)],
    ids=lambda m: f"{m.bits}bit-{'sym' if m.symmetric else 'asym'}",
)


def tiny(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=64, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def dense(checkpoint: Path) -> PreTrainedModel:
    config = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config).eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def rounded(weight: Tensor, method: RTN) -> tuple[Tensor, Tensor]:
    """Round to nearest as a textbook writes it: the dequantized weight, and the scale of every element."""
    w = weight.unflatten(-1, (-1, method.group_size))
    top = 2**method.bits - 1
    if method.symmetric:
        scale = w.abs().amax(-1, keepdim=True) / (top / 2)
        low, high, zero = -(top + 1) // 2, top // 2, torch.zeros_like(scale)
    else:
        least, most = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
        scale = (most - least) / top
        low, high, zero = 0, top, (-least / scale).round()
    q = (w / scale + zero).round().clamp(low, high)
    return ((q - zero) * scale).flatten(-2), scale.expand_as(w).flatten(-2)


def quantized_(model: PreTrainedModel, method: RTN) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.data = rounded(module.weight.data, method)[0]
    return model


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@every_method
def test_loaded_logits_are_those_of_an_independent_rounding(method: RTN, tmp_path: Path) -> None:
    loaded = dense(quantize(tiny(), tmp_path / "q", method=method))
    expected = logits(quantized_(tiny(), method))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(tiny()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_loading_without_flags_gives_the_same_bits(symmetric: bool, tmp_path: Path) -> None:
    out = quantize(tiny(), tmp_path / "q", method=RTN(3, GROUP, symmetric))
    try:
        plain = AutoModelForCausalLM.from_pretrained(out)
    except RuntimeError:
        assert not symmetric, "symmetric checkpoints load everywhere"
        pytest.skip("this transformers loads asymmetric checkpoints only with dequantize=True")
    assert torch.equal(logits(plain), logits(dense(out)))


@every_method
def test_weights_are_packed_on_disk(method: RTN, tmp_path: Path) -> None:
    out = quantize(tiny(), tmp_path / "q", method=method)
    model, stored = tiny(), load_file(out / "model.safetensors")
    for name, layer in model.model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        kept = {key: t for key, t in stored.items() if key.startswith(f"model.{name}.")}
        size = {key.rpartition(".")[2]: t.numel() * t.element_size() for key, t in kept.items()}
        groups = layer.weight.numel() // GROUP
        assert size.pop("weight_packed") * 8 == layer.weight.numel() * method.bits
        assert size.pop("weight_scale") == groups * 4
        assert size.pop("weight_shape") == 16
        assert size == ({} if method.symmetric else {"weight_zero_point": groups * method.bits // 8})
    torch.testing.assert_close(stored["model.embed_tokens.weight"], model.model.embed_tokens.weight.data)


@pytest.mark.parametrize("dtype", EXCESS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_scale(dtype: torch.dtype, symmetric: bool, tmp_path: Path) -> None:
    method = RTN(4, GROUP, symmetric)
    full = tiny(dtype)
    loaded = dense(quantize(full, tmp_path / "q", method=method))
    for name, layer in full.model.named_modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.data.float()
            error = (weight - loaded.model.get_submodule(name).weight.data.float()).abs()
            assert (error / rounded(weight, method)[1]).max() <= 0.5 + EXCESS[dtype]
    assert loaded.dtype == dtype


def test_source_is_unchanged_and_its_tokenizer_copied(tmp_path: Path) -> None:
    model, folder = tiny(torch.bfloat16), tmp_path / "full"
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "None"}')
    (folder / "merges.txt").write_text("a b\n")
    before, state = digests(folder), {name: t.clone() for name, t in model.state_dict().items()}
    from_folder = quantize(folder, tmp_path / "a", method=RTN(4, GROUP))
    from_memory = quantize(model, tmp_path / "b", method=RTN(4, GROUP))
    assert digests(folder) == before
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert not any(hasattr(module, "quantization_scheme") for module in model.modules())
    copied, weights = digests(from_folder), "model.safetensors"
    assert copied["tokenizer_config.json"] == before["tokenizer_config.json"]
    assert copied["merges.txt"] == before["merges.txt"]
    assert copied[weights] == digests(from_memory)[weights]


def test_nothing_else_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    heard: list[str] = []
    handler = logger.add(heard.append, format="{message}")
    environment = dict(os.environ)
    capfd.readouterr()
    quantize(tiny(), "q", method=RTN(4, GROUP))
    assert capfd.readouterr() == ("", "")
    assert (os.listdir(here), os.listdir(tmp_path)) == (["q"], ["here"])
    assert dict(os.environ) == environment
    assert heard == []
    logger.info("still heard")
    logger.remove(handler)
    assert heard == ["still heard\n"]


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    quantize(tiny(), tmp_path / "q", method=RTN(4, GROUP))  # an empty folder is free
    before = digests(tmp_path / "q")
    with pytest.raises(IntactKVError, match="q exists and is not empty; remove it or choose another folder"):
        quantize(tiny(), tmp_path / "q", method=RTN(3, GROUP))
    assert digests(tmp_path / "q") == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits=5 is not supported; use one of 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0 must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(IntactKVError, match=message):
        RTN(**settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RTN().bits = 3  # type: ignore[misc]


def test_a_refused_model_leaves_no_files(tmp_path: Path) -> None:
    experts = MixtralConfig(**SIZES, num_local_experts=2)
    cases = [
        (
            tiny(),
            RTN(4, 48),
            r"group_size=48 does not divide in_features=64 of model\.layers\.0\.self_attn\.q_proj",
        ),
        (tiny(), RTN(4, 128), "group_size=128 does not divide in_features=64"),
        (
            AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2)),
            RTN(),
            "no torch.nn.Linear",
        ),
        (
            AutoModelForCausalLM.from_config(experts),
            RTN(4, GROUP),
            "transformers cannot load the quantized .*experts",
        ),
        (tmp_path / "absent", RTN(), "absent is not a folder; give a model's folder or its name on the Hub"),
    ]
    for model, method, message in cases:
        with pytest.raises(IntactKVError, match=message):
            quantize(model, tmp_path / "q", method=method)
        assert os.listdir(tmp_path) == []


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "full")
    weights = tmp_path / "full" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(IntactKVError, match="full cannot be loaded as a causal LM: "):
        quantize(tmp_path / "full", tmp_path / "q", method=RTN(4, GROUP))


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    once = quantize(tiny(), tmp_path / "once", method=RTN(4, GROUP))
    for model in (once, AutoModelForCausalLM.from_pretrained(once)):
        with pytest.raises(IntactKVError, match=r"quantized already \(compressed-tensors\); give the full"):
            quantize(model, tmp_path / "twice", method=RTN(4, GROUP))


def test_missing_llm_compressor_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    with pytest.raises(IntactKVError, match=r"pip install 'intactkv\[quantize\]'"):
        quantize(tiny(), tmp_path / "q", method=RTN())


def test_fused_experts_are_quantized_where_transformers_can_load_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=64)
    full = AutoModelForCausalLM.from_config(config)
    out = quantize(full, tmp_path / "q", method=RTN(8, GROUP))
    with safe_open(out / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.0.up_proj.weight_packed" in file.keys()  # noqa: SIM118
    torch.testing.assert_close(logits(dense(out)), logits(full), rtol=0, atol=0.02)


def test_a_name_on_the_hub_is_looked_for_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def model_info(self: object, name: str, **settings: object) -> None:
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(IntactKVError, match=r"owner/absent is no folder here, .* was not found on the Hub"):
        quantize("owner/absent", tmp_path / "q", method=RTN(4, 32))
    assert asked == ["owner/absent"]


def test_what_a_killed_run_left_behind_goes_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom intactkv.files import scratch_beside\n"
        "with scratch_beside(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'weights').write_bytes(b'x' * 100)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "q")])
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert sorted(each.name for each in left.iterdir()) == ["intactkv.lock", "weights"]
    (tmp_path / ".q-notes").mkdir()
    with scratch_beside(tmp_path / "q") as works, scratch_beside(tmp_path / "q") as too:
        quantize(tiny(), tmp_path / "q", method=RTN(4, GROUP, True))
        assert works.is_dir()
        assert too.is_dir()
    assert sorted(each.name for each in tmp_path.iterdir()) == [".q-notes", "q"]
