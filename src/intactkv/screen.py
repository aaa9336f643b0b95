"""What the commands print: fitted to a terminal, and elsewhere, where a program may read it, never wrapped or cut."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, ConsoleDimensions
from rich.progress import Progress

_UNBOUNDED = 10_000  # columns
_EVERY = 10.0  # seconds between two lines of progress where there is no terminal


class Screen(Console):
    """A rich console that has no width where it is not a terminal, and takes no text for markup: names may hold [/]."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, **settings})

    @property
    def size(self) -> ConsoleDimensions:
        fitted = super().size
        return fitted if self.is_terminal else ConsoleDimensions(_UNBOUNDED, fitted.height)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        self._width, self._height = new


class Show(Protocol):
    """How far some work is: so many of so many parts, and perhaps what it is at."""

    def __call__(self, done: int, total: int | None, text: str | None = None) -> None: ...


@contextmanager
def working(console: Console, what: str, *, above: bool = True) -> Iterator[Show]:
    """A progress bar for `what` on a terminal; elsewhere a plain line every ten seconds, on standard error.

    With `above` false, what is printed meanwhile is not caught and put above the bar.
    """
    if not console.is_terminal:
        errors, began = Screen(stderr=True, quiet=console.quiet), time.monotonic()
        last = began

        def update(done: int, total: int | None, text: str | None = None) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _EVERY:
                last = now
                of = "" if total is None else f" of {total}"
                errors.print(f"{text or what}: {done}{of}, {now - began:.0f} s", highlight=False, markup=False)

        yield update
        return
    with Progress(console=console, transient=True, redirect_stdout=above, redirect_stderr=above) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int | None, text: str | None = None) -> None:
            bar.update(task, completed=done, total=total, description=text or what)

        yield show
