"""The artifact's file: one safetensors file, whose JSON metadata says what it is. Nothing is pickled.

It holds `ids`, `layers.{i}.key`, `layers.{i}.value` and perhaps `logits`. The header has the format's version, the
fingerprint, the provenance, each tensor's digest, and one digest over the header and these, which makes tampering
visible. Format 1, of before the release, has one digest over everything instead and always logits; it is still read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from intactkv.artifact.digest import add_tensor, digests, joined
from intactkv.error import IntactKVError
from intactkv.files import check_outputs, write_atomically
from intactkv.lines import from_json

if TYPE_CHECKING:
    from intactkv.artifact.data import IntactKV

VERSION = 2
_READ = (1, VERSION)
_TENSOR_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(key|value)")


def write(kv: IntactKV, path: Path) -> None:
    """Write `kv` to `path`, see `IntactKV.save`."""
    check_outputs(path)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in kv.tensors.items()}
    header = {"version": VERSION, "fingerprint": dict(kv.fingerprint), "provenance": dict(kv.provenance)}
    try:
        # what a reader will see: tuples are lists, keys are text; NaN and infinity are no JSON
        header = json.loads(json.dumps(header, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise IntactKVError(
            f"cannot write {path}: the fingerprint or the provenance is no JSON data ({error}); "
            "keep only text, finite numbers, lists and dictionaries in them"
        ) from error
    header["digest"] = joined(header, digests(tensors))
    write_atomically(path, save(tensors, metadata={"intactkv": json.dumps(header, sort_keys=True)}))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked header and the named tensors of a file, see `IntactKV.load`."""
    if not path.is_file():
        raise IntactKVError(f"{path} is not a file; write one with `intactkv capture` or `IntactKV.save`")
    try:
        # once: safe_open opens a path twice, and between the two another file may take its place
        content = path.read_bytes()
        tensors = load(content)
        header_bytes = content[8 : 8 + int.from_bytes(content[:8], "little")]
        text = (from_json(header_bytes).get("__metadata__") or {}).get("intactkv")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise IntactKVError(f"{path} is truncated or no safetensors file ({error}); capture it again") from error
    header = _header(text, path)
    whole = _digest_1(header, tensors) if header["version"] == 1 else joined(header, digests(tensors))
    if whole != header["digest"]:
        raise IntactKVError(
            f"{path} was changed after it was written (its digest does not match its content); capture it again"
        )
    return header, tensors


def by_layer(tensors: Mapping[str, Tensor], path: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values from a file's named tensors; names that are not ours are refused."""
    pairs: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match:
            pairs.setdefault(int(match[1]), {})[match[2]] = tensor
        elif name not in ("ids", "logits"):
            raise IntactKVError(f"{path} holds the unknown tensor {name!r}; capture it again")
    if "ids" not in tensors:
        raise IntactKVError(f"{path} lacks the tensor 'ids'; capture it again")
    for i, pair in pairs.items():
        if len(pair) != 2:
            raise IntactKVError(f"{path} has only the {next(iter(pair))} of layer {i}; capture it again")
    return {i: (pairs[i]["key"], pairs[i]["value"]) for i in sorted(pairs)}


def _digest_1(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Format 1's digest: the header's JSON, then all tensors by name, one after the other."""
    sha = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "digest"}, sort_keys=True).encode())
    for name in sorted(tensors):
        add_tensor(sha, name, tensors[name])
    return sha.hexdigest()


def _header(text: str | None, path: Path) -> dict[str, Any]:
    """The checked JSON header of a file at `path`, from the text in its metadata."""
    if text is None:
        raise IntactKVError(f"{path} is a safetensors file but no intact KV; write one with `intactkv capture`")
    try:
        header = from_json(text)
        version, needed = header["version"], {"digest", "fingerprint", "provenance"} - header.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntactKVError(f"{path} has an unreadable header ({error}); capture it again") from error
    if type(version) is not int or version not in _READ:
        raise IntactKVError(
            f"{path} has format version {version!r}, this intactkv reads versions up to {VERSION}; "
            "update intactkv or capture it again"
        )
    if needed:
        raise IntactKVError(f"{path} lacks {', '.join(sorted(needed))} in its header; capture it again")
    for name in ("fingerprint", "provenance"):
        if not isinstance(header[name], dict):
            kind = type(header[name]).__name__
            raise IntactKVError(f"{path} has a {kind} as {name} in its header, not a dictionary; capture it again")
    return header
