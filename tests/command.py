"""The command line as a user runs it, in the test's own process."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from intactkv.cli import main


@dataclass
class Done:
    """What a finished command left: exit code and the two streams."""

    returncode: int
    stdout: str
    stderr: str


def intactkv(*args: str | Path, cwd: Path | None = None) -> Done:
    """Run the command line in this process: importing torch anew for each command would take most of the time."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["intactkv", *map(str, args)])
        patch.chdir(cwd or Path.cwd())
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Done(code, out.getvalue(), err.getvalue())
