"""Relations of keys and values as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.box import SIMPLE
from rich.table import Table

from intactkv.basis.compare import Relation


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
