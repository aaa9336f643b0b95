"""Figures as people read them: rich tables and a JSON file that says how to get them again."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from intactkv.basis import Relation
from intactkv.evaluate import Evaluation, Interval
from intactkv.pivots import LayerPivot, uniform_mass

_SHOWN = {
    "kl_median": "median",
    "kl_99": "99 %",
    "kl_99_9": "99.9 %",
    "same_top1_percent": "top-1 %",
    "perplexity": "PPL",
}
WORTH_IT = 0.02  # the share of KL below which an effect, however certain, is not worth having

_DIGITS = {"same_top1_percent": 2, "perplexity": 2}


def pivot_table(pivots: Sequence[LayerPivot], length: int) -> Table:
    """One row per layer: how massive the first token is and how much attention it draws."""
    table = Table(box=SIMPLE, title="Pivots at the first token", padding=(0, 1))
    for heading in ("layer", "hidden state, × median token", "attention mass", "best head"):
        table.add_column(heading, justify="right")
    for p in pivots:
        ratio = "–" if p.ratio is None else f"{p.ratio:.1f}"
        table.add_row(str(p.layer + 1), ratio, f"{p.mass:.3f}", f"{p.best_head:.3f}")
    table.caption = f"uniform attention over {length} tokens: {uniform_mass(length):.3f}"
    return table


def pivot_sentence(pivots: Sequence[LayerPivot], length: int) -> str:
    """How strong the pivots are beside those of large models, from the upper half of the layers."""
    upper = pivots[len(pivots) // 2 :]
    mass = sum(p.mass for p in upper) / len(upper)
    ratio = max((p.ratio for p in pivots if p.ratio is not None), default=float("nan"))
    strength = "weak" if mass < 0.3 or ratio < 20 else "real"
    return (
        f"Its pivots are {strength}: {100 * mass:.0f} % of attention in the upper half of the layers (uniform: "
        f"{100 * uniform_mass(length):.0f} %) and a hidden state up to {ratio:.0f}× the median token's, where large "
        "models show over 50 % and up to 1000×."
    )


def basis_table(relations: Sequence[Relation]) -> Table:
    """How many heads of keys and values stand in which relation to the full model's, and what is left unexplained."""
    table = Table(box=SIMPLE, title="Keys and values against the full model's", padding=(0, 1))
    for heading in ("part", "relation", "heads", "left unexplained, median", "largest", "as it is, median"):
        table.add_column(heading, justify="left" if heading in ("part", "relation") else "right")
    for part in ("key", "value"):
        for kind in ("same", "scale", "rotation", "other"):
            found = [r for r in relations if r.part == part and r.kind == kind]
            if found:
                left, as_is = [r.residual for r in found], [r.as_is for r in found]
                shares = [f"{100 * share:.2g} %" for share in (median(left), max(left), median(as_is))]
                table.add_row(part, kind, str(len(found)), *shares)
    return table


def arms_table(figures: dict[str, Any], *, title: str) -> Table:
    """The three-arm table from `Evaluation.to_dict()`: KL to the full model with its interval, top-1, perplexity."""
    table = Table(box=SIMPLE, title=title, padding=(0, 1, 0, 0))
    table.add_column("arm", no_wrap=True)
    for heading in ("KL mean [95 %]", *_SHOWN.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in figures["arms"].items():
        shown = [f"{row[metric]['value']:.{_DIGITS.get(metric, 4)}f}" for metric in _SHOWN]
        kl = row["kl_mean"]
        interval = "" if kl["low"] is None else f" [{kl['low']:.4f}, {kl['high']:.4f}]"
        table.add_row(name, f"{kl['value']:.4f}{interval}", *shown)
    return table


def sentences(evaluation: Evaluation, *, seed: int = 0) -> list[str]:
    """One sentence for each pair of arms that says what its intervals allow to say, and no more."""
    said = []
    for own, intact in evaluation.pairs:
        gap = evaluation.gap_closed(own=own, intact=intact, seed=seed)
        perplexity = evaluation.difference(own=own, intact=intact, seed=seed)["perplexity"]
        said.append(
            f"{intact}: {verdict(gap)}; perplexity changes by {-perplexity.value:+.3f} "
            f"({-perplexity.high:+.3f} to {-perplexity.low:+.3f})."
        )
    return said


def verdict(gap: Interval) -> str:
    """What the share of KL closed, with its paired 95 % interval, allows to say."""
    share = f"{100 * gap.value:+.1f} % (95 % interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
    if gap.low > 0 and gap.high < WORTH_IT:
        return f"not worth it: the intact prefix closes only {share} of the KL to the full model"
    if gap.low > 0:
        return f"the intact prefix closes {share} of the KL to the full model"
    if gap.high < 0:
        return f"the intact prefix makes it worse: it closes {share} of the KL to the full model"
    return f"no effect that this text can show: {share} of the KL to the full model closed"


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
