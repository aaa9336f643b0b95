"""Laws of the artifact: every bit comes back, nothing else is ever taken for one, and it fits one model only."""

from __future__ import annotations

import base64
import copy
import dataclasses
import gc
import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, PREFIX, VOCAB, Architecture, build, by_name, prompts, rounded
from safetensors.torch import save_file
from test_cli import intactkv as intactkv_command
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

import intactkv.artifact.data
import intactkv.artifact.file
import intactkv.attaching.prefix_cache
from intactkv import IntactKV, attach, capture
from intactkv.artifact.digest import digests, joined, weights_digest
from intactkv.artifact.file import VERSION
from intactkv.artifact.fingerprint import check_fingerprint, fingerprint
from intactkv.demo import MODEL
from intactkv.error import IntactKVError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
LLAMA = by_name("llama-gqa")


def noise(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    """Random bits: infinities, subnormals, signed zeros and NaNs with any payload among them."""
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (*shape, size), dtype=torch.uint8, generator=generator).view(dtype).squeeze(-1)


def finite(tensor: Tensor) -> Tensor:
    return torch.where(tensor.double().isfinite(), tensor, torch.ones_like(tensor))


def toy(dtype: torch.dtype = torch.float32, **more: Any) -> IntactKV:
    """Three tokens; layers 0, 2 and 10 of a model with others in between; K and V of different heads and width."""
    layers = {i: (finite(noise(dtype, 2, 3, 4, seed=i)), finite(noise(dtype, 1, 3, 6, seed=i + 1))) for i in (0, 2, 10)}
    fields = {
        "ids": torch.tensor([1, 5, 7]),
        "layers": layers,
        "logits": noise(dtype, 3, 11, seed=99),
        "fingerprint": {"model_type": "toy", "num_hidden_layers": 11, "rope_parameters": {"rope_theta": 1e4}},
        "provenance": {"model": "a/b", "weights": "0f", "calibration": None, "note": "Ω\n\u2028"},
    }
    return IntactKV(**{**fields, **more})


def content(kv: IntactKV) -> tuple[Any, ...]:
    """Everything there is in an artifact, down to the bits."""
    bits = {
        name: (t.dtype, tuple(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, t in kv.tensors.items()
    }
    return bits, list(kv.layers), dict(kv.fingerprint), dict(kv.provenance)


def forged(path: Path, tensors: dict[str, Tensor], header: Any, *, sign: bool = True) -> Path:
    """A file like ours with a digest that is right, whatever it holds."""
    if sign and isinstance(header, dict):
        header = {**header, "digest": joined(header, digests(tensors))}
    save_file(tensors, path, metadata={"intactkv": header if isinstance(header, str) else json.dumps(header)})
    return path


def header_of(kv: IntactKV) -> dict[str, Any]:
    return {"version": VERSION, "fingerprint": dict(kv.fingerprint), "provenance": dict(kv.provenance)}


def refused(path: Path, message: str | None = None) -> None:
    """Loading raises our error, and its message is one sentence that names the file."""
    with pytest.raises(IntactKVError, match=message) as caught:
        IntactKV.load(path)
    text = str(caught.value)
    assert str(path) in text
    assert text == text.strip()
    if message:
        assert "\n" not in text
        assert ";" in text, "no remedy"


# ------------------------------------------------------------------------------------------------ save and load


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    kv = toy(dtype)
    path = kv.save(tmp_path / "kv.safetensors")
    assert content(IntactKV.load(path)) == content(kv)
    assert content(IntactKV.load(str(path))) == content(kv)
    again = IntactKV.load(path).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    assert {*os.listdir(tmp_path)} == {"kv.safetensors", "again.safetensors"}


def test_views_shared_memory_and_gradients_are_saved_by_value(tmp_path: Path) -> None:
    wide = torch.randn(3, 2, 8)
    key, value = wide.transpose(0, 1)[..., ::2], wide[:1, :1].expand(2, 3, 8)
    kv = toy(layers={0: (key, value), 1: (key, key.clone().requires_grad_())})
    loaded = IntactKV.load(kv.save(tmp_path / "kv"))
    assert all(torch.equal(t, kv.tensors[name]) for name, t in loaded.tensors.items())
    assert all(not t.requires_grad for t in loaded.tensors.values())


plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
keys = st.text(max_size=4)
nested = st.recursive(
    plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3) | st.tuples(x), max_leaves=8
)


@quick
@given(provenance=st.dictionaries(keys, nested | st.dictionaries(st.integers(0, 12), plain), max_size=4))
def test_any_json_provenance_survives(provenance: dict[str, Any], tmp_path: Path) -> None:
    loaded = IntactKV.load(toy(provenance=provenance).save(tmp_path / "kv"))
    assert loaded.provenance == json.loads(json.dumps(provenance))


@pytest.mark.parametrize("value", [{1, 2}, torch.tensor(1.0), b"x", {(1, 2): 3}])
def test_provenance_that_is_no_json_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match=r"is no JSON data .*; keep only text, finite numbers"):
        toy(provenance={"gain": value}).save(tmp_path / "kv")
    assert os.listdir(tmp_path) == []


def test_load_and_to_choose_device_and_dtype(tmp_path: Path) -> None:
    kv = toy()
    path = kv.save(tmp_path / "kv")
    assert {t.device.type for t in IntactKV.load(path, device="meta").tensors.values()} == {"meta"}
    half = kv.to(dtype=torch.float16)
    assert {name: t.dtype for name, t in half.tensors.items()} == {
        name: torch.int64 if name == "ids" else torch.float16 for name in kv.tensors
    }
    assert torch.equal(half.layers[2][1].view(torch.int16), kv.layers[2][1].half().view(torch.int16))
    assert {t.device.type for t in kv.to(device="meta").tensors.values()} == {"meta"}
    assert (half.fingerprint, half.provenance) == (kv.fingerprint, kv.provenance)
    assert content(kv.to()) == content(kv)
    assert content(kv) == content(toy())  # and nothing happened to the original
    with pytest.raises(IntactKVError, match="must be floating point"):
        kv.to(dtype=torch.int8)


def test_a_copy_shares_no_memory_with_its_original() -> None:
    kv = toy()
    for tensor in kv.to().tensors.values():
        tensor.zero_()
    assert content(kv) == content(toy())


def test_an_artifact_is_frozen_and_says_what_it_is() -> None:
    kv = toy(torch.bfloat16)
    for name in ("ids", "layers", "logits", "fingerprint", "provenance"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kv, name, None)
    assert len(kv) == 3
    assert kv.nbytes == 3 * (2 * 3 * 4 + 1 * 3 * 6) * 2  # layers × (K + V) × bytes
    assert repr(kv) == "IntactKV(3 tokens, 3 layers of toy, 252 bytes)"
    assert list(kv.tensors) == ["ids", "logits", *(f"layers.{i}.{n}" for i in (0, 2, 10) for n in ("key", "value"))]


# ------------------------------------------------------------------------------------------------ atomic writing


def half_written(self: Path, data: bytes) -> int:
    with open(self, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError("no space left on device")


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    ("target", "name", "broken", "error"),
    [
        (intactkv.artifact.file, "save", interrupted, KeyboardInterrupt),
        (Path, "write_bytes", half_written, IntactKVError),
        (os, "replace", interrupted, KeyboardInterrupt),
    ],
)
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    target: Any, name: str, broken: Any, error: type[BaseException], old: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "kv.safetensors"
    before = toy().save(path).read_bytes() if old else None
    with monkeypatch.context() as patch:
        patch.setattr(target, name, broken)
        with pytest.raises(error):
            toy(torch.bfloat16).save(path)
    assert os.listdir(tmp_path) == (["kv.safetensors"] if old else [])
    assert not old or path.read_bytes() == before


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: Any) -> None:
    path, seen = tmp_path / "kv.safetensors", []
    toy().save(path)

    def watched(source: Path, target: Path) -> None:
        seen.extend([content(IntactKV.load(target)), content(IntactKV.load(source))])
        assert Path(source).parent == tmp_path, "a rename is atomic only within one file system"
        shutil.move(source, target)

    monkeypatch.setattr(os, "replace", watched)
    toy(torch.bfloat16).save(path)
    assert seen == [content(toy()), content(toy(torch.bfloat16))]
    assert content(IntactKV.load(path)) == seen[1]


def test_saving_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match=r"the folder .*absent does not exist; create it first"):
        toy().save(tmp_path / "absent" / "kv.safetensors")
    with pytest.raises(IntactKVError, match="it is a folder; name a file in it"):
        toy().save(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(IntactKVError, match=r"the folder .*file does not exist; create it first"):
        toy().save(tmp_path / "file" / "kv")
    assert os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return toy().save(tmp_path_factory.mktemp("good") / "kv").read_bytes()


def test_a_file_cut_anywhere_is_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kv"
    for length in sorted({*range(20), *range(0, len(good), 7), *range(len(good) - 20, len(good))}):
        path.write_bytes(good[:length])
        refused(path)
    path.write_bytes(good + b"\0")
    refused(path)
    path.write_bytes(good[:40])
    refused(path, "is truncated or no safetensors file .*; capture it again")


def loads_the_same_or_not(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        loaded = IntactKV.load(path)
    except IntactKVError:
        return
    assert content(loaded) == content(toy())


def test_no_single_bit_can_change_what_is_loaded(good: bytes, tmp_path: Path) -> None:
    for at in range(0, len(good), 3):
        loads_the_same_or_not(tmp_path / "kv", good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])


@settings(quick, max_examples=300)
@given(data=st.data())
def test_no_edit_can_change_what_is_loaded(data: st.DataObject, good: bytes, tmp_path: Path) -> None:
    edited = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1) | st.integers(0, 600))
        length = data.draw(st.sampled_from([0, 1, 1, 1, 4, 50]))
        edited[at : at + length] = data.draw(st.binary(min_size=length, max_size=length) | st.binary(max_size=3))
    loads_the_same_or_not(tmp_path / "kv", bytes(edited))


def test_a_changed_tensor_a_changed_header_and_swapped_tensors_are_tampering(good: bytes, tmp_path: Path) -> None:
    kv, path = toy(), tmp_path / "kv"
    header = {**header_of(kv), "digest": joined(header_of(kv), digests(kv.tensors))}
    tampered = "was changed after it was written .*; capture it again"
    tensors = {name: t.clone() for name, t in kv.tensors.items()}
    content(IntactKV.load(forged(path, tensors, header, sign=False)))  # so far all is well
    tensors["layers.2.key"].view(torch.int32)[1, 2, 3] ^= 1
    refused(forged(path, tensors, header, sign=False), tampered)
    tensors = {name: t.clone() for name, t in kv.tensors.items()}
    tensors["layers.0.key"], tensors["layers.2.key"] = tensors["layers.2.key"], tensors["layers.0.key"]
    refused(forged(path, tensors, header, sign=False), tampered)
    for same_bytes in (
        {"layers.2.key": kv.tensors["layers.2.key"].view(4, 3, 2)},
        {"layers.2.key": kv.tensors["layers.2.key"].view(torch.int32)},
        {"layers.3.key": kv.tensors["layers.2.key"], "layers.3.value": kv.tensors["layers.2.value"]},
    ):
        kept = [name for name in kv.tensors if not ("layers.3.key" in same_bytes and name.startswith("layers.2."))]
        renamed = {name: kv.tensors[name] for name in kept} | same_bytes
        refused(forged(path, renamed, header, sign=False), tampered)
    del tensors["layers.10.key"], tensors["layers.10.value"]
    refused(forged(path, tensors, header, sign=False), tampered)
    for part in ("fingerprint", "provenance"):
        refused(forged(path, kv.tensors, {**header, part: {}}, sign=False), tampered)
    for digest in ("", None, [], header["digest"].upper(), header["digest"][:-1]):
        refused(forged(path, kv.tensors, {**header, "digest": digest}, sign=False), tampered)


# ------------------------------------------------------------------------------------- files that are something else


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "is not a file; write one with `intactkv capture`")
    refused(tmp_path, "is not a file; write one with `intactkv capture`")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    refused(tmp_path / "dangling", "is not a file; write one")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    refused(tmp_path / "pipe", "is not a file; write one")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


def test_other_formats_are_refused_and_never_executed(tmp_path: Path) -> None:
    path = tmp_path / "kv.safetensors"
    foreign = "is truncated or no safetensors file .*; capture it again"
    path.write_bytes(pickle.dumps({"ids": Bomb()}))
    refused(path, foreign)
    torch.save(toy().tensors, path)
    refused(path, foreign)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ids", b"\1")
    refused(path, foreign)
    for data in (
        b"",
        b"{}",
        b"\0" * 8,
        b"\0" * 4096,
        b"\xff" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        b"GGUF" + b"\3" * 99,
    ):
        path.write_bytes(data)
        refused(path, foreign)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    for metadata in (None, {}, {"format": "pt"}, {"INTACTKV": "{}"}):
        save_file(toy().tensors, path, metadata=metadata)
        refused(path, "is a safetensors file but no intact KV; write one with `intactkv capture`")


@pytest.mark.parametrize(
    "header", ["", "no json", "[]", "3", "null", '"version"', "{", '{"version"', "[" * 10**5, "{}"]
)
def test_headers_that_are_no_json_object_are_refused(header: str, tmp_path: Path) -> None:
    refused(forged(tmp_path / "kv", toy().tensors, header), "has an unreadable header .*; capture it again")


@pytest.mark.parametrize("depth", [100, 300, 500, 900, 990, 1000, 2000, 10**4, 10**5])
def test_a_header_of_any_depth_is_loaded_or_refused(depth: int, tmp_path: Path) -> None:
    text = json.dumps({**header_of(toy()), "digest": "0"}).replace("null", "[" * depth + "]" * depth)
    refused(forged(tmp_path / "kv", toy().tensors, text), "was changed after|unreadable header")


@pytest.mark.parametrize("version", [0, 3, 99, -1, 1.0, True, "1", None, [1], {}])
def test_other_versions_are_refused(version: Any, tmp_path: Path) -> None:
    path = forged(tmp_path / "kv", toy().tensors, {**header_of(toy()), "version": version})
    refused(path, "has format version .* reads versions up to 2; update intactkv or capture it again")


@pytest.mark.parametrize("part", ["digest", "fingerprint", "provenance"])
def test_a_header_that_lacks_a_part_is_refused(part: str, tmp_path: Path) -> None:
    header = {**header_of(toy()), "digest": "0"}
    del header[part]
    refused(
        forged(tmp_path / "kv", toy().tensors, header, sign=part != "digest"), f"lacks {part} in its header; capture"
    )


@pytest.mark.parametrize("part", ["fingerprint", "provenance"])
@pytest.mark.parametrize("value", [None, [], [["model_type", "toy"]], "llama", 3, True])
def test_header_parts_of_the_wrong_type_are_refused(part: str, value: Any, tmp_path: Path) -> None:
    path = forged(tmp_path / "kv", toy().tensors, {**header_of(toy()), part: value})
    refused(path, f"has a {type(value).__name__} as {part} in its header, not a dictionary; capture it again")


FOREIGN = [
    "layers.1e3.key",
    "layers.-1.key",
    "layers.01.key",
    "layers.².key",
    "layers.٣.key",
    "layers.1.keys",
    "ID",
    "",
]
FOREIGN += ["layers..key", "layers.1", "layer.1.key", "layers.1.key.x", " layers.1.key", "layers.1.key\n", "scale"]
FOREIGN += ["layers.9999999.key", f"layers.{'9' * 5000}.key"]


@pytest.mark.parametrize("name", FOREIGN, ids=lambda name: ascii(name[:20]))
def test_unknown_tensors_are_refused(name: str, tmp_path: Path) -> None:
    tensors = {**toy().tensors, name: torch.zeros(2, 3, 4)}
    refused(forged(tmp_path / "kv", tensors, header_of(toy())), "holds the unknown tensor .*; capture it again")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["ids"], "lacks the tensor 'ids'; capture it again"),
        (["layers.2.key"], "has only the value of layer 2; capture it again"),
        (["layers.10.value"], "has only the key of layer 10; capture it again"),
        ([n for n in toy().tensors if n.startswith("layers")], "no layer has keys and values"),
    ],
)
def test_missing_tensors_are_refused(missing: list[str], message: str, tmp_path: Path) -> None:
    tensors = {name: t for name, t in toy().tensors.items() if name not in missing}
    refused(forged(tmp_path / "kv", tensors, header_of(toy())), message)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


WRONG = {
    "ids": [zeros(3), zeros(3, dtype=torch.int32), zeros(1, 3, dtype=torch.int64), zeros(0, dtype=torch.int64)],
    "logits": [zeros(2, 11), zeros(3), zeros(1, 3, 11), zeros(3, 11, dtype=torch.int64)],
    "layers.2.key": [zeros(2, 4, 4), zeros(3, 4), zeros(1, 2, 3, 4), zeros(2, 3, 4, dtype=torch.int8)],
    "layers.0.value": [zeros(2, 1, 4), zeros(2, 3, 4, dtype=torch.bool), zeros(), zeros(0)],
}


@pytest.mark.parametrize(("name", "tensor"), [(name, t) for name, ts in WRONG.items() for t in ts])
def test_wrong_shapes_and_types_are_refused_in_files_and_in_memory(name: str, tensor: Tensor, tmp_path: Path) -> None:
    tensors = {**toy().tensors, name: tensor}
    message = "ids|logits" if name == "ids" else name  # fewer ids make the logits wrong
    refused(forged(tmp_path / "kv", tensors, header_of(toy())), f"{message} is .* it must be .*; capture it again")
    layers = {i: (tensors[f"layers.{i}.key"], tensors[f"layers.{i}.value"]) for i in (0, 2, 10)}
    with pytest.raises(IntactKVError, match=f"{message} is .* it must be"):
        toy(ids=tensors["ids"], logits=tensors["logits"], layers=layers)


# ------------------------------------------------------------------------------------------------ fingerprints


@pytest.fixture(scope="module")
def small() -> Any:
    full = build(LLAMA)
    return full, capture(full, PREFIX)


@pytest.mark.parametrize(
    "more",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 128}},
        {"dtype": "float16"},
        {"_name_or_path": "someone/else"},
        {"use_cache": False, "attention_dropout": 0.5, "initializer_range": 0.3},
        {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6},
        {"architectures": ["Other"], "transformers_version": "4.0.0", "unsloth_version": "1", "pretraining_tp": 2},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_does_not_change_keys_and_values_does_not_matter(small: Any, more: dict[str, Any]) -> None:
    full, kv = small
    config = LlamaConfig(**{**full.config.to_dict(), **more})
    assert fingerprint(config) == kv.fingerprint
    check_fingerprint(kv, config)


@pytest.mark.parametrize(
    ("name", "field", "more"),
    [
        ("llama-gqa", "rope_parameters", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama-gqa", "rope_parameters", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("llama-gqa", "num_attention_heads", {"num_attention_heads": 8, "head_dim": 16}),
        ("llama-gqa", "num_key_value_heads", {"num_key_value_heads": 4}),
        ("llama-gqa", "head_dim", {"head_dim": 32}),
        ("llama-gqa", "hidden_size", {"hidden_size": 32, "head_dim": 16}),
        ("llama-gqa", "num_hidden_layers", {"num_hidden_layers": 2}),
        ("llama-gqa", "rms_norm_eps", {"rms_norm_eps": 1e-3}),
        ("llama-gqa", "hidden_act", {"hidden_act": "gelu"}),
        ("llama-gqa", "vocab_size", {"vocab_size": 101}),
        ("mistral-sliding", "sliding_window", {"sliding_window": 16}),
        ("gemma2", "layer_types", {"layer_types": ["full_attention"] * 3}),
        ("gemma2", "query_pre_attn_scalar", {"query_pre_attn_scalar": 64}),
        ("gemma3", "hidden_activation", {"hidden_activation": "relu"}),
        ("gpt2", "activation_function", {"activation_function": "relu"}),
        ("gpt2", "layer_norm_epsilon", {"layer_norm_epsilon": 1e-2}),
        ("granite", "embedding_multiplier", {"embedding_multiplier": 2.0}),
        ("granite", "residual_multiplier", {"residual_multiplier": 0.5}),
        ("granite", "attention_multiplier", {"attention_multiplier": 0.5}),
        ("deepseek-v3", "routed_scaling_factor", {"routed_scaling_factor": 1.0}),
        ("deepseek-v3", "kv_lora_rank", {"kv_lora_rank": 8}),
        ("mixtral", "num_experts_per_tok", {"num_experts_per_tok": 1}),
        ("mpt", "attn_config.softmax_scale", {"attn_config": {"softmax_scale": 0.5}}),
        ("smollm3", "no_rope_layers", {"no_rope_layers": [0, 1, 1]}),
        ("gpt-neox", "use_parallel_residual", {"use_parallel_residual": False}),
        ("llama4", "attention_chunk_size", {"attention_chunk_size": 16}),
    ],
)  # fmt: skip
def test_attach_names_the_field_that_differs(name: str, field: str, more: dict[str, Any]) -> None:
    kv, other = capture(build(by_name(name)), PREFIX), build(by_name(name), **more)
    message = f"captured from a model with {field}=.*, the model given has {field}=.*; capture one from the model's own"
    with pytest.raises(IntactKVError, match=message):
        attach(other, kv)
    with pytest.raises(IntactKVError, match=message):
        kv.cache(other)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_another_family_is_refused(small: Any) -> None:
    with pytest.raises(IntactKVError, match=r"captured from a model with .*; capture one from"):
        attach(build(by_name("qwen2")), small[1])


def test_longrope_keys_depend_on_the_length_that_the_model_claims() -> None:
    def phi3(length: int) -> Any:
        trained = {"original_max_position_embeddings": 64}
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        return build(by_name("phi3"), rope_parameters={**rope, **trained}, max_position_embeddings=length, **trained)

    kv = capture(phi3(128), PREFIX)
    assert not torch.equal(kv.layers[0][0], capture(phi3(256), PREFIX).layers[0][0])  # from the same weights
    with pytest.raises(IntactKVError, match=r"max_position_embeddings=128, .* has max_position_embeddings=256"):
        attach(phi3(256), kv)
    assert "max_position_embeddings" not in fingerprint(LlamaConfig())


def test_old_and_new_spellings_of_rope_are_one() -> None:
    new = LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    old = LlamaConfig.from_dict({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert fingerprint(old) == fingerprint(new)
    assert fingerprint(LlamaConfig.from_dict({"rope_theta": 5e5, "rope_scaling": None})) == fingerprint(
        LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_a_fingerprint_is_stable(architecture: Architecture, tmp_path: Path) -> None:
    model = build(architecture)
    first = fingerprint(model.config)
    assert json.loads(json.dumps(first)) == first
    model(prompts())
    assert fingerprint(model.config) == first, "running the model changed it"
    assert fingerprint(copy.deepcopy(model.config)) == first
    model.config.save_pretrained(tmp_path)
    assert fingerprint(AutoConfig.from_pretrained(tmp_path)) == first
    assert first["model_type"] == model.config.model_type
    assert first["num_hidden_layers"] == len(first.get("layer_types", range(first["num_hidden_layers"])))


def changed(value: Any) -> list[Any]:
    """Other values that a field could have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(value * 2, 4), value // 2]
    if isinstance(value, float):
        return [value * 2 + 0.1, 0.1]
    if isinstance(value, str):
        return ["relu", "silu"]
    if isinstance(value, list) and value and isinstance(value[0], int | float):
        return [[0] * len(value), [type(x)(not x) for x in value]]
    return [3, 0.5, True] if value is None else []


# tie_word_embeddings changes which of two weights is loaded, output_attentions the attention kernel
IMMATERIAL = {*PreTrainedConfig().to_dict(), "tie_word_embeddings"}
SAMPLE = {"gpt2", "granite", "falcon-alibi", "gpt-neox"}


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name, marks=[] if a.name in SAMPLE else pytest.mark.slow) for a in ARCHITECTURES],
)
def test_every_field_that_changes_keys_and_values_is_in_the_fingerprint(architecture: Architecture) -> None:
    model, prefix = build(architecture), [*PREFIX, *range(9, 19)]
    state, kv, fields = model.state_dict(), capture(model, prefix), model.config.to_dict()
    paths = [(name,) for name in fields if name not in IMMATERIAL]
    paths += [(name, inner) for name, value in fields.items() if isinstance(value, dict) for inner in value]
    tried = 0
    for path in paths:
        *outer, last = path
        for value in changed(fields[outer[0]][last] if outer else fields[last]):
            edited = copy.deepcopy(fields)
            (edited[outer[0]] if outer else edited)[last] = value
            try:
                config = type(model.config).from_dict(edited)
                if fingerprint(config) == kv.fingerprint:
                    other = type(model)(config).eval()
                    other.load_state_dict(state)
                    same = capture(other, prefix)
                    tried += 1
                else:
                    continue
            except Exception:  # whatever a field's own checks raise: there is no such model
                continue
            assert same.layers.keys() == kv.layers.keys(), path
            pairs = [(a, b) for i in kv.layers for a, b in zip(kv.layers[i], same.layers[i], strict=True)]
            assert all(torch.equal(a, b) for a, b in pairs), f"{'.'.join(path)}={value!r} changes keys or values"
    assert tried > 0


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="this transformers has no Gemma 4")
def test_fields_that_differ_from_layer_to_layer_are_compared_layer_by_layer() -> None:
    def gemma4(wide: int) -> Any:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": wide}
        layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
        config = transformers.Gemma4TextConfig(**sizes, **heads, **layers, hidden_size_per_layer_input=8)
        return transformers.Gemma4ForCausalLM(config).eval()

    kv = capture(gemma4(32), PREFIX)
    assert kv.fingerprint["head_dim"] == [16, 32]
    assert [key.shape[-1] for key, _ in kv.layers.values()] == [16, 32]
    with pytest.raises(IntactKVError, match=r"head_dim=\[16, 32\], the model given has head_dim=\[16, 64\]"):
        attach(gemma4(64), kv)


# ------------------------------------------------------------------------------------------------ weights


def test_the_weights_digest_sees_every_bit_and_nothing_else(tmp_path: Path) -> None:
    model = build(LLAMA)
    digest = weights_digest(model)
    assert weights_digest(build(LLAMA)) == weights_digest(copy.deepcopy(model).train()) == digest
    assert weights_digest(build(LLAMA, seed=1)) != digest
    model.save_pretrained(tmp_path)
    assert weights_digest(type(model).from_pretrained(tmp_path)) == digest
    weight = model.model.layers[2].mlp.down_proj.weight.data
    bits = weight.view(torch.int32)
    bits[3, 4] ^= 1
    assert weights_digest(model) != digest
    bits[3, 4] ^= 1
    assert weights_digest(model) == digest
    weight[0, 0] = 0.0
    zero = weights_digest(model)
    weight[0, 0] = -0.0
    assert weights_digest(model) != zero
    assert weights_digest(build(LLAMA).double()) != digest


def test_the_weights_digest_tells_equal_bytes_under_other_names_apart() -> None:
    model = build(LLAMA)
    digest, first = weights_digest(model), model.model.layers[0].self_attn
    first.q_proj, first.o_proj = first.o_proj, first.q_proj  # the same shapes
    assert weights_digest(model) != digest


def test_the_weights_digest_tells_equal_bytes_of_another_name_shape_or_type_apart() -> None:
    same_bytes = [("a", zeros(2, 6)), ("b", zeros(2, 6)), ("a", zeros(3, 4)), ("a", zeros(2, 6).view(torch.int32))]
    modules = [nn.ParameterDict({name: nn.Parameter(t, requires_grad=False)}) for name, t in same_bytes]
    assert len({weights_digest(module) for module in modules}) == len(modules)  # type: ignore[arg-type]


def test_weights_that_cannot_be_read_have_no_digest() -> None:
    assert weights_digest(build(LLAMA).to("meta")) == "unknown: offloaded weights"


def test_the_artifacts_digest_is_of_its_tensors() -> None:
    kv = toy()
    assert toy().digest == kv.to().digest == toy(provenance={}).digest == kv.digest
    assert kv.to(dtype=torch.float64).digest != kv.digest
    other = toy()
    other.layers[2][1].view(torch.int32)[0, 0, 0] ^= 1
    assert other.digest != kv.digest


# ------------------------------------------------------------------------------------------------ the filled cache


@pytest.mark.parametrize("rows", [1, 3])
def test_a_filled_cache_holds_the_prefix_in_every_row(small: Any, rows: int) -> None:
    full, kv = small
    cache, before = kv.cache(full, rows), content(kv)
    assert cache.get_seq_length() == len(kv)
    for i, (key, value) in kv.layers.items():
        assert torch.equal(cache.layers[i].keys, key.expand(rows, *key.shape))
        assert torch.equal(cache.layers[i].values, value.expand(rows, *value.shape))
        cache.layers[i].keys.zero_()
    assert content(kv) == before, "the cache shares memory with the artifact"


def test_a_filled_cache_takes_the_models_dtype(small: Any) -> None:
    full, kv = small
    cache = kv.cache(copy.deepcopy(full).to(torch.bfloat16))
    assert {t.dtype for layer in cache.layers for t in (layer.keys, layer.values)} == {torch.bfloat16}


@pytest.mark.parametrize("rows", [0, -1])
def test_a_cache_without_rows_is_refused(small: Any, rows: int) -> None:
    with pytest.raises(IntactKVError, match=f"batch_size={rows} must be at least 1; give the number of rows"):
        small[1].cache(small[0], rows)


def test_a_cache_for_another_number_of_rows_is_refused(small: Any) -> None:
    full, kv = small
    with pytest.raises(IntactKVError, match="made for 2 rows and is used with 3; make it with"):
        full(prompts()[:, len(PREFIX) :], past_key_values=kv.cache(full, 2))


@pytest.mark.parametrize("name", ["model_type", "vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim"])
def test_a_fingerprint_without_type_or_sizes_fits_no_model(name: str) -> None:
    model = build(by_name("llama-gqa"))
    kv = capture(model, PREFIX)
    check_fingerprint(kv, model.config)
    lacking = dataclasses.replace(
        kv, fingerprint={field: value for field, value in kv.fingerprint.items() if field != name}
    )
    with pytest.raises(IntactKVError, match=f"does not say its model's {name}, .*; capture it again"):
        check_fingerprint(lacking, model.config)
    with pytest.raises(IntactKVError, match="does not say its model's model_type"):
        check_fingerprint(dataclasses.replace(kv, fingerprint={}), model.config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", [0, 1])
def test_a_file_with_nan_or_infinity_is_refused(part: int, value: float, tmp_path: Path) -> None:
    kv = capture(build(by_name("llama-gqa")), PREFIX)
    kv.layers[1][part][0, 1, 3] = value
    kv.save(tmp_path / "kv")
    with pytest.raises(IntactKVError, match=f"the {('keys', 'values')[part]} of layer 1 hold NaN or infinity"):
        IntactKV.load(tmp_path / "kv")


@torch.no_grad()
def test_generate_refuses_what_a_filled_cache_does_not_stand_for(small: Any) -> None:
    full, kv = small
    ids = prompts()
    greedy: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    with attach(full, kv):
        want = full.generate(ids, **greedy)
    cache = kv.cache(full, len(ids))
    assert torch.equal(full.generate(ids, past_key_values=cache, **greedy), want)
    longer = torch.cat([want, ids[:, -2:]], 1)  # going on after what was said is right
    with attach(full, kv):
        further = full.generate(longer, **greedy)
    assert torch.equal(full.generate(longer, past_key_values=cache, **greedy), further)

    message = "does not begin, or begins and ends"
    with pytest.raises(IntactKVError, match=f"an earlier call, with which row 0 .* {message}"):
        full.generate(ids, past_key_values=cache, **greedy)
    without = ids.clone()
    without[1, 0] = 90
    with pytest.raises(IntactKVError, match=f"the prefix, with which row 1 .* {message}"):
        full.generate(without, past_key_values=kv.cache(full, len(ids)), **greedy)
    padded = torch.cat([torch.zeros(len(ids), 2, dtype=torch.int64), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    with pytest.raises(IntactKVError, match=message):
        full.generate(padded, attention_mask=mask, past_key_values=kv.cache(full, len(ids)), **greedy)
    with pytest.raises(IntactKVError, match=message):
        full.generate(ids[:, : len(PREFIX)], past_key_values=kv.cache(full, len(ids)), **greedy)


def test_a_model_is_itself_again_when_its_filled_caches_are_gone(small: Any) -> None:
    full, kv = small
    first, second = kv.cache(full), kv.cache(full)
    assert "prepare_inputs_for_generation" in vars(full)
    del first
    assert "prepare_inputs_for_generation" in vars(full)
    del second
    gc.collect()
    assert "prepare_inputs_for_generation" not in vars(full)


def test_a_filled_cache_has_the_door_of_the_basis(small: Any) -> None:
    full, kv = small
    foreign = copy.deepcopy(full)
    with torch.no_grad():
        for layer in foreign.model.layers:
            layer.self_attn.k_proj.weight.mul_(-1)
    with pytest.raises(IntactKVError, match="another basis or model"):
        kv.cache(foreign)
    assert kv.cache(foreign, check=False).get_seq_length() == len(kv)


def test_the_digest_is_hashed_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, hashed = toy(), []
    monkeypatch.setattr(intactkv.artifact.data, "joined", lambda *given: hashed.append(1) or joined(*given))
    first = kv.digest
    assert [kv.digest, kv.digest] == [first, first]
    assert len(hashed) == 1
    kv.layers[min(kv.layers)][1].view(torch.uint8)[0, 0, 0] ^= 1  # through a view, as anybody may
    assert kv.digest != first
    assert len(hashed) == 2
    kv.layers[min(kv.layers)][1].view(torch.uint8)[0, 0, 0] ^= 1
    assert kv.digest == first
    assert copy.deepcopy(kv).digest == first
    with torch.inference_mode():
        clone = kv.to()
    assert [clone.digest, clone.digest] == [first, first]


def test_the_door_of_a_filled_cache_is_passed_once(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache saves the prefix's forward: the door's own one is not made again for every prompt."""
    full, kv = copy.deepcopy(small[0]), small[1]
    kv.cache(full)
    monkeypatch.setattr(intactkv.attaching.prefix_cache, "refuse_foreign", lambda *_: pytest.fail("computed again"))
    assert kv.cache(full, 2).get_seq_length() == len(kv)


# ------------------------------------------------------------------------------------------- formats, logits, places


def test_format_1_is_read(tmp_path: Path) -> None:
    """A file that the code of before format 2 wrote, of the model that `build` still makes."""
    path = Path(__file__).parent / "data" / "format1.intactkv"
    kv, again = IntactKV.load(path), capture(build(LLAMA), [1, 5, 7])
    assert kv.ids.tolist() == [1, 5, 7]
    assert all(torch.allclose(t, again.tensors[name], atol=1e-5) for name, t in kv.tensors.items())
    assert content(IntactKV.load(kv.save(tmp_path / "kv"))) == content(kv)
    broken = bytearray(path.read_bytes())
    broken[-5] ^= 64
    (tmp_path / "kv").write_bytes(bytes(broken))
    refused(tmp_path / "kv", "was changed after it was written")


def test_an_artifact_without_logits_changes_only_those_of_the_prefix(small: Any, tmp_path: Path) -> None:
    full, kv = small
    model, bare = rounded(full), capture(full, kv.ids, logits=False)
    assert bare.logits is None
    assert bare.digest != kv.digest
    bare = IntactKV.load(bare.save(tmp_path / "kv"))
    ids = prompts(rows=2)
    with attach(model, kv):
        expected = model(ids).logits
        answer = model.generate(ids, max_new_tokens=4, do_sample=False)
    with attach(model, bare):
        got = model(ids).logits
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), answer)
    size = len(kv)
    assert torch.equal(got[:, size:], expected[:, size:])
    assert not torch.allclose(got[:, :size], expected[:, :size], atol=0.1)  # its own, over the intact keys and values
    assert bare.to(dtype=torch.float64).logits is None


def test_the_command_leaves_logits_out_where_asked(tmp_path: Path) -> None:
    for name, more in (("with", []), ("without", ["--no-logits"])):
        done = intactkv_command("capture", MODEL, "--prefix", "bos", "-o", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    kept, bare = (IntactKV.load(tmp_path / name) for name in ("with", "without"))
    assert kept.logits is not None
    assert bare.logits is None
    assert torch.equal(kept.layers[0][0], bare.layers[0][0])


@pytest.mark.parametrize("module", ["intactkv.artifact", "intactkv.artifact.fingerprint", "intactkv.artifact.file"])
def test_the_artifact_is_imported_without_transformers(module: str) -> None:
    script = (
        f"import sys, time, torch, safetensors.torch; began = time.perf_counter(); import {module}; "
        "print(time.perf_counter() - began, sorted({'transformers', 'huggingface_hub', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, _, loaded = done.stdout.strip().partition(" ")
    assert loaded == "[]"
    assert float(seconds) < 0.5


def test_folders_and_files_are_found(small: Any, tmp_path: Path) -> None:
    full, kv = small
    path = kv.save_pretrained(tmp_path / "q" / "w3")
    assert path == tmp_path / "q" / "w3" / "prefix.intactkv"
    for source in (path, path.parent, str(path.parent)):
        assert content(IntactKV.from_pretrained(source)) == content(kv)
    with attach(full, path.parent):
        pass
    with pytest.raises(IntactKVError, match=r"holds no prefix\.intactkv; write one"):
        IntactKV.from_pretrained(tmp_path)
    for absent in (tmp_path / "absent", "absent", "kv.safetensors", "a/b/c"):
        with pytest.raises(IntactKVError, match="is not a file or folder; write one"):
            IntactKV.from_pretrained(absent)
    (tmp_path / "file").write_text("")
    with pytest.raises(IntactKVError, match="it is a file; name a folder"):
        kv.save_pretrained(tmp_path / "file")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files, their download and a check for one take."""

    files: ClassVar[dict[str, bytes]] = {}
    commits: ClassVar[list[str]] = []

    @property
    def site(self) -> str:
        return f"http://{self.headers['Host']}/a/b"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.answer({"url": self.site, "name": "a/b"})
        elif "/preupload/" in self.path:
            found = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in found]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.commits.append(line["value"]["summary"])
                else:
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.site}/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self.answer({}, 200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        content = self.files.get(self.path.partition("/resolve/")[2].partition("/")[2].partition("?")[0])
        if "/resolve/" not in self.path:
            self.answer({"id": "a/b", "sha": "1" * 40, "siblings": [], "private": False})
        elif content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
        else:
            self.send_response(200)
            for name, value in (("ETag", f'"{hashlib.sha1(content).hexdigest()}"'), ("X-Repo-Commit", "1" * 40),
                                ("Content-Length", str(len(content)))):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    def answer(self, data: Any, status: int = 200) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


def test_the_hub_takes_it_and_gives_it_back(small: Any, tmp_path: Path) -> None:
    """Against a server on loopback, in a process of its own: huggingface_hub reads its endpoint once."""
    _, kv = small
    named = dataclasses.replace(kv, provenance={**kv.provenance, "model": "meta/Llama-9"})
    named.save(tmp_path / "kv")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    script = (
        "import sys; from intactkv import IntactKV, IntactKVError\n"
        "kv = IntactKV.load(sys.argv[1])\n"
        "print(kv.push_to_hub('a/b', token='none'), kv.push_to_hub('a/b', token='none'))\n"
        "print(IntactKV.from_pretrained('a/b', revision='main').digest == kv.digest)\n"
        "import huggingface_hub.constants; huggingface_hub.constants.HF_HUB_OFFLINE = True\n"
        "try: IntactKV.from_pretrained('a/c')\n"
        "except IntactKVError as error: print(str(error).split(' (')[0].replace(' ', '_'))\n"
    )
    where = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
             "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    try:
        done = subprocess.run([sys.executable, "-c", script, tmp_path / "kv"], env={**os.environ, **where},
                              capture_output=True, text=True, timeout=120)  # fmt: skip
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    commit = f"{where['HF_ENDPOINT']}/a/b/commit/{'1' * 40}"
    said = "a/c_is_no_folder_here,_is_not_in_the_Hub's_cache,_and_the_Hub_was_not_reached"
    assert done.stdout.split() == [commit, commit, "True", said]
    page = Hub.files["README.md"].decode()
    assert "base_model: meta/Llama-9" in page
    assert f"{len(kv)} prefix tokens (ids `{kv.ids.tolist()}`)" in page
    assert 'ik.attach(model, "a/b")' in page
    assert Hub.commits == ["Intact KV", "Intact KV"]
