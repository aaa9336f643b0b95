"""Figures as people read them: rich tables and a JSON file that says how to get them again."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from intactkv.evaluate import Evaluation, Interval
from intactkv.pivots import LayerPivot, uniform_mass

_COLUMNS = {
    "kl_median": "median",
    "kl_99": "99 %",
    "kl_99_9": "99.9 %",
}


def pivot_table(pivots: Sequence[LayerPivot], length: int) -> Table:
    """One row per layer: how massive the first token is and how much attention it draws."""
    table = Table(
        title=f"Pivots at the first token (uniform attention over {length} tokens would be {uniform_mass(length):.3f})"
    )
    for heading in ("layer", "hidden state, × median token", "attention mass", "best head"):
        table.add_column(heading, justify="right")
    for p in pivots:
        ratio = "–" if p.ratio is None else f"{p.ratio:.1f}"
        table.add_row(str(p.layer + 1), ratio, f"{p.mass:.3f}", f"{p.best_head:.3f}")
    return table


def arms_table(figures: dict[str, Any], *, title: str) -> Table:
    """The three-arm table from `Evaluation.to_dict()`: KL to the full model with intervals, top-1, perplexity."""
    table = Table(title=title)
    table.add_column("arm")
    table.add_column("KL mean [95 %]", justify="right")
    for heading in _COLUMNS.values():
        table.add_column(heading, justify="right")
    table.add_column("same top-1 %", justify="right")
    table.add_column("perplexity [95 %]", justify="right")
    for name, row in figures["arms"].items():
        shown = [f"{row[metric]['value']:.4f}" for metric in _COLUMNS]
        kl, top1 = _with_interval(row["kl_mean"], 4), f"{row['same_top1_percent']['value']:.2f}"
        if name == "full":
            kl, shown, top1 = "0", ["0"] * len(_COLUMNS), "100"
        table.add_row(name, kl, *shown, top1, _with_interval(row["perplexity"], 2))
    return table


def sentences(evaluation: Evaluation, *, seed: int = 0) -> list[str]:
    """One sentence for each pair of arms that says what its interval allows to say, and no more."""
    said = []
    for own, intact in evaluation.pairs:
        gap = evaluation.gap_closed(own=own, intact=intact, seed=seed)
        said.append(f"{intact} against {own}: {verdict(gap)}.")
    return said


def verdict(gap: Interval) -> str:
    """What the share of KL closed, with its paired 95 % interval, allows to say."""
    share = f"{100 * gap.value:+.1f} % (95 % interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
    if gap.low > 0:
        return f"the intact prefix closes {share} of the KL to the full model"
    if gap.high < 0:
        return f"the intact prefix makes it worse, closing {share} of the KL to the full model"
    return f"no effect that this text can show: the intact prefix closes {share} of the KL to the full model"


def write_json(path: str | os.PathLike[str], data: dict[str, Any]) -> Path:
    """Write `data` with the versions, machine and command that made it, atomically."""
    path = Path(path)
    made_by = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("intactkv", "torch", "transformers")},
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({**data, "made_by": made_by}, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _with_interval(figure: dict[str, float | None], digits: int) -> str:
    low, high = figure["low"], figure["high"]
    if low is None or high is None:
        return f"{figure['value']:.{digits}f}"
    return f"{figure['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
