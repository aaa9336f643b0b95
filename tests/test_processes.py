"""Several processes at one evaluation: one process's figures, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, by_name, make_pair, rounded
from torch import distributed

from intactkv import IntactKVError, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import Arm, Windows, evaluate
from intactkv.processes import count, gathered, join

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def w3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model rounded to 3 bits, as a folder, and a KV beside it."""
    folder, full, tokenizer = tmp_path_factory.mktemp("quantized") / "w3", load_model(MODEL), load_tokenizer(MODEL)
    rounded(full).save_pretrained(folder)
    capture(full, [tokenizer.bos_token_id], tokenizer=tokenizer).save(folder.parent / "kv")
    return folder


def run(processes: int, w3: Path, out: Path, *more: str | Path) -> tuple[dict[str, Any], str]:
    """What `intactkv eval` writes and prints; seven windows in twos, so that shares and the last batch are uneven."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, "-m", "intactkv.cli", "eval", w3, "--full", MODEL, "--kv", w3.parent / "kv",
         "--data", TEXT, "--window", "64", "--windows", "7", "--batch-size", "2", "--bare", "-o", out, *more],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(out.read_text())
    for name in ("seconds", "tokens_per_second", "made_by"):  # all that tells when, how fast and by which command
        del figures[name]
    return figures, done.stdout


@pytest.mark.slow  # 40 s
def test_two_processes_measure_what_one_measures_bit_for_bit(w3: Path, tmp_path: Path) -> None:
    one, printed = run(1, w3, tmp_path / "one.json")
    two, said = run(2, w3, tmp_path / "two.json")
    assert two == one
    assert said == printed  # one of them speaks
    cached, _ = run(2, w3, tmp_path / "cached.json", "--cache", tmp_path / "cache")
    again, _ = run(1, w3, tmp_path / "again.json", "--cache", tmp_path / "cache")
    for figures, computed in ((cached, True), (again, False)):
        about = figures.pop("cache")
        counts = {"computed": 4 * 5, "read": 0} if computed else {"computed": 0, "read": 4 * 5}  # batches, arms
        assert {name: about[name] for name in counts} == counts
        assert not figures["block_mse"]
        assert {**figures, "block_mse": one["block_mse"]} == one


def test_alone_there_is_nothing_to_join_or_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() is None
    assert (count(), gathered([1, 2])) == (1, [1, 2])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(IntactKVError, match=r"pip install 'intactkv\[distributed\]'"):
        join()


def test_a_group_of_one_is_one_process(tmp_path: Path) -> None:
    full, model, kv = make_pair(by_name("llama-gqa"))
    ids = torch.cat([kv.ids.expand(5, -1), torch.randint(8, 97, (5, 9))], 1)
    windows = Windows(ids, torch.arange(ids.shape[1]).expand_as(ids) > len(kv))
    arms = [Arm("own", model), Arm("intact", model, kv)]
    one = evaluate(full, arms, windows, batch_size=2)
    distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        shared = evaluate(full, arms, windows, batch_size=2, shared=True)
    finally:
        distributed.destroy_process_group()
    assert all(
        torch.equal(shared.metrics[name].nll.nan_to_num(), one.metrics[name].nll.nan_to_num()) for name in one.metrics
    )


def test_a_tensor_parallel_model_shares_no_windows(tmp_path: Path) -> None:
    model = build(by_name("llama-gqa"))
    windows = Windows(torch.tensor([[1, 5, 7, 9, 9]]), torch.tensor([[False, False, False, False, True]]))
    model._tp_size = 1
    evaluate(model, [Arm("own", model)], windows, shared=True)
    model._tp_size = 2
    with pytest.raises(IntactKVError, match="split over 2 processes, which are not all there are"):
        evaluate(model, [Arm("own", model)], windows, shared=True)
