"""A sequence state for llama.cpp, from an artifact: what `llama_state_seq_load_file` and a server's slot restore read.

llama.cpp checks sizes and types of such a file, not whose keys and values they are; `serving.gguf` does. Rows of
quantized caches are stored rotated since 2026 and depend on the build: let the engine compute them (`llama-server`'s
own slot save); this is for caches of f16 and f32.

Source of the layout: files that llama.cpp wrote (xllamacpp 2026.10.11549: version 4; llama-cpp-python 0.3.36: 3).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from intactkv.artifact import IntactKV
from intactkv.error import IntactKVError
from intactkv.files import check_outputs, write_atomically
from intactkv.serving.gguf import ARCHITECTURES, TWO_CACHES, check_gguf, in_pairs, opened, slides

_MAGIC = 0x67677371  # "ggsq"
VERSIONS = (3, 4)
MOST_STREAMS = 256  # llama.cpp's LLAMA_MAX_SEQ
CACHE_TYPES = {"f32": (0, torch.float32), "f16": (1, torch.float16)}  # ggml's number, ours


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
        if not 0 <= self.stream < self.streams <= MOST_STREAMS:
            raise IntactKVError(
                f"stream {self.stream} of {self.streams} cannot be; number them from 0, of at most {MOST_STREAMS}"
            )


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


class States(Protocol):
    """Where a server's states of an intact prefix come from."""

    ids: list[int]

    def candidates(self, slots: int) -> Iterator[Callable[[int], bytes]]:
        """The forms that a server with so many slots may take, each as the bytes for a slot; it refuses the others."""


class ArtifactStates:
    """States written from an artifact, for caches of one type."""

    def __init__(self, kv: IntactKV, architecture: str, cache_type: str = "f16") -> None:
        CacheKind(cache_type=cache_type)
        self.ids: list[int] = kv.ids.tolist()
        self._kv, self._architecture, self._cache_type = kv, architecture, cache_type

    def candidates(self, slots: int) -> Iterator[Callable[[int], bytes]]:
        """New builds, flash attention and a cache that all slots share first."""
        for version, flash, streams in product(reversed(VERSIONS), (True, False), sorted({1, slots})):

            def of_slot(slot: int, version: int = version, flash: bool = flash, streams: int = streams) -> bytes:
                kind = CacheKind(version, self._cache_type, flash, streams, slot if streams > 1 else 0)
                return state(self._kv, self._architecture, kind)

            yield of_slot


class SavedState:
    """A state that llama.cpp has saved itself."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._data = Path(path), Path(path).read_bytes()
        magic, _, count = struct.unpack_from("<III", self._data.ljust(12, b"\0"))
        if magic != _MAGIC or not 0 < count <= (len(self._data) - 12) // 4:
            raise IntactKVError(
                f"{path} is no sequence state of llama.cpp; give what `capture --engine llama.cpp` wrote"
            )
        ids = list(struct.unpack_from(f"<{count}i", self._data, 12))
        if ids[0] == -1:  # servers of 2026 write -1, a version, how many, the tokens, and how many media lie among them
            if len(ids) < 4 or ids[1] != 1 or len(ids) != ids[2] + 4 or ids[-1] != 0:
                raise IntactKVError(
                    f"{path} lists its tokens in a way that is not known here, or media among them; save the state of "
                    "tokens alone, or by `intactkv capture --engine llama.cpp`"
                )
            ids = ids[3:-1]
        if not ids or min(ids) < 0:
            raise IntactKVError(f"{path} lists no token, or {min(ids, default=0)} as one; save the state again")
        self.ids: list[int] = ids

    def candidates(self, slots: int) -> Iterator[Callable[[int], bytes]]:
        """Itself."""
        yield lambda slot: self._data


def is_state(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a sequence state does."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == struct.pack("<I", _MAGIC)


def advice(kv: IntactKV) -> str | None:
    """What the server must be told besides, or it restores a state and does not use it."""
    if not slides(kv):
        return None
    return (
        "this model has sliding windows: start llama-server with --swa-full, or it computes every prompt anew and "
        "the answers are the plain model's (cache_n 0)"
    )


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
    if architecture not in TWO_CACHES:
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
