"""Let the full model compute a prefix."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import Device, DType, Ids, Model, System, check_prefix, console, listed, prefix_ids, warn
from intactkv.error import IntactKVError
from intactkv.files import check_outputs


def capture_command(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", metavar="KV")],
    prefix: Annotated[
        str | None,
        typer.Option(
            help="`bos` (the default), `chat` (what the chat template begins with), `auto` (the shortest that leaves "
            "no pivot outside), or the text that prompts begin with."
        ),
    ] = None,
    system: System = None,
    ids: Ids = None,
    data: Annotated[
        Path | None, typer.Option(help="With `--prefix auto`, a UTF-8 text to look for pivots in.", metavar="TEXT")
    ] = None,
    allow_quantized: Annotated[
        bool, typer.Option("--allow-quantized", help="Take a MODEL that is quantized, and say so in the file.")
    ] = False,
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Keep the prefix's logits, which engines never read.")
    ] = True,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read the weights matrix by matrix, never holding them; by default where MODEL takes more than a "
            "quarter of the free memory. Where it is killed, the same command goes on from KV.partial.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    engine: Annotated[
        str | None,
        typer.Option(
            help="llama.cpp: let it compute its own state from an F16, BF16 or Q8_0 GGUF (docs/llama.cpp.md)."
        ),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="With --engine llama.cpp, the GGUF that will be served with it.", metavar="FILE")
    ] = None,
) -> None:
    """Let the full-precision MODEL compute the keys and values of a prefix, and save them.

    With --engine llama.cpp, what is not known here (`--cache-type-k q8_0`, …) goes to llama-server.
    """
    if engine is not None:
        if engine != "llama.cpp":
            raise IntactKVError(f"--engine {engine} is not known; use llama.cpp, or leave it out")
        ours = {"--data": data is not None, "--no-logits": not logits, "--stream": stream is True}
        ours |= {"--no-stream": stream is False, "--device": device != "auto", "--dtype": dtype != "auto"}
        if unheeded := [name for name, given in ours.items() if given]:
            raise IntactKVError(f"{unheeded[0]} is not for --engine llama.cpp, which computes by itself; leave it out")
        _capture_state(model, out, prefix, system, ids, gguf, context.args, allow_quantized)
        return
    if context.args or gguf is not None:
        given = context.args[0] if context.args else "--gguf"
        raise IntactKVError(f"{given} is not known without --engine llama.cpp; leave it out")
    from intactkv.capturing.live import capture
    from intactkv.checkpoint.load import device_named, load_full, load_tokenizer
    from intactkv.checkpoint.source import refuse_quantized
    from intactkv.checkpoint.stream import check_at_hand, larger_than_memory
    from intactkv.demo import TEXT
    from intactkv.pivots import discover, without_pivot
    from intactkv.pivots.discover import behind
    from intactkv.texts import first_tokens, read_text

    check_prefix(prefix, system, ids)
    check_outputs(out)
    tokenizer = load_tokenizer(model)
    auto = prefix == "auto"
    if data is not None and not auto:
        raise IntactKVError(f"--data {data} goes with --prefix auto; add it")
    text = read_text(data or TEXT)
    chosen = [] if auto else prefix_ids(tokenizer, prefix, system, ids)
    if dtype == "auto" and device_named(device).type == "cpu":
        dtype = "float32"  # so few tokens take no time, and bfloat16 costs a value up to 0.4 % of itself
    streams = not allow_quantized and larger_than_memory(model) if stream is None else stream
    if streams and auto:
        check_at_hand(model, "--prefix auto")
    with console.status(f"loading {model}"):
        full = load_full(model, device, dtype=dtype, stream=streams)
    if not allow_quantized:
        refuse_quantized(full.config)
    if auto:
        with console.status("looking for pivots"):
            chosen = discover(full, tokenizer, text)
    with console.status(f"capturing {len(chosen)} tokens"):
        kv = capture(
            full, chosen, tokenizer=tokenizer, logits=logits, allow_quantized=allow_quantized,
            resume=out.with_name(f"{out.name}.partial") if streams else None,
        )  # fmt: skip
        kv.save(out)
        tokens = first_tokens(tokenizer, text, 4096)
        idle = None if streams else without_pivot(full, behind(chosen, tokens), size=len(chosen))
    console.print(f"{out}: {kv}")
    console.print(f"prefix {chosen} = {tokenizer.decode(chosen)!r}", markup=False)
    if idle is not None:
        warn(idle)


def _capture_state(
    model: str, out: Path, prefix: str | None, system: str | None, ids: str | None, gguf: Path | None,
    arguments: list[str], allow_quantized: bool,
) -> None:  # fmt: skip
    from intactkv.serving.llama_capture import capture_state
    from intactkv.serving.llama_server import installed_program

    check_prefix(prefix, system, ids)
    if prefix == "auto":
        raise IntactKVError(
            "--prefix auto cannot go with --engine llama.cpp; use --ids, or --prefix bos, chat or a text"
        )
    tokens, compared = asyncio.run(
        capture_state(
            installed_program(), model, out, ids=None if ids is None else listed(ids), prefix=prefix or "bos",
            system=system, served=None if gguf is None else str(gguf), more=arguments, allow_quantized=allow_quantized,
        )
    )  # fmt: skip
    console.print(f"{out}: llama.cpp's state of {len(tokens)} tokens, {tokens}", markup=False, highlight=False)
    if not compared:
        warn(
            f"{model} has no plain first layer, so nothing was compared with {gguf or 'the GGUF that will be served'}; "
            "see to it that both are of one model, and serve the state with --unchecked"
        )
