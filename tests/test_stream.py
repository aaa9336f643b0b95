"""Streaming: the artifact of a checkpoint that is never in memory is that of one that is, bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, PREFIX, Architecture, build, by_name
from safetensors.torch import load_file, save_file
from test_cli import intactkv

from intactkv import IntactKV, IntactKVError, capture
from intactkv.basis.compare import basis, show_noise
from intactkv.checkpoint import store, stream
from intactkv.checkpoint.ahead import Ahead
from intactkv.checkpoint.load import load_model
from intactkv.checkpoint.shards import Folder
from intactkv.checkpoint.stream import load_streamed, streamed
from intactkv.decoder import blocks
from intactkv.demo import MODEL, TEXT


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small, the head works in slices."""
    monkeypatch.setattr(store, "_SLICE", 64)


@pytest.mark.parametrize("ahead", [(), ("cpu",)], ids=["", "ahead"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_streamed_is_live(
    architecture: Architecture, ahead: tuple[str, ...], tmp_path: Path, on_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every architecture, from several shards, merged experts included; with the next block fetched ahead as well."""
    monkeypatch.setattr(store, "_AHEAD", ahead)
    build(architecture).save_pretrained(tmp_path, max_shard_size="40KB")
    live = capture(load_model(tmp_path, dtype=torch.float32), PREFIX)
    model = load_streamed(tmp_path, dtype=torch.float32)
    kv = capture(model, PREFIX)
    assert kv.digest == live.digest
    assert kv.logits is not None
    assert torch.equal(kv.logits, live.logits)
    assert kv.provenance["weights"].startswith("read: ")
    without, again = capture(model, PREFIX, logits=False), capture(model, PREFIX)
    assert again.digest == kv.digest
    assert again.provenance["weights"] == kv.provenance["weights"]
    assert without.logits is None
    assert all(torch.equal(a, b) for i in kv.layers for a, b in zip(kv.layers[i], without.layers[i], strict=True))


def test_the_next_block_is_fetched_while_one_computes() -> None:
    """In order, never more than that, and nothing twice."""
    fetched: list[str] = []

    def fetch(name: str) -> str:
        fetched.append(name)
        return name

    ahead = Ahead(["ab", "c", "de"], fetch)

    def settled() -> str:
        assert ahead.take("z") == "z"  # of no block: comes behind all that is on its way
        done = "".join(fetched).replace("z", "")
        fetched.clear()
        return done

    assert ahead.take("a") == "a"
    assert settled() == "abc"
    assert ahead.take("b") == "b"
    assert settled() == ""
    assert ahead.take("c") == "c"
    assert settled() == "de"
    assert ahead.take("e") == "e"
    assert ahead.take("e") == "e"  # a module that computes twice
    assert settled() == "e"
    assert ahead.take("a") == "a"  # another forward; what nobody took of the last block is forgotten
    assert settled() == "abc"
    ahead.stop()
    assert ahead.take("b") == "b"
    assert settled() == "abc"


def test_what_is_not_fetched_ahead_says_why() -> None:
    def fetch(name: str) -> str:
        raise IntactKVError(f"no {name}")

    ahead = Ahead(["ab"], fetch)
    with pytest.raises(IntactKVError, match="no b"):
        ahead.take("b")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_a_gpu_computes_of_streamed_weights_what_it_does_of_loaded_ones(
    architecture: Architecture, dtype: torch.dtype, tmp_path: Path, on_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(architecture).save_pretrained(tmp_path, max_shard_size="40KB")
    live = capture(load_model(tmp_path, dtype=dtype).cuda(), PREFIX)
    for ahead in ((), ("cuda",)):
        monkeypatch.setattr(store, "_AHEAD", ahead)
        model = load_streamed(tmp_path, dtype=dtype, device="cuda")
        kv, again = capture(model, PREFIX), capture(model, PREFIX)
        assert kv.digest == again.digest == live.digest
        assert torch.equal(kv.logits, live.logits)  # type: ignore[arg-type]
        assert kv.provenance["weights"] == again.provenance["weights"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_capture_on_a_gpu_goes_on(
    tmp_path: Path, on_disk: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build(by_name("llama-gqa")).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    model, partial, plain = load_streamed(tmp_path / "m", device="cuda"), tmp_path / "partial", Folder.read
    whole = capture(model, PREFIX)

    def ends(self: Folder, part: str, rows: slice | None = None) -> torch.Tensor:
        if ".layers.2." in part:
            raise Killed
        return plain(self, part, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "read", ends)
        with pytest.raises(Killed):
            capture(model, PREFIX, resume=partial)
        streamed(model).later(lambda: None).result()  # type: ignore[union-attr]
    with caplog.at_level("INFO"):
        kv = capture(load_streamed(tmp_path / "m", device="cuda"), PREFIX, resume=partial)
    assert "going on behind block 2" in caplog.text
    assert kv.digest == whole.digest
    assert kv.provenance["weights"] == whole.provenance["weights"]


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "deepseek-v3", "qwen3-next", "gpt-oss"])
def test_experts_that_nobody_is_sent_to_are_not_read(
    name: str, tmp_path: Path, on_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of their own, or rows of one; spoilt where nobody reads them, the artifact is the same."""
    build(by_name(name)).save_pretrained(tmp_path, max_shard_size="40KB")
    ids = PREFIX[:1]
    live, model = capture(load_model(tmp_path, dtype=torch.float32), ids), load_streamed(tmp_path, dtype=torch.float32)
    read: set[tuple[str, int | None]] = set()
    plain = Folder.read

    def watched(self: Folder, part: str, rows: slice | None = None) -> torch.Tensor:
        read.add((part, None if rows is None else rows.start))
        return plain(self, part, rows)

    monkeypatch.setattr(Folder, "read", watched)
    assert capture(model, ids).digest == live.digest
    spoilt = 0
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        for part, tensor in tensors.items():
            if "experts." not in part or "shared" in part or "bias" in part or (part, None) in read:
                continue
            for i in range(len(tensor)) if name == "gpt-oss" else [...]:
                if (part, i) not in read:
                    tensor[i] = torch.nan
                    spoilt += 1
        save_file(tensors, file, {"format": "pt"})
    assert spoilt > 4
    monkeypatch.undo()
    assert capture(tmp_path, ids, stream=True).digest == live.digest


class Killed(BaseException):
    """As if the process had ended."""


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_killed_and_gone_on(
    architecture: Architecture, tmp_path: Path, on_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any block: the blocks before are not read again, and artifact, logits and digest are those of one run."""
    build(architecture).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    model = load_streamed(tmp_path / "m", dtype=torch.float32)
    whole, partial = capture(model, PREFIX), tmp_path / "partial"
    plain, read, ends = Folder.read, set[int](), -1

    def watched(self: Folder, part: str, rows: slice | None = None) -> torch.Tensor:
        if found := re.search(r"\.(?:h|layers|blocks)\.(\d+)\.", part):
            if int(found[1]) == ends:
                raise Killed
            read.add(int(found[1]))
        return plain(self, part, rows)

    monkeypatch.setattr(Folder, "read", watched)
    follows = architecture.name not in ("gemma3n", "gemma4")  # its blocks hand keys and values on to each other
    last = len(blocks(model)) - 1
    for at in (1, last):
        model = load_streamed(tmp_path / "m", dtype=torch.float32)
        read.clear()
        ends = at
        with pytest.raises(Killed):
            capture(model, PREFIX, resume=partial)
        streamed(model).later(lambda: None).result()  # type: ignore[union-attr]
        assert partial.exists() is follows
        assert read == set(range(1 if at == last and follows else 0, at))
        ends = -1
    model = load_streamed(tmp_path / "m", dtype=torch.float32)
    kv = capture(model, PREFIX, resume=partial)
    assert kv.digest == whole.digest
    assert torch.equal(kv.logits, whole.logits)  # type: ignore[arg-type]
    assert kv.provenance["weights"] == whole.provenance["weights"]
    assert not partial.exists()


def test_another_file_is_not_gone_on_from(tmp_path: Path, on_disk: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ids, a changed checkpoint, a spoilt file, one that cannot be written: begun again, never mixed."""
    build(by_name("llama-gqa")).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    partial = tmp_path / "partial"

    def stop() -> None:
        plain = Folder.read

        def read(self: Folder, part: str, rows: slice | None = None) -> torch.Tensor:
            if ".layers.2." in part:
                raise Killed
            return plain(self, part, rows)

        with monkeypatch.context() as patched:
            patched.setattr(Folder, "read", read)
            model = load_streamed(tmp_path / "m", dtype=torch.float32)
            with pytest.raises(Killed):
                capture(model, PREFIX, resume=partial)
            streamed(model).later(lambda: None).result()  # type: ignore[union-attr]

    stop()
    other = [*PREFIX, 9]
    assert capture(tmp_path / "m", other, stream=True, resume=partial).digest == capture(tmp_path / "m", other).digest
    stop()
    partial.write_bytes(partial.read_bytes()[:-9])
    whole = capture(tmp_path / "m", PREFIX)
    assert capture(tmp_path / "m", PREFIX, stream=True, resume=partial).digest == whole.digest
    stop()
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[3]
    changed = {name: tensor * 2 for name, tensor in load_file(shard).items()}
    save_file(changed, shard, {"format": "pt"})
    whole = capture(tmp_path / "m", PREFIX)
    assert capture(tmp_path / "m", PREFIX, stream=True, resume=partial).digest == whole.digest
    assert capture(tmp_path / "m", PREFIX, stream=True, resume=tmp_path / "no" / "partial").digest == whole.digest
    with pytest.raises(IntactKVError, match="goes with a streamed model"):
        capture(tmp_path / "m", PREFIX, stream=False, resume=partial)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, "auto"])
def test_types_of_storage(stored: torch.dtype, dtype: torch.dtype | str, tmp_path: Path, on_disk: None) -> None:
    build(ARCHITECTURES[1]).to(stored).save_pretrained(tmp_path, max_shard_size="40KB")
    if stored == torch.float16 and dtype == "auto":
        pytest.skip("float16 on a CPU is slow")
    live = capture(load_model(tmp_path, dtype=dtype), PREFIX)
    assert capture(load_streamed(tmp_path, dtype=dtype), PREFIX).digest == live.digest


def test_by_default_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is streamed where it takes more than a quarter of what is free, or where `stream` says so."""
    build(ARCHITECTURES[1]).save_pretrained(tmp_path)
    kv = capture(tmp_path, PREFIX)
    assert not kv.provenance["weights"].startswith("read: ")
    assert capture(tmp_path, PREFIX, stream=True).provenance["weights"].startswith("read: ")
    monkeypatch.setattr(stream, "stored_bytes", lambda source: 2**50)
    assert capture(tmp_path, PREFIX).digest == kv.digest
    assert capture(tmp_path, PREFIX).provenance["weights"].startswith("read: ")
    assert not capture(tmp_path, PREFIX, stream=False).provenance["weights"].startswith("read: ")


@pytest.mark.parametrize("streams", [True, False])
def test_a_path_is_captured_on_the_device_that_is_named(streams: bool, tmp_path: Path) -> None:
    build(by_name("llama-gqa")).save_pretrained(tmp_path)
    kv = capture(tmp_path, PREFIX, stream=streams, device="cpu")
    assert kv.digest == capture(load_model(tmp_path, dtype=torch.float32), PREFIX).digest
    with pytest.raises(IntactKVError, match="cannot be put on --device nowhere"):
        capture(tmp_path, PREFIX, stream=streams, device="nowhere")
    with pytest.raises(IntactKVError, match="device='cpu' goes with a path"):
        capture(load_model(tmp_path), PREFIX, device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("streams", [True, False])
def test_a_path_is_captured_on_a_gpu_where_there_is_one(streams: bool, tmp_path: Path) -> None:
    build(by_name("llama-gqa")).save_pretrained(tmp_path)
    kv = capture(tmp_path, PREFIX, stream=streams)
    assert kv.digest == capture(load_model(tmp_path, dtype=torch.float32).cuda(), PREFIX).digest


def test_a_streamed_model_gives_logits_again_behind_a_capture_without(tmp_path: Path, on_disk: None) -> None:
    build(by_name("llama-gqa")).save_pretrained(tmp_path)
    model, ids = load_streamed(tmp_path), torch.tensor([[1, 2, 3]])
    capture(model, PREFIX, logits=False)
    assert torch.equal(model(ids).logits, load_model(tmp_path)(ids).logits)


def test_the_digest_is_of_what_was_read(tmp_path: Path, on_disk: None) -> None:
    """The same weights in other shards have it; a bit more has another; a row that no id names is not read."""
    model = build(ARCHITECTURES[1])
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    for folder, size in zip(folders, ("40KB", "5GB", "5GB", "5GB"), strict=True):
        model.save_pretrained(folder, max_shard_size=size)
    for folder, name, row in (
        (folders[2], "model.layers.2.mlp.down_proj.weight", 0),
        (folders[3], "model.embed_tokens.weight", 90),
    ):
        tensors = load_file(folder / "model.safetensors")
        tensors[name][row, 0] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    a, b, c, d = (capture(folder, PREFIX, stream=True, logits=False).provenance["weights"] for folder in folders)
    assert a == b == d != c


def test_the_digest_is_of_what_is_held_too(tmp_path: Path) -> None:
    """A norm, which stays in memory, and embeddings that are small enough to."""
    model = build(ARCHITECTURES[1])
    model.save_pretrained(tmp_path)
    first = capture(tmp_path, PREFIX, stream=True).provenance["weights"]
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[name].view(-1)[-1] += 1
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        other = capture(tmp_path, PREFIX, stream=True).provenance["weights"]
        assert other != first
        first = other


@pytest.mark.parametrize("experts", [False, True])
def test_fp8_with_scales(experts: bool, tmp_path: Path, on_disk: None) -> None:
    """As transformers makes it dense: DeepSeek's own form, blocks of 128 with a scale each."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 4,
             "num_key_value_heads": 2}  # fmt: skip
    sizes |= {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2} if experts else {}
    model = build(by_name("qwen3-moe" if experts else "llama-gqa"), **sizes).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors, scaled = load_file(tmp_path / "model.safetensors"), {}
    for name, weight in tensors.items():
        if "_proj" not in name:
            scaled[name] = weight
            continue
        blocks_ = weight.float().reshape(weight.shape[0] // 128, 128, weight.shape[1] // 128, 128)
        scale = blocks_.abs().amax((1, 3), keepdim=True) / 448
        scaled[name] = (blocks_ / scale).reshape(weight.shape).to(torch.float8_e4m3fn)
        scaled[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    save_file(scaled, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": fp8}))
    for dtype in (torch.float32, torch.bfloat16):
        live, read = capture(load_model(tmp_path, dtype=dtype), PREFIX), load_streamed(tmp_path, dtype=dtype)
        assert capture(read, PREFIX).digest == live.digest


def test_files_wider_than_their_configuration(tmp_path: Path, on_disk: None) -> None:
    """Float32 files of a configuration that says bfloat16 are read as they are, merged experts too."""
    for name in ("llama-gqa", "mixtral"):
        folder = tmp_path / name
        build(by_name(name)).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
        live = capture(load_model(folder, dtype=torch.float32), PREFIX)
        assert capture(folder, PREFIX, stream=True).digest == live.digest


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    """One sentence, with the file and the tensor."""
    model = build(ARCHITECTURES[1])
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = tmp_path / "m" / index["weight_map"][name]
    whole = load_file(shard)

    def said() -> str:
        with pytest.raises(IntactKVError) as error:
            capture(tmp_path / "m", PREFIX, stream=True)
        return str(error.value)

    save_file({n: t for n, t in whole.items() if n != name}, shard, {"format": "pt"})
    assert name in said()
    save_file({n: torch.full_like(t, torch.nan) if n == name else t for n, t in whole.items()}, shard, {"format": "pt"})
    assert f"{name} in {shard.name} holds NaN or infinity; get it again" in said()
    save_file({f"{n}.x" if n == name else n: t for n, t in whole.items()}, shard, {"format": "pt"})
    assert f"the index says that {shard.name} holds {name}, and it does not" in said()
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard.name} is not readable" in said()
    shard.unlink()
    assert f"holds no {shard.name}" in said()
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in said()
    for source in (tmp_path / "none", tmp_path):
        with pytest.raises(IntactKVError):
            load_streamed(source)
    assert streamed(model) is None


def test_check_streams_the_full_model(tmp_path: Path, on_disk: None) -> None:
    """The relations are those of models in memory, for a rescaled model too."""
    full = build(ARCHITECTURES[1])
    full.save_pretrained(tmp_path, max_shard_size="40KB")
    other = build(ARCHITECTURES[1])
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight *= 2
    live, read = show_noise(load_model(tmp_path)), show_noise(load_streamed(tmp_path))
    assert torch.equal(live.embeddings, read.embeddings)
    relations = [basis(shown, other) for shown in (live, read)]
    assert [(r.layer, r.part, r.head, r.kind, r.residual) for r in relations[0]] == [
        (r.layer, r.part, r.head, r.kind, r.residual) for r in relations[1]
    ]
    assert {r.kind for r in relations[1] if (r.layer, r.part) == (1, "value")} != {"same"}


def test_check_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert intactkv("capture", MODEL, "-o", tmp_path / "kv").returncode == 0
    command = ("check", MODEL, "--full", MODEL, "--kv", tmp_path / "kv")
    live = intactkv(*command)
    monkeypatch.setattr(stream, "stored_bytes", lambda source: 2**50)
    read = intactkv(*command)
    assert live.returncode == read.returncode == 0, read.stderr
    assert live.stdout == read.stdout


def test_on_the_command_line(tmp_path: Path) -> None:
    done = intactkv("capture", MODEL, "-o", tmp_path / "kv", "--stream")
    assert done.returncode == 0, done.stderr
    assert intactkv("capture", MODEL, "-o", tmp_path / "live").returncode == 0
    kv, live = IntactKV.load(tmp_path / "kv"), IntactKV.load(tmp_path / "live")
    assert kv.digest == live.digest
    assert kv.provenance["weights"].startswith("read: ")


def test_a_prefix_is_found_in_a_streamed_model(tmp_path: Path) -> None:
    told, text = [], tmp_path / "text"
    text.write_text(TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    for way in ("--stream", "--no-stream"):
        done = intactkv("capture", MODEL, "-o", tmp_path / way, way, "--prefix", "auto", "--data", text)
        assert done.returncode == 0, done.stderr
        told.append(IntactKV.load(tmp_path / way))
    assert told[0].ids.tolist() == told[1].ids.tolist() == [0]
    assert told[0].digest == told[1].digest
