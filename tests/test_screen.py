"""What a program may read is neither wrapped nor cut, and long work says how far it is."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.table import Table

from intactkv import screen
from intactkv.screen import Screen, working

SOURCE = Path(screen.__file__).parent


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_has_a_width(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    console = Screen(file=out, force_terminal=terminal, color_system=None)
    console.print("word " * 60)
    table = Table("name", "path")
    table.add_row("a", "/some/where/" * 20)
    console.print(table)
    longest = max(map(len, out.getvalue().splitlines()))
    assert (longest <= 80) == terminal
    assert ("word " * 59 in out.getvalue()) == (not terminal)
    assert ("/some/where/" * 20 in out.getvalue()) == (not terminal)


def test_every_console_is_a_screen() -> None:
    for file in SOURCE.rglob("*.py"):
        if file.name != "screen.py":
            assert not re.search(r"\bConsole\(", file.read_text(encoding="utf-8")), file


def test_progress_that_is_piped_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    now = 100.0
    monkeypatch.setattr(screen.time, "monotonic", lambda: now)
    with working(Screen(file=io.StringIO()), "measuring") as show:
        for done in range(1, 31):
            now += 1
            show(done, 40)
    out, err = capsys.readouterr()  # type: ignore[attr-defined]
    assert out == ""
    assert err.splitlines() == [f"measuring: {done} of 40, {done} s" for done in (10, 20, 30)]


def test_progress_on_a_terminal_is_a_bar_that_goes() -> None:
    out = io.StringIO()
    with working(Screen(file=out, force_terminal=True), "measuring") as show:
        show(1, 4)
        show(2, 4, "at the second")
    assert "at the second" in out.getvalue()
