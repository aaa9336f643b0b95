"""The whole story on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import console
from intactkv.files import check_folder


def demo_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("intactkv-demo"),
) -> None:
    """Show the whole story offline, on the small model inside this package: the main job in one command."""
    from intactkv.demo.run import run

    check_folder(out)
    run(out, console)
