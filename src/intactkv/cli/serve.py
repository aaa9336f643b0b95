"""Serve a checkpoint with its intact KV."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
from collections.abc import Sequence
from typing import Annotated

import typer

from intactkv.cli.options import console
from intactkv.error import IntactKVError


def serve_command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="The checkpoint: a folder or a name on the Hub, or a GGUF.", metavar="MODEL")
    ],
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="The intact KV: a file, folder or Hub name; else the one in MODEL.", metavar="KV"),
    ] = None,
    mode: Annotated[str, typer.Option(help="vLLM: auto, external or overwrite (docs/vllm.md).")] = "auto",
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Serve a KV of which nothing says that it is in MODEL's basis.")
    ] = False,
    show: Annotated[bool, typer.Option("--print", help="vLLM: print the command and do not run it.")] = False,
) -> None:
    """Serve MODEL with its intact KV: by vLLM, a GGUF by llama-server, what mlx-lm quantized by mlx_lm.server.

    What is not known here (`--port 8000`, `--tensor-parallel-size 2`, `-c 8192`, …) goes to the engine.
    """
    from intactkv.artifact.served import checkpoint_folder, is_mlx

    gguf = model.endswith(".gguf")
    if gguf or is_mlx(checkpoint_folder(model)):
        if mode != "auto" or show:
            raise IntactKVError(f"--mode and --print are for vLLM; leave them out for {'a GGUF' if gguf else 'MLX'}")
        (_serve_gguf if gguf else _serve_mlx)(model, kv, context.args, check=not unchecked)
        return
    from intactkv.serving.launch import vllm_command

    command = vllm_command(model, kv, mode=mode, check=not unchecked, more=context.args)
    if show:
        console.print(shlex.join(command), markup=False, highlight=False)
        return
    program = shutil.which("vllm")
    if program is None:
        raise IntactKVError("vllm is not installed here; pip install vllm, or take the command that --print shows")
    os.execv(program, command)


def _serve_gguf(model: str, kv: str | None, arguments: Sequence[str], *, check: bool) -> None:
    from intactkv.serving.gguf import opened
    from intactkv.serving.llama_capture import states_for, with_windows
    from intactkv.serving.llama_proxy import serve
    from intactkv.serving.llama_server import Engine, installed_program, option, without

    if kv is None:
        raise IntactKVError(
            "a GGUF holds no intact KV; name it by --kv: an artifact, or a state that capture has saved"
        )
    host, port = option(arguments, "--host") or "127.0.0.1", option(arguments, "--port") or "8080"
    if not port.isdecimal():
        raise IntactKVError(f"--port {port} is no number; use one from 1 to 65535")
    with console.status(f"reading {model}"):
        gguf = opened(model)
        more = with_windows(gguf, without(arguments, "--host", "--port"))
        engine = Engine(installed_program(), model, states_for(kv, gguf, more, check=check), more)
    asyncio.run(serve(engine, host, int(port), lambda said: console.print(said, markup=False, highlight=False)))


def _serve_mlx(model: str, kv: str | None, arguments: Sequence[str], *, check: bool) -> None:
    from intactkv.artifact import IntactKV
    from intactkv.serving.mlx_server import serve

    artifact = IntactKV.from_pretrained(model if kv is None else kv)
    serve(model, artifact, arguments, check=check, said=lambda told: console.print(told, markup=False, highlight=False))
