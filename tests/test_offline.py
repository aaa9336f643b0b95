"""No command unpickles anything or asks another machine, as Python's own audit hooks see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from intactkv.demo import MODEL, TEXT

SCRIPT = """
import sys

seen = {"pickle.find_class": [], "socket.connect": [], "socket.getaddrinfo": [], "torch.load": []}


def watch(event, args):
    if event in seen:
        seen[event].append(repr(args))
        if event.startswith("socket"):
            raise ConnectionRefusedError("no network")


sys.addaudithook(watch)

import contextlib
import io
import json
import pickle
import socket

import torch

torch.set_num_threads(1)
torch.load = lambda *args, **kwargs: seen["torch.load"].append(repr(args))  # its own unpickler raises no event

from intactkv.cli import main

codes = []
for words in json.loads(sys.argv[1]):
    sys.argv, said = ["intactkv", *words], io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
        codes.append([words[0], 0, ""])
    except SystemExit as end:
        codes.append([words[0], end.code or 0, said.getvalue()[-300:]])
found = {event: list(calls) for event, calls in seen.items()}
pickle.loads(pickle.dumps(OSError))  # and the watch is awake
torch.load("x")
with contextlib.suppress(OSError):
    socket.create_connection(("example.org", 80))
with contextlib.suppress(OSError):
    socket.socket().connect(("192.0.2.1", 80))
print(json.dumps([codes, found, [event for event in seen if len(seen[event]) > len(found[event])]]))
"""


def watched(commands: list[list[str]], folder: Path) -> dict[str, list[str]]:
    """What was unpickled, loaded and asked for while these commands ran in one process, in an empty home."""
    script = folder / "watch.py"
    script.write_text(SCRIPT)
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    source = str(Path(__file__).parent.parent / "src")
    done = subprocess.run(
        [sys.executable, script, json.dumps(commands)], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**known, "HOME": str(folder), "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    codes, found, awake = json.loads(done.stdout.splitlines()[-1])
    assert [code for _, code, _ in codes] == [0] * len(commands), codes
    assert sorted(awake) == sorted(found)
    return found


NOTHING: dict[str, list[Any]] = {name: [] for name in ("pickle.find_class", "socket.connect", "socket.getaddrinfo",
                                                      "torch.load")}  # fmt: skip


def test_the_main_commands(tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    text = tmp_path / "text"
    text.write_text(TEXT.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps({"context": "A river", "continuation": "rises"}) + "\n")
    arms = ["--full", str(MODEL), "--kv", "kv"]
    few = ["--samples", "2", "--held-out", "3", "--length", "32", "--steps", "1", "--batch-size", "2"]
    assert watched(
        [
            ["capture", str(MODEL), "-o", "kv"],
            ["capture", str(MODEL), "-o", "kv-streamed", "--stream"],
            ["quantize", str(MODEL), "-o", "w4"],
            ["check", "w4", *arms, "-o", "checked"],
            ["generate", "w4", "The river", "--kv", "kv", "--max-new-tokens", "2"],
            ["eval", "w4", *arms, "--data", str(text), "--window", "64", "--windows", "2", "-o", "x.json"],
            ["calibrate", "w4", *arms, "--data", str(text), "-o", "kv2", *few, "--spool", "spool", "--checkpoint", "c"],
            ["serve", "w4", "--kv", "checked", "--print"],
            ["tasks", "data", "-o", "tasks"],
        ],
        tmp_path,
    ) == NOTHING  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "commands",
    [
        [["doctor", "--window", "64", "-o", "x.html"]],
        [["demo"]],
        [["quantize", str(MODEL), "-o", "w4", "--method", "gptq", "--data", "text"]],
        [["tasks", "data", "-o", "tasks"], ["lm-eval", "--model", "intactkv", "--model_args", f"pretrained={MODEL}",
          "--include_path", "tasks", "--tasks", "a_local", "--device", "cpu", "--batch_size", "1"]],
    ],
    ids=lambda commands: commands[-1][0],
)  # fmt: skip
def test_the_long_commands(commands: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    (tmp_path / "data").mkdir()
    rows = 3 * (json.dumps({"context": "A river", "continuation": "rises"}) + "\n")
    (tmp_path / "data" / "a.jsonl").write_text(rows)
    assert watched(commands, tmp_path) == NOTHING
