"""A sequence state for llama.cpp, from an artifact: what `llama_state_seq_load_file` and a server's slot restore read.

llama.cpp checks sizes and types of such a file, not whose keys and values they are: one of another model of equal
shapes is taken in silence. So the GGUF is read before: its configuration, and whether its first layer makes these
values of these tokens. Rows of quantized caches are stored rotated since 2026 and depend on the build: let the engine
compute them (`llama-server`'s own slot save); this is for caches of f16 and f32.

Source of the layout: files that llama.cpp wrote (xllamacpp 2026.10.11549: version 4; llama-cpp-python 0.3.36: 3).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from intactkv.artifact import IntactKV
from intactkv.artifact.door import DOOR, relative_error
from intactkv.error import IntactKVError, first_line
from intactkv.files import check_outputs, write_atomically

_MAGIC = 0x67677371  # "ggsq"
VERSIONS = (3, 4)
CACHE_TYPES = {"f32": (0, torch.float32), "f16": (1, torch.float16)}  # ggml's number, ours

# Whether llama.cpp's converter reorders a head's channels so that the two of a rotary pair are neighbours.
ARCHITECTURES = {
    "llama": True, "granite": True, "olmo": True, "deci": True,
    "qwen2": False, "qwen3": False, "gemma": False, "gemma2": False, "gemma3": False, "phi3": False, "olmo2": False,
    "starcoder2": False, "stablelm": False, "smollm3": True,
}  # fmt: skip
_TWO_CACHES = {"gemma2", "gemma3"}  # full layers in one, sliding ones in another


@dataclass(frozen=True)
class CacheKind:
    """How the engine keeps its cache, which a state must match.

    `version` is the file's: 3 in llama-cpp-python 0.3.36, 4 in builds of autumn 2026. `flash_attention` off means that
    values lie transposed. A server with `--parallel N` and without `--kv-unified` has N `streams`, a slot each.
    """

    version: int = VERSIONS[-1]
    cache_type: str = "f16"
    flash_attention: bool = True
    streams: int = 1
    stream: int = 0

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise IntactKVError(f"version {self.version} of a sequence state is not known; use {VERSIONS}")
        if self.cache_type not in CACHE_TYPES:
            raise IntactKVError(
                f"a cache of {self.cache_type} holds rows as its build rounds and rotates them; use f16 or f32, or let "
                "the engine save the state of a full-precision GGUF itself"
            )
        if not 0 <= self.stream < self.streams:
            raise IntactKVError(f"stream {self.stream} is none of {self.streams}; number them from 0")


def write_state(
    kv: IntactKV, gguf: str | os.PathLike[str], path: str | os.PathLike[str], kind: CacheKind = CacheKind(), *,
    check: bool = True,
) -> Path:  # fmt: skip
    """Write `kv` to `path` as the state of one sequence, for the model in the file `gguf`, a quantized form of its own.

    Raises `IntactKVError` for a GGUF of another model or architecture than `kv`'s, and, unless `check` is False, for
    one whose first layer does not make `kv`'s keys and values of its tokens.
    """
    check_outputs(Path(path))
    reader = opened(gguf)
    check_gguf(kv, reader, weights=check)
    write_atomically(Path(path), state(kv, str(reader.architecture), kind))
    return Path(path)


def advice(kv: IntactKV) -> str | None:
    """What the server must be told besides, or it restores a state and does not use it."""
    if not _slides(kv):
        return None
    return (
        "this model has sliding windows: start llama-server with --swa-full, or it computes every prompt anew and "
        "the answers are the plain model's (cache_n 0)"
    )


def _slides(kv: IntactKV) -> bool:
    return "sliding_attention" in (kv.fingerprint.get("layer_types") or ())


def installed_version() -> int:
    """The version of an installed llama-cpp-python's states, else the newest."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError):  # none, or a library that does not load
        return VERSIONS[-1]
    return int(llama_cpp.LLAMA_STATE_SEQ_VERSION)


def state(kv: IntactKV, architecture: str, kind: CacheKind = CacheKind()) -> bytes:
    """The bytes of a state file: header, tokens, then every cache of the architecture."""
    ids = kv.ids.tolist()
    parts = [struct.pack(f"<III{len(ids)}i", _MAGIC, kind.version, len(ids), *ids)]
    for layers in _caches(kv, architecture):
        parts.append(struct.pack("<I", kind.streams))
        for stream in range(kind.streams):
            parts += _stream(kv, layers, architecture, kind) if stream == kind.stream else [struct.pack("<I", 0)]
    return b"".join(parts)


def _caches(kv: IntactKV, architecture: str) -> list[list[int]]:
    """The layers of each cache."""
    if architecture not in _TWO_CACHES:
        return [sorted(kv.layers)]
    types = kv.fingerprint["layer_types"]
    return [[i for i in sorted(kv.layers) if types[i] == kind] for kind in ("full_attention", "sliding_attention")]


def _stream(kv: IntactKV, layers: Sequence[int], architecture: str, kind: CacheKind) -> list[bytes]:
    number, dtype = CACHE_TYPES[kind.cache_type]
    parts = [
        struct.pack("<I", len(kv)),
        *(struct.pack("<iIi", p, 1, 0) for p in range(len(kv))),
    ]
    parts.append(struct.pack("<II", not kind.flash_attention, len(layers)))
    if kind.version >= 4:
        parts.append(struct.pack("<II", 0, 0))  # by how many channels keys and values are rotated
    partial = (kv.fingerprint.get("rope_parameters") or {}).get("partial_rotary_factor")
    for i in layers:
        key = kv.layers[i][0]
        if ARCHITECTURES[architecture]:
            key = in_pairs(key, int((partial or 1) * key.shape[2]))
        parts += _rows(key, number, dtype)
    for i in layers:
        value = kv.layers[i][1]
        if kind.flash_attention:
            parts += _rows(value, number, dtype)
        else:
            flat = value.transpose(0, 1).flatten(1)  # (prefix, channel)
            parts.append(struct.pack("<iII", number, dtype.itemsize, flat.shape[1]))
            parts.append(_bytes(flat.t(), dtype))
    return parts


def _rows(states: Float[Tensor, "head prefix dim"], number: int, dtype: torch.dtype) -> list[bytes]:
    flat = states.transpose(0, 1).flatten(1)
    return [struct.pack("<iQ", number, flat.shape[1] * dtype.itemsize), _bytes(flat, dtype)]


def _bytes(tensor: Tensor, dtype: torch.dtype) -> bytes:
    return bytes(tensor.detach().cpu().to(dtype).contiguous().numpy().tobytes())


def in_pairs(key: Float[Tensor, "head prefix dim"], rotary: int) -> Float[Tensor, "head prefix dim"]:
    """Keys whose rotary channels i and i + rotary/2 are neighbours: from transformers' order to llama.cpp's.

    >>> in_pairs(torch.arange(6.0).reshape(1, 1, 6), 4)
    tensor([[[0., 2., 1., 3., 4., 5.]]])
    """
    turned = key[..., :rotary].unflatten(-1, (2, rotary // 2)).transpose(-1, -2).flatten(-2)
    return torch.cat([turned, key[..., rotary:]], -1)


@dataclass(frozen=True, eq=False)
class Gguf:
    """What is read of a GGUF: its fields by name, and its tensors, dequantized when they are asked for."""

    path: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> Any:
        """llama.cpp's name of the model's architecture."""
        return self.fields.get("general.architecture")

    def value(self, name: str) -> Any:
        """A field of the architecture, None where it is not there."""
        return self.fields.get(f"{self.architecture}.{name}")

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> Tensor | None:
        """A tensor as float32, or some of its rows; None where there is none of that name."""
        from gguf.quants import dequantize

        found = self.tensors.get(name)
        if found is None:
            return None
        data = found.data if rows is None else found.data[list(rows)]
        return torch.from_numpy(dequantize(data, found.tensor_type).copy())


def opened(path: str | os.PathLike[str]) -> Gguf:
    """The GGUF at `path`, its weights unread. Raises `IntactKVError` where it is none."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise IntactKVError("reading a GGUF needs gguf: pip install 'intactkv[gguf]'") from error
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise IntactKVError(f"{path} is no readable GGUF ({first_line(error)}); give the one that is served") from error
    return Gguf(os.fspath(path), fields, {tensor.name: tensor for tensor in reader.tensors})


def check_gguf(kv: IntactKV, model: Gguf, *, weights: bool = True) -> None:
    """Raise `IntactKVError` where `kv` is not of this GGUF's model, by its configuration and its first layer."""
    name, told = model.architecture, kv.fingerprint
    if name not in ARCHITECTURES:
        raise IntactKVError(
            f"the order of {model.path}'s architecture {name!r} in llama.cpp's cache is not known here; let llama.cpp "
            "compute the state of its full-precision GGUF itself"
        )
    key, value = next(iter(kv.layers.values()))
    theirs = {
        "block_count": told.get("num_hidden_layers"), "embedding_length": told.get("hidden_size"),
        "attention.head_count": told.get("num_attention_heads"), "attention.head_count_kv": key.shape[0],
        "attention.key_length": key.shape[2], "attention.value_length": value.shape[2],
    }  # fmt: skip
    for field, want in theirs.items():
        have = model.value(field)
        if have is not None and have != want:
            raise IntactKVError(
                f"{model.path} has {name}.{field}={have}, the intact KV {want}; give a form of its model"
            )
    if sorted(kv.layers) != list(range(told["num_hidden_layers"])):
        raise IntactKVError("some layers of this intact KV have no keys and values; such models are not supported here")
    window = told.get("sliding_window")
    sliding = _slides(kv)
    if sliding and name not in _TWO_CACHES:
        raise IntactKVError(f"{name} with sliding windows is not supported; let llama.cpp compute the state")
    if sliding and window and len(kv) > window:
        raise IntactKVError(
            f"the prefix has {len(kv)} tokens and the window {window}, llama.cpp keeps those; use fewer"
        )
    if weights:
        _check_weights(kv, model)


def _check_weights(kv: IntactKV, model: Gguf) -> None:
    """The first layer's values of all tokens, and its keys of the first one, whose rotary angle is 0."""
    embedded = model.tensor("token_embd.weight", kv.ids.tolist())
    norm, wide = model.tensor("blk.0.attn_norm.weight"), model.tensor("blk.0.attn_v.weight")
    keys = model.tensor("blk.0.attn_k.weight")
    if embedded is None or norm is None or wide is None or keys is None:
        raise IntactKVError(
            f"{model.path} has no plain first layer to compare with, so nobody can tell whether it is this intact KV's "
            "model; pass check=False (--unchecked) if you know it is"
        )
    if str(model.architecture).startswith("gemma"):
        embedded = embedded * embedded.shape[1] ** 0.5
    eps = float(model.value("attention.layer_norm_rms_epsilon") or 1e-6)
    read = _normed(embedded, norm, eps)
    key, value = kv.layers[0]
    made_value = _projected(read, wide, model.tensor("blk.0.attn_v.bias"), len(value))
    made_key = _projected(read[:1], keys, model.tensor("blk.0.attn_k.bias"), len(key))
    if (of_heads := model.tensor("blk.0.attn_k_norm.weight")) is not None:
        made_key = _normed(made_key, of_heads, eps)
    intact_key = in_pairs(key[:, :1], key.shape[2]) if ARCHITECTURES[str(model.architecture)] else key[:, :1]
    for name, made, intact in (("values", made_value, value), ("keys", made_key, intact_key)):
        error = relative_error(made, intact)
        if error > DOOR:
            raise IntactKVError(
                f"the first layer of {model.path} makes other {name} of these tokens than the intact KV has "
                f"({100 * error:.0f} % off; rounding leaves less than {100 * DOOR:.0f} %): another model or basis; "
                "give a GGUF of its own model"
            )


def _normed(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps) * weight


def _projected(
    read: Float[Tensor, "token hidden"], weight: Float[Tensor, "out hidden"], bias: Tensor | None, heads: int
) -> Float[Tensor, "head token dim"]:
    made = read @ weight.T + (0 if bias is None else bias)
    return made.unflatten(-1, (heads, -1)).transpose(0, 1)
