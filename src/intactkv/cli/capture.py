"""Let the full model compute a prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import Device, DType, Ids, Model, System, console, prefix_ids, warn
from intactkv.error import IntactKVError
from intactkv.files import check_outputs


def capture_command(
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
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Let the full-precision MODEL compute the keys and values of a prefix, and save them."""
    from intactkv.capturing.live import capture
    from intactkv.checkpoint.load import device_named, load_model_on, load_tokenizer
    from intactkv.checkpoint.source import refuse_quantized
    from intactkv.demo import TEXT
    from intactkv.pivots import without_pivot
    from intactkv.pivots.discover import behind
    from intactkv.texts import first_tokens, read_text

    check_outputs(out)
    tokenizer = load_tokenizer(model)
    auto = prefix == "auto"
    if data is not None and not auto:
        raise IntactKVError(f"--data {data} goes with --prefix auto; add it")
    text = read_text(data or TEXT)
    chosen = [] if auto and ids is None else prefix_ids(tokenizer, prefix, system, ids)
    if dtype == "auto" and device_named(device).type == "cpu":
        dtype = "float32"  # so few tokens take no time, and bfloat16 costs a value up to 0.4 % of itself
    with console.status(f"loading {model}"):
        full = load_model_on(model, device, dtype=dtype)
    if not allow_quantized:
        refuse_quantized(full.config)
    if auto:
        from intactkv.pivots import discover

        with console.status("looking for pivots"):
            chosen = discover(full, tokenizer, text)
    with console.status(f"capturing {len(chosen)} tokens"):
        kv = capture(full, chosen, tokenizer=tokenizer, logits=logits, allow_quantized=allow_quantized)
        tokens = first_tokens(tokenizer, text, 4096)
        idle = without_pivot(full, behind(chosen, tokens), size=len(chosen))
        kv.save(out)
    console.print(f"{out}: {kv}")
    console.print(f"prefix {chosen} = {tokenizer.decode(chosen)!r}", markup=False)
    if idle is not None:
        warn(idle)
