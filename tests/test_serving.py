"""What vLLM is told, and what it is not given: no engine is needed to know that it would be wrong."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PREFIX, build, by_name, rounded
from test_cli import intactkv
from transformers import AutoModelForCausalLM

from intactkv import IntactKV, IntactKVError, capture
from intactkv.artifact.served import files_digest, mark_needing, served_architectures, with_check
from intactkv.serving.launch import vllm_arguments, vllm_command


@pytest.fixture(scope="module")
def kv() -> IntactKV:
    return capture(build(by_name("llama-gqa")), PREFIX)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense folder that says it is quantized, and nothing of an artifact."""
    path = tmp_path / "m"
    rounded(build(by_name("llama-gqa"))).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    return path


def test_an_artifact_is_served_with_what_it_was_made_or_checked_with(
    folder: Path, kv: IntactKV, tmp_path: Path
) -> None:
    file = kv.save(tmp_path / "kv.safetensors")
    with pytest.raises(IntactKVError, match=r"nothing says that this intact KV is in the basis of .*intactkv check"):
        vllm_arguments(folder, file)
    told = vllm_arguments(folder, file, check=False)["kv_transfer_config"]
    assert told["kv_connector_extra_config"] == {"artifact": str(file), "check": False}
    assert (told["kv_connector"], told["kv_connector_module_path"]) == ("IntactKVConnector", "intactkv.serving.vllm")

    with_check(kv, folder).save(file)
    assert vllm_arguments(folder, file, mode="overwrite")["kv_transfer_config"]["kv_connector_extra_config"] == {
        "artifact": str(file), "mode": "overwrite",
    }  # fmt: skip
    other = tmp_path / "other"
    rounded(build(by_name("qwen2"))).save_pretrained(other)
    (other / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(IntactKVError, match="nothing says"):
        vllm_arguments(other, file)

    (folder / "intactkv.json").write_text(json.dumps({"prefix": PREFIX}))
    kv.save_pretrained(folder)
    assert vllm_arguments(folder)["kv_transfer_config"]["kv_connector_extra_config"] == {
        "artifact": str(folder / "prefix.intactkv")
    }
    calibrated = replace(kv, provenance={**kv.provenance, "calibration": {}}).save(tmp_path / "calibrated")
    assert vllm_arguments(folder, calibrated)
    rescaled = replace(kv, layers={i: (key, 2 * value) for i, (key, value) in kv.layers.items()})
    with pytest.raises(IntactKVError, match="nothing says"):  # captured, of the same tokens, and never calibrated
        vllm_arguments(folder, rescaled.save(tmp_path / "rescaled"))
    foreign = capture(build(by_name("llama-gqa")), [1, 9]).save(tmp_path / "foreign")
    with pytest.raises(IntactKVError, match=r"beside it, and the artifact is of \[1, 9\]"):
        vllm_arguments(folder, foreign)


def test_a_full_model_is_served_with_its_own(tmp_path: Path) -> None:
    full = build(by_name("llama-gqa"))
    full.save_pretrained(tmp_path / "full")
    kv = capture(AutoModelForCausalLM.from_pretrained(tmp_path / "full"), PREFIX)
    kv.save(tmp_path / "kv")
    assert vllm_arguments(tmp_path / "full", tmp_path / "kv")
    full.save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(IntactKVError, match="nothing says"):
        vllm_arguments(tmp_path / "elsewhere", tmp_path / "kv")


def test_files_are_told_apart_by_their_headers(folder: Path, kv: IntactKV) -> None:
    before = files_digest(folder)
    kv.save_pretrained(folder)
    assert files_digest(folder) == before  # an artifact is no weight
    rounded(build(by_name("llama-gqa"), dtype=torch.bfloat16)).save_pretrained(folder)
    assert files_digest(folder) != before
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    without_header = files_digest(folder)
    with (folder / "pytorch_model.bin").open("ab") as file:
        file.write(b"x")
    assert files_digest(folder) != without_header
    with pytest.raises(IntactKVError, match=r"holds no \*.safetensors"):
        files_digest(folder.parent)


def test_a_marked_checkpoint_loads_in_transformers_and_names_no_architecture_that_engines_know(folder: Path) -> None:
    assert served_architectures(folder) is None
    mark_needing(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMNeedsIntactKV"]
    assert served_architectures(folder) == ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "LlamaForCausalLM"


def test_the_command(folder: Path, kv: IntactKV, tmp_path: Path) -> None:
    mark_needing(folder)
    file = kv.save(tmp_path / "k v.safetensors")
    command = vllm_command(str(folder), str(file), check=False, more=["--tensor-parallel-size", "2"])
    assert command[:3] == ["vllm", "serve", str(folder)]
    assert json.loads(command[command.index("--hf-overrides") + 1]) == {"architectures": ["LlamaForCausalLM"]}
    assert command[-2:] == ["--tensor-parallel-size", "2"]
    done = intactkv("serve", folder, "--kv", file, "--unchecked", "--print", "--tensor-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout) == command
    for other in ("--hf-overrides={}", "--hf_overrides={}", "--hf-overrides.architectures=[]"):  # as vLLM reads them
        with pytest.raises(IntactKVError, match="--hf-overrides is what this command gives"):
            vllm_command(str(folder), str(file), check=False, more=["--port", "8000", other])
    done = intactkv("serve", folder, "--print")
    assert done.returncode == 1
    assert "holds no prefix.intactkv" in done.stderr


def test_serving_without_vllm_says_so(folder: Path, kv: IntactKV, tmp_path: Path, monkeypatch: Any) -> None:
    file = kv.save(tmp_path / "kv")
    monkeypatch.setenv("PATH", "")
    done = intactkv("serve", folder, "--kv", file, "--unchecked")
    assert (done.returncode, "vllm is not installed here" in done.stderr) == (1, True)


def test_a_checkpoint_on_the_hub_is_served_as_its_folder_says(folder: Path, kv: IntactKV, tmp_path: Path) -> None:
    (folder / "intactkv.json").write_text(json.dumps({"prefix": PREFIX}))
    kv.save_pretrained(folder)
    mark_needing(folder)
    cache = tmp_path / "hub" / "models--a--b"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("1" * 40)
    (cache / "snapshots").mkdir()
    folder.rename(cache / "snapshots" / ("1" * 40))
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def run(name: str) -> Any:  # huggingface_hub reads its environment once
        command = [sys.executable, "-m", "intactkv.cli", "serve", name, "--print"]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    done = run("a/b")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert command[:3] == ["vllm", "serve", "a/b"]
    assert json.loads(command[command.index("--hf-overrides") + 1]) == {"architectures": ["LlamaForCausalLM"]}
    done = run("a/c")
    assert (done.returncode, "a/c is no folder here and was not found on the Hub" in done.stderr) == (1, True)
