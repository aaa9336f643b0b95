"""The full model's targets, computed when they are first asked for and read back from a nameless file afterwards.

The file has no name, so that nothing is left of it, not even after a kill. Each sample is computed alone: what is read
back is bit for bit what would be computed again, and a resumed run finds the same. What this gives up: disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intactkv.calibrating.outputs import Outputs
from intactkv.calibrating.samples import Sample
from intactkv.calibrating.targets import Live
from intactkv.error import IntactKVError


class Kept:
    """As `Live`, but what was computed once is read back from disk, up to `most_bytes` and half of what is free.

    The file lies where TMPDIR says, else in /var/tmp, which unlike /tmp is never memory.
    """

    def __init__(self, live: Live, *, most_bytes: int) -> None:
        self.live, self.folder = live, _folder()
        self.left = min(most_bytes, shutil.disk_usage(self.folder).free // 2)
        self._places: dict[tuple[str, bool, bool], tuple[int, list[Any]]] = {}
        self._file: Any = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 (closed by close)
        self._end = 0

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()

    @property
    def weights(self) -> str:
        """The digest of the full model's weights."""
        return self.live.weights

    def of(self, samples: Sequence[Sample], *, blocks: bool, logits: bool) -> Outputs:
        """As `Live.of`. Raises `IntactKVError` where the disk refuses."""
        found = [self._one(sample, blocks, logits) for sample in samples]
        layers = tuple(torch.cat(parts) for parts in zip(*(one.blocks for one in found), strict=True))
        return Outputs(layers, torch.cat([one.logits for one in found if one.logits is not None]) if logits else None)

    def _one(self, sample: Sample, blocks: bool, logits: bool) -> Outputs:
        name = (sample.digest, blocks, logits)
        try:
            if name in self._places:
                return _joined(self._read(*self._places[name]), logits=logits)
            found = self.live.of([sample], blocks=blocks, logits=logits)
            tensors = [*found.blocks, *([] if found.logits is None else [found.logits])]
            if sum(tensor.nbytes for tensor in tensors) <= self.left:
                self._places[name] = (self._end, [(tuple(t.shape), t.dtype) for t in tensors])
                for tensor in tensors:
                    self._write(tensor.detach().cpu().contiguous())
        except OSError as error:
            raise IntactKVError(
                f"the full model's targets cannot be kept in {self.folder} ({error.strerror or error}); make room, "
                "name another folder in TMPDIR, or give keep_bytes=0 to compute them at every step"
            ) from error
        return found

    def _write(self, tensor: Tensor) -> None:
        content = _bytes(tensor)
        self._file.seek(self._end)
        while content:
            content = content[self._file.write(content) :]
        self._end, self.left = self._end + tensor.nbytes, self.left - tensor.nbytes

    def _read(self, start: int, about: list[Any]) -> list[Tensor]:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in about]
        self._file.seek(start)
        for tensor in tensors:
            room = _bytes(tensor)
            while room:
                count = self._file.readinto(room)
                if not count:
                    raise OSError("the file is shorter than what was written to it")
                room = room[count:]
        return tensors


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory, of any dtype."""
    raw: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _joined(tensors: list[Tensor], *, logits: bool) -> Outputs:
    return Outputs(tuple(tensors[:-1]), tensors[-1]) if logits else Outputs(tuple(tensors))


def _folder() -> str:
    usual = os.environ.get("TMPDIR") or "/var/tmp"
    return usual if os.path.isdir(usual) and os.access(usual, os.W_OK) else tempfile.gettempdir()
