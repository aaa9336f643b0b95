"""Does a GGUF's header lie within its file? Readers believe its counts, and count to 2^64 if they are told to.

A file of fields (name, type, value) and tensors (name, shape, type, place); nothing but lengths and tensors' types is
looked at here.

Source of the layout: the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from functools import lru_cache

from intactkv.error import IntactKVError, first_line

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type
_STRING, _ARRAY = 8, 9
_MOST_DIMS = 4  # of a tensor, as ggml has it


def check_header(path: str | os.PathLike[str]) -> frozenset[int]:
    """Which types its tensors have, by ggml's numbers.

    Raises `IntactKVError` for a file that is no GGUF, or ends before what its header says is in it.
    """
    try:
        told = os.stat(path)
        return _checked(os.fspath(path), told.st_size, told.st_mtime_ns)
    except (OSError, ValueError, struct.error) as error:
        raise IntactKVError(f"{path} is no readable GGUF ({first_line(error)}); get it again") from error


@lru_cache(maxsize=16)
def _checked(path: str, size: int, changed: int) -> frozenset[int]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return frozenset(_walk(data, size))


def _walk(data: mmap.mmap, size: int) -> Iterator[int]:
    """Go through a header, from length to length, and give each tensor's type."""
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    order, at = "<" if int.from_bytes(data[4:6], "little") else ">", 8

    def number(form: str) -> int:
        nonlocal at
        (found,) = struct.unpack_from(order + form, data, at)
        at += struct.calcsize(form)
        return int(found)

    def skip(count: int, each: int) -> None:
        nonlocal at
        at += count * each
        if at > size:
            raise ValueError("it ends within its header")

    def items(kind: int, count: int) -> None:
        if kind != _STRING and kind not in _SIZES:
            raise ValueError(f"a field of the unknown type {kind}")
        if kind in _SIZES or 8 * count > size - at:
            skip(count, _SIZES.get(kind, 8))
            return
        for _ in range(count):
            skip(number("Q"), 1)

    tensors, fields = number("Q"), number("Q")
    if 24 * (tensors + fields) > 2 * size:  # a tensor takes at least 24 bytes, a field 13
        raise ValueError(f"{fields} fields and {tensors} tensors do not fit into it")
    for _ in range(fields):
        items(_STRING, 1)
        kind = number("I")
        if kind == _ARRAY:
            kind = number("I")
            items(kind, number("Q"))
        else:
            items(kind, 1)
    for _ in range(tensors):
        items(_STRING, 1)
        if (dims := number("I")) > _MOST_DIMS:
            raise ValueError(f"a tensor of {dims} dimensions")
        skip(dims, 8)
        yield number("I")
        skip(1, 8)
