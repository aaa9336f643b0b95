"""Files that are there whole or not at all, and whose place is looked at before the work that fills them."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock
from safetensors import SafetensorError

from intactkv.error import IntactKVError

_LOCK = "intactkv.lock"


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` so that after a crash, at any moment, a reader finds the old file or the new one.

    Raises `IntactKVError` where the disk refuses; the old file is then left as it was.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file of its own beside `path` to write to, which takes its place, on the disk, where nothing was raised.

    Any number of threads and processes may write one path: the last one to end wins, and none reads half a file.
    Raises `IntactKVError` where the disk refuses.
    """
    temporary = path.with_name(f".{path.name[:50]}.{uuid4().hex}.tmp")
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses to take for `path`, which is left as it was, is one sentence: an `IntactKVError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise IntactKVError(
            f"{path} cannot be written ({why}); what was there before is kept: make room, or name "
            "another place, and run the same command again"
        ) from error


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to work in, gone at the end; those of runs that were killed go at the beginning.

    A lock tells a run that works from one that was killed.
    """
    for left in path.parent.glob(f".{escape(path.name)}-*"):
        with suppress(OSError):  # filelock's Timeout is one: somebody works there
            if (left / _LOCK).is_file():
                with FileLock(left / _LOCK, timeout=0):
                    shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder,
        FileLock(Path(folder, _LOCK), timeout=0),
    ):
        yield Path(folder)


def json_data(value: Any) -> Any:
    """`value` as JSON can hold it: tuples are lists, and NaN and infinity, which are no JSON, are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_data(item) for key, item in value.items()}
    return [json_data(item) for item in value] if isinstance(value, list | tuple) else value


def check_outputs(*paths: Path | None) -> None:
    """Raise `IntactKVError` now for a file that could not be written once the work is done; None is no file."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise IntactKVError(f"cannot write {path}: it is a folder; name a file in it")
        _check_folder(path, path.parent)


def check_folder(path: Path) -> None:
    """Raise `IntactKVError` now for a folder that is none, or in which, or beside which, nothing can be written."""
    if path.exists() and not path.is_dir():
        raise IntactKVError(f"cannot write to {path}: it is a file; name a folder")
    existing = path
    while not existing.exists():
        existing = existing.parent
    _check_folder(path, existing)


def _check_folder(path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise IntactKVError(f"cannot write {path}: the folder {folder} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise IntactKVError(f"cannot write {path}: {error.strerror or error}; name another folder") from error
