"""Where models run, and in which dtype, by names that mean the fastest that is right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from models import build, by_name
from safetensors.torch import load_file, save_file

from intactkv import IntactKVError
from intactkv.load import device_named, dtype_named, load_model, load_model_on, load_tokenizer

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.dtype]:
    folder = tmp_path_factory.mktemp("stored")
    build(by_name("llama-gqa"), dtype=request.param).save_pretrained(folder)
    return folder, request.param


@pytest.mark.parametrize("capable", [True, False, None])
def test_a_dtype_that_is_slow_on_this_processor_becomes_float32(
    stored: tuple[Path, torch.dtype], capable: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 without instructions, float16 always; an older torch that cannot tell counts as without."""
    folder, dtype = stored
    if capable is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not capable)
    assert dtype_named("auto", folder, CPU) == (torch.float32 if slow else "auto")
    assert load_model_on(folder, "cpu").dtype == (torch.float32 if slow else dtype)
    assert dtype_named("auto", folder, CARD) == "auto"
    assert dtype_named("bfloat16", folder, CPU) == torch.bfloat16


@pytest.mark.parametrize("name", ["int8", "floaty", "nn"])
def test_unknown_dtypes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match=f"--dtype {name} is unknown to torch; use auto, float32"):
        dtype_named(name, tmp_path, CPU)


def test_an_accelerator_is_taken_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert device_named("auto") == torch.device("cuda:1")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert device_named("auto") == CPU, "there is no float64 on it"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device_named("auto") == CPU


def test_weights_packed_by_another_version_are_refused(tmp_path: Path) -> None:
    """Before compressed-tensors 0.18 ten 3-bit values took an integer; today's reader would make others of them."""
    pytest.importorskip("llmcompressor")
    from intactkv.quantize import RTN, quantize

    quantize(build(by_name("llama-gqa")), tmp_path / "w3", method=RTN(3, 16))
    load_model(tmp_path / "w3")
    file = tmp_path / "w3" / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        rows, columns = tensors[name.replace("packed", "shape")].tolist()
        tensors[name] = torch.zeros(rows, math.ceil(columns / 10), dtype=torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "w3" / "config.json").read_text())
    config["quantization_config"]["version"] = "0.17.1"
    (tmp_path / "w3" / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntactKVError, match=r"by compressed-tensors 0\.17\.1: rows of .* take \d+ integers, where"):
        load_model(tmp_path / "w3")


def test_a_mistyped_name_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def model_info(self: object, name: str, **settings: object) -> None:
        asked.append((name, settings))
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-w3").mkdir()
    for load in (load_model, load_tokenizer):
        with pytest.raises(IntactKVError, match=r"smolm2-w3 is no folder here, .*did you mean smollm2-w3\?"):
            load("smolm2-w3")
    assert asked == [("smolm2-w3", {"timeout": 5})], "once, and not for long"
    with pytest.raises(IntactKVError, match=r"\./smolm2-w3 is not a folder; did you mean smollm2-w3\?"):
        load_model("./smolm2-w3")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(IntactKVError, match=r"model\.gguf is a file, and a model is a folder here; of a GGUF"):
        load_model("model.gguf")
    assert len(asked) == 1


def test_a_bias_of_zeros_is_nothing_lost_and_any_other_is(tmp_path: Path) -> None:
    model = build(by_name("llama-gqa"))
    model.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.self_attn.q_proj.bias"
    tensors = load_file(file)
    save_file({**tensors, name: torch.zeros(64)}, file, metadata={"format": "pt"})
    ids = torch.arange(8, 20)[None]
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)
    save_file({**tensors, name: torch.full((64,), 1e-3)}, file, metadata={"format": "pt"})
    with pytest.raises(IntactKVError, match=f"unexpected keys such as {name}"):
        load_model(tmp_path)
