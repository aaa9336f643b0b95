"""Commands that are killed at random moments: run again, they end as if they had not been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from world import write_world

from intactkv.demo import MODEL, TEXT

pytest.importorskip("gguf")

SCRIPT = """
import contextlib, io, json, os, random, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)
import intactkv.calibrating.command, intactkv.capturing.live, intactkv.checkpoint.load  # once, not in every child
import intactkv.demo, intactkv.evaluating.command, intactkv.pivots.discover, intactkv.serving.llama_cpp
import intactkv.harness.tasks, intactkv.quantizing
from intactkv.cli import main

source, place, commands, kills = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
moments = random.Random(0)


def begun(words, folder):
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.argv, code = ["intactkv", *words], 0
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        if code:
            sys.__stderr__.write(sys.stderr.getvalue())
            sys.__stderr__.flush()
        os._exit(code)
    return child


def files(folder):
    return {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".tmp")}


told = {}
for name, words in commands.items():
    whole, broken = place / name / "whole", place / name / "broken"
    for folder in (whole, broken):
        folder.mkdir(parents=True)
        for file in Path(source).iterdir():
            (folder / file.name).symlink_to(file)
    start = time.monotonic()
    assert os.waitpid(begun(words, whole), 0)[1] == 0, name
    takes, hit = time.monotonic() - start, 0
    for _ in range(kills):
        child = begun(words, broken)
        time.sleep(moments.uniform(0, takes))
        os.kill(child, signal.SIGKILL)
        hit += os.waitpid(child, 0)[1] == signal.SIGKILL
        for file, path in files(broken).items():  # what has its name is whole
            if file == "out":
                assert path.read_bytes() == files(whole)[file].read_bytes(), name
    assert os.waitpid(begun(words, broken), 0)[1] == 0, name
    left = [p.name for p in broken.rglob("*.tmp")]
    told[name] = {"killed": hit, "seconds": takes, "left": len(left)}
print(json.dumps(told))
"""


def killed(world: Path, place: Path, commands: dict[str, list[str]], kills: int) -> dict[str, Any]:
    source = str(Path(__file__).parent.parent / "src")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(world), str(place), json.dumps(commands), str(kills)],
        capture_output=True, text=True, timeout=1800, env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for name in commands:
        whole, broken = place / name / "whole", place / name / "broken"
        found = {str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()}
        assert found == {str(p.relative_to(broken)) for p in broken.rglob("*") if p.is_file() and p.suffix != ".tmp"}
        for file in found:
            assert same(whole / file, broken / file), (name, file)
    assert any(each["killed"] for each in told.values()), told  # or nothing was tried
    return told


def same(one: Path, other: Path) -> bool:
    if one.suffix != ".json" or one.is_symlink():
        return one.read_bytes() == other.read_bytes()
    a, b = (json.loads(path.read_text()) for path in (one, other))
    for figures in (a, b):
        for name in ("made_by", "cache", "seconds", "tokens_per_second"):  # where, when, and what was there already
            figures.pop(name, None)
    return bool(a == b)


def commands(model: str, text: str, length: int) -> dict[str, list[str]]:
    arms = ["w3", "--full", model, "--kv", "kv", "--data", text]
    few = ["--samples", "4", "--held-out", "4", "--length", str(length), "--batch-size", "2", "--steps", "4"]
    measured = [*arms, "--window", str(length), "--windows", "8", "--batch-size", "2", "-o", "out.json"]
    return {
        "capture": ["capture", model, "-o", "out"],
        "capture, streamed": ["capture", model, "-o", "out", "--stream"],
        "calibrate": ["calibrate", *arms, *few, "-o", "out", "--checkpoint", "state", "--spool", "spool"],
        "eval": ["eval", *measured],
        "eval, cached": ["eval", *measured, "--cache", "cache"],
        "export": ["export", "kv", "--to", "llama.cpp", "--gguf", "model.gguf", "-o", "out"],
        "tasks": ["tasks", "folder", "-o", "tasks"],
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    for i in range(8):
        (folder / "folder" / f"{i}.txt").write_text("A river rises.")
    return folder


def test_a_few_times(world: Path, tmp_path: Path) -> None:
    few = {name: each for name, each in commands("model", "text", 16).items() if name in ("calibrate", "eval, cached")}
    killed(world, tmp_path, few, kills=3)


@pytest.mark.slow
def test_many_times_on_the_embedded_model(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from models import rounded

    from intactkv import IntactKV, capture
    from intactkv.checkpoint.load import load_model, load_tokenizer

    place = tmp_path / "world"
    place.mkdir()
    full, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    rounded(full).save_pretrained(place / "w3")
    tokenizer.save_pretrained(place / "w3")
    from gguf_model import write_gguf

    write_gguf(full.float(), place / "model.gguf", vocabulary=False)
    kv: IntactKV = capture(full, [tokenizer.bos_token_id], tokenizer=tokenizer)
    kv.save(place / "kv")
    (place / "folder").symlink_to(world / "folder")
    told = killed(place, tmp_path, commands(str(MODEL), str(TEXT), 64), kills=10)
    assert all(each["killed"] >= 10 / 4 for each in told.values()), told
    with capsys.disabled():
        print(json.dumps(told, indent=1))
