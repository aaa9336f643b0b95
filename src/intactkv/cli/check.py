"""Compare the basis of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import KV, Device, DType, Full, Model, console
from intactkv.files import check_outputs


def check_command(
    model: Model,
    full: Full,
    kv: KV,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the intact KV in MODEL's basis here.", metavar="KV")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read the weights of both matrix by matrix, never holding them; by default where one of them takes "
            "more than a quarter of the free memory. What is of a format that cannot be streamed is loaded whole.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Are MODEL's keys and values the full model's, rescaled or rotated ones, or another's? Refuses the last."""
    from intactkv.artifact import IntactKV
    from intactkv.artifact.served import with_check
    from intactkv.basis.compare import align, basis, describe, show_noise
    from intactkv.basis.words import basis_table
    from intactkv.checkpoint.load import load_compared
    from intactkv.checkpoint.source import is_gguf, weights_folder
    from intactkv.checkpoint.stream import larger_than_memory

    check_outputs(out)
    artifact = IntactKV.from_pretrained(kv)
    streams = larger_than_memory(full) or larger_than_memory(model) if stream is None else stream
    with console.status("reading the full model"):
        # and drop it: one model is in memory at a time
        shown = show_noise(load_compared(full, device, dtype=dtype, stream=streams))
    with console.status("comparing every layer and head"):
        relations = basis(shown, load_compared(model, device, dtype=dtype, stream=streams))
    console.print(basis_table(relations))
    aligned = align(artifact, relations)
    changed = aligned is not artifact
    console.print(f"basis: {describe(relations)}", highlight=False)
    if out is not None:
        checked = aligned if is_gguf(model) else with_check(aligned, weights_folder(model))
        checked.save(out)
        console.print(f"written: {out}")
    elif changed:
        console.print(f"{kv} does harm as it is: write the aligned one with -o KV and attach that", style="yellow")
