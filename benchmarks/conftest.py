"""The benchmarks' settings, and the page they print at the end: where they ran, and one table for each question."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

_TABLES: dict[str, list[dict[str, Any]]] = defaultdict(list)


@dataclass(frozen=True)
class Size:
    """How much work a run does."""

    threads: int
    rounds: int  # at least
    seconds: float  # to go on with rounds, for each benchmark
    tokens: int  # of a prompt that is prefilled
    new_tokens: int  # decoded by one `generate`
    steps: int  # decoded by the model that is nearly free
    windows_tokens: int  # in all windows together
    choices: int  # items of a multiple-choice task
    hidden: int  # of the random Llama
    layers: int


FULL = Size(2, 7, 10.0, 256, 32, 300, 4096, 16, 768, 12)
QUICK = Size(1, 2, 0.0, 48, 4, 8, 512, 2, 48, 2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only see that the benchmarks run; the figures mean nothing")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # pytest-benchmark's own table shows whole rounds, which answers nothing
    torch.set_num_threads(_size(config).threads)


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Size:
    return _size(request.config)


def _size(config: pytest.Config) -> Size:
    return QUICK if config.getoption("--quick") else FULL


@pytest.fixture(scope="session", autouse=True)
def no_autograd() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def report(benchmark: Any) -> Callable[..., None]:
    """Add one row to the table of that title; the row is also kept in the benchmark's JSON."""

    def add(title: str, **row: Any) -> None:
        _TABLES[title].append(row)
        benchmark.extra_info.setdefault("rows", []).append({"table": title, **row})

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _TABLES:
        return
    if config.getoption("--quick"):
        terminalreporter.write_line(
            "\nA quick run, which only shows that the benchmarks work: these figures mean nothing."
        )
    lines = ["", *_where()]
    for title, rows in _TABLES.items():
        columns = [name.replace("_", " ") for name in rows[0]]
        lines += ["", f"### {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(str(cell) for cell in row.values())} |" for row in rows]
    terminalreporter.write_line("\n".join(lines))


def _where() -> list[str]:
    """Machine, versions, commit and command, as a Markdown list."""
    load = f", load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return [
        f"- machine: {_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads{load}",
        f"- versions: torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
        f"- commit: {_commit()}",
        f"- command: `python -m pytest {shlex.join(sys.argv[1:])}`",
    ]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../src", ".")
        return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
