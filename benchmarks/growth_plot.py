"""Tables and plots of how costs grow, from what `gpu_work.py --only growth` wrote; it needs matplotlib and no GPU.

Milliseconds of a GPU; what a CPU took is given as multiples of the smallest size's first way.

python benchmarks/growth_plot.py DIR/gpu_work.json docs/results    # growth-attach.svg …, and Markdown on the screen
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

AXES = ("context", "batch", "prefix", "layers")
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's, told apart by all kinds of colour vision


def main() -> None:
    """Print a table of each piece of work and draw its plot."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("figures", type=Path, help="gpu_work.json")
    options.add_argument("folder", type=Path, help="where the SVG files go")
    asked = options.parse_args()
    found = json.loads(asked.figures.read_text())
    rows = found["growth"]["rows"]
    for work in dict.fromkeys(row["work"] for row in rows):
        own, unit = [row for row in rows if row["work"] == work], "ms"
        if found["where"]["card"].startswith("no GPU"):
            smallest = min(own, key=lambda row: [row[name] for name in AXES])
            own, unit = multiples(own, next(iter(smallest["ms"].values()))), "times"
        print("\n".join(table(work, own, unit)))
        plot(work, own, unit, asked.folder / f"growth-{work.replace(' ', '-')}.svg")


def multiples(rows: list[dict[str, Any]], one: float) -> list[dict[str, Any]]:
    """The rows in units of `one`, which is in milliseconds."""
    return [{**row, "ms": {way: round(ms / one, 2) for way, ms in row["ms"].items()}} for row in rows]


def along(rows: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """The rows in which only `axis` differs from the first of all, that one included."""
    first = {name: min(row[name] for row in rows) for name in AXES}
    others = [name for name in AXES if name != axis]
    found = {row[axis]: row for row in rows if all(row[name] == first[name] for name in others)}
    return [found[value] for value in sorted(found)]


def table(work: str, rows: list[dict[str, Any]], unit: str) -> list[str]:
    """What each way took, one line a size."""
    ways = list(rows[0]["ms"])
    head = [*AXES, *(f"{way}, {unit}" for way in ways)]
    lines = ["", f"### {work}", "", f"| {' | '.join(head)} |", "|---:" * len(head) + "|"]
    seen = {tuple(row[name] for name in AXES): row for axis in AXES for row in along(rows, axis)}
    for at, row in seen.items():
        lines.append(f"| {' | '.join(str(x) for x in (*at, *(row['ms'][way] for way in ways)))} |")
    return lines


def plot(work: str, rows: list[dict[str, Any]], unit: str, path: Path) -> None:
    """One panel for each axis along which the work was measured, both scales logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "intactkv", "svg.fonttype": "none"}  # the same bytes from the same figures
    lines = {axis: along(rows, axis) for axis in AXES}
    lines = {axis: each for axis, each in lines.items() if len(each) > 1}
    figure, panels = pyplot.subplots(1, len(lines), figsize=(3 * len(lines), 2.8), squeeze=False, sharey=True)
    for panel, (axis, each) in zip(panels[0], lines.items(), strict=True):
        for colour, way in zip(COLOURS, each[0]["ms"], strict=False):
            panel.plot([row[axis] for row in each], [row["ms"][way] for row in each], "o-", color=colour, label=way)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks([row[axis] for row in each], [str(row[axis]) for row in each])
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"{work}: {unit}")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
