"""A summary of grades as people read it."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from intactkv.evaluating.markdown import head_lines, line


def means_table(summary: dict[str, Any], *, title: str) -> Table:
    """Mean grade of every model by category and turn; (n) where fewer questions count than are asked in all."""
    table = Table(box=SIMPLE, title=title, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for model in summary["models"]:
        table.add_column(model, justify="right")
    whole = summary["questions"]
    for row in next(iter(summary["models"].values())):
        cells = []
        for model in summary["models"].values():
            of = model[row]
            few = f" ({of['questions']})" if row == "all" and of["questions"] < whole else ""
            cells.append("–" if of["mean"] is None else f"{of['mean']:.2f}{few}")
        table.add_row(row, *cells, end_section=row == "all")
    return table


def differences_table(summary: dict[str, Any], *, title: str) -> Table:
    """The second model's mean grade minus the first's, on the same questions, with paired 95 % intervals."""
    table = Table(box=SIMPLE, title=title, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for pair in summary["pairs"]:
        table.add_column(f"{pair['second']} − {pair['first']}", justify="right")
    for row in summary["pairs"][0]["difference"]:
        table.add_row(row, *(interval(pair["difference"][row]) for pair in summary["pairs"]))
    return table


def interval(found: dict[str, Any] | None) -> str:
    """A difference with its interval, as far as there is one."""
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{found['value']:+.2f}"
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def markdown_rows(summary: dict[str, Any], *, judge: str, commit: str | None) -> tuple[tuple[str, str], list[str]]:
    """The head lines and one row for each model, by category, and one for each pair's difference."""
    rows = list(next(iter(summary["models"].values())))
    lines = []
    end = (commit or "–")[:7]
    for model, of in summary["models"].items():
        cells = ("–" if of[row]["mean"] is None else f"{of[row]['mean']:.2f}" for row in rows)
        lines.append(line((judge, model, *cells, end)))
    for pair in summary["pairs"]:
        cells = (interval(pair["difference"][row]) for row in rows)
        lines.append(line((judge, f"{pair['second']} − {pair['first']}", *cells, end)))
    return head_lines(("judge", "model", *rows, "commit")), lines
