"""A matplotlib figure that is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intactkv.error import IntactKVError
from intactkv.files import replacing

_KINDS = ("png", "svg", "pdf")


@contextmanager
def picture(
    path: str | os.PathLike[str], *, size: tuple[float, float], paper: str = "white", dpi: int = 130
) -> Iterator[Any]:
    """A figure of `size` in inches, which is written to `path` when the block ends well: PNG, SVG or PDF by its ending.

    Raises `IntactKVError` for other endings, where matplotlib is missing, and where the disk refuses.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise IntactKVError("pictures need matplotlib; pip install 'intactkv[doctor]'") from error
    path = Path(path)
    kind = path.suffix.lstrip(".")
    if kind not in _KINDS:
        raise IntactKVError(f"cannot draw {path.name}: its ending must be .png, .svg or .pdf")
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=kind, facecolor=paper)
