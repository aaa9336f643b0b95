"""The doctor's forecast of what quantizing with the prefix gains, beside what it gained: rank correlation over cells.

What it does: forecasts, from each full model alone and a calibration text, symmetric and asymmetric GPTQ at 3 and 4
bits, and reads what was measured from the JSON files of `prefix_aware.py`: KL with the intact prefix of the ordinary
checkpoint over that of the one made for the prefix, on C4. What it gives up: cells whose two files are not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from scipy.stats import spearmanr

from intactkv import bos
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.doctor.forecast import forecast
from intactkv.texts import read_text

GROUP = 64  # as prefix_aware.py has it


def main(
    text: Annotated[Path, typer.Argument(help="The calibration's text.")],
    models: Annotated[list[str], typer.Argument(help="NAME=FOLDER=RESULTS …, results of prefix_aware.py.")],
) -> None:
    """Print one Markdown table and Spearman's rank correlation."""
    print("| model | GPTQ | layer that pays most | share | counted | left out | forecast: times | measured: times |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    told, gained = [], []
    for name, folder, results in (model.split("=") for model in models):
        full, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
        tokens = tokenizer(read_text(text), add_special_tokens=False, verbose=False).input_ids
        for found in forecast(full, tokens, bos(tokenizer), symmetric=(True, False), group_size=GROUP):
            job = f"gptq-{'' if found.symmetric else 'asym-'}w{found.bits}"
            files = [Path(results) / f"{job}-{kind}.json" for kind in ("ordinary", "aware")]
            measured = "–"
            if all(file.exists() for file in files):
                ordinary, aware = (json.loads(f.read_text())["texts"]["C4"]["intact"]["kl_mean"] for f in files)
                told.append(found.times)
                gained.append(ordinary / aware)
                measured = f"{ordinary / aware:.3f}"
            worst = found.layers[0]
            print(
                f"| {name} | {job[5:]} | {worst.layer} | {worst.share:.3f} | {worst.counted:.4f} "
                f"| {worst.left_out:.4f} | {found.times:.3f} | {measured} |"
            )
    rank = spearmanr(told, gained)
    print(f"\nSpearman's rank correlation over {len(told)} cells: {rank.statistic:.2f} (p = {rank.pvalue:.2g})")


if __name__ == "__main__":
    typer.run(main)
