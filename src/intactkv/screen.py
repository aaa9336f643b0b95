"""Where commands print: a terminal's width on a terminal, whole lines for programs that read them."""

from __future__ import annotations

from rich.console import Console, ConsoleDimensions

_UNWRAPPED = 100_000  # columns


class Screen(Console):
    """A console that wraps and crops nothing when its output is not a terminal."""

    @property
    def size(self) -> ConsoleDimensions:  # type: ignore[override]
        """The terminal's columns and lines, or so many columns that no line is broken."""
        size = super().size
        return size if self.is_terminal else ConsoleDimensions(_UNWRAPPED, size.height)
