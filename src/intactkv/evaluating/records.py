"""Tensors on disk that are whole, belong to what they say, and have not been changed: or they count as not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from intactkv.artifact.digest import digests, joined
from intactkv.error import IntactKVError
from intactkv.files import write_atomically, writing

_VERSION = 2


def key_of(about: Mapping[str, Any]) -> str:
    """A name for what `about` describes: 32 hexadecimal digits of its SHA-256."""
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def write_record(folder: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write `tensors` to the file of `about` in `folder`, whole or not at all.

    Raises `IntactKVError` where the disk refuses.
    """
    path = folder / f"{key_of(about)}.safetensors"
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"version": _VERSION, **about}
    header["digest"] = joined(header, digests(kept))
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(kept, metadata={"intactkv": json.dumps(header)}))
    return path


def has_record(folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether `folder` has a file of `about`, by its header alone: `read_record` says whether its tensors are whole.

    Raises `IntactKVError` for a file that is truncated, or is about something else.
    """
    return _opened(folder, about, tensors=False) is not None


def read_record(folder: Path, about: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of `about`, or None where there is no such file.

    Raises `IntactKVError` for a file that is truncated, was changed, or is about something else.
    """
    return _opened(folder, about, tensors=True)


def _opened(folder: Path, about: Mapping[str, Any], *, tensors: bool) -> dict[str, Tensor] | None:
    path = folder / f"{key_of(about)}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["intactkv"])
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 (not a dict)
        claimed = {name: value for name, value in header.items() if name != "digest"}
        whole = not tensors or joined(header, digests(found)) == header["digest"]
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntactKVError(f"{path} is truncated or no record of ours ({error}); remove it") from error
    if claimed != {"version": _VERSION, **about}:
        raise IntactKVError(f"{path} holds something else than its name says; remove it")
    if not whole:
        raise IntactKVError(f"{path} was changed after it was written; remove it")
    return found
