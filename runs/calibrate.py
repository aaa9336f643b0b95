"""One table of calibration: quantizers × bits × prefixes × objectives, measured on a text that was not learned from.

What it does: quantizes MODEL by each method at each number of bits, with the intact KV in the checkpoint's own basis,
calibrates it on LEARN (its last pieces choose and judge), and measures four arms on TEXT: the quantized model with its
own prefix, with the intact one, with the calibrated one, and the full model. Rows are written as they are done, and a
run that was stopped goes on after the last whole row. `s` is the whole calibration with its readings and gate, `MiB`
its peak memory beyond both models. What it gives up: one model, one seed, one learning rate for all.
"""

from __future__ import annotations

import ctypes
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

from intactkv import IntactKV, bos
from intactkv.calibrate import Objective, Settings, calibrate, split, text_samples
from intactkv.demo import MODEL
from intactkv.evaluate import Arm, Windows, evaluate, prefixed_windows
from intactkv.load import load_model, load_tokenizer, read_text
from intactkv.quantize import AWQ, GPTQ, PREFIX_KV, RTN, Method, quantize

METHODS: dict[str, type[Any]] = {"RTN": RTN, "GPTQ": GPTQ, "AWQ": AWQ}
OBJECTIVES = {"blocks": Objective(blocks=1, kl=0), "KL": Objective(blocks=0, kl=1)}
HEAD = "A reader opens an encyclopaedia and finds an article about places, people, buildings, battles, plants, songs, "
HEAD += "rivers and the years in which all of these things happened."
HEADER = (
    "| method | bits | prefix | objective | KL own | intact | calibrated | closed, intact % | closed, calibrated % "
    "| calibrated − intact, KL | PPL full | own | intact | calibrated | best step | adopted | s | MiB |\n"
    "|---|---:|---:|---|---:|---:|---:|---|---|---|---:|---:|---:|---:|---:|---|---:|---:|\n"
)


def main(
    learn: Annotated[Path, typer.Option(help="Text to calibrate on.")],
    text: Annotated[Path, typer.Option(help="Text to measure on.")],
    out: Annotated[Path, typer.Option(help="The markdown table; whole rows in it are not computed again.")],
    model: Annotated[str, typer.Option(help="The full-precision model.")] = str(MODEL),
    methods: Annotated[str, typer.Option(help="Some of RTN,GPTQ,AWQ.")] = "RTN,GPTQ,AWQ",
    bits: Annotated[str, typer.Option(help="Numbers of bits.")] = "3,4,2",
    prefixes: Annotated[str, typer.Option(help="Prefix lengths.")] = "1,8,34",
    objectives: Annotated[str, typer.Option(help="Some of blocks,KL.")] = "blocks,KL",
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 160,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="AdamW's.")] = 1e-2,
    decay: Annotated[bool, typer.Option(help="Let the learning rate fall to 0.")] = True,
    samples: Annotated[int, typer.Option(help="Pieces to learn from; 20 more choose and judge.")] = 128,
    window: Annotated[int, typer.Option(help="Tokens in a piece, prefix included.")] = 256,
    windows: Annotated[int, typer.Option(help="Windows to measure on.")] = 32,
) -> None:
    """Calibrate for every cell and write one row each."""
    full, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    lengths = [int(length) for length in prefixes.split(",")]
    ids = bos(tokenizer) + tokenizer(HEAD, add_special_tokens=False).input_ids
    learnable, tokens = (
        tokenizer(read_text(path), add_special_tokens=False, verbose=False).input_ids for path in (learn, text)
    )
    if not out.exists():
        out.write_text(HEADER, encoding="utf-8")
    done = {tuple(line.split("|")[1:5]) for line in out.read_text(encoding="utf-8").splitlines()}
    settings = Settings(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, decay=decay, check_every=max(1, steps // 6)
    )
    for name, width in ((m, int(b)) for b in bits.split(",") for m in methods.split(",")):
        cells = [(length, goal) for length in lengths for goal in objectives.split(",")]
        cells = [c for c in cells if (f" {name} ", f" {width} ", f" {c[0]} ", f" {c[1]} ") not in done]
        if not cells:
            continue
        quantized, longest = _quantized(
            full, METHODS[name](width, 128, symmetric=False), learnable, ids[: max(lengths)]
        )
        for length, goal in cells:
            kv = _shortened(longest, length)
            pieces = text_samples(learn, tokenizer, prefix=kv.ids, length=window, count=samples + 20)
            measure = prefixed_windows(tokens, prefix=kv.ids, window=window)
            step = len(measure) // windows  # all over the text
            measure = Windows(measure.ids[::step][:windows], measure.scored[::step][:windows])
            row = _row(full, quantized, kv, (pieces, measure), replace(settings, objective=OBJECTIVES[goal]))
            with out.open("a", encoding="utf-8") as table:
                table.write(f"| {name} | {width} | {length} | {goal} | {row} |\n")


def _quantized(full: Any, method: Method, tokens: list[int], ids: list[int]) -> tuple[Any, IntactKV]:
    """The checkpoint loaded back, and the KV of the longest prefix in its basis."""
    learn = prefixed_windows(tokens[:40_000], prefix=ids, window=256).ids[-32:]
    with tempfile.TemporaryDirectory() as scratch:
        folder = quantize(full, Path(scratch) / "q", method=method, calibration=learn, prefix=ids)
        return load_model(folder, dtype=torch.float32), IntactKV.load(folder / PREFIX_KV)


def _shortened(kv: IntactKV, length: int) -> IntactKV:
    """The KV of the first tokens: keys and values hang on the tokens before them only."""
    layers = {
        i: (key[:, :length].contiguous(), value[:, :length].contiguous()) for i, (key, value) in kv.layers.items()
    }
    return replace(kv, ids=kv.ids[:length], layers=layers, logits=kv.logits[:length])


def _row(full: Any, model: Any, kv: IntactKV, data: tuple[Any, Windows], settings: Settings) -> str:
    """Calibrate and measure: the figures of one row. The calibrated arm is shown also where it was not adopted."""
    began, before = perf_counter(), _memory(reset=True)
    calibrated = calibrate(kv, model, full, split(data[0], held_out=20), settings=settings)
    seconds, mib = perf_counter() - began, _memory() - before
    about = calibrated.provenance["calibration"]
    arms = [Arm("own", model), Arm("intact", model, kv), Arm("calibrated", model, calibrated)]
    found = evaluate(full, arms, data[1], block_mse=False)
    table = {row["arm"]: row for row in found.table()}
    kl = [f"{table[arm]['kl_mean']:.4f}" for arm in ("own", "intact", "calibrated")]
    gaps = [found.gap_closed(own="own", intact=arm) for arm in ("intact", "calibrated")]
    shares = [f"{100 * g.value:.1f} [{100 * g.low:.1f}, {100 * g.high:.1f}]" for g in gaps]
    less = found.difference(own="calibrated", intact="intact")["kl_mean"]
    paired = f"{less.value:+.4f} [{less.low:+.4f}, {less.high:+.4f}]"
    ppl = [f"{table[arm]['perplexity']:.2f}" for arm in ("full", "own", "intact", "calibrated")]
    end = [str(about["best_step"]), "yes" if about["adopted"] else "no", f"{seconds:.0f}", f"{mib:.0f}"]
    return " | ".join([*kl, *shares, paired, *ppl, *end])


def _memory(*, reset: bool = False) -> float:
    """The process's largest resident size in MiB since the last `reset`, which begins at the present size; Linux."""
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would else be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    typer.run(main)
