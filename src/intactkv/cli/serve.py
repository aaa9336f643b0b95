"""Serve a checkpoint with its intact KV."""

from __future__ import annotations

import os
import shlex
import shutil
from typing import Annotated

import typer

from intactkv.cli.options import console
from intactkv.error import IntactKVError


def serve_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The checkpoint: a folder or a name on the Hub.", metavar="MODEL")],
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="The intact KV: a file, folder or Hub name; else the one in MODEL.", metavar="KV"),
    ] = None,
    mode: Annotated[str, typer.Option(help="auto, external or overwrite (docs/vllm.md).")] = "auto",
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Serve a KV of which nothing says that it is in MODEL's basis.")
    ] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the command and do not run it.")] = False,
) -> None:
    """Serve MODEL with its intact KV by vLLM; what is not known here (`--tensor-parallel-size 2`, …) goes to vLLM."""
    from intactkv.serving.launch import vllm_command

    command = vllm_command(model, kv, mode=mode, check=not unchecked, more=context.args)
    if show:
        console.print(shlex.join(command), markup=False, highlight=False)
        return
    program = shutil.which("vllm")
    if program is None:
        raise IntactKVError("vllm is not installed here; pip install vllm, or take the command that --print shows")
    os.execv(program, command)
