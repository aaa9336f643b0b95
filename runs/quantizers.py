"""One table of every quantizer: three arms on one model, KL and perplexity, weight-only and with 4-bit activations.

What it does: quantizes MODEL by each method at 2, 3 and 4 bits into a temporary folder, with the intact KV of [BOS]
captured in the checkpoint's own basis, loads the checkpoint back and measures it on TEXT. Where the basis is not the
full model's, the full model's raw KV is measured too: that is what capturing before quantizing would have given.
What it gives up: one model, one prefix, one seed, one text; the intervals are over windows of that text only.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from intactkv import IntactKV, IntactKVError, bos, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import Arm, Evaluation, Interval, Windows, evaluate, prefixed_windows
from intactkv.quantizing import AWQ, GPTQ, PREFIX_KV, RTN, AutoRound, Method, Rotated, SmoothQuant, quantize
from intactkv.texts import read_text

BITS, GROUP, LEARN = (4, 3, 2), 128, 32
HEADER = (
    "| method | weights | activations | KV | KL own | KL intact | gap closed, % [95 %] | KL raw KV "
    "| PPL full | PPL own | PPL intact | s |\n|---|---|---|---|---:|---:|---|---:|---:|---:|---:|---:|\n"
)


def methods(iterations: int) -> Iterator[tuple[str, Method]]:
    """Every method under the name it has in the table."""
    for activation_bits in (None, 4):
        for bits in BITS:
            shared: dict[str, Any] = {"group_size": GROUP, "activation_bits": activation_bits}
            grid = {"symmetric": False, **shared}
            yield "RTN", RTN(bits, **grid)
            yield "GPTQ", GPTQ(bits, **grid)
            yield "AWQ", AWQ(bits, **grid)
            yield "AutoRound", AutoRound(bits, iterations=iterations, **shared)
            yield "SmoothQuant + RTN", SmoothQuant(RTN(bits, **grid))
            yield "R1 R2 R4 + RTN", Rotated(RTN(bits, **grid))
            yield "R1 R2 R4 + GPTQ", Rotated(GPTQ(bits, **grid))
    yield "SmoothQuant + RTN", SmoothQuant()
    yield "RTN", RTN(4, GROUP, symmetric=False, kv_bits=4)
    yield "R1 R2 R4 + RTN", Rotated(RTN(4, GROUP, symmetric=False, activation_bits=4, kv_bits=4))
    yield "R1 R2 R4 + GPTQ", Rotated(GPTQ(4, GROUP, symmetric=False, activation_bits=4, kv_bits=4))


def main(
    model: Annotated[str, typer.Option(help="The full-precision model: a folder or a name on the Hub.")] = str(MODEL),
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on; by default the embedded text's 2nd half.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on; by default its first half.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table here instead of printing it.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in one window, prefix included.")] = 128,
    windows: Annotated[int, typer.Option(help="Measure at most so many windows.")] = 64,
    iterations: Annotated[int, typer.Option(help="AutoRound's steps for each block; 200 is its own default.")] = 10,
) -> None:
    """Quantize MODEL by every method, measure three arms of each, and print one markdown table."""
    full, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    first, second = _halves(read_text(TEXT))
    prefix = bos(tokenizer)

    def cut(text: str) -> Windows:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return prefixed_windows(tokens, prefix=prefix, window=window)

    learn = cut(first if calibration is None else read_text(calibration)).ids[:LEARN]
    measure = cut(second if text is None else read_text(text))[:windows]
    raw, todo = capture(full, prefix), list(methods(iterations))
    title = (
        f"{len(measure)} windows of {window} tokens; {len(learn)} for calibration; groups of {GROUP}; prefix {prefix}"
    )
    with nullcontext(sys.stdout) if out is None else out.open("w", encoding="utf-8") as table:

        def write(text: str) -> None:  # line by line: a run that is stopped leaves what it has
            table.write(text)
            table.flush()

        write(f"{title}\n\n{HEADER}")
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=len(todo))
            for name, method in todo:
                bar.update(task, description=f"{name} {' '.join(_levels(method))}")
                write(_row(name, method, full, raw, learn, measure))
                bar.advance(task)


def _row(name: str, method: Method, full: Any, raw: IntactKV, learn: torch.Tensor, measure: Windows) -> str:
    """Quantize, load, measure: one line of the table, or the error in its place."""
    began = perf_counter()
    head = [name, *_levels(method)]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = quantize(full, Path(scratch) / "q", method=method, calibration=learn, prefix=raw.ids)
            model, kv = load_model(folder, dtype=torch.float32), IntactKV.load(folder / PREFIX_KV)
        arms = [Arm("own", model), Arm("intact", model, kv)]
        if method.basis != "full":
            arms.append(Arm("raw", model, raw))
        found = evaluate(full, arms, measure, block_mse=False)
    except IntactKVError as error:
        return f"| {' | '.join(head)} | does not run: {error} |" + " |" * 7 + "\n"
    return f"| {' | '.join([*head, *_figures(found), f'{perf_counter() - began:.0f}'])} |\n"


def _figures(found: Evaluation) -> list[str]:
    table = {row["arm"]: row for row in found.table()}
    kl = {name: f"{row['kl_mean']:.4f}" for name, row in table.items()}
    ppl = [f"{table[name]['perplexity']:.2f}" for name in ("full", "own", "intact")]
    gap = _percent(found.gap_closed(own="own", intact="intact"))
    return [kl["own"], kl["intact"], gap, kl.get("raw", "–"), *ppl]


def _percent(part: Interval) -> str:
    return f"{100 * part.value:+.1f} [{100 * part.low:+.1f}, {100 * part.high:+.1f}]"


def _levels(method: Method) -> list[str]:
    levels = method.levels
    return ["–" if bits is None else str(bits) for bits in (levels.bits, levels.activation_bits, levels.kv_bits)]


def _halves(text: str) -> tuple[str, str]:
    middle = text.index(" ", len(text) // 2)
    return text[:middle], text[middle:]


if __name__ == "__main__":
    typer.run(main)
