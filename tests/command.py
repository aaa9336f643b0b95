"""The command line as a user runs it: in the test's own process, or serving in one of its own."""

from __future__ import annotations

import contextlib
import io
import socket
import subprocess
import sys
from collections.abc import Iterator
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


@contextlib.contextmanager
def serving(*args: str | Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command in a process of its own; its address, once it says that it serves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "intactkv.cli", "serve", *map(str, args), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving "):
                break
        else:
            raise AssertionError("it ended before it served")
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(60)
