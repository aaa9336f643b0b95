"""Every method's checkpoint loads as what was made, and the KV beside it is the full model's in its basis."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PREFIX, VOCAB, build, by_name, prompts
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from intactkv import IntactKV, IntactKVError, attach, capture
from intactkv.artifact.digest import weights_digest
from intactkv.checkpoint.load import load_model
from intactkv.evaluating import Arm, evaluate, prefixed_windows, three_arms

pytest.importorskip("llmcompressor")

from compressed_tensors.offload.cache.cpu import CPUCache

from intactkv.quantizing import AWQ, GPTQ, PREFIX_KV, RECIPE, RTN, AutoRound, Method, Rotated, SmoothQuant, quantize
from intactkv.quantizing.compress import compress_
from intactkv.quantizing.made_for import MadeFor
from intactkv.quantizing.quiet import quiet

GROUP = 32
TRANSFORM, ATTACH = 1e-4, 2e-5  # on logits of up to 10, float32
METHODS: dict[str, Method] = {
    "rtn-w3": RTN(3, GROUP, symmetric=False),
    "rtn-w4a4kv4": RTN(4, GROUP, activation_bits=4, kv_bits=4),
    "rtn-w4-whole-rows": RTN(4, None),
    "gptq-w3": GPTQ(3, GROUP),
    "gptq-w2a4": GPTQ(2, None, activation_bits=4),
    "awq-w3": AWQ(3, GROUP),
    "awq-w4a4": AWQ(4, None, activation_bits=4, grid=4),
    "smoothquant-w8a8": SmoothQuant(),
    "smoothquant-gptq-w4": SmoothQuant(GPTQ(4, GROUP)),
    "rotated-w4a4": Rotated(),
    "rotated-gptq-w4a4kv4": Rotated(GPTQ(4, GROUP, activation_bits=4, kv_bits=4)),
    "rotated-r1-w3": Rotated(RTN(3, GROUP), rotations=("R1",), block_size=16),
}
windows = prefixed_windows(torch.arange(8, 8 + 64 * 12).remainder(VOCAB - 8) + 8, prefix=PREFIX, window=32)
ids = prompts(rows=2, length=24)


def full_model(name: str) -> PreTrainedModel:
    """A random model whose norms, and whose values against their output projection, have channels of unequal size."""
    model = build(by_name(name))
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + 1.5 * torch.rand(parameter.shape, generator=noise))
        for layer in model.model.layers:
            values, output = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
            heads = model.config.num_key_value_heads
            scale = torch.exp(torch.randn(len(values), generator=noise))
            values *= scale[:, None]
            output /= scale.view(heads, 1, -1).expand(heads, output.shape[1] // len(values), -1).flatten()
    return model


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(ids).logits


@dataclasses.dataclass
class Made:
    """One method on one model: in memory on the way, and as the checkpoint on disk."""

    method: Method
    full: PreTrainedModel
    transformed: Tensor
    with_itself: Tensor
    kv: IntactKV
    quantized: Tensor
    folder: Path


@pytest.fixture(scope="module", params=[(a, m) for a in ("llama-gqa", "llama-mha") for m in METHODS], ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    architecture, name = request.param
    method, folder = METHODS[name], tmp_path_factory.mktemp("made")
    full, seen = full_model(architecture), {}
    model = reloaded(full, folder / "full")

    def look(transformed: PreTrainedModel) -> None:
        seen["transformed"], seen["kv"] = logits(transformed), capture(transformed, PREFIX)
        with attach(transformed, seen["kv"]):
            seen["with_itself"] = logits(transformed)

    ids = torch.tensor(PREFIX)
    made_for = MadeFor.decide(full, ids, method, windows.ids, None, []) if method.needs_calibration else None

    def look_and_show(transformed: PreTrainedModel) -> None:
        look(transformed)
        if made_for is not None:
            made_for.aware.show(seen["kv"])

    with quiet():
        compress_(model, method, windows.ids, aware=made_for and made_for.aware, transformed=look_and_show)
    out = quantize(folder / "full", folder / "q", method=method, calibration=windows.ids, prefix=PREFIX)
    return Made(method, full, quantized=logits(model), folder=out, **seen)


def test_the_transformed_model_is_the_full_one(made: Made) -> None:
    torch.testing.assert_close(made.transformed, logits(made.full), rtol=0, atol=TRANSFORM)
    torch.testing.assert_close(made.with_itself, made.transformed, rtol=0, atol=ATTACH)


def test_the_checkpoint_is_the_model_in_memory(made: Made) -> None:
    loaded = load_model(made.folder)
    torch.testing.assert_close(logits(loaded), made.quantized, rtol=0, atol=ATTACH)
    assert not torch.allclose(logits(loaded), logits(made.full), rtol=0, atol=0.01)


def test_a_loaded_checkpoint_moves_to_another_device_whole(made: Made) -> None:
    """compressed-tensors unpacks into a store of its own, out of which `.to` moves nothing."""
    moved = load_model(made.folder).to("meta")
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}
    assert moved(ids.to("meta")).logits.device.type == "meta"


def test_the_kv_beside_it_is_the_transformed_models(made: Made) -> None:
    kv = IntactKV.load(made.folder / PREFIX_KV)
    assert all(torch.equal(kv.tensors[name], tensor) for name, tensor in made.kv.tensors.items())
    assert kv.provenance["basis"] == made.method.basis
    assert kv.provenance["weights"] == weights_digest(made.full)
    raw = capture(made.full, PREFIX)
    off = max(float((a - b).abs().max()) for i in raw.layers for a, b in zip(raw.layers[i], kv.layers[i], strict=True))
    values_move = "R2" in made.method.basis or (
        made.method.basis == "awq" and made.full.config.num_key_value_heads == made.full.config.num_attention_heads
    )
    assert (off > 0.1) == values_move, "the basis changes for AWQ on as many value as query heads and for R2, alone"
    torch.testing.assert_close(kv.logits, raw.logits, rtol=0, atol=TRANSFORM)


def test_three_arms_run_and_the_prefix_is_intact(made: Made) -> None:
    loaded, kv = load_model(made.folder), IntactKV.load(made.folder / PREFIX_KV)
    evaluation = three_arms(made.full, loaded, kv, windows, block_mse=False)
    assert {row["arm"] for row in evaluation.table()} == {"full", "own", "intact"}
    with attach(loaded, kv):
        cache = loaded(ids, use_cache=True).past_key_values
    for i, (key, value) in kv.layers.items():
        assert torch.equal(cache.layers[i].keys[0, :, : len(kv)], key)
        assert torch.equal(cache.layers[i].values[0, :, : len(kv)], value)


def test_the_recipe_is_plain_json(made: Made) -> None:
    said = json.loads((made.folder / RECIPE).read_text())
    assert said["method"] == type(made.method).__name__
    assert (said["basis"], said["prefix"]) == (made.method.basis, PREFIX)
    assert (said["calibration"] is not None) == made.method.needs_calibration
    assert said["versions"]["llmcompressor"]
    assert not (made.folder / "recipe.yaml").exists()


def test_awq_values_are_the_full_models_by_a_scale_and_raw_ones_do_harm(tmp_path: Path) -> None:
    full, text = (
        full_model("llama-mha"),
        torch.randint(8, VOCAB, (16 * 61,), generator=torch.Generator().manual_seed(5)),
    )
    out = quantize(full, tmp_path / "q", method=AWQ(4, GROUP), calibration=windows.ids, prefix=PREFIX)
    model, raw, captured = load_model(out), capture(full, PREFIX), IntactKV.load(out / PREFIX_KV)
    for i in raw.layers:
        torch.testing.assert_close(captured.layers[i][0], raw.layers[i][0], rtol=0, atol=TRANSFORM)
        scale = raw.layers[i][1] / captured.layers[i][1]  # (head, prefix, dim)
        torch.testing.assert_close(scale, scale[:, :1].expand_as(scale), rtol=1e-2, atol=0)
        assert scale.max() / scale.min() > 10
    arms = [Arm("own", model), Arm("raw", model, raw), Arm("captured", model, captured)]
    evaluation = evaluate(full, arms, prefixed_windows(text, prefix=PREFIX, window=64), block_mse=False)
    kl = {row["arm"]: row["kl_mean"] for row in evaluation.table()}
    assert kl["captured"] < kl["own"] < kl["raw"]
    assert evaluation.gap_closed(own="own", intact="captured").low > 0
    assert evaluation.gap_closed(own="own", intact="raw").high < -1  # more than twice as far off as without


def test_r2_rotates_values_and_raw_ones_do_harm(tmp_path: Path) -> None:
    full = full_model("llama-gqa")
    out = quantize(full, tmp_path / "q", method=Rotated(RTN(4, GROUP)), prefix=PREFIX)
    model, raw, captured = load_model(out), capture(full, PREFIX), IntactKV.load(out / PREFIX_KV)
    for i in raw.layers:
        a, b = raw.layers[i][1], captured.layers[i][1]
        rotation = torch.linalg.lstsq(a.flatten(0, 1), b.flatten(0, 1)).solution
        assert (a - b).abs().max() > 0.1
        torch.testing.assert_close(a.norm(dim=-1), b.norm(dim=-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.flatten(0, 1) @ rotation, b.flatten(0, 1), rtol=0, atol=TRANSFORM)
    arms = [Arm("own", model), Arm("raw", model, raw), Arm("captured", model, captured)]
    kl = {row["arm"]: row["kl_mean"] for row in evaluate(full, arms, windows, block_mse=False).table()}
    assert kl["captured"] < kl["own"] < kl["raw"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_half_precision_model_is_rotated_and_captured_in_float32(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if elsewhere:  # an accelerator works on copies of the weights, in which changes are lost
        monkeypatch.setattr(CPUCache, "onload", lambda self, x: None if x is None else copy.deepcopy(x))
    full = full_model("llama-gqa").to(torch.bfloat16)
    exact = quantize(full, tmp_path / "exact", method=Rotated(RTN(8, GROUP)), prefix=PREFIX, dtype=torch.float32)
    narrow = quantize(full, tmp_path / "narrow", method=Rotated(RTN(8, GROUP)), prefix=PREFIX)
    expected, kv = (IntactKV.load(folder / PREFIX_KV) for folder in (exact, narrow))
    for i, states in expected.layers.items():
        for a, b in zip(states, kv.layers[i], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
    assert {p.dtype for p in load_model(narrow).model.embed_tokens.parameters()} == {torch.bfloat16}
    assert kv.provenance["basis"] == "rotated R1 R2 R4"


def test_a_rotated_checkpoint_in_shards_loads_exactly(tmp_path: Path) -> None:
    model = reloaded(full_model("llama-gqa"), tmp_path / "full")
    with quiet():
        compress_(model, Rotated())
        expected = logits(model)
        model.save_pretrained(tmp_path / "q", max_shard_size="50KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 1
    torch.testing.assert_close(logits(load_model(tmp_path / "q")), expected, rtol=0, atol=ATTACH)


def test_a_missing_online_rotation_is_refused(tmp_path: Path) -> None:
    out = quantize(full_model("llama-gqa"), tmp_path / "q", method=Rotated())
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["transform_config"]["config_groups"].pop("R4")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntactKVError, match=r"unexpected keys such as .*R4"):
        load_model(out)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "gpt-neox"])
def test_a_rotation_that_changes_the_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match=r"rotated R1 R2 R4 changes what|Rotated fails on|no power of two"):
        quantize(build(by_name(name)), tmp_path / "q", method=Rotated(RTN(4, GROUP)))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral-sliding"])
@pytest.mark.parametrize("method", [AWQ(4, GROUP, grid=3), SmoothQuant(), Rotated()], ids=lambda m: m.basis)
def test_other_llama_like_architectures(name: str, method: Method, tmp_path: Path) -> None:
    full = build(by_name(name))
    out = quantize(full, tmp_path / "q", method=method, calibration=windows.ids[:4], prefix=PREFIX)
    kv = IntactKV.load(out / PREFIX_KV)
    three_arms(full, load_model(out), kv, windows, block_mse=False)
    torch.testing.assert_close(kv.logits, capture(full, PREFIX).logits, rtol=0, atol=TRANSFORM)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (GPTQ, {"bits": 5}, "bits=5 is not supported; use one of 2, 3, 4, 8"),
        (RTN, {"activation_bits": 16}, "activation_bits=16 is not supported"),
        (RTN, {"bits": None}, "bits=None is not supported"),
        (AWQ, {"group_size": 0}, "group_size=0 must be positive"),
        (AWQ, {"grid": 2}, "grid=2 leaves nothing to choose from"),
        (GPTQ, {"damping": 0}, "damping=0 must lie between 0 and 1"),
        (AutoRound, {"symmetric": False}, "symmetric=False would lose AutoRound's zero points"),
        (AutoRound, {"iterations": 0}, "iterations=0 must be positive"),
        (SmoothQuant, {"strength": 2}, "strength=2 must lie between 0 and 1"),
        (SmoothQuant, {"levels": AWQ()}, r"levels=AWQ\(.* must be RTN"),
        (Rotated, {"rotations": ("R3",)}, r"rotations=\('R3',\) must be some of"),
        (Rotated, {"block_size": 24}, "block_size=24 must be a power of two"),
    ],
)
def test_impossible_settings_are_refused(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(IntactKVError, match=message):
        method(**settings)


@pytest.mark.parametrize(
    ("method", "calibration", "message"),
    [
        (GPTQ(4, GROUP), None, "GPTQ learns from text and calibration is None; give token windows, or use RTN"),
        (Rotated(GPTQ(4, GROUP)), None, "Rotated learns from text and calibration is None"),
        (GPTQ(4, GROUP), torch.arange(8), "calibration is torch.int64 of shape"),
        (GPTQ(4, GROUP), torch.full((2, 8), VOCAB), f"ids from {VOCAB} to {VOCAB}, outside the vocabulary of {VOCAB}"),
        (GPTQ(4, GROUP), "some text", "calibration is text, but the model has no tokenizer"),
        (AWQ(4, 48), windows.ids, "group_size=48 does not divide in_features=64"),
        (Rotated(block_size=64), None, "block_size=64 does not divide the widths 64 and 96; use 32 or a smaller"),
    ],
)
def test_what_does_not_fit_is_refused(method: Method, calibration: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match=message):
        quantize(build(by_name("llama-gqa")), tmp_path / "q", method=method, calibration=calibration)
    assert os.listdir(tmp_path) == []


def test_a_text_calibrates_with_the_models_own_tokenizer(tmp_path: Path) -> None:
    from intactkv.demo import MODEL, TEXT

    full = AutoModelForCausalLM.from_pretrained(MODEL)
    full.config.num_hidden_layers, full.model.layers = 1, full.model.layers[:1]
    full.config.layer_types = None
    full.save_pretrained(tmp_path / "full")
    for file in MODEL.glob("*token*"):
        (tmp_path / "full" / file.name).write_bytes(file.read_bytes())
    text = TEXT.read_text(encoding="utf-8")[:3000]
    out = quantize(tmp_path / "full", tmp_path / "q", method=GPTQ(4, 64), calibration=text, prefix=[0])
    assert json.loads((out / RECIPE).read_text())["calibration"]["windows"] >= 1
    assert IntactKV.load(out / PREFIX_KV).provenance["tokenizer"]


def test_progress_counts_every_block_of_every_step(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    settings: dict[str, Any] = {"method": AWQ(4, GROUP, grid=3), "calibration": windows.ids[:4]}
    quantize(build(by_name("llama-gqa")), tmp_path / "q", **settings, progress=lambda *now: heard.append(now))
    blocks = 3 + 1  # and what comes after them
    assert heard == [(i, blocks + 1 + 1) for i in range(1, blocks + 3)]


def test_no_trace_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from llmcompressor.core import LifecycleCallbacks, active_session
    from llmcompressor.pipelines.cache import IntermediatesCache

    def state() -> list[Any]:
        return [
            dict(os.environ),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            vars(IntermediatesCache)["pin_memory"],
            vars(LifecycleCallbacks)["sequential_epoch_end"],
            active_session(),
            {name: logging.getLogger(name).level for name in ("autoround", "torch.fx._symbolic_trace")},
        ]

    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    full, foreign = build(by_name("llama-gqa")), build(by_name("opt"))
    weights, before = weights_digest(full), state()
    capfd.readouterr()
    for name in ("awq-w3", "gptq-w3", "rotated-gptq-w4a4kv4"):
        quantize(full, name, method=METHODS[name], calibration=windows.ids[:4], prefix=PREFIX)
    with pytest.raises(IntactKVError):
        quantize(foreign, "no", method=SmoothQuant(), calibration=windows.ids[:4])
    assert capfd.readouterr() == ("", "")
    assert sorted(os.listdir(here)) == ["awq-w3", "gptq-w3", "rotated-gptq-w4a4kv4"]
    assert state() == before
    assert weights_digest(full) == weights


@pytest.mark.slow  # AutoRound takes some 15 s for even the smallest model
@pytest.mark.parametrize("architecture", ["llama-gqa", "llama-mha"])
def test_autoround(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    full, method = full_model(architecture), AutoRound(3, GROUP, iterations=5)
    model = reloaded(full, tmp_path / "full")
    random, environment = torch.get_rng_state(), dict(os.environ)
    capfd.readouterr()
    out = quantize(full, "q", method=method, calibration=windows.ids, prefix=PREFIX, prefix_weight=1)
    assert capfd.readouterr() == ("", "")
    assert (torch.equal(torch.get_rng_state(), random), dict(os.environ)) == (True, environment)
    assert not torch.are_deterministic_algorithms_enabled()
    assert sorted(os.listdir(tmp_path)) == ["full", "q"]
    kv, raw = IntactKV.load(out / PREFIX_KV), capture(full, PREFIX)
    assert all(torch.equal(kv.tensors[name], tensor) for name, tensor in raw.tensors.items()), "captured in float32"
    assert kv.provenance["basis"] == "full"
    with quiet():
        compress_(model, method, windows.ids)
    loaded = load_model(out)
    assert loaded.dtype == model.dtype == torch.bfloat16
    for name, parameter in loaded.named_parameters():  # AutoRound's own product and ours differ in bfloat16's last bit
        if name.endswith("proj.weight"):
            torch.testing.assert_close(parameter, model.get_parameter(name), rtol=2**-6, atol=1e-4)
    three_arms(full, loaded, kv, windows, block_mse=False)


def test_auto_round_computes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcompressor.modifiers.autoround import base

    told, auto_round = [], base.AutoRound
    monkeypatch.setattr(
        base, "AutoRound", lambda **settings: told.append(settings["device_map"]) or auto_round(**settings)
    )
    printed = repr(torch.tensor([0.0, 0.9]))
    with quiet():
        compress_(reloaded(full_model("llama-gqa"), tmp_path), AutoRound(4, GROUP, iterations=1), windows.ids[:2],
                  device="cpu")  # fmt: skip
        assert repr(torch.tensor([0.0, 0.9])) != printed, "AutoRound sets no print options any more"
    assert set(told) == {"cpu"}
    assert repr(torch.tensor([0.0, 0.9])) == printed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*METHODS, "autoround-w3"])
def test_a_gpu_quantizes_as_the_cpu_does(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    full, method = full_model("llama-gqa"), METHODS.get(name, AutoRound(3, GROUP, iterations=8))
    made = {}
    for device in ("cpu", "cuda"):
        out = quantize(full, tmp_path / device, method=method, calibration=windows.ids, prefix=PREFIX, dtype=dtype,
                       device=device)  # fmt: skip
        made[device] = Arm(device, load_model(out), IntactKV.load(out / PREFIX_KV))
    for i, states in made["cpu"].kv.layers.items():
        for a, b in zip(states, made["cuda"].kv.layers[i], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)
    found = evaluate(full, list(made.values()), windows, block_mse=False)
    kl = {row["arm"]: row["kl_mean"] for row in found.table()}
    assert kl["cuda"] == pytest.approx(kl["cpu"], rel=0.25)
