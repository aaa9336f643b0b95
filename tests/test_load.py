"""Where models run, and in which dtype, by names that mean the fastest that is right."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from models import build, by_name
from safetensors.torch import load_file, save_file

from intactkv import IntactKV, IntactKVError, attach, capture
from intactkv.checkpoint.load import device_named, dtype_named, load_model, load_model_on, load_tokenizer
from intactkv.checkpoint.source import checkpoint_digest, holds_floats
from intactkv.demo import MODEL

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
    from intactkv.quantizing import RTN, quantize

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
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    with pytest.raises(IntactKVError, match=r"model\.bin is a file; a model is a folder, a name on the Hub, or one"):
        load_model("model.bin")
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


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `full`, `F16` and `Q8_0`, the last two with a `model.gguf` of the first."""
    pytest.importorskip("gguf")
    from backends import gguf

    folder = tmp_path_factory.mktemp("gguf")
    build(by_name("llama-gqa")).save_pretrained(folder / "full")
    for kind in ("F16", "Q8_0"):
        gguf(folder / "full", folder / kind, kind=kind)
    return folder


def test_a_gguf_of_floats_is_a_full_model_and_any_other_a_quantized_one(ggufs: Path, tmp_path: Path) -> None:
    full, expected = ggufs / "F16" / "model.gguf", capture(ggufs / "full", [1, 5, 6])
    kv = capture(full, [1, 5, 6])
    for i, states in kv.layers.items():
        for a, b in zip(states, expected.layers[i], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.01)
    model = load_model(ggufs / "Q8_0" / "model.gguf")
    with attach(model, kv):
        model(torch.tensor([[1, 5, 6, 9]]))
    with pytest.raises(IntactKVError, match=r"quantized already \(gguf\)"):
        capture(ggufs / "Q8_0" / "model.gguf", [1])
    assert checkpoint_digest(full) != checkpoint_digest(ggufs / "Q8_0" / "model.gguf")
    pytest.importorskip("llmcompressor")
    from intactkv.quantizing import PREFIX_KV, RTN, quantize

    with pytest.raises(IntactKVError, match=r"quantized already \(gguf\)"):
        quantize(ggufs / "Q8_0" / "model.gguf", tmp_path / "q", method=RTN(4, 32))
    out = quantize(full, tmp_path / "q", method=RTN(8, 32), prefix=[1, 5])
    assert torch.equal(IntactKV.load(out / PREFIX_KV).layers[0][0], capture(full, [1, 5]).layers[0][0])
    load_model(out)


def test_a_transformers_that_cannot_tell_ggufs_version_is_named(ggufs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> bool:
        raise ValueError("Invalid version: 'N/A'")

    monkeypatch.setattr("intactkv.checkpoint.source.is_gguf_available", unknown)
    with pytest.raises(IntactKVError, match=r"model\.gguf cannot be read: .*pip install 'transformers>=5\.17'"):
        load_model(ggufs / "F16" / "model.gguf")


def test_whether_a_gguf_is_of_floats_is_told_without_its_vocabulary(
    ggufs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gguf.GGUFReader", None)
    assert holds_floats(ggufs / "F16" / "model.gguf")
    assert not holds_floats(ggufs / "Q8_0" / "model.gguf")


def test_a_ggufs_tokenizer_is_the_one_beside_it(ggufs: Path, tmp_path: Path) -> None:
    file = shutil.copy(ggufs / "Q8_0" / "model.gguf", tmp_path)
    with pytest.raises(IntactKVError, match=r"model\.gguf has no tokenizer\.json beside it"):
        load_tokenizer(file)
    load_tokenizer(str(MODEL)).save_pretrained(tmp_path)
    assert load_tokenizer(file)("word").input_ids == load_tokenizer(str(MODEL))("word").input_ids


@pytest.mark.filterwarnings("ignore:.*of the energy of the models' embeddings differ")
def test_commands_take_a_gguf(ggufs: Path, tmp_path: Path) -> None:
    from test_cli import intactkv

    full, quantized, kv = ggufs / "F16" / "model.gguf", ggufs / "Q8_0" / "model.gguf", tmp_path / "kv.safetensors"
    load_tokenizer(str(MODEL)).save_pretrained(ggufs / "F16")
    done = intactkv("capture", full, "--ids", "1,5", "-o", kv)  # of another model's tokenizer
    assert "outside the vocabulary of 97; tokenize with this model's tokenizer" in done.stderr
    tokenizer = json.loads((ggufs / "F16" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: i for token, i in tokenizer["model"]["vocab"].items() if i < 97}
    tokenizer["model"]["merges"] = []
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < 97]
    (ggufs / "F16" / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = intactkv("capture", full, "--ids", "1,5", "-o", kv)
    assert done.returncode == 0, done.stderr
    done = intactkv("check", quantized, "--full", full, "--kv", kv, "-o", tmp_path / "checked")
    assert done.returncode == 0, done.stderr
    assert "same" in done.stdout
    assert IntactKV.load(tmp_path / "checked").digest == IntactKV.load(kv).digest
