"""A run that is killed and resumed logs bit for bit the losses of a run that never stopped."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from prepare import encode, train_tokenizer

RECIPE = Path(__file__).parent
SETTINGS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "context": 16,
    "positions": 16,
    "batch": 2,
    "steps": 200,
    "warmup": 10,
    "compile": False,
    "log_every": 1,
    "measure_every": 100,
    "checkpoint_seconds": 0.3,
}


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Prepare a corpus so small that a run is several epochs; return the training command less its --out."""
    generator = np.random.default_rng(0)
    words = ["the", "pivot", "token", "keeps", "its", "key", "and", "value", "intact", ".", ","]
    texts = [" ".join(generator.choice(words, 200)) for _ in range(20)]
    tokenizer = train_tokenizer(texts, vocab=300, context=16)
    tokenizer.save_pretrained(tmp_path / "data" / "tokenizer")
    encode(texts, tokenizer).tofile(tmp_path / "data" / "tokens.u16")
    (tmp_path / "eval.txt").write_text(texts[0])
    (tmp_path / "tiny.json").write_text(json.dumps(SETTINGS))
    arguments = [
        "--data",
        tmp_path / "data",
        "--eval",
        tmp_path / "eval.txt",
        tmp_path / "tiny.json",
        "--out",
    ]
    return [sys.executable, str(RECIPE / "train.py"), *map(str, arguments)]


def losses(run: Path) -> list[tuple[int, float]]:
    """Return the (step, loss) of every log line."""
    records = map(json.loads, (run / "tiny" / "log.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records]


def test_killed_run_resumes_bit_identically(command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command, whole], env=environment, check=True)
    assert [step for step, _ in losses(whole)] == list(range(1, 201))

    log = broken / "tiny" / "log.jsonl"
    process = subprocess.Popen([*command, broken], env=environment)
    while not (log.exists() and log.read_text().count("\n") >= 120):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (broken / "tiny" / "checkpoint.pt").exists()
    assert len(losses(broken)) < 200

    subprocess.run([*command, broken], env=environment, check=True)
    assert losses(broken) == losses(whole)
