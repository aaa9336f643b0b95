"""Does an intact prefix help a model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import Device, DType, console


def doctor_command(
    model: Annotated[
        str | None, typer.Argument(help="The full model: a folder or a Hub name; without it, the embedded one.")
    ] = None,
    quantized: Annotated[
        str | None, typer.Option(help="Its quantized form; without it, rounding to 4 and 3 bits is simulated.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to measure on; without it, the embedded one.", metavar="TEXT")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens in one window.", min=64)] = 128,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write; figures go beside it as JSON.")] = Path(
        "intactkv-doctor.html"
    ),
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read the weights matrix by matrix in every run, never holding them; by default where a model takes "
            "more than a quarter of the free memory. Layers are not measured one by one then.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Does an intact prefix help MODEL? Finds its pivots and says: worth it, marginal, no effect or harmful."""
    from intactkv.doctor.run import run as run_doctor

    run_doctor(
        model, out, console, quantized=quantized, data=data, window=window, stream=stream, device=device, dtype=dtype
    )
