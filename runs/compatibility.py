"""Does it run elsewhere: other Pythons, the lowest and the newest torch and transformers. One Markdown row each.

What it does: clones this commit, and for each environment makes a new virtual environment, installs the clone with what
its tests need, and runs the quick part of the suite, or with --all the whole, warnings of ours being errors as always.
What it gives up: Pythons that are not on the PATH are said to be missing; torch's CUDA builds (all that PyPI has for
most Pythons, 6 GB an environment, one at a time) run on the CPU here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parent.parent
QUICK = "laws capture attach artifact packed stream pivots generate load prefix basis discover plan quantize"
HEADER = (
    "| Python | torch | transformers | llm-compressor | installed with | passed | failed | skipped | what breaks |\n"
    "|---|---|---|---|---|---:|---:|---:|---|"
)


@dataclass(frozen=True)
class Environment:
    """A Python, and what pip is told beside `.[EXTRAS]`."""

    python: str
    pins: str  # "-c constraints.txt", or versions; what is not named is the newest that fits
    extras: str = "test"


# llm-compressor 0.14 ends at transformers 5.17 and torch 2.14.0
PINNED, NEWEST = "-c constraints.txt", "torch==2.15.0 transformers==5.24.0"
WITHOUT_QUANTIZERS = "doctor,gguf,judge,llama.cpp,distributed,tensorboard"
ENVIRONMENTS = [
    Environment("3.10", "torch==2.11.0 transformers==5.15.0"),
    *(Environment(f"3.{minor}", PINNED) for minor in range(10, 15)),
    Environment("3.11", "torch==2.13.0 transformers==5.24.0", WITHOUT_QUANTIZERS),
    Environment("3.13", NEWEST, WITHOUT_QUANTIZERS),
    Environment("3.14", NEWEST, WITHOUT_QUANTIZERS),
]
VERSIONS = """
import json, platform
from importlib.metadata import distributions
there = {each.metadata["Name"].lower(): each.version for each in distributions()}
names = ("torch", "transformers", "llmcompressor")
print(json.dumps([platform.python_version(), *(there.get(name, "–") for name in names)]))
"""


def main(
    whole: Annotated[bool, typer.Option("--all", help="The whole suite instead of its quick part.")] = False,
    only: Annotated[list[int] | None, typer.Option(help="Which environments, counted from 0; all by default.")] = None,
) -> None:
    """Print the table."""
    typer.echo(HEADER)
    for environment in [ENVIRONMENTS[i] for i in only] if only else ENVIRONMENTS:
        with tempfile.TemporaryDirectory() as scratch:
            typer.echo(row(environment, Path(scratch), whole))


def row(environment: Environment, scratch: Path, whole: bool) -> str:
    """Install and test in `scratch`; a row of the table."""
    clone, python = scratch / "clone", scratch / "venv/bin/python"
    told = f"`{environment.pins}`"
    interpreter = shutil.which(f"python{environment.python}")
    if interpreter is None:
        return f"| {environment.python} | | | | {told} | | | | not on this machine |"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    subprocess.run([interpreter, "-m", "venv", scratch / "venv"], check=True)
    tools = [] if environment.extras == "test" else ["pytest", "pytest-xdist", "hypothesis", "peft", "optimum-quanto"]
    install = [python, "-m", "pip", "install", "-q", *environment.pins.split(), f".[{environment.extras}]", *tools]
    done = subprocess.run(install, cwd=clone, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr[-200:])
        return f"| {environment.python} | | | | {told} | | | | pip: {reason} |"
    found = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True)
    versions = " | ".join(json.loads(found.stdout))
    tests = [] if whole else [f"tests/test_{name}.py" for name in QUICK.split()]
    report = scratch / "report.xml"
    command = [python, "-m", "pytest", "-n", "2", "--dist", "worksteal", f"--junitxml={report}", *tests]
    path = f"{scratch / 'venv/bin'}{os.pathsep}{os.environ['PATH']}"  # ninja, by which quanto builds, lies there
    ended = subprocess.run(command, cwd=clone, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if not report.exists():
        return f"| {versions} | {told} | | | | pytest: {ended.stdout.splitlines()[-1]} |"
    suite = ET.parse(report).getroot()[0]
    broken = [
        f"`{case.get('name')}`: {problem.get('message', '').splitlines()[0][:160]}"
        for case in suite.iter("testcase")
        for problem in (*case.iter("failure"), *case.iter("error"))
    ]
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    passed = total - skipped - len(broken)
    breaks = "; ".join(broken).replace("|", "/") or "–"
    return f"| {versions} | {told} | {passed} | {len(broken)} | {skipped} | {breaks} |"


if __name__ == "__main__":
    typer.run(main)
