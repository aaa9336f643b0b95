"""The full model's targets on disk: computed once, each sample alone, and read back bit for bit.

A `Spool` is a folder with one safetensors file a sample, so that the full model can be gone before the quantized one
is loaded; its size is known beforehand and bounded. `Kept` fills a nameless file while the full model stays: nothing is
left of it, not even after a kill.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact.digest import weights_digest
from intactkv.calibrating.outputs import Outputs, batched
from intactkv.calibrating.samples import Sample, Split
from intactkv.calibrating.targets import Live
from intactkv.decoder import blocks as blocks_of
from intactkv.error import IntactKVError
from intactkv.files import write_atomically
from intactkv.lines import from_json

_ABOUT = "spool.json"


@dataclass(frozen=True, eq=False)
class Spool:
    """A folder written by `spool`: every sample's targets, read when they are asked for."""

    folder: str | os.PathLike[str]

    def of(self, samples: Sequence[Sample], *, blocks: bool, logits: bool) -> Outputs:
        """As `Live.of`. Raises `IntactKVError` for a sample or a part that the folder does not hold."""
        return _together([self._read(sample, blocks=blocks, logits=logits) for sample in samples])

    @property
    def weights(self) -> str:
        """The digest of the full model's weights."""
        return str(_about(Path(self.folder))["weights"])

    def _read(self, sample: Sample, *, blocks: bool, logits: bool) -> Outputs:
        try:
            with safe_open(Path(self.folder, f"{sample.digest}.safetensors"), framework="pt") as file:
                layers = tuple(file.get_tensor("blocks").unbind()) if blocks else ()
                return Outputs(layers, file.get_tensor("logits") if logits else None)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise IntactKVError(
                f"{self.folder} does not hold what this sample needs ({error}); spool the same data for the same "
                "objective again"
            ) from error


class Kept:
    """As `Live`, but what was computed once is read back from disk, up to `most_bytes` and half of what is free.

    The file lies where TMPDIR says, else in /var/tmp, which unlike /tmp is never memory.
    """

    def __init__(self, live: Live, *, most_bytes: int) -> None:
        self.live, self.folder = live, _temporary_folder()
        self.left = min(most_bytes, shutil.disk_usage(self.folder).free // 2)
        self._places: dict[tuple[str, bool, bool], tuple[int, int]] = {}  # start and length
        self._file: Any = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (closed by close)

    def close(self) -> None:
        """Give the disk back."""
        with suppress(OSError):  # what a full disk did not take is not needed any more
            self._file.close()

    @property
    def weights(self) -> str:
        """The digest of the full model's weights."""
        return self.live.weights

    def of(self, samples: Sequence[Sample], *, blocks: bool, logits: bool) -> Outputs:
        """As `Live.of`. Raises `IntactKVError` where the disk refuses."""
        return _together([self._one(sample, blocks=blocks, logits=logits) for sample in samples])

    def _one(self, sample: Sample, *, blocks: bool, logits: bool) -> Outputs:
        name = (sample.digest, blocks, logits)
        try:
            if name in self._places:
                start, length = self._places[name]
                self._file.seek(start)
                read = load(self._file.read(length))
                return Outputs(tuple(read["blocks"].unbind()) if blocks else (), read.get("logits"))
            found = self.live.of([sample], blocks=blocks, logits=logits)
            content = save(_tensors(found))
            if len(content) <= self.left:
                start = self._file.seek(0, os.SEEK_END)
                self._file.write(content)
                self._file.flush()
                self._places[name], self.left = (start, len(content)), self.left - len(content)
        except (OSError, SafetensorError) as error:
            raise IntactKVError(
                f"the full model's targets cannot be kept in {self.folder} ({error}); make room, name another folder "
                "in TMPDIR, or give keep_bytes=0 to compute them at every step"
            ) from error
        return found


def spool_bytes(full: PreTrainedModel, data: Split, *, prefix: Tensor, blocks: bool, logits: bool) -> int:
    """How many bytes of tensors `spool` writes: hidden states and logits of learned tokens, in the model's dtype."""
    config, layers = full.config.get_text_config(decoder=True), len(blocks_of(full))
    total = 0
    for rows, with_blocks, with_logits in _parts(data, blocks=blocks, logits=logits):
        for row in rows:
            batch = batched([row], prefix=prefix)
            total += with_blocks * int(batch.learned.sum()) * layers * config.hidden_size
            total += with_logits * int(batch.predicting.sum()) * config.vocab_size
    return total * torch.empty(0, dtype=full.dtype).element_size()


def spool(
    full: PreTrainedModel,
    data: Split,
    folder: str | os.PathLike[str],
    *,
    prefix: Int[Tensor, "prefix"],
    blocks: bool = True,
    logits: bool = False,
    most_bytes: int = 50 * 2**30,
    progress: Callable[[int, int], None] | None = None,
) -> Spool:
    """Write the full model's targets for `data` to `folder`: one file a sample, one sample in memory at a time.

    `blocks` and `logits` say what the objective learns from; the samples that choose and judge always get logits.
    Samples that the folder holds already are not computed again, so an interrupted spool goes on.

    Raises `IntactKVError` where it would take more than `most_bytes` or than the disk has, and for a folder that
    belongs to another full model.
    """
    folder = Path(folder)
    needed = spool_bytes(full, data, prefix=prefix, blocks=blocks, logits=logits)
    folder.mkdir(parents=True, exist_ok=True)
    free, about = shutil.disk_usage(folder).free, folder / _ABOUT
    if needed > most_bytes or (needed > free and not about.exists()):
        raise IntactKVError(
            f"the targets take {needed:,} bytes, {most_bytes:,} are allowed and {free:,} are free; use fewer or "
            "shorter samples, the blocks objective for a large vocabulary, or the full model in memory"
        )
    source = {"weights": weights_digest(full), "prefix": prefix.tolist()}
    if about.exists():
        if _about(folder) != source:
            raise IntactKVError(f"{folder} holds the targets of another full model or prefix; name another folder")
    else:
        write_atomically(about, json.dumps(source).encode())
    live, done, total = Live(full, prefix), 0, sum(len(part) for part in (data.train, data.choose, data.judge))
    for rows, with_blocks, with_logits in _parts(data, blocks=blocks, logits=logits):
        for row in rows:
            _write(live, row, folder, blocks=with_blocks, logits=with_logits)
            done += 1
            if progress is not None:
                progress(done, total)
    return Spool(folder)


def _about(folder: Path) -> dict[str, Any]:
    """Whose targets a folder holds."""
    try:
        found = from_json((folder / _ABOUT).read_text(encoding="utf-8"))
        return {"weights": found["weights"], "prefix": found["prefix"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntactKVError(f"{folder} is no spool of targets; write one with spool(full, …)") from error


def _parts(data: Split, *, blocks: bool, logits: bool) -> list[tuple[tuple[Sample, ...], bool, bool]]:
    return [(data.train.rows, blocks, logits), (data.choose.rows, False, True), (data.judge.rows, False, True)]


def _write(live: Live, sample: Sample, folder: Path, *, blocks: bool, logits: bool) -> None:
    path = folder / f"{sample.digest}.safetensors"
    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                held = set(file.keys())
        except (SafetensorError, OSError, RuntimeError):  # computed again
            held = set()
        blocks, logits = blocks or "blocks" in held, logits or "logits" in held
        if held == {name for name, wanted in (("blocks", blocks), ("logits", logits)) if wanted}:
            return
    write_atomically(path, save(_tensors(live.of([sample], blocks=blocks, logits=logits))))


def _tensors(found: Outputs) -> dict[str, Tensor]:
    """One sample's outputs: `blocks` (layer, token, hidden) and `logits` (token, vocab), what was asked for."""
    tensors = {}
    if found.blocks:
        tensors["blocks"] = torch.stack([block.detach().cpu() for block in found.blocks])
    if found.logits is not None:
        tensors["logits"] = found.logits.detach().cpu().contiguous()
    return tensors


def _together(found: Sequence[Outputs]) -> Outputs:
    """Several samples' outputs, one after the other."""
    layers = tuple(torch.cat(parts) for parts in zip(*(one.blocks for one in found), strict=True))
    logits = [one.logits for one in found if one.logits is not None]
    return Outputs(layers, torch.cat(logits) if logits else None)


def _temporary_folder() -> str:
    usual = os.environ.get("TMPDIR") or "/var/tmp"
    return usual if os.path.isdir(usual) and os.access(usual, os.W_OK) else tempfile.gettempdir()
