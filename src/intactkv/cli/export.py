"""Write an artifact for another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import console
from intactkv.error import IntactKVError


def export_command(
    kv: Annotated[str, typer.Argument(help="The intact KV: a file, a folder or a name on the Hub.", metavar="KV")],
    to: Annotated[str, typer.Option("--to", help="The engine: llama.cpp.", metavar="ENGINE")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", metavar="FILE")],
    gguf: Annotated[Path, typer.Option("--gguf", help="The GGUF that will be served with it.", metavar="FILE")],
    cache_type: Annotated[str, typer.Option(help="f16 or f32, as --cache-type-k and -v of the engine.")] = "f16",
    flash_attention: Annotated[
        bool, typer.Option(help="Whether the engine uses it; off, values lie transposed.")
    ] = True,
    state_version: Annotated[
        int | None, typer.Option(help="3 or 4; by default an installed llama-cpp-python's, else 4.")
    ] = None,
    streams: Annotated[int, typer.Option(help="The server's --parallel where its cache is not unified.", min=1)] = 1,
    stream: Annotated[int, typer.Option(help="Which of them: the slot's number.", min=0)] = 0,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Do not compare with the GGUF's weights.")] = False,
) -> None:
    """Write KV as the state of a sequence, which llama-server restores into a slot and llama.cpp loads from a file."""
    from intactkv.artifact import IntactKV
    from intactkv.serving.llama_cpp import CacheKind, installed_version, write_state

    if to != "llama.cpp":
        raise IntactKVError(f"--to {to} is not known; use llama.cpp (vLLM needs no export: intactkv serve)")
    version = installed_version() if state_version is None else state_version
    kind = CacheKind(version, cache_type, flash_attention, streams, stream)
    write_state(IntactKV.from_pretrained(kv), gguf, out, kind, check=not unchecked)
    console.print(f"written: {out} (sequence state, version {version})", highlight=False)
