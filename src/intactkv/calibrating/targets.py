"""What the full model gives for each sample: computed when it is needed, or once and read back from disk.

`Live` keeps the full model in memory and stores nothing. A `Spool` is a folder with one safetensors file for each
sample, of which only the batch at hand is read, so that the full model can be gone before the quantized one is
loaded. Its size is known beforehand and bounded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact.digest import weights_digest
from intactkv.calibrating.outputs import Outputs, batched, outputs
from intactkv.calibrating.samples import Sample, Split
from intactkv.decoder import blocks as blocks_of
from intactkv.error import IntactKVError
from intactkv.files import write_atomically

_ABOUT = "spool.json"


class Targets(Protocol):
    """Where the full model's outputs for samples come from."""

    def of(self, samples: Sequence[Sample], *, blocks: bool, logits: bool) -> Outputs:
        """Every block's output at learned tokens, the logits at predicting ones, as far as asked for."""

    @property
    def weights(self) -> str:
        """The digest of the full model's weights."""


@dataclass(frozen=True, eq=False)
class Live:
    """The full model itself: every batch's targets are computed when they are asked for."""

    full: PreTrainedModel
    prefix: Int[Tensor, "prefix"]

    @torch.no_grad()
    def of(self, samples: Sequence[Sample], *, blocks: bool, logits: bool) -> Outputs:
        """The full model's outputs for `samples`, with its own prefix."""
        return outputs(self.full, batched(samples, prefix=self.prefix), blocks=blocks, logits=logits)

    @property
    def weights(self) -> str:
        """The digest of the full model's weights."""
        return weights_digest(self.full)


@dataclass(frozen=True, eq=False)
class Spool:
    """A folder written by `spool`: every sample's targets, read when they are asked for."""

    folder: Path

    def of(self, samples: Sequence[Sample], *, blocks: bool, logits: bool) -> Outputs:
        """As `Live.of`. Raises `IntactKVError` for a sample or a part that the folder does not hold."""
        read = [self._read(sample, blocks=blocks, logits=logits) for sample in samples]
        layers = tuple(torch.cat(parts) for parts in zip(*(one.blocks for one in read), strict=True))
        return Outputs(layers, torch.cat([one.logits for one in read if one.logits is not None]) if logits else None)

    @property
    def weights(self) -> str:
        """The digest of the full model's weights."""
        try:
            return str(json.loads((self.folder / _ABOUT).read_text(encoding="utf-8"))["weights"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntactKVError(f"{self.folder} is no spool of targets; write one with spool(full, …)") from error

    def _read(self, sample: Sample, *, blocks: bool, logits: bool) -> Outputs:
        path = self.folder / f"{sample.digest}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                layers = tuple(file.get_tensor("blocks").unbind()) if blocks else ()
                return Outputs(layers, file.get_tensor("logits") if logits else None)
        except (SafetensorError, OSError) as error:
            raise IntactKVError(
                f"{self.folder} does not hold what this sample needs ({error}); spool the same data for the same "
                "objective again"
            ) from error


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
        if json.loads(about.read_text(encoding="utf-8")) != source:
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


def _parts(data: Split, *, blocks: bool, logits: bool) -> list[tuple[tuple[Sample, ...], bool, bool]]:
    return [(data.train.rows, blocks, logits), (data.choose.rows, False, True), (data.judge.rows, False, True)]


def _write(live: Live, sample: Sample, folder: Path, *, blocks: bool, logits: bool) -> None:
    path = folder / f"{sample.digest}.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
        blocks, logits = blocks or "blocks" in held, logits or "logits" in held
        if held == {name for name, wanted in (("blocks", blocks), ("logits", logits)) if wanted}:
            return
    found, tensors = live.of([sample], blocks=blocks, logits=logits), {}
    if blocks:
        tensors["blocks"] = torch.stack([block.cpu() for block in found.blocks])  # (layer, token, hidden)
    if found.logits is not None:
        tensors["logits"] = found.logits.cpu().contiguous()
    write_atomically(path, save(tensors))
