"""`check` with both models streamed: the relations are those of models in memory, figure for figure."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from backends import BACKENDS, Backend, save_full
from models import PREFIX, build, by_name
from test_cli import intactkv
from transformers import PreTrainedModel

from intactkv import IntactKVError, capture
from intactkv.basis.compare import Relation, Shown, basis, embedding_change, show_noise
from intactkv.checkpoint import store
from intactkv.checkpoint.load import load_compared, load_model
from intactkv.checkpoint.shards import Folder
from intactkv.checkpoint.stream import CannotStream, load_streamed, streamed
from intactkv.quantizing import RTN, quantize

pytest.importorskip("llmcompressor")

STREAMED = [each for each in BACKENDS if "compressed-tensors" in each.name]
WHOLE = [each for each in BACKENDS if "AutoRound" in each.name and each not in STREAMED]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small, the head works in slices; logs of libraries go to a folder."""
    monkeypatch.setattr(store, "_SLICE", 64)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    save_full(folder)
    return folder


def figures(relations: list[Relation]) -> list[tuple[object, ...]]:
    """All that a relation holds, to be compared exactly."""
    transforms = [None if r.transform is None else r.transform.tolist() for r in relations]
    return [
        (r.layer, r.part, r.head, r.kind, r.residual, r.as_is, t) for r, t in zip(relations, transforms, strict=True)
    ]


@cache
def shown(full: Path, dtype: torch.dtype) -> tuple[Shown, Shown]:
    """What the full model shows, in memory and streamed."""
    return show_noise(load_model(full, dtype=dtype)), show_noise(load_streamed(full, dtype=dtype))


def same_twice(full: Path, changed: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The streamed model, whose relations to the streamed full one were those of two in memory."""
    loaded, read = shown(full, dtype)
    live = basis(loaded, load_model(changed, dtype=dtype))
    model = load_streamed(changed, dtype=dtype, quantized=True)
    assert figures(basis(read, model)) == figures(live)
    assert any(r.residual > 0 for r in live)
    return model


def made(backend: Backend, full: Path, tmp_path: Path) -> Path:
    """The folder of a checkpoint that the backend makes of `full`."""
    if backend.missing:
        pytest.skip(f"{backend.missing} is not installed")
    backend.make(full, tmp_path / "out")
    return next(path.parent for path in sorted((tmp_path / "out").rglob("config.json")))


@pytest.mark.parametrize("backend", STREAMED, ids=lambda each: each.name)
def test_quantizers(backend: Backend, full: Path, tmp_path: Path) -> None:
    """Of every format of compressed-tensors, weights packed or not, activations and caches rounded or not."""
    changed = made(backend, full, tmp_path)
    if "R4" in backend.name:
        with pytest.raises(CannotStream, match="rotations done while it runs"):
            load_streamed(changed, quantized=True)
        return
    for dtype in (torch.float32, torch.bfloat16):
        model = same_twice(full, changed, dtype)
        assert all(each.device.type == "meta" for each in model.model.layers.parameters())  # and again
        live = capture(load_model(changed, dtype=dtype), PREFIX, allow_quantized=True)
        assert capture(model, PREFIX, allow_quantized=True).digest == live.digest


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["llama-mha", "qwen2", "qwen3-moe", "gemma3", "phi3", "opt", "gpt-neox", "deepseek-v3", "qwen3-next"]
)
def test_architectures(name: str, stored: torch.dtype, tmp_path: Path) -> None:
    """Biases, fused projections, merged experts, MLA, hybrids; of two types on the disk."""
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32} if name == "deepseek-v3" else {}
    build(by_name(name), **ranks).to(stored).save_pretrained(tmp_path / "full", max_shard_size="40KB")
    quantize(tmp_path / "full", tmp_path / "changed", method=RTN(4, 16), prefix=PREFIX)
    # transformers gives GPT-NeoX two types where the stored one is not asked for
    same_twice(tmp_path / "full", tmp_path / "changed", stored if name == "gpt-neox" else torch.float32)


@pytest.mark.parametrize("backend", WHOLE, ids=lambda each: each.name)
def test_other_formats_are_loaded_whole_and_said_to_be(backend: Backend, full: Path, tmp_path: Path) -> None:
    changed = made(backend, full, tmp_path)
    with pytest.warns(UserWarning, match=r"packs its weights for a kernel of its own; it is loaded whole"):
        model = load_compared(changed, "cpu", stream=True)
    assert streamed(model) is None
    with pytest.raises(IntactKVError, match="quantized already"):
        load_streamed(changed)


def test_on_the_command_line(full: Path, tmp_path: Path) -> None:
    """The same table and the same aligned artifact; which side is streamed is told."""
    quantize(full, tmp_path / "changed", method=RTN(4, 64), prefix=PREFIX)
    capture(full, PREFIX).save(tmp_path / "kv")
    said = []
    for flag in ("--stream", "--no-stream"):
        out = tmp_path / f"kv{flag}"
        done = intactkv("check", tmp_path / "changed", "--full", full, "--kv", tmp_path / "kv", "-o", out, flag)
        assert done.returncode == 0, done.stderr
        said.append((done.stdout.replace(str(out), ""), out.read_bytes()))
    assert said[0] == said[1]


def test_noise_reads_what_keys_and_values_are_made_of(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass reads all; behind a block's keys and values the two of noise read nothing."""
    read: Counter[str] = Counter()
    plain = Folder.read

    def watched(self: Folder, part: str, rows: slice | None = None) -> torch.Tensor:
        read[part.rpartition("layers.1.")[2]] += 1
        return plain(self, part, rows)

    monkeypatch.setattr(Folder, "read", watched)
    show_noise(load_streamed(full))
    times = {part: read[f"{part}_proj.weight"] for part in ("self_attn.k", "self_attn.v", "self_attn.o", "mlp.down")}
    assert times == {"self_attn.k": 3, "self_attn.v": 3, "self_attn.o": 1, "mlp.down": 1}


def test_each_matrix_is_read_where_it_computes(full: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantize(full, tmp_path / "changed", method=RTN(4, 64), prefix=PREFIX)
    with caplog.at_level("INFO"):
        model = load_compared(tmp_path / "changed", "cpu", dtype="float32", stream=True)
    assert f"streaming {tmp_path / 'changed'}" in caplog.text
    assert embedding_change(load_model(full), model) == 0
    held = [name for name, each in model.model.layers.named_parameters() if each.device.type != "meta"]
    model(torch.tensor([PREFIX]))
    assert [name for name, each in model.model.layers.named_parameters() if each.device.type != "meta"] == held == []
