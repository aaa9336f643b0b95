"""Laws of the cached evaluation: the same figures as without, whatever was read, killed, truncated or tampered with."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PREFIX, VOCAB, build, by_name, rounded
from safetensors.torch import load_file, save_file
from test_cli import intactkv
from torch import Tensor

from intactkv import IntactKV, IntactKVError, capture
from intactkv.checkpoint.source import checkpoint_digest
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import (
    Arm,
    Evaluation,
    Windows,
    evaluate,
    full_metrics,
    prefixed_windows,
    stored,
    token_metrics,
)
from intactkv.evaluating.cached import Checkpoint, StoredArm, Traces, evaluate_cached
from intactkv.evaluating.markdown import append_rows, header
from intactkv.evaluating.records import read_record, write_record
from intactkv.evaluating.stored import DistributionStore
from intactkv.evaluating.truncated import token_bytes, top, top_metrics

WINDOW, BATCH = 24, 3


@pytest.fixture(scope="module")
def full() -> Any:
    return build(by_name("llama-gqa"))


@pytest.fixture(scope="module")
def windows() -> Windows:
    tokens = torch.randint(8, VOCAB, (7 * (WINDOW - len(PREFIX)),), generator=torch.Generator().manual_seed(2))
    return prefixed_windows(tokens, prefix=PREFIX, window=WINDOW)


@pytest.fixture(scope="module")
def kv(full: Any) -> IntactKV:
    return capture(full, PREFIX)


class Loads:
    """Checkpoints that count how often they are loaded."""

    def __init__(self, full: Any) -> None:
        self.models = {"full": full, "w3": rounded(full, 3), "w2": rounded(full, 2)}
        self.loaded: list[str] = []

    def checkpoint(self, name: str) -> Checkpoint:
        def load() -> Any:
            self.loaded.append(name)
            return self.models[name]

        return Checkpoint(f"digest of {name}", load)


@pytest.fixture
def loads(full: Any) -> Loads:
    return Loads(full)


def cached(
    loads: Loads, kv: IntactKV, windows: Windows, folder: Path, names: tuple[str, ...] = ("w3", "w2"), **more: Any
) -> tuple[Evaluation, Traces]:
    loads.loaded.clear()
    store = DistributionStore(folder, "digest of full", more.pop("top", None), more.pop("most_bytes", 2**30))
    arms = []
    for name in names:
        made = loads.checkpoint(name)
        arms += [StoredArm(f"{name} own", made), StoredArm(f"{name} intact", made, kv)]
    return evaluate_cached(loads.checkpoint("full"), arms, windows, store=store, batch_size=BATCH, **more)


def plain(loads: Loads, kv: IntactKV, windows: Windows, names: tuple[str, ...] = ("w3", "w2")) -> Evaluation:
    arms = []
    for name in names:
        arms += [Arm(f"{name} own", loads.models[name]), Arm(f"{name} intact", loads.models[name], kv)]
    return evaluate(loads.models["full"], arms, windows, batch_size=BATCH, block_mse=False)


def same(a: Evaluation, b: Evaluation) -> None:
    """Every figure of every token is the same, bit for bit."""
    assert list(a.metrics) == list(b.metrics)
    for name in a.metrics:
        for part, values in vars(a.metrics[name]).items():
            torch.testing.assert_close(values, vars(b.metrics[name])[part], rtol=0, atol=0, equal_nan=True)
    assert a.pairs == b.pairs


def test_figures_are_those_without_a_cache_fresh_and_read(
    loads: Loads, kv: IntactKV, windows: Windows, tmp_path: Path
) -> None:
    expected = plain(loads, kv, windows)
    first, traces = cached(loads, kv, windows, tmp_path)
    same(first, expected)
    assert loads.loaded == ["full", "w3", "w2"]
    assert (traces.read, traces.computed, traces.rest_mass) == (0, 15, 0)
    assert first.seconds > 0
    again, traces = cached(loads, kv, windows, tmp_path)
    same(again, expected)
    assert loads.loaded == []
    assert (traces.read, traces.computed) == (15, 0)
    assert math.isnan(again.seconds)
    assert again.to_dict()["tokens_per_second"] is None


def test_one_pass_over_the_full_model_serves_models_that_come_later(
    loads: Loads, kv: IntactKV, windows: Windows, tmp_path: Path
) -> None:
    cached(loads, kv, windows, tmp_path, names=("w3",))
    assert loads.loaded == ["full", "w3"]
    found, _ = cached(loads, kv, windows, tmp_path, names=("w2", "w3"))
    assert loads.loaded == ["w2"]
    same(found, plain(loads, kv, windows, names=("w2", "w3")))
    fewer = windows[:2]  # other batches of the same windows: nothing new of the full
    cached(loads, kv, fewer, tmp_path, names=("w2",))
    assert loads.loaded == ["w2"]


def test_a_distribution_is_read_once_for_a_model(
    loads: Loads, kv: IntactKV, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(loads, kv, windows, tmp_path, names=("w3",))
    read = []
    monkeypatch.setattr(stored, "read_record", lambda *given: read.append(given) or read_record(*given))
    cached(loads, kv, windows, tmp_path, names=("w2",))
    assert len(read) == len(windows.ids)


def test_another_kv_prefix_or_text_is_measured_anew(
    loads: Loads, kv: IntactKV, windows: Windows, tmp_path: Path
) -> None:
    cached(loads, kv, windows, tmp_path, names=("w3",))
    other = kv.to(dtype=torch.float32)
    other.layers[0][0].mul_(1.5)
    found, traces = cached(loads, other, windows, tmp_path, names=("w3",))
    same(found, plain(loads, other, windows, names=("w3",)))
    assert (traces.read, traces.computed) == (6, 3)
    changed = Windows(windows.ids.clone(), windows.scored)
    changed.ids[4, 9] = 8 if changed.ids[4, 9] != 8 else 9
    found, traces = cached(loads, kv, changed, tmp_path, names=("w3",))
    same(found, plain(loads, kv, changed, names=("w3",)))
    assert loads.loaded == ["full", "w3"]
    assert traces.computed == 3


@pytest.mark.parametrize("k", [1, 5, 40, VOCAB - 1])
def test_a_truncated_cache_bounds_kl_from_below_and_nothing_else(
    loads: Loads, kv: IntactKV, windows: Windows, tmp_path: Path, k: int
) -> None:
    exact = plain(loads, kv, windows)
    for _ in range(2):
        found, traces = cached(loads, kv, windows, tmp_path, top=k)
        for name, metrics in found.metrics.items():
            want = exact.metrics[name]
            for part in ("nll", "same_top1", "delta_p"):
                torch.testing.assert_close(vars(metrics)[part], vars(want)[part], rtol=0, atol=0, equal_nan=True)
            assert (metrics.kl <= want.kl + 2e-6)[windows.scored].all()
        assert 0 < traces.rest_mass < 1
    own = found.metrics["w2 own"].kl[windows.scored].mean()
    share = own / exact.metrics["w2 own"].kl[windows.scored].mean()
    assert share < 0.9 if k < 40 else share > 0.8


def test_the_bound_is_the_kl_of_the_merged_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, 30, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    labels = torch.randint(30, (50,), generator=generator)
    previous = torch.zeros(50, dtype=torch.float64)
    for k in range(1, 30):
        found = top_metrics(top(p, labels, k=k), q, labels)
        order = p.argsort(-1, descending=True)

        def merged(x: Tensor, order: Tensor = order, k: int = k) -> Tensor:
            mass = x.softmax(-1).gather(-1, order)
            return torch.cat([mass[:, :k], mass[:, k:].sum(-1, keepdim=True)], dim=-1)

        expected = (merged(p) * (merged(p) / merged(q)).log()).sum(-1)
        torch.testing.assert_close(found.kl, expected, rtol=1e-9, atol=1e-12)
        assert (found.kl >= previous - 1e-12).all()  # one more outcome told apart never lowers it
        previous = found.kl
    torch.testing.assert_close(previous, token_metrics(p, q, labels).kl, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(top(p, labels, k=3).nll, full_metrics(p, labels).nll, rtol=0, atol=0)


def test_ties_for_the_first_place_and_tokens_ruled_out() -> None:
    p, labels = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, -torch.inf]]), torch.tensor([0])
    q = torch.tensor([[0.0, 2.0, 2.0, 1.0, 0.5]])
    kept = top(p, labels, k=3)
    assert kept.first.tolist() == [1]
    assert kept.rest_mass.tolist() == [0]
    torch.testing.assert_close(top_metrics(kept, q, labels).kl, token_metrics(p, q, labels).kl)
    assert top_metrics(kept, q, labels).same_top1.all()


@pytest.mark.parametrize("top_k", [None, 7])
def test_a_file_has_the_bytes_that_are_stated(
    loads: Loads, kv: IntactKV, windows: Windows, tmp_path: Path, top_k: int | None
) -> None:
    cached(loads, kv, windows, tmp_path, names=("w3",), top=top_k)
    each = (VOCAB + 1) * 4 if top_k is None else token_bytes(top_k, torch.float32)
    for path in tmp_path.glob("*.safetensors"):
        assert sum(t.nbytes for t in load_file(path).values()) == each * WINDOW
    assert len(list(tmp_path.glob("*.safetensors"))) == len(windows)


def test_too_little_room_names_what_fits(loads: Loads, kv: IntactKV, windows: Windows, tmp_path: Path) -> None:
    tokens = windows.ids.numel()
    room = tokens * token_bytes(9, torch.float32)
    with pytest.raises(IntactKVError, match=r"keep the 9 likeliest tokens \(--top\)"):
        cached(loads, kv, windows, tmp_path, most_bytes=room)
    assert not list(tmp_path.glob("*.safetensors"))
    cached(loads, kv, windows, tmp_path / "nine", most_bytes=room, top=9)
    with pytest.raises(IntactKVError, match="keep the"):
        cached(loads, kv, windows, tmp_path / "ten", most_bytes=room, top=10)
    with pytest.raises(IntactKVError, match="use fewer windows"):
        cached(loads, kv, windows, tmp_path, most_bytes=100)
    with pytest.raises(IntactKVError, match=f"--top {VOCAB} is no part of the vocabulary of {VOCAB}"):
        cached(loads, kv, windows, tmp_path, top=VOCAB)


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 7, 9, 16, 21])
def test_a_stopped_run_goes_on_where_it_was(
    loads: Loads, kv: IntactKV, windows: Windows, tmp_path: Path, stop_after: int
) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 3 * len(windows)
        if done >= stop_after:
            raise _Stopped

    with pytest.raises(_Stopped):
        cached(loads, kv, windows, tmp_path, names=("w3",), progress=stop)
    calls: list[tuple[int, int]] = []
    found, traces = cached(loads, kv, windows, tmp_path, names=("w3",), progress=lambda *call: calls.append(call))
    same(found, plain(loads, kv, windows, names=("w3",)))
    assert traces.read >= 1
    assert traces.read + traces.computed == 9
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (21, 21)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def tamper(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [truncate, tamper, empty])
@pytest.mark.parametrize("where", [".", "arms"])
def test_a_spoilt_file_is_computed_again_and_named(
    loads: Loads, kv: IntactKV, windows: Windows, tmp_path: Path, spoil: Callable[[Path], None], where: str
) -> None:
    cached(loads, kv, windows, tmp_path, names=("w3",))
    for path in (tmp_path / "arms").glob("*"):
        if where == "." or path.name == min(p.name for p in (tmp_path / "arms").glob("*")):
            path.unlink() if where == "." else spoil(path)
    if where == ".":
        spoil(sorted(tmp_path.glob("*.safetensors"))[2])
    found, traces = cached(loads, kv, windows, tmp_path, names=("w3",))
    same(found, plain(loads, kv, windows, names=("w3",)))
    assert len(traces.unusable) == 1
    assert "truncated" in traces.unusable[0] or "changed after it was written" in traces.unusable[0]
    assert cached(loads, kv, windows, tmp_path, names=("w3",))[1].unusable == []


def test_a_record_under_anothers_name_is_refused(tmp_path: Path) -> None:
    one = write_record(tmp_path, {"a": 1}, {"x": torch.ones(2)})
    two = write_record(tmp_path, {"a": 2}, {"x": torch.zeros(2)})
    two.write_bytes(one.read_bytes())
    with pytest.raises(IntactKVError, match="something else than its name says"):
        read_record(tmp_path, {"a": 2})
    assert read_record(tmp_path, {"a": 3}) is None
    save_file({"x": torch.ones(2)}, one)
    with pytest.raises(IntactKVError, match="no record of ours"):
        read_record(tmp_path, {"a": 1})


def test_arms_that_cannot_be_measured_are_refused_before_anything_is_loaded(
    loads: Loads, kv: IntactKV, windows: Windows, full: Any, tmp_path: Path
) -> None:
    other = capture(full, [1, 5, 8])
    with pytest.raises(IntactKVError, match="does not start with the 3 prefix tokens"):
        cached(loads, other, windows, tmp_path)
    assert loads.loaded == []
    loads.models["w3"] = copy.deepcopy(full).train()
    with pytest.raises(IntactKVError, match="call model"):
        cached(loads, kv, windows, tmp_path, names=("w3",))


def test_markdown_rows_go_on_with_their_table(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    append_rows(page, ["| a |"])
    assert page.read_text().splitlines() == [*header(), "| a |"]
    append_rows(page, ["| b |"])
    assert page.read_text().splitlines() == [*header(), "| a |", "| b |"]
    page.write_text("# Page\n\n| other |\n|---|\n| 1 |\n")
    append_rows(page, ["| c |"])
    assert page.read_text().splitlines()[-4:] == ["", *header(), "| c |"]


@pytest.fixture(scope="module")
def w3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model rounded to 3 bits, as a folder, and a KV beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("quantized") / "w3"
    full, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    rounded(full).save_pretrained(folder)
    capture(full, [tokenizer.bos_token_id], tokenizer=tokenizer).save(folder.parent / "kv")
    return folder


def command(w3: Path, *more: str | Path) -> list[str | Path]:
    return [
        "eval", w3, "--full", MODEL, "--kv", w3.parent / "kv", "--data", TEXT, "--window", "64", "--windows", "6",
        "--batch-size", "2", *more,
    ]  # fmt: skip


def test_the_command_says_all_that_is_needed_to_run_it_again(w3: Path, tmp_path: Path) -> None:
    done = intactkv(*command(w3, "-o", tmp_path / "plain.json", "--markdown", "-"))
    assert done.returncode == 0, done.stderr
    assert "| w3 | 6 × 64 |" in done.stdout
    data = json.loads((tmp_path / "plain.json").read_text())
    assert data["kl"] == "exact"
    assert data["models"]["w3"]["kv_digest"] == IntactKV.load(w3.parent / "kv").digest
    assert len(data["full"]["checkpoint"]) == len(data["models"]["w3"]["checkpoint"]) == len(data["text"]) == 64
    assert data["full"]["checkpoint"] != data["models"]["w3"]["checkpoint"]
    assert data["options"]["batch_size"] == 2
    assert data["bootstrap"]["seed"] == 0
    assert set(data["made_by"]["versions"]) == {"intactkv", "torch", "transformers"}
    assert data["made_by"]["command"].startswith("intactkv eval ")

    for name in ("fresh", "read"):
        done = intactkv(*command(w3, "-o", tmp_path / f"{name}.json", "--cache", tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert (found["arms"], found["pairs"]) == (data["arms"], data["pairs"])
        assert found["cache"]["read"] == (0 if name == "fresh" else 9)


def test_a_truncated_cache_says_so_in_table_json_and_markdown(w3: Path, tmp_path: Path) -> None:
    more = ["--cache", tmp_path / "cache", "--top", "32", "-o", tmp_path / "top.json", "--markdown", tmp_path / "page"]
    done = intactkv(*command(w3, *more))
    assert done.returncode == 0, done.stderr
    assert "KL mean ≥" in done.stdout
    assert "Every KL above is a lower bound" in done.stdout
    data = json.loads((tmp_path / "top.json").read_text())
    assert data["kl"].startswith("lower bound: over the full model's 32 likeliest tokens")
    assert 0 < data["cache"]["rest_mass"] < 1
    assert "| ≥ " in (tmp_path / "page").read_text()
    done = intactkv(*command(w3, "--top", "32"))
    assert done.returncode == 1
    assert "add --cache DIR" in done.stderr


def test_a_checkpoints_digest_is_of_its_weights_and_configuration(w3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(w3, folder)
    before = checkpoint_digest(folder)
    assert before == checkpoint_digest(str(w3)) != checkpoint_digest(MODEL)
    shutil.copy(w3.parent / "kv", folder / "prefix.intactkv")  # as `quantize` puts it there
    assert checkpoint_digest(folder) == before
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("1e-06", "1e-05"))
    assert checkpoint_digest(folder) != before
    (folder / "config.json").write_text(config)
    tamper(folder / "model.safetensors")
    assert checkpoint_digest(folder) != before
    (folder / "model.safetensors").unlink()
    (folder / "prefix.intactkv").unlink()
    with pytest.raises(IntactKVError, match="holds no weights"):
        checkpoint_digest(folder)


def test_several_models_in_one_command(w3: Path, tmp_path: Path) -> None:
    for cache in ([], ["--cache", tmp_path / "cache"]):
        page = tmp_path / f"page{len(cache)}"
        done = intactkv(*command(w3, MODEL, "--markdown", page, *cache))
        assert done.returncode == 0, done.stderr
        assert "model intact" in done.stdout
        assert "w3 own" in done.stdout
        assert [line.split(" | ")[0] for line in page.read_text().splitlines()[2:]] == ["| w3", "| model"]
    assert (tmp_path / "page0").read_text() == (tmp_path / "page2").read_text()
    done = intactkv(*command(w3, w3))
    assert done.returncode == 1
    assert "is given twice" in done.stderr
    done = intactkv(*command(w3, MODEL, "--kv", w3.parent / "kv", "--kv", w3.parent / "kv"))
    assert done.returncode == 1
    assert "3 intact KVs are given for 2 models" in done.stderr


def test_killed_at_once_and_run_again_gives_the_same_bits(w3: Path, tmp_path: Path) -> None:
    cache, arguments = tmp_path / "cache", [str(a) for a in command(w3, "--cache", tmp_path / "cache")]
    script = [sys.executable, "-m", "intactkv.cli", *arguments]
    source = str(Path(__file__).parent.parent / "src")
    process = subprocess.Popen(
        script,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(list((cache / "arms").glob("*.safetensors"))) < 4 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list((cache / "arms").glob("*.safetensors")))
    assert kept >= 4
    for name, more in (("resumed", ["--cache", cache]), ("plain", [])):
        done = intactkv(*command(w3, "-o", tmp_path / f"{name}.json", *more))
        assert done.returncode == 0, done.stderr
    resumed, plain = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("resumed", "plain"))
    assert resumed["cache"]["read"] >= 4
    assert (resumed["arms"], resumed["pairs"]) == (plain["arms"], plain["pairs"])


def test_prompts_without_the_prefix_are_kept_too(loads: Loads, kv: IntactKV, windows: Windows, tmp_path: Path) -> None:
    """The same figures as without a cache, fresh and read; the arms with the prefix are not measured again for them."""
    skip = len(kv)
    cached(loads, kv, windows, tmp_path, ("w3",))
    loads.loaded.clear()
    made = loads.checkpoint("w3")
    arms = [StoredArm("w3 own", made), StoredArm("w3 intact", made, kv), StoredArm("w3 bare", made, None, skip)]
    store = DistributionStore(tmp_path, "digest of full")
    model = loads.models["w3"]
    plain = [Arm("w3 own", model), Arm("w3 intact", model, kv), Arm("w3 bare", model, None, skip)]
    want = evaluate(loads.models["full"], plain, windows, batch_size=BATCH, block_mse=False).metrics
    for computed in (2 * 3, 0):  # the full model's batches without the prefix and the bare arm's, then nothing
        found, traces = evaluate_cached(loads.checkpoint("full"), arms, windows, store=store, batch_size=BATCH)
        assert traces.computed == computed
        assert set(found.metrics) == set(want)
        for name, metrics in found.metrics.items():
            for figure, values in vars(metrics).items():
                assert torch.equal(values.nan_to_num(-1), getattr(want[name], figure).nan_to_num(-1)), (name, figure)
    assert loads.loaded == ["full", "w3"]
