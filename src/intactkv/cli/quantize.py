"""Make a quantized checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from intactkv.cli.options import Device, DType, Ids, Model, System, console, prefix_ids
from intactkv.error import IntactKVError
from intactkv.screen import Screen, working


def quantize_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", metavar="DIR")],
    method: Annotated[str, typer.Option(help="rtn, gptq, awq, autoround, smoothquant or rotated.")] = "rtn",
    bits: Annotated[int, typer.Option(help="Bits of a weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        str, typer.Option(help="Weights that share a scale; 0 is one row, auto the largest up to 128 that fits.")
    ] = "128",
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="By default as the method has it.")
    ] = None,
    activation_bits: Annotated[
        int | None, typer.Option(help="Round the inputs of layers too, to so many bits.")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="One scale for all tokens' inputs, from calibration, instead of one each.")
    ] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Eight bits are floating-point numbers, not integers.")] = False,
    kv_bits: Annotated[int | None, typer.Option(help="Round keys and values in the cache, to so many bits.")] = None,
    rounding: Annotated[str | None, typer.Option(help="rtn or gptq, after smoothquant or rotated.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to calibrate on; only rtn needs none.", metavar="TEXT")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="`bos` (the default), `chat`, or the text that prompts begin with: what stays intact."),
    ] = None,
    system: System = None,
    ids: Ids = None,
    prefix_weight: Annotated[
        float | None,
        typer.Option(
            help="How much prefix tokens count while the method learns, from 0, not at all, to 1, in full; 1/16 by "
            "default, 0 for methods that know no part."
        ),
    ] = None,
    plain_prefix: Annotated[
        bool, typer.Option("--plain-prefix", help="The ordinary checkpoint: prefix tokens count as others do.")
    ] = False,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Quantize MODEL into a checkpoint that transformers and vLLM load, and write the intact KV that fits beside it.

    A method that learns from text makes a checkpoint for that KV, which should not be used without it.
    """
    from intactkv.attaching.plain import made_for_prefix
    from intactkv.checkpoint.load import device_named, dtype_named, load_tokenizer
    from intactkv.quantizing import PREFIX_KV, method_named, quantize
    from intactkv.texts import read_text

    settings = method_named(
        method, bits=bits, group_size=_group_size(group_size), activation_bits=activation_bits, kv_bits=kv_bits,
        symmetric=symmetric, rounding=rounding, static_activations=static, float8=fp8,
    )  # fmt: skip
    if settings.needs_calibration and data is None:
        raise IntactKVError(f"--method {method} learns from text; add --data TEXT, or use --method rtn")
    if plain_prefix and prefix_weight not in (None, 1):
        raise IntactKVError(f"--plain-prefix is --prefix-weight 1, and {prefix_weight} was given; leave one out")
    where = device_named(device)
    text = None if data is None else read_text(data)
    chosen_ids = prefix_ids(load_tokenizer(model), prefix, system, ids)
    screen = Screen(file=sys.stderr)  # the one the user sees, while llm-compressor's output is silenced
    with working(screen, f"{method}, {bits} bits", above=False) as show:
        quantize(
            model, out, method=settings, calibration=text, prefix=chosen_ids, device=where,
            prefix_weight=1.0 if plain_prefix else prefix_weight, dtype=dtype_named(dtype, model, where),
            progress=show,
        )  # fmt: skip
    console.print(f"{out}: {method}, {bits} bits; attach {out / PREFIX_KV} to it", highlight=False)
    made_for = made_for_prefix(out)
    if made_for is not None:
        perplexity = made_for["perplexity"]
        console.print(
            f"made for that prefix: on {perplexity['windows']} windows of its text the perplexity is "
            f"{perplexity['full']:.4g} in full precision, {perplexity['with_kv']:.4g} with the KV attached and "
            f"{perplexity['without_kv']:.4g} without; --plain-prefix makes the ordinary checkpoint",
            highlight=False,
        )


def _group_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise IntactKVError(f"--group-size {text} is no number; use 128, 64, …, 0 for a whole row, or auto") from None
