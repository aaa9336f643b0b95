"""Write an artifact for another engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import console, warn
from intactkv.error import IntactKVError

_ENGINES = {"--model": ("mlx", "lightllm"), "--ranks": ("lightllm",)}  # all other options are llama.cpp's


def export_command(
    kv: Annotated[str, typer.Argument(help="The intact KV: a file, a folder or a name on the Hub.", metavar="KV")],
    to: Annotated[str, typer.Option("--to", help="The engine: llama.cpp, mlx or lightllm.", metavar="ENGINE")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", metavar="FILE")],
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="llama.cpp: the GGUF that will be served with it.", metavar="FILE")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="mlx, lightllm: the model that is served with it.", metavar="MODEL")
    ] = None,
    cache_type: Annotated[str, typer.Option(help="llama.cpp: f16 or f32, as its --cache-type-k and -v.")] = "f16",
    flash_attention: Annotated[
        bool, typer.Option(help="llama.cpp: whether it uses it; off, values lie transposed.")
    ] = True,
    state_version: Annotated[
        int | None, typer.Option(help="llama.cpp: 3 or 4; by default an installed llama-cpp-python's, else 4.")
    ] = None,
    streams: Annotated[int, typer.Option(help="llama.cpp: its --parallel where its cache is not unified.", min=1)] = 1,
    stream: Annotated[int, typer.Option(help="llama.cpp: which of them, the slot's number.", min=0)] = 0,
    ranks: Annotated[int, typer.Option(help="lightllm: its --tp, a file for each.", min=1)] = 1,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Do not compare with the model's weights.")] = False,
) -> None:
    """Write KV for another engine: llama.cpp's state of a sequence, mlx-lm's or LightLLM's prompt cache."""
    from intactkv.artifact import IntactKV

    needed = {"llama.cpp": ("--gguf", gguf), "mlx": ("--model", model), "lightllm": ("--model", model)}
    if to not in needed:
        raise IntactKVError(f"--to {to} is not known; use {', '.join(needed)} (vLLM needs none: intactkv serve)")
    option, value = needed[to]
    if value is None:
        raise IntactKVError(f"--to {to} needs {option}, the model that will be served with it")
    given = {
        "--gguf": gguf is not None, "--model": model is not None, "--cache-type": cache_type != "f16",
        "--no-flash-attention": not flash_attention, "--state-version": state_version is not None,
        "--streams": streams != 1, "--stream": stream != 0, "--ranks": ranks != 1,
    }  # fmt: skip
    for name, is_given in given.items():
        if is_given and to not in (engines := _ENGINES.get(name, ("llama.cpp",))):
            raise IntactKVError(f"{name} is for --to {' or '.join(engines)}, not for {to}; leave it out")
    artifact = IntactKV.from_pretrained(kv)
    if to == "mlx":
        from intactkv.serving.mlx import write_prompt_cache

        write_prompt_cache(artifact, str(model), out, check=not unchecked)
        console.print(f"written: {out}", highlight=False)
        return
    if to == "lightllm":
        from intactkv.serving.lightllm import ADVICE, write_prompt_buffer

        entries = write_prompt_buffer(artifact, str(model), out, ranks=ranks, check=not unchecked)
        console.print(json.dumps(entries), highlight=False, markup=False, soft_wrap=True)
        warn(f"{model}/config.json must hold these two entries; {ADVICE}")
        return
    from intactkv.serving.llama_cpp import CacheKind, advice, installed_version, write_state

    version = installed_version() if state_version is None else state_version
    kind = CacheKind(version, cache_type, flash_attention, streams, stream)
    write_state(artifact, Path(str(gguf)), out, kind, check=not unchecked)
    console.print(f"written: {out} (sequence state, version {version})", highlight=False)
    if (said := advice(artifact)) is not None:
        warn(said)
