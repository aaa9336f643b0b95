"""What decides how much an intact KV helps: its effect beside the pivot's strength and its share of the error.

    python runs/effect.py measure MODEL DATA OUT RTN-3 gptq-3 …       # folders in OUT, by `runs/paper.sh` or `quantize`
    python runs/effect.py table NAME=OUT/effect.json …

What it does: for each checkpoint with a `prefix.intactkv` of [BOS], measures the KL that the intact KV closes on C4,
and before that, on calibration text, what may tell it: the pivot's ratio and attention mass in the full model; the
share of attention-output error that the intact prefix removes (`budget`), from the checkpoint and, before anything is
quantized, from the full model rounded to nearest in as many bits. `table` ranks the effects by each (Spearman).
What it gives up: 4 windows of 256 tokens for the budget, 150 of 512 for the effect, one checkpoint a cell.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from intactkv import IntactKV, IntactKVError, bos
from intactkv.checkpoint.load import load_model_on, load_tokenizer
from intactkv.doctor.simulate import rounded_model
from intactkv.evaluating import Arm, Windows, evaluate, prefixed_windows
from intactkv.files import write_atomically
from intactkv.pivots.measure import first_token_pivots, mean_mass, measure
from intactkv.pivots.pair import error_budget
from intactkv.quantizing import PREFIX_KV
from intactkv.texts import read_text

GROUP, WINDOWS, WINDOW = 64, 150, 512
BUDGET_WINDOWS, BUDGET_WINDOW = 4, 256
app = typer.Typer(pretty_exceptions_enable=False)


@app.command("measure")
def measured(
    model: Annotated[str, typer.Argument(help="The full-precision model.")],
    data: Annotated[Path, typer.Argument(help="The folder with calib/ and eval/.")],
    out: Annotated[Path, typer.Argument(help="The folder with the checkpoints; effect.json is written there.")],
    cells: Annotated[list[str], typer.Argument(help="METHOD-BITS, their folders.")],
    device: Annotated[str, typer.Option(help="Where models run.")] = "auto",
) -> None:
    """Measure each checkpoint's effect and what may tell it; those in effect.json are not measured again."""
    full, tokenizer = load_model_on(model, device, dtype=torch.float32), load_tokenizer(model)
    prefix, file = bos(tokenizer), out / "effect.json"

    def windows(path: Path, window: int, count: int) -> Windows:
        tokens = tokenizer(read_text(path), add_special_tokens=False, verbose=False).input_ids
        return prefixed_windows(tokens, prefix=prefix, window=window)[:count]

    learned = windows(data / "calib" / "wikitext2_valid_tokenised.txt", BUDGET_WINDOW, BUDGET_WINDOWS)
    shown = windows(data / "eval" / "c4_sample_500.jsonl", WINDOW, WINDOWS)
    known = json.loads(file.read_text()) if file.exists() else {}
    if "pivot" not in known:
        layers = first_token_pivots(measure(full, learned.ids))
        known["pivot"] = {"ratio": max(layer.ratio for layer in layers), "mass": mean_mass(layers)}
    for bits in sorted({cell.rpartition("-")[2] for cell in cells} - known.setdefault("simulated", {}).keys()):
        rounded = rounded_model(full, bits=int(bits), group_size=GROUP)
        known["simulated"][bits] = gone(full, rounded, learned)
        del rounded
    for cell in (cell for cell in cells if cell not in known.setdefault("cells", {})):
        quantized, kv = load_model_on(out / cell, device, dtype=torch.float32), IntactKV.load(out / cell / PREFIX_KV)
        arms = [Arm("own", quantized), Arm("intact", quantized, kv)]
        found = evaluate(full, arms, shown, block_mse=False)
        try:
            budget = gone(full, quantized, learned)
        except IntactKVError as error:  # keys in another basis, say
            print(f"{cell}: no budget: {error}")
            budget = None
        own, intact = (float(found.metrics[name].kl.double().nanmean()) for name in ("own", "intact"))
        known["cells"][cell] = {"own": own, "intact": intact, "budget": budget,
                                "closed": vars(found.gap_closed(own="own", intact="intact"))}  # fmt: skip
        write_atomically(file, json.dumps(known, indent=1).encode())
        print(f"{cell}: {own:.4f} to {intact:.4f}", flush=True)
        del quantized, arms
    write_atomically(file, json.dumps(known, indent=1).encode())


def gone(full: PreTrainedModel, model: PreTrainedModel, windows: Windows) -> float:
    """The share of attention-output error energy, a mean over the layers, that goes with the prefix intact."""
    layers = error_budget(full, model, windows.ids, sizes=(0, 1))
    return sum(1 - float(layer.layer_left[1]) for layer in layers) / len(layers)


@app.command()
def table(results: Annotated[list[str], typer.Argument(help="NAME=OUT/effect.json …")]) -> None:
    """Print every cell, and how well each figure ranks the effects."""
    print("| model | cell | pivot's ratio | its attention | error gone, simulated % | of the checkpoint % | KL own "
          "| intact | closed %, from, to |\n|---|---|" + "---:|" * 6 + "---|")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name, path in (result.split("=", 1) for result in results):
        known = json.loads(Path(path).read_text())
        for cell, found in known["cells"].items():
            method, _, bits = cell.rpartition("-")
            row = {**known["pivot"], "simulated": known["simulated"][bits], "budget": found["budget"], "method": method,
                   "closed": found["closed"]["value"], "broken": int(bits) < 3}  # fmt: skip
            rows.append(row)
            cells = [f"{row['ratio']:.0f}", f"{row['mass']:.2f}", percent(row["simulated"]), percent(row["budget"])]
            cells += [f"{found['own']:.4f}", f"{found['intact']:.4f}"]
            closed = " ".join(percent(found["closed"][end]) for end in ("value", "low", "high"))
            print(f"| {name} | {cell} | {' | '.join(cells)} | {closed} |")
    print("\n| cells | " + " | ".join(FIGURES) + " |\n|---|" + "---:|" * len(FIGURES))
    for words, chosen in SELECTIONS.items():
        some = [row for row in rows if chosen(row)]
        print(f"| {words} ({len(some)}) | " + " | ".join(rank(some, figure) for figure in FIGURES) + " |")


FIGURES = ("ratio", "mass", "simulated", "budget")
SELECTIONS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "all": lambda row: True,
    "3 and 4 bits": lambda row: not row["broken"],
    "3 and 4 bits without AutoRound": lambda row: not row["broken"] and row["method"] != "autoround",
    "rounding to nearest": lambda row: row["method"] == "rtn",
}


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def rank(rows: list[dict[str, Any]], figure: str) -> str:
    pairs = [(row[figure], row["closed"]) for row in rows if row[figure] is not None]
    if len({x for x, _ in pairs}) < 2:
        return "–"
    return f"{spearmanr(*zip(*pairs, strict=True)).statistic:+.2f} (n = {len(pairs)})"


if __name__ == "__main__":
    app()
