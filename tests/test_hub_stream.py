"""Streaming from the Hub: of each file the bytes that are needed, against a server on loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest
from models import PREFIX, build, by_name

from intactkv import IntactKV, IntactKVError, capture
from intactkv.checkpoint.shards import weight_map

COMMIT = "1" * 40


@dataclass
class Site:
    """A repository, and what the server does to requests for its files."""

    folder: Path
    sent: dict[str, int] = field(default_factory=dict)  # bytes of each file
    cut_at: int | None = None  # every second answer ends after so many bytes
    ranges: bool = True
    tags: Iterator[int] | None = None  # an ETag of its own for every answer
    lock: Lock = field(default_factory=Lock)
    answers: int = 0
    asked: int = 0  # for what there is


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as reading parts of files takes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each small answer waits 40 ms for the client to acknowledge its head

    @property
    def hub(self) -> Site:
        return self.server.hub  # type: ignore[attr-defined]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" not in path:
            self.hub.asked += 1
            names = [{"rfilename": each.name, "size": each.stat().st_size} for each in self.hub.folder.iterdir()]
            self.answer(200, json.dumps({"id": "a/b", "sha": COMMIT, "siblings": names}).encode(), {})
            return
        file = self.hub.folder / path.rpartition("/")[2]
        if not file.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content, tag = file.read_bytes(), f'"{file.name}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        with self.hub.lock:
            self.hub.answers += 1
            number = self.hub.answers
        if self.hub.tags is not None and asked:
            tag = f'"{number}"'
        told = {"ETag": tag, "X-Repo-Commit": COMMIT}
        if asked is None or not self.hub.ranges:
            self.answer(200, content, told)
            return
        begin, end = int(asked[1]), int(asked[2]) + 1
        told["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        cut = self.hub.cut_at if number % 2 else None
        self.answer(206, content[begin:end], told, cut=cut)
        with self.hub.lock:
            self.hub.sent[file.name] = self.hub.sent.get(file.name, 0) + end - begin

    def answer(self, status: int, content: bytes, told: dict[str, str], *, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **told}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None and cut < len(content):
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


_SCRIPT = """
import json, sys
from types import SimpleNamespace
import psutil
import intactkv as ik
from intactkv.checkpoint import remote
remote._PIECE = 8000
psutil.virtual_memory = lambda: SimpleNamespace(available=0)  # so that all is streamed without being asked for
for line in sys.stdin:
    source, ids, out = json.loads(line)
    try:
        ik.capture(source, ids, logits=False).save(out)
        print(flush=True)
    except ik.IntactKVError as error:
        print(error, flush=True)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Any]]:
    """A mixture of experts in small shards, and a capture of it by name: huggingface_hub reads its endpoint once."""
    folder = tmp_path_factory.mktemp("site")
    build(by_name("qwen3-moe")).save_pretrained(folder / "m", max_shard_size="40KB")
    hub = Site(folder / "m")
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.hub = hub
    Thread(target=server.serve_forever, daemon=True).start()
    where = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "home"),
             "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT], env={**os.environ, **where}, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip

    def run(ids: list[int], out: Path, source: object = "a/b") -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([str(source), ids, str(out)]), file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    yield hub, run
    process.communicate()
    server.shutdown()


def test_only_what_is_needed_is_fetched_and_none_kept(site: tuple[Site, Any], tmp_path: Path) -> None:
    """The artifact is the folder's; experts without tokens and other tokens' embeddings are not fetched."""
    hub, run = site
    assert run(PREFIX[:1], tmp_path / "kv") == run(PREFIX[:1], tmp_path / "local", hub.folder) == ""
    kv, live = IntactKV.load(tmp_path / "kv"), IntactKV.load(tmp_path / "local")
    assert kv.digest == live.digest
    assert kv.provenance["weights"] == live.provenance["weights"]
    index = json.loads((hub.folder / "model.safetensors.index.json").read_text())["weight_map"]
    others = {file for name, file in index.items() if ".layers.2." not in name}
    last = set(index.values()) - others  # the causal probe reads the first two layers besides
    assert 0 < sum(hub.sent[file] for file in last) < 0.75 * sum((hub.folder / file).stat().st_size for file in last)
    assert hub.sent[index["model.embed_tokens.weight"]] < 2000
    kept = [path for path in (hub.folder.parent / "home").rglob("*") if path.is_file() and path.stat().st_size > 20_000]
    assert not kept


def test_the_hub_is_asked_once(site: tuple[Site, Any], tmp_path: Path) -> None:
    """Of how many bytes a model is and which files it has, beside whether there is one, asked once in a process."""
    hub, run = site
    for _ in range(2):
        hub.asked = 0
        assert run(PREFIX[:1], tmp_path / "kv") == ""
    assert hub.asked == 1


def test_connections_that_are_cut(site: tuple[Site, Any], tmp_path: Path) -> None:
    """Every second answer ends after 3,000 bytes of up to 8,000: taken up where it ended."""
    hub, run = site
    hub.cut_at = 3000
    assert run(PREFIX, tmp_path / "kv") == ""
    hub.cut_at = None
    assert IntactKV.load(tmp_path / "kv").digest == capture(hub.folder, PREFIX, stream=True, logits=False).digest


def test_answers_that_are_not_what_was_asked(site: tuple[Site, Any], tmp_path: Path) -> None:
    """A mirror that sends whole files, a file that changes meanwhile, a shard that is not there."""
    hub, run = site
    hub.ranges = False
    assert "is another part or the whole (status 200, no Content-Range); use an endpoint that serves ranges" in run(
        PREFIX, tmp_path / "kv"
    )
    hub.ranges, hub.tags = True, iter(())
    assert "changed on the Hub while it was read (ETag" in run(PREFIX, tmp_path / "kv")
    hub.tags = None
    shard = sorted(hub.folder.glob("*.safetensors"))[5]
    shard.rename(tmp_path / "elsewhere")
    assert f"the Hub does not give a/b/{shard.name}" in run(PREFIX, tmp_path / "kv")
    assert not (tmp_path / "kv").exists()


def test_an_index_that_names_files_elsewhere() -> None:
    """A file beside it, and no other."""
    for file in ("../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", 3, ""):
        with pytest.raises(IntactKVError, match="index"):
            weight_map(json.dumps({"weight_map": {"a": file}}).encode(), "index")
    with pytest.raises(IntactKVError, match="is no index"):
        weight_map(b"{", "index")
