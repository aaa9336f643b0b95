"""Train an intact KV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import KV, Device, DType, Full, Model, Seed, console
from intactkv.error import IntactKVError
from intactkv.files import check_folder, check_outputs


def calibrate_command(
    model: Model,
    full: Full,
    kv: KV,
    data: Annotated[Path, typer.Option(help="Conversations (.json, .jsonl) or a UTF-8 text.", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", metavar="KV2")],
    objective: Annotated[str, typer.Option(help="`blocks` (the paper's), `kl`, or `both`.")] = "blocks",
    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW's; by default the paper's 2e-4, with KL 0.01 that falls to 0.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 160,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 16,
    samples: Annotated[int, typer.Option(help="Samples to learn from.", min=1)] = 128,
    held_out: Annotated[int, typer.Option(help="Samples that choose the step and judge it.", min=3)] = 40,
    length: Annotated[int, typer.Option(help="Tokens of a sample, prefix included.")] = 1024,
    values_only: Annotated[bool, typer.Option("--values-only", help="Train the values, keep the keys.")] = False,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            help="Samples in a forward; by default 1 on a CPU, else what half of the GPU's free memory holds. Give it "
            "where others use the GPU too."
        ),
    ] = None,
    checkpoint_blocks: Annotated[
        bool | None,
        typer.Option(
            help="Compute blocks twice to save memory; by default if a graph takes above 2 GiB, or above half of a "
            "GPU's free memory."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt of conversations that have none.")] = None,
    spool: Annotated[
        Path | None, typer.Option(help="Keep the full model's targets in this folder, and only one model in memory.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A file to resume from after a stop.", metavar="FILE")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Draw curves for TensorBoard.", metavar="DIR")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Train the intact KV to absorb what is left of MODEL's quantization error; keep it only if that helps."""
    from intactkv.artifact import IntactKV
    from intactkv.calibrating import CalibrationConfig
    from intactkv.calibrating import command as calibration
    from intactkv.capturing.live import check_tokenizer
    from intactkv.checkpoint.load import load_tokenizer
    from intactkv.processes import is_main

    check_outputs(out, checkpoint)
    for folder in (spool, tensorboard):
        if folder is not None:
            check_folder(folder)
    if objective not in calibration.OBJECTIVES:
        raise IntactKVError(f"--objective {objective!r} is not known; use {', '.join(calibration.OBJECTIVES)}")
    artifact = IntactKV.from_pretrained(kv)
    check_tokenizer(artifact, load_tokenizer(full), full)
    found = calibration.run(
        model, full, artifact,
        data=calibration.Data(data, samples, held_out, length, seed, system),
        config=CalibrationConfig(
            objective=calibration.OBJECTIVES[objective], learning_rate=learning_rate, steps=steps, seed=seed,
            batch_size=batch_size, micro_batch=micro_batch, checkpoint_blocks=checkpoint_blocks,
            parts=("value",) if values_only else ("key", "value"),
        ),
        places=calibration.Places(spool, checkpoint, tensorboard, device, dtype), console=console,
    )  # fmt: skip
    if is_main():
        found.save(out)
        console.print(f"written: {out}")
