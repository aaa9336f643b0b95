"""Where a checkpoint's tensors lie: in which file of safetensors, of which type and shape, to be read one by one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from intactkv.error import IntactKVError, first_line
from intactkv.lines import from_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LINE = 64  # bytes of a cache line, by which products choose their kernels


class Entry(NamedTuple):
    """One tensor: the file that holds it, its type and shape."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shards(Protocol):
    """The tensors of a checkpoint by the names that its files give them."""

    entries: dict[str, Entry]

    @property
    def identity(self) -> str:
        """Another one where a file was changed."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor as it is stored, or some of its rows. Raises `IntactKVError` where its file does not give it."""


class Folder:
    """The safetensors of a folder, mapped where they lie."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / INDEX
        said = weight_map(index.read_bytes(), index) if index.is_file() else None
        files = [SINGLE] if said is None else sorted(set(said.values()))
        self.entries: dict[str, Entry] = {}
        for file in files:
            if not os.path.isfile(folder / file):  # a name may be too long for a file
                raise IntactKVError(f"{folder} holds no {file}; give a folder or Hub name with all its safetensors")
            for name, dtype, shape in self._header(file):
                add(self.entries, name, file, dtype, shape)
        check_index(said, self.entries, folder)
        self._files = files

    @property
    def identity(self) -> str:
        """By the files' names, sizes and times."""
        stats = {file: (self._folder / file).stat() for file in self._files}
        said = [str(self._folder.resolve()), {file: (s.st_size, s.st_mtime_ns) for file, s in stats.items()}]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def _header(self, file: str) -> list[tuple[str, str, list[int]]]:
        try:
            with safe_open(self._folder / file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
                return [(name, each.get_dtype(), each.get_shape()) for name, each in slices.items()]
        except (OSError, SafetensorError, RuntimeError) as error:
            raise IntactKVError(f"{self._folder / file} is not readable ({first_line(error)}); get it again") from error

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """See `Shards.read`."""
        path = self._folder / self.entries[name].file
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
                return tensor
        except (OSError, SafetensorError, RuntimeError) as error:
            raise IntactKVError(f"{path} does not give {name} ({first_line(error)}); get it again") from error


def weight_map(content: bytes, path: object) -> dict[str, str]:
    """An index's tensors and their files. Raises `IntactKVError` where it is none, or names a file elsewhere."""
    try:
        found: Any = from_json(content)["weight_map"]
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise ValueError("its weight_map is no table of files")
    except (ValueError, KeyError, TypeError) as error:
        raise IntactKVError(f"{path} is no index of safetensors ({first_line(error)}); get it again") from error
    for file in found.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise IntactKVError(f"{path} names the file {file!r}; an index names *.safetensors beside it")
    return found


def check_index(said: Mapping[str, str] | None, entries: Mapping[str, Entry], where: object) -> None:
    """Raise `IntactKVError` where an index names a tensor that its file does not hold."""
    for name, file in sorted((said or {}).items()):
        if name not in entries or entries[name].file != file:
            raise IntactKVError(f"{where}: the index says that {file} holds {name}, and it does not; get both again")


def add(entries: dict[str, Entry], name: str, file: str, dtype: str, shape: Iterable[int]) -> None:
    """One tensor of a header. Raises `IntactKVError` for a type that torch does not have."""
    if dtype not in str_to_torch_dtype:
        raise IntactKVError(f"{file} holds {name} as {dtype}, which torch cannot read here")
    entries[name] = Entry(file, str_to_torch_dtype[dtype], tuple(shape))


def aligned(memory: Tensor, size: int, place: int) -> Tensor:
    """`size` bytes of a memory of `LINE` more, at an address that is `place` beyond a multiple of `LINE`."""
    begin = (place - memory.data_ptr()) % LINE
    return memory[begin : begin + size]
