"""Tables in Markdown, for pages of results, and an evaluation as one row of such a table."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from intactkv.error import IntactKVError
from intactkv.files import write_atomically
from intactkv.provenance import made_by

_HEADINGS = (
    "model", "windows × length", "KL own", "KL intact", "KL closed % [95 %]", "top-1 % own", "top-1 % intact",
    "PPL full", "PPL own", "PPL intact", "commit",
)  # fmt: skip


def line(cells: Iterable[str]) -> str:
    """One line of a table; a | in a cell is escaped."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def head_lines(headings: Collection[str]) -> tuple[str, str]:
    """The two lines that a table begins with."""
    return line(headings), "|" + "---|" * len(headings)


def header() -> tuple[str, str]:
    """The head lines above `row`."""
    return head_lines(_HEADINGS)


def row(figures: dict[str, Any], *, model: str, arms: tuple[str, str]) -> str:
    """One quantized model's row, from `Evaluation.to_dict()` and the names of its arms (own, intact).

    A KL that is a lower bound stands behind ≥.
    """
    measured = figures["arms"]
    own, intact, full = measured[arms[0]], measured[arms[1]], measured["full"]
    gap = next(pair["gap_closed"] for pair in figures["pairs"] if (pair["own"], pair["intact"]) == arms)
    bound = "" if figures.get("kl", "exact") == "exact" else "≥ "
    closed = "–" if gap["value"] is None else f"{100 * gap['value']:+.1f}"
    if gap["low"] is not None:
        closed += f" [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
    if bound:
        closed += " of the bound"
    cells = [
        model, f"{figures['windows']} × {figures['window']}",
        f"{bound}{own['kl_mean']['value']:.4f}", f"{bound}{intact['kl_mean']['value']:.4f}", closed,
        *(f"{arm['same_top1_percent']['value']:.2f}" for arm in (own, intact)),
        *(f"{arm['perplexity']['value']:.3f}" for arm in (full, own, intact)),
        (made_by()["commit"] or "–")[:7],
    ]  # fmt: skip
    return line(cells)


def page_text(path: Path) -> str:
    """What a page holds, nothing where it is not there yet. Raises `IntactKVError` for a file that is no UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise IntactKVError(f"{path} is no UTF-8 text ({error}); name another file") from error


def append_rows(path: Path, rows: Sequence[str], *, head: tuple[str, str] | None = None) -> None:
    """Add rows to the table that a Markdown file ends with; where it ends with none of ours, a new one is begun.

    Raises `IntactKVError` for a file that is no UTF-8 text.
    """
    head, text = head or header(), page_text(path)
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    table: list[str] = []
    for last in reversed(lines):  # the table at the file's end, its head included
        if not last.startswith("|"):
            break
        table.insert(0, last)
    begun = table[:2] == list(head)
    new = rows if begun else [*([""] if lines else []), *head, *rows]
    write_atomically(path, ("\n".join([*lines, *new]) + "\n").encode())
