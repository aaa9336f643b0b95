"""Where figures come from: the command, the machine, the versions."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from intactkv.files import json_data, write_atomically


def commit() -> str | None:
    """The git commit this package's own source is at, "+ changes" if it has any; None where it is not under git."""
    source = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(source), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # a virtual environment in another's checkout
        return None
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ".")
    return head if head is None or changes == "" else f"{head} + changes"


def installed(package: str) -> str | None:
    """The version of an installed package; None where it runs from source, without metadata, or is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def made_by() -> dict[str, Any]:
    """The command, machine and versions that figures come from."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "folder": str(Path.cwd()),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "versions": {name: installed(name) for name in ("intactkv", "torch", "transformers")},
    }


def write_json(path: str | os.PathLike[str], data: dict[str, Any]) -> Path:
    """Write `data` with the versions, machine and command that made it, atomically."""
    path = Path(path)
    text = json.dumps({**json_data(data), "made_by": made_by()}, indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())
    return path
