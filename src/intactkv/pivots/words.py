"""Pivots as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from intactkv.pivots import LayerPivot, uniform_mass
from intactkv.pivots.classify import PIVOT


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
