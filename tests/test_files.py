"""Files are whole or not there, whoever else writes them; a place that cannot be written is told before the work."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PREFIX, build, by_name
from test_cli import intactkv

from intactkv import IntactKV, IntactKVError, capture
from intactkv.demo import MODEL, TEXT
from intactkv.files import check_folder, check_outputs, json_data, write_atomically
from intactkv.provenance import write_json
from intactkv.texts import read_text


def test_threads_that_write_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    kv = capture(build(by_name("llama-gqa")), PREFIX)
    path, failed = tmp_path / "kv.safetensors", []

    def save() -> None:
        try:
            for _ in range(25):
                kv.save(path)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [p.name for p in tmp_path.iterdir()] == ["kv.safetensors"]
    assert IntactKV.load(path).digest == kv.digest


WRITERS = """
import os, sys
from pathlib import Path

from intactkv import IntactKV

one, other, path = map(Path, sys.argv[1:])
kvs = [IntactKV.load(one), IntactKV.load(other)]
digests = {kv.digest for kv in kvs}
kvs[0].save(path)
children = []
for i in range(4):
    if (child := os.fork()) == 0:
        for _ in range(60):
            kvs[i % 2].save(path)
            assert IntactKV.load(path).digest in digests
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
"""


def test_processes_that_write_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    """Four of them, two artifacts: whatever is read meanwhile is one of the two."""
    model, place = build(by_name("llama-gqa")), tmp_path / "place"
    place.mkdir()
    for name, ids in (("one", PREFIX), ("other", PREFIX[:2])):
        capture(model, ids).save(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", WRITERS, tmp_path / "one", tmp_path / "other", place / "kv"], capture_output=True,
        text=True, timeout=200, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in place.iterdir()] == ["kv"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    write_atomically(path, b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IntactKVError, match=r"cannot be written \(No space .*; what was there before is kept"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_figures_without_a_number_are_null_and_provenance_without_one_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"perplexity": math.inf, "rows": [(1.5, math.nan)], "n": 3})
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (read["perplexity"], read["rows"], read["n"]) == (None, [[1.5, None]], 3)
    assert json_data({"a": {"b": -math.inf}}) == {"a": {"b": None}}
    kv = capture(build(by_name("llama-gqa")), PREFIX)
    with pytest.raises(IntactKVError, match="keep only text, finite numbers"):
        replace(kv, provenance={"loss": math.nan}).save(tmp_path / "kv.safetensors")
    assert not (tmp_path / "kv.safetensors").exists()


def test_places_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_outputs(None, tmp_path / "new.json", tmp_path / "file")
    check_folder(tmp_path / "new" / "deeper")
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "x.json", f"the folder {tmp_path / 'no'} does not exist"),
        (tmp_path / "file" / "x.json", "does not exist"),
    ):
        with pytest.raises(IntactKVError, match=message):
            check_outputs(path)
    with pytest.raises(IntactKVError, match="it is a file; name a folder"):
        check_folder(tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    "command",
    [
        ["capture", "absent", "-o", "no/kv"],
        ["check", "absent", "--full", "absent", "--kv", "absent", "-o", "no/kv"],
        ["eval", "absent", "--full", "absent", "--kv", "absent", "--data", "absent", "-o", "no/x.json"],
        ["eval", "absent", "--full", "absent", "--kv", "absent", "--data", "absent", "--markdown", "no/x.md"],
        ["calibrate", "absent", "--full", "absent", "--kv", "absent", "--data", "absent", "-o", "no/kv"],
        ["compare", "--full", "absent", "--own", "absent", "--intact", "absent", "-o", "no/x.json"],
        ["mtbench", "show", "absent", "--questions", "absent", "--judge", "j", "-o", "no/x.json"],
        ["doctor", "absent", "-o", "no/x.html"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_command_looks_at_its_outputs_before_anything_else(command: list[str], tmp_path: Path) -> None:
    done = intactkv(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert "the folder no does not exist; create it first" in done.stderr
    assert not any(tmp_path.iterdir())


def test_what_nobody_foresaw_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def break_(error: Exception) -> Any:
        def raise_(*_: Any, **__: Any) -> None:
            raise error

        return raise_

    command = ("capture", MODEL, "-o", tmp_path / "kv")
    monkeypatch.setattr(
        "intactkv.capturing.live.capture", break_(torch.OutOfMemoryError("CUDA out of memory. Tried …"))
    )
    done = intactkv(*command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the device's memory does not suffice (CUDA out of memory. Tried …); use")
    monkeypatch.setattr("intactkv.capturing.live.capture", break_(IndexError("list index out of range\nmore")))
    assert intactkv(*command).stderr.startswith("error: IndexError: list index out of range (nobody foresaw this")
    monkeypatch.setenv("INTACTKV_TRACEBACK", "1")
    with pytest.raises(IndexError):
        intactkv(*command)


# ------------------------------------------------------------------------------------------------ texts in rows

TEXTS = ["One text.", "Another\u2028with a line separator.", "Ωmega."]


def rows(*more: Any) -> list[Any]:
    return [{"text": text, "id": i} for i, text in enumerate(TEXTS)] + list(more)


def test_rows_are_read_by_their_text_field(tmp_path: Path) -> None:
    want = "\n\n".join(TEXTS)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows())
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(f"\ufeff{lines}\n", encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps(rows()), encoding="utf-8")
    (tmp_path / "d.txt").write_text(f"\ufeff{want}", encoding="utf-8")
    for name in ("a.jsonl", "b.jsonl", "c.json", "d.txt"):
        assert read_text(tmp_path / name) == want, name


def test_parquet_is_read_by_its_text_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows()), tmp_path / "a.parquet")
    assert read_text(tmp_path / "a.parquet") == "\n\n".join(TEXTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}\n', "line 2 of .*a.jsonl lacks text"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', "row 1 of .*a.jsonl has no text under `text`, but the fields text"),
        ("a.json", '[{"conversations": [], "id": 1}]', "has no text under `text`, but the fields conversations, id"),
        ("a.json", '["x"]', "but str; rename the field"),
        ("a.json", "no json", "is no JSON"),
        ("a.parquet", "no parquet", "cannot be read as Parquet|is read with pyarrow"),
        ("a.jsonl", "", "is empty"),
    ],
)
def test_rows_without_text_are_refused_by_name(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(IntactKVError, match=message):
        read_text(tmp_path / name)


def test_a_command_measures_on_rows(tmp_path: Path) -> None:
    paragraphs = TEXT.read_text(encoding="utf-8").split("\n\n")[:40]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in paragraphs), encoding="utf-8")
    (tmp_path / "same.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    capture_ = intactkv("capture", MODEL, "-o", tmp_path / "kv")
    assert capture_.returncode == 0, capture_.stderr
    figures = []
    for file in (data, tmp_path / "same.txt"):
        done = intactkv(
            "eval", MODEL, "--full", MODEL, "--kv", tmp_path / "kv", "--data", file, "--window", "64", "--windows", "2",
            "-o", tmp_path / "x.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        figures.append(json.loads((tmp_path / "x.json").read_text())["arms"])
    assert figures[0] == figures[1]
