"""What `intactkv calibrate` does: read the data, load or spool the full model, train, and say what came of it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.calibrating.board import board
from intactkv.calibrating.conversations import conversation_samples
from intactkv.calibrating.objective import Objective
from intactkv.calibrating.samples import Split, split, text_samples
from intactkv.calibrating.spool import Spool, spool, spool_bytes
from intactkv.calibrating.step import CalibrationConfig
from intactkv.calibrating.train import Report, calibrate
from intactkv.checkpoint.load import load_model_on, load_tokenizer
from intactkv.error import IntactKVError
from intactkv.processes import is_main, join, wait
from intactkv.screen import Screen, working

OBJECTIVES = {"blocks": Objective(1, 0), "kl": Objective(0, 1), "both": Objective(1, 1)}


@dataclass(frozen=True)
class Data:
    """Which samples to take from a file: how many to learn from and to hold out, their length, and how to read them."""

    file: Path
    samples: int
    held_out: int
    length: int
    seed: int
    system: str | None


@dataclass(frozen=True)
class Places:
    """Where the targets are spooled, the state is kept to resume from, and curves are drawn: each if it is wanted.

    `device` is where models run, and in which `dtype`; several processes run where accelerate puts each.
    """

    spool: Path | None
    checkpoint: Path | None
    tensorboard: Path | None = None
    device: str = "auto"
    dtype: str = "auto"


def run(
    model: str, full: str, kv: IntactKV, *, data: Data, config: CalibrationConfig, places: Places, console: Console
) -> IntactKV:
    """Calibrate `kv` for `model` from the command line's arguments."""
    device = join() or places.device
    console = console if is_main() else Screen(quiet=True)
    curves: Any = board(places.tensorboard) if places.tensorboard is not None and is_main() else nullcontext()
    parts = _samples(data, full, kv, console)
    goal: dict[str, bool] = {"blocks": config.objective.blocks > 0, "logits": config.objective.kl > 0}
    targets: PreTrainedModel | Spool
    if places.spool is None:
        with console.status(f"loading {full}"):
            targets = load_model_on(full, device, dtype=places.dtype)
    else:
        if is_main():
            _spool((full, device, places.dtype), parts, places.spool, kv, goal, console)
        wait()
        targets = Spool(places.spool)
    with console.status(f"loading {model}"):
        quantized = load_model_on(model, device, dtype=places.dtype)
    with curves as draw, working(console, "calibrating") as update:

        def show(now: Report) -> None:
            text = f"loss {now.loss:.4g}, held-out KL {now.kl:.4f}, {now.seconds_left:.0f} s left"
            update(now.step, config.steps, text)
            if draw is not None:
                draw(now)

        found = calibrate(kv, quantized, targets, parts, config=config, checkpoint=places.checkpoint, progress=show)
    for sentence in sentences(found.provenance["calibration"]):
        console.print(sentence, highlight=False)
    return found


def sentences(about: dict[str, Any]) -> list[str]:
    """What a calibration found, from its provenance."""
    kl, less = about["kl"], about["kl_removed"]
    said = [
        f"{about['steps']} steps, the best after {about['best_step']}; held-out KL over {about['samples']} samples: "
        f"{kl['own']:.4f} with the model's own prefix, {kl['before']:.4f} with the intact one, {kl['after']:.4f} "
        f"calibrated; {less['value']:+.4f} less ({less['low']:+.4f} to {less['high']:+.4f})."
    ]
    if about["straight_through"]:
        names = ", ".join(f"{count} {name}" for name, count in about["straight_through"].items())
        said.append(f"Kernels without a backward pass were trained through their effective weights: {names}.")
    if not about["adopted"]:
        said.append("Calibration does not lower the KL beyond its 95 % interval: the uncalibrated KV is kept.")
    return said


def _samples(data: Data, full: str, kv: IntactKV, console: Console) -> Split:
    tokenizer = load_tokenizer(full)
    shape: dict[str, Any] = {"prefix": kv.ids, "length": data.length, "count": data.samples + data.held_out}
    if data.file.suffix in (".json", ".jsonl"):
        found = conversation_samples(data.file, tokenizer, seed=data.seed, system=data.system, **shape)
    elif data.system is not None:
        raise IntactKVError(f"--system goes with conversations (.json, .jsonl), and {data.file} is text; leave it out")
    else:
        found = text_samples(data.file, tokenizer, **shape)
    console.print(f"{len(found)} samples with {found.tokens:,} learned tokens", highlight=False)
    for reason, rows in found.skipped.items():
        console.print(f"left out: {len(rows)} × {reason} ({', '.join(rows[:5])})", highlight=False, markup=False)
    return split(found, held_out=data.held_out)


def _spool(
    full: tuple[str, str, str], parts: Split, folder: Path, kv: IntactKV, goal: dict[str, bool], console: Console
) -> None:
    """Spool the targets of the full model, given by name, device and dtype."""
    with console.status(f"loading {full[0]}"):
        loaded = load_model_on(full[0], full[1], dtype=full[2])
    size = spool_bytes(loaded, parts, prefix=kv.ids, **goal)
    console.print(f"targets of the full model: {size:,} bytes in {folder}", highlight=False)
    with working(console, "the full model's targets") as show:
        spool(loaded, parts, folder, prefix=kv.ids, **goal, progress=show)
