"""Figures as people read them: rich tables and a JSON file that says how to get them again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from intactkv.basis import Relation
from intactkv.evaluate import Evaluation, summary, verdict
from intactkv.files import json_data, write_atomically
from intactkv.pivots import LayerPivot, uniform_mass
from intactkv.pivots.classify import PIVOT

_SHOWN = {
    "kl_median": "median",
    "kl_99": "99 %",
    "kl_99_9": "99.9 %",
    "same_top1_percent": "top-1 %",
    "perplexity": "PPL",
}
_DIGITS = {"same_top1_percent": 2, "perplexity": 2}


def pivot_table(pivots: Sequence[LayerPivot], length: int) -> Table:
    """One row per layer: how massive the first token is and how much attention it draws."""
    table = Table(box=SIMPLE, title="Pivots at the first token", padding=(0, 1))
    for heading in ("layer", "hidden state, × median token", "attention mass", "best head"):
        table.add_column(heading, justify="right")
    for p in pivots:
        shares = ("–" if share is None else f"{share:.3f}" for share in (p.mass, p.best_head))
        table.add_row(str(p.layer + 1), f"{p.ratio:.1f}", *shares)
    table.caption = f"uniform attention over {length} tokens: {uniform_mass(length):.3f}"
    return table


def pivot_sentence(pivots: Sequence[LayerPivot], length: int) -> str:
    """How strong the pivots are beside those of large models, from the upper half of the layers."""
    masses = [p.mass for p in pivots if p.mass is not None]
    upper = masses[len(masses) // 2 :]
    mass = sum(upper) / len(upper) if upper else 0.0
    ratio = max(p.ratio for p in pivots)
    strength = "weak" if mass < 0.3 or ratio < PIVOT else "real"
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
    """The three-arm table from `Evaluation.to_dict()`: KL to the full model with its interval, top-1, perplexity.

    Where `figures["kl"]` says that KL is a lower bound, its heading does so too.
    """
    table = Table(box=SIMPLE, title=title, padding=(0, 1, 0, 0))
    table.add_column("arm", no_wrap=True)
    bound = "" if figures.get("kl", "exact") == "exact" else " ≥"
    for heading in (f"KL mean{bound} [95 %]", *_SHOWN.values()):
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
        own_kl = summary(evaluation.metrics[own])["kl_mean"]
        against = "" if intact.replace("intact", "own") == own else f" against {own}"
        judged = verdict(gap, own_kl=own_kl, times=evaluation.times_perplexity(intact))
        said.append(
            f"{intact}{against}: {judged}; perplexity changes by {-perplexity.value:+.3f} "
            f"({-perplexity.high:+.3f} to {-perplexity.low:+.3f})."
        )
    return said


def commit() -> str | None:
    """The git commit this package's own source is at, "+ changes" if it has any; None where it is not under git."""
    source = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # a virtual environment in another's checkout
        return None
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ".")
    return head if head is None or changes == "" else f"{head} + changes"


def installed(package: str) -> str | None:
    """The version of an installed package; None where it runs from source, without metadata, or is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def made_by() -> dict[str, Any]:
    """The command, machine and versions that figures come from."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "folder": str(Path.cwd()),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "versions": {name: installed(name) for name in ("intactkv", "torch", "transformers")},
    }


def write_json(path: str | os.PathLike[str], data: dict[str, Any]) -> Path:
    """Write `data` with the versions, machine and command that made it, atomically."""
    path = Path(path)
    text = json.dumps({**json_data(data), "made_by": made_by()}, indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())
    return path
