"""The three kinds of pivot side by side: one picture and one table for several models.

    python runs/pivots.py TEXT OUT.svg "SmolLM2 (the position)=MODEL" "Gemma 3 (the token)=MODEL" "control (none)=MODEL"

What it does, on windows of TEXT: how large the first token's hidden state is over the median token's and how much
attention it gets, by layer, with [BOS] first and with the text's own token; and, with the weights rounded to nearest in
memory, how much of the block outputs' error is left with the first 0 to 8 tokens intact, and KL by position with the
model's own [BOS] and the intact one. What it gives up: 8 windows of 256 tokens (24 for KL), simulated rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from intactkv import bos, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.doctor.simulate import rounded_model
from intactkv.evaluating import Arm, evaluate, prefixed_windows
from intactkv.files import replacing
from intactkv.pivots.measure import LayerPivot, first_token_pivots, mean_mass, measure
from intactkv.pivots.pair import mse_by_prefix_size
from intactkv.texts import read_text

WINDOW, WINDOWS, KL_WINDOWS, SIZES, BINS = 256, 8, 24, 8, 16
SIMULATED_BITS, GROUP = 3, 64
FIRST, OTHER = "#0072B2", "#D55E00"  # Okabe and Ito's


@dataclass(frozen=True)
class Seen:
    """What one column shows; layers with [BOS] first and without it, shares of error by size, KL by span."""

    name: str
    with_bos: list[LayerPivot]
    without: list[LayerPivot]
    left: Tensor
    kl: dict[str, Tensor]


def main(
    text: Annotated[Path, typer.Argument(help="A UTF-8 text to show models.")],
    out: Annotated[Path, typer.Argument(help="The picture, .svg.")],
    models: Annotated[list[str], typer.Argument(help="NAME=MODEL …")],
) -> None:
    """Draw the picture and print the table."""
    columns = [seen(name, model, text) for name, model in (each.split("=", 1) for each in models)]
    draw(columns, out)
    print("| model | largest ratio with [BOS] | without | attention with [BOS] | without "
          "| block error left with 1 intact % | with 8 % | KL own | intact |\n|---|" + "---:|" * 8)  # fmt: skip
    for column in columns:
        layers = (column.with_bos, column.without)
        ratios = [f"{max(layer.ratio for layer in some):.0f}" for some in layers]
        masses = [f"{mean_mass(some):.2f}" for some in layers]
        left = [f"{100 * float(column.left[size]):.0f}" for size in (1, SIZES)]
        kl = [f"{float(column.kl[arm].mean()):.4f}" for arm in ("own", "intact")]
        print(f"| {' | '.join([column.name, *ratios, *masses, *left, *kl])} |")


def seen(name: str, model: str, text: Path) -> Seen:
    full, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    tokens = tokenizer(read_text(text), add_special_tokens=False, verbose=False).input_ids
    windows = prefixed_windows(tokens, prefix=bos(tokenizer), window=WINDOW)
    ids = windows.ids[:WINDOWS]
    plain = torch.tensor(tokens[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)
    rounded = rounded_model(full, bits=SIMULATED_BITS, group_size=GROUP)
    mse = mse_by_prefix_size(full, rounded, ids[:2], most=SIZES)
    arms = [Arm("own", rounded), Arm("intact", rounded, capture(full, bos(tokenizer)))]
    found = evaluate(full, arms, windows[:KL_WINDOWS], block_mse=False)
    return Seen(
        name,
        first_token_pivots(measure(full, ids)),
        first_token_pivots(measure(full, plain)),
        (mse / mse[0]).mean(1),
        {arm.name: spans(found.metrics[arm.name].kl) for arm in arms},
    )


def spans(kl: Tensor) -> Tensor:
    """Mean KL in spans of positions, those not scored left out."""
    return torch.stack([part.double().nanmean() for part in kl.tensor_split(BINS, dim=1)])


def draw(columns: list[Seen], out: Path) -> None:
    """Four rows of small pictures, a column a model; readable on light and dark pages."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4 * len(columns), 11), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(4, len(columns), sharey="row", squeeze=False)
    simulated = f"({SIMULATED_BITS} bits)"
    rows = ("first token's largest |hidden|\nover the median token's", "attention that later tokens\ngive the first",
            f"block outputs' error left, %\n{simulated}", f"KL to the full model\n{simulated}")  # fmt: skip
    for at, column in enumerate(columns):
        ratio, mass, error, kl = grid[:, at]
        ratio.set_title(column.name)
        for layers, label, colour in ((column.with_bos, "[BOS]", FIRST), (column.without, "the text's own", OTHER)):
            numbers = range(1, len(layers) + 1)
            ratio.semilogy(numbers, [layer.ratio for layer in layers], color=colour, label=f"first: {label}")
            mass.plot(
                numbers, [layer.mass if layer.mass is not None else float("nan") for layer in layers], color=colour
            )
        error.plot(range(SIZES + 1), 100 * column.left, color=FIRST, marker="o")
        width = WINDOW / BINS
        for arm, colour in (("own", OTHER), ("intact", FIRST)):
            kl.plot([width * (n + 0.5) for n in range(BINS)], column.kl[arm], color=colour, label=f"{arm} [BOS]")
        for axes, label in zip(grid[:, at], ("layer", "layer", "tokens intact", "position"), strict=True):
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
    for axes, label in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(label)
    grid[0, 0].legend(frameon=False)
    grid[3, 0].legend(frameon=False)
    grid[2, 0].set_ylim(0)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="svg", facecolor="white")


if __name__ == "__main__":
    typer.run(main)
