"""Arms as people read them: a table, and what their intervals allow to say."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from intactkv.evaluating import Evaluation, summary, verdict

_SHOWN = {
    "kl_median": "median",
    "kl_99": "99 %",
    "kl_99_9": "99.9 %",
    "same_top1_percent": "top-1 %",
    "perplexity": "PPL",
}
_DIGITS = {"same_top1_percent": 2, "perplexity": 2}


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
