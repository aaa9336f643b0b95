"""Compare arms on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import Device, DType, Full, console, markdown_file
from intactkv.error import IntactKVError
from intactkv.files import check_outputs


def eval_command(
    models: Annotated[
        list[str], typer.Argument(help="One or more quantized models: folders or names on the Hub.", metavar="MODEL…")
    ],
    full: Full,
    kv: Annotated[
        list[Path], typer.Option("--kv", help="The intact KV; with several models one for all, or one each.")
    ],
    data: Annotated[Path, typer.Option(help="A UTF-8 text file to measure on.", metavar="TEXT")],
    window: Annotated[int, typer.Option(help="Tokens in one window, prefix included.")] = 512,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's protocol: each window's first token overwritten by BOS.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward.", min=1)] = 8,
    windows: Annotated[int | None, typer.Option(help="Use only the first so many windows.", min=2)] = None,
    bare: Annotated[
        bool | None,
        typer.Option(
            "--bare/--no-bare", help="Measure prompts without the prefix too; by default if a model was made for it."
        ),
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Keep what the full model says of each token, and every batch's figures, in this folder: one pass "
            "over the full model serves many commands, a stopped one goes on, one model is in memory at a time.",
            metavar="DIR",
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(help="Keep only so many likeliest tokens of each distribution: every KL is then a lower bound."),
    ] = None,
    cache_bytes: Annotated[int, typer.Option(help="The most bytes of distributions in the cache.", min=0)] = 50 * 2**30,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write all figures as JSON.", metavar="JSON")] = None,
    markdown: Annotated[
        str | None, typer.Option(help="Add a row for each model to this Markdown file; `-` prints it.", metavar="FILE")
    ] = None,
) -> None:
    """Compare three arms on a text: the full model, MODEL with its own prefix, MODEL with the intact prefix."""
    from intactkv.evaluating import command as evaluation

    check_outputs(out, markdown_file(markdown))
    if top is not None and cache is None:
        raise IntactKVError(f"--top {top} says what a cache keeps; add --cache DIR, or leave it out")
    evaluation.run(
        models, full, kv,
        protocol=evaluation.Protocol(data, window, paper, windows, batch_size, device, dtype, bare),
        cache=None if cache is None else evaluation.Cache(cache, top, cache_bytes),
        outputs=evaluation.OutputFiles(out, markdown), console=console,
    )  # fmt: skip
