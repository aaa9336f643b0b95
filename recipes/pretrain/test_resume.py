"""A run that is killed and resumed logs bit for bit the losses of a run that never stopped."""

import json
import os
import subprocess
import sys
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
    "steps": 80,
    "warmup": 10,
    "compile": False,
    "log_every": 1,
    "measure_every": 40,
    "checkpoint_seconds": 0.02,
}


SCRIPT = """
import os, signal, sys, time
from pathlib import Path

sys.path.insert(0, {recipe!r})
import train  # once, not in every run

whole, broken = map(Path, sys.argv[1:])


def begun(out):
    child = os.fork()
    if child == 0:
        sys.argv = ["train.py", *{arguments!r}, "--out", str(out)]
        train.main()
        os._exit(0)
    return child


assert os.waitpid(begun(whole), 0)[1] == 0
child, log = begun(broken), broken / "tiny/log.jsonl"
while not (log.exists() and log.read_text().count("\\n") >= 50):
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it could be killed"
    time.sleep(0.01)
os.kill(child, signal.SIGKILL)
assert os.waitpid(child, 0)[1] == signal.SIGKILL
assert (broken / "tiny/checkpoint.pt").exists()
assert log.read_text().count("\\n") < 80
assert os.waitpid(begun(broken), 0)[1] == 0
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Prepare a corpus so small that a run is several epochs; return the training's arguments less its --out."""
    generator = np.random.default_rng(0)
    words = ["the", "pivot", "token", "keeps", "its", "key", "and", "value", "intact", ".", ","]
    texts = [" ".join(generator.choice(words, 200)) for _ in range(20)]
    tokenizer = train_tokenizer(texts, vocab=300, context=16)
    tokenizer.save_pretrained(tmp_path / "data" / "tokenizer")
    encode(texts, tokenizer).tofile(tmp_path / "data" / "tokens.u16")
    (tmp_path / "eval.txt").write_text(texts[0])
    (tmp_path / "tiny.json").write_text(json.dumps(SETTINGS))
    given = ["--data", tmp_path / "data", "--eval", tmp_path / "eval.txt", tmp_path / "tiny.json"]
    return [str(each) for each in given]


def losses(run: Path) -> list[tuple[int, float]]:
    """Return the (step, loss) of every log line."""
    records = map(json.loads, (run / "tiny" / "log.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records]


def test_killed_run_resumes_bit_identically(arguments: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    script = SCRIPT.format(recipe=str(RECIPE), arguments=arguments)
    subprocess.run([sys.executable, "-c", script, whole, broken], env=environment, check=True)
    assert [step for step, _ in losses(whole)] == list(range(1, 81))
    assert losses(broken) == losses(whole)
