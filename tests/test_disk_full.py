"""A disk that takes no more: one sentence, the old file as it was, nothing half-written beside it."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_cli import intactkv
from world import write_world

pytest.importorskip("gguf")

ARMS = ["w3", "--full", "model", "--kv", "kv"]
MEASURED = [*ARMS, "--data", "text", "--window", "16", "--windows", "2"]
LEARNED = [*ARMS, "--data", "text", "--steps", "1", "--samples", "2", "--held-out", "3", "--length", "16"]
COMMANDS = [
    ["capture", "model", "-o", "PLACE/kv"],
    ["check", *ARMS, "-o", "PLACE/kv"],
    ["calibrate", *LEARNED, "-o", "PLACE/kv"],
    ["calibrate", *LEARNED, "-o", "PLACE/kv", "--checkpoint", "PLACE/folder/state"],
    ["calibrate", *LEARNED, "-o", "PLACE/kv", "--spool", "PLACE/folder"],
    ["eval", *MEASURED, "-o", "PLACE/x.json"],
    ["eval", *MEASURED, "--markdown", "PLACE/page.md"],
    ["eval", *MEASURED, "--cache", "PLACE/folder"],
    ["export", "kv", "--to", "llama.cpp", "--gguf", "model.gguf", "-o", "PLACE/state"],
    ["quantize", "model", "--group-size", "32", "-o", "PLACE/folder/w4"],
    ["mtbench", "answer", *ARMS, "--questions", "rows.jsonl", "--max-new-tokens", "1", "-o", "PLACE/folder"],
    ["tasks", "data", "-o", "PLACE/folder"],
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "data").mkdir()
    (folder / "data" / "long.txt").write_text("A river rises.")
    (folder / "data" / f"{'x' * 150}.txt").write_text("A river rises.")
    return folder


@contextmanager
def limited(folder: Path) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """No file grows beyond so many bytes: what writing meets is another error, the same to a writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(room: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    try:
        yield limit, lambda: limit(limits[0])
    finally:
        limit(limits[0])


@contextmanager
def mounted(folder: Path) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """A real file system of 8 MiB with no more than so many bytes free."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    filler = folder / "filler"

    def fill(room: int) -> None:
        free = shutil.disk_usage(folder).free
        filler.write_bytes(b"x" * (free - room // 4096 * 4096))

    try:
        yield fill, filler.unlink
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def files(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file() and p.name != "filler"}


@pytest.fixture(autouse=True)
def unlocked() -> Iterator[None]:
    """The repository, whose commit figures tell of, is left without a lock."""
    yield
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--path-format=absolute", "--git-path", "index.lock"]
    told = subprocess.run(asked, capture_output=True, text=True)
    assert told.returncode != 0 or not Path(told.stdout.strip()).exists()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("command", "disk"),
    [(command, limited) for command in COMMANDS]
    + [(command, mounted) for command in COMMANDS if command[0] in ("capture", "quantize", "tasks")],
    ids=lambda given: given.__name__ if callable(given) else "-".join([given[0], *given[-2:]]).replace("/", "-"),
)
def test_a_full_disk(command: list[str], disk: Any, world: Path, tmp_path: Path) -> None:
    """No room, or some: a sentence with a remedy, what was there is kept; with room the same command does its work."""
    place = tmp_path / "disk"
    place.mkdir()
    words = [word.replace("PLACE", str(place)) for word in command]
    with disk(place) as (fill, free):
        (place / "folder").mkdir()
        for name in {"kv", "page.md"} & {Path(word).name for word in words}:
            (place / name).write_bytes((world / "kv").read_bytes() if name == "kv" else b"# Page\n")
        before = files(place)
        for room in (200, 60_000) if "quantize" in command else (200,):
            fill(room)
            done = intactkv(*words, cwd=world)
            now = files(place)
            assert done.returncode == 1, (room, done.stdout, done.stderr)
            *_, said = [line for line in done.stderr.splitlines() if line.strip()]
            assert said.startswith("error: ")
            assert "nobody foresaw" not in said
            assert re.search("No space left on device|File too large| 0 are free|are free:", said), said
            assert re.search("make room|use fewer", said), said
            assert {name: now[name] for name in before} == before
            assert not list(place.rglob(".*"))
            free()
            if "folder" not in words[-1]:
                assert now == before
        done = intactkv(*words, cwd=world)
        assert done.returncode == 0, done.stderr
        assert files(place) != before
