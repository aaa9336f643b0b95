"""One table of calibration: quantizers × bits × prefixes × objectives, measured on a text that was not learned from.

What it does: quantizes MODEL by each method at each number of bits, with the intact KV in the checkpoint's own basis,
calibrates it on the LEARN files, piece by piece in turn (the last pieces choose and judge), and measures four arms on
TEXT: the quantized model with its own prefix, with the intact one, with the calibrated one, and the full model.
`times` is what the calibrated KV closes of the gap ÷ what the intact one closes; *held out* are the pieces that judge.
Rows are written as they are done, and a run that was stopped computes only what is missing. Several processes share one
device. `s` is the whole calibration with its readings and gate, beside the other processes'; `MiB` its peak memory
beyond both models: resident memory, on a GPU the peak of torch's allocations. What it gives up: one model, one seed,
one learning rate for all.
"""

from __future__ import annotations

import ctypes
import gc
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from intactkv import IntactKV, IntactKVError, bos
from intactkv.calibrating import CalibrationConfig, Objective, Samples, Split, calibrate, split, text_samples
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL
from intactkv.evaluating import Arm, TokenMetrics, Windows, evaluate, paired_bootstrap, prefixed_windows
from intactkv.files import write_atomically
from intactkv.pivots.pair import shortened
from intactkv.quantizing import AWQ, GPTQ, PREFIX_KV, RECIPE, RTN, quantize
from intactkv.texts import read_text

METHODS: dict[str, type[Any]] = {"RTN": RTN, "GPTQ": GPTQ, "AWQ": AWQ}
OBJECTIVES = {"blocks": Objective(blocks=1, kl=0), "KL": Objective(blocks=0, kl=1)}
HEAD = "A reader opens an encyclopaedia and finds an article about places, people, buildings, battles, plants, songs, "
HEAD += "rivers and the years in which all of these things happened."
HEADER = (
    "| method | bits | prefix | objective | KL own | intact | calibrated | closed, intact % | closed, calibrated % "
    "| times | held out, intact % | held out, calibrated % | calibrated − intact, KL | PPL full | own | intact "
    "| calibrated | best step | adopted | s | MiB |\n"
    "|---|---:|---:|---|---:|---:|---:|---|---|---|---|---|---|---:|---:|---:|---:|---:|---|---:|---:|\n"
)
Cell = tuple[str, int, int, str]  # method, bits, length of the prefix, objective


@dataclass(frozen=True)
class Plan:
    """What all cells share."""

    model: str
    checkpoints: Path
    learn: tuple[Path, ...]
    text: Path
    samples: int
    held_out: int
    window: int
    windows: int
    device: str
    settings: CalibrationConfig


def main(
    learn: Annotated[list[Path], typer.Option(help="Texts to calibrate on, the same number of pieces from each; "
                                                   "GPTQ and AWQ learn from the first.")],
    text: Annotated[Path, typer.Option(help="Text to measure on.")],
    out: Annotated[Path, typer.Option(help="The markdown table; whole rows in it are not computed again.")],
    model: Annotated[str, typer.Option(help="The full-precision model.")] = str(MODEL),
    checkpoints: Annotated[Path | None, typer.Option(help="Folder of quantized models, made where missing.")] = None,
    methods: Annotated[str, typer.Option(help="Some of RTN,GPTQ,AWQ.")] = "RTN,GPTQ,AWQ",
    bits: Annotated[str, typer.Option(help="Numbers of bits.")] = "3,4,2",
    prefixes: Annotated[str, typer.Option(help="Prefix lengths, the longest that the checkpoints have among them.")]
    = "1,8,34",
    objectives: Annotated[str, typer.Option(help="Some of blocks,KL.")] = "blocks,KL",
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 160,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 16,
    micro_batch: Annotated[int | None, typer.Option(help="Samples in a forward; as many as fit by default.")] = None,
    learning_rate: Annotated[float, typer.Option(help="AdamW's.")] = 1e-2,
    decay: Annotated[bool, typer.Option(help="Let the learning rate fall to 0.")] = True,
    samples: Annotated[int, typer.Option(help="Pieces to learn from.")] = 128,
    held_out: Annotated[int, typer.Option(help="Pieces that choose and judge, turn about.")] = 20,
    window: Annotated[int, typer.Option(help="Tokens in a piece, prefix included.")] = 256,
    windows: Annotated[int, typer.Option(help="Windows to measure on.")] = 32,
    device: Annotated[str, typer.Option(help="Where models run: cpu, cuda, …")] = "cpu",
    processes: Annotated[int, typer.Option(help="How many calibrate at once.")] = 1,
) -> None:  # fmt: skip
    """Calibrate for every cell and write one row each."""
    settings = CalibrationConfig(
        steps=steps, batch_size=batch_size, micro_batch=micro_batch, learning_rate=learning_rate, decay=decay,
        check_every=max(1, steps // 8), checkpoint_blocks=False,
    )  # fmt: skip
    order: list[Cell] = [
        (name, width, length, goal)
        for width, length, name, goal in product(
            map(int, bits.split(",")), map(int, prefixes.split(",")), methods.split(","), objectives.split(",")
        )
    ]
    if not out.exists():
        out.write_text(HEADER, encoding="utf-8")
    cells = [cell for cell in order if _label(cell) not in out.read_text(encoding="utf-8")]
    with tempfile.TemporaryDirectory() if checkpoints is None else nullcontext(checkpoints) as folder:
        plan = Plan(
            model, Path(folder), tuple(learn), text, samples, held_out, window, windows, device, settings
        )  # fmt: skip
        _quantize_missing(plan, cells, max(length for _, _, length, _ in order))
        began = perf_counter()
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
            rows = {pool.submit(_row, plan, cell): cell for cell in cells}
            for row in as_completed(rows):
                if row.exception() is not None:  # the other rows are worth having
                    print(f"{_label(rows[row])} failed: {row.exception()!r}", flush=True)
                    continue
                with out.open("a", encoding="utf-8") as table:
                    table.write(f"{_label(rows[row])} {row.result()} |\n")
                print(f"{perf_counter() - began:.0f} s: {_label(rows[row])} {row.result()}", flush=True)
    lines = out.read_text(encoding="utf-8").splitlines()[HEADER.count("\n") :]
    places = [_label(cell) for cell in order]
    lines.sort(key=lambda line: next((i for i, label in enumerate(places) if line.startswith(label)), len(places)))
    write_atomically(out, (HEADER + "".join(f"{line}\n" for line in lines)).encode())
    if len(lines) < len(order):
        raise typer.Exit(1)


def _label(cell: Cell) -> str:
    return f"| {cell[0]} | {cell[1]} | {cell[2]} | {cell[3]} |"


def _one_thread() -> None:
    torch.set_num_threads(1)


def _quantize_missing(plan: Plan, cells: list[Cell], longest: int) -> None:
    """Make the checkpoints that the cells need and that are not there, each with the KV of the longest prefix."""
    tokenizer = load_tokenizer(plan.model)
    ids = (bos(tokenizer) + tokenizer(HEAD, add_special_tokens=False).input_ids)[:longest]
    for name, width in dict.fromkeys((name, width) for name, width, _, _ in cells):
        folder = plan.checkpoints / f"{name}-{width}"
        if folder.exists():
            if json.loads((folder / RECIPE).read_text(encoding="utf-8"))["prefix"] != ids:
                raise IntactKVError(f"{folder} was made with another prefix; remove it or name another folder")
            continue
        tokens = tokenizer(read_text(plan.learn[0]), add_special_tokens=False, verbose=False).input_ids[:40_000]
        shown = prefixed_windows(tokens, prefix=ids, window=256).ids[-32:]
        method = METHODS[name](width, 128, symmetric=False)
        full = load_model(plan.model, dtype=torch.float32)
        quantize(full, folder, method=method, calibration=shown, prefix=ids)


@lru_cache(maxsize=2)  # the full model and the quantized one at hand
def _loaded(source: str, device: str) -> Any:
    return load_model(source, dtype=torch.float32).to(torch.device(device))


@lru_cache(maxsize=4)
def _data(plan: Plan, ids: tuple[int, ...]) -> tuple[Split, Windows]:
    """What is learned, and what is measured: windows all over the text."""
    tokenizer = load_tokenizer(plan.model)
    share = -(-(plan.samples + plan.held_out) // len(plan.learn))
    parts = [text_samples(p, tokenizer, prefix=ids, length=plan.window, count=share).rows for p in plan.learn]
    if min(map(len, parts)) < share:
        raise IntactKVError(f"the learned texts give {[len(part) for part in parts]} pieces; {share} of each are used")
    rounds = (
        found[:: (-1) ** i] for i, found in enumerate(zip(*parts, strict=True))
    )  # to and fro: turn about, all texts
    mixed = Samples(tuple(chain.from_iterable(rounds)), " + ".join(p.name for p in plan.learn))  # choose and judge
    tokens = tokenizer(read_text(plan.text), add_special_tokens=False, verbose=False).input_ids
    measure = prefixed_windows(tokens, prefix=ids, window=plan.window)
    step = len(measure) // plan.windows
    return split(mixed, held_out=plan.held_out), measure[::step][: plan.windows]


def _row(plan: Plan, cell: Cell) -> str:
    """Calibrate and measure: the figures of one row. The calibrated arm is shown also where it was not adopted."""
    name, width, length, goal = cell
    folder = plan.checkpoints / f"{name}-{width}"
    full, model = _loaded(plan.model, plan.device), _loaded(str(folder), plan.device)
    kv = shortened(IntactKV.load(folder / PREFIX_KV), length)
    learned, measure = _data(plan, tuple(kv.ids.tolist()))
    began, before = perf_counter(), _memory(plan.device, reset=True)
    settings = replace(plan.settings, objective=OBJECTIVES[goal])
    calibrated = calibrate(kv, model, full, learned, config=settings)
    seconds, mib = perf_counter() - began, _memory(plan.device) - before
    about = calibrated.provenance["calibration"]
    arms = [Arm("own", model), Arm("intact", model, kv), Arm("calibrated", model, calibrated)]
    found = evaluate(full, arms, measure, block_mse=False)
    table = {row["arm"]: row for row in found.table()}
    kl = [f"{table[arm]['kl_mean']:.4f}" for arm in ("own", "intact", "calibrated")]
    gaps = [_percent(vars(found.gap_closed(own="own", intact=arm))) for arm in ("intact", "calibrated")]
    held = [_percent(about["gap_closed"][arm]) for arm in ("before", "after")]
    three = [found.metrics[arm.name] for arm in arms]
    times = paired_bootstrap(_times, *three, generator=torch.Generator().manual_seed(0))["times"]
    less = found.difference(own="calibrated", intact="intact")["kl_mean"]
    paired = f"{less.value:+.4f} [{less.low:+.4f}, {less.high:+.4f}]"
    ppl = [f"{table[arm]['perplexity']:.2f}" for arm in ("full", "own", "intact", "calibrated")]
    end = [str(about["best_step"]), "yes" if about["adopted"] else "no", f"{seconds:.0f}", f"{mib:.0f}"]
    ratio = f"{times.value:.2f} [{times.low:.2f}, {times.high:.2f}]"
    return " | ".join([*kl, *gaps, ratio, *held, paired, *ppl, *end])


def _percent(share: dict[str, float]) -> str:
    return f"{100 * share['value']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def _times(own: TokenMetrics, intact: TokenMetrics, calibrated: TokenMetrics, counts: Tensor) -> dict[str, Tensor]:
    """What the calibrated arm removes of the own one's KL ÷ what the intact one does, in many resamples."""
    sums = [counts.double() @ torch.where(a.scored, a.kl.double(), 0.0).sum(dim=1) for a in (own, intact, calibrated)]
    return {"times": (sums[0] - sums[2]) / (sums[0] - sums[1])}


def _memory(device: str, *, reset: bool = False) -> float:
    """MiB at the peak since the last `reset`, which begins at the present size: of torch on a GPU, else resident."""
    gc.collect()  # a model of the cell before, freed only later, would hide as much of this one's
    if torch.device(device).type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would else be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    typer.run(main)
