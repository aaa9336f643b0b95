#!/usr/bin/env bash
# huggingface_hub 2.4.0: HfFileSystem takes whatever a server sends for the part of a file that it asked for.
#
# Guess before running: a server that does not know `Range` answers 200 with the whole file; a file object that asked for
# a part sees that (its sister hf_hub_download does, when it takes up a broken download) and raises, or skips to it.
# Seen: reading ten bytes in the middle gives the file's first ten bytes, without a word: neither the status, nor
# Content-Range, nor the length is looked at. HTTP lets a server ignore `Range`, as simple mirrors and proxies do. Tensors
# read by their offsets from such a file are other numbers of the right shape. Exits with 1 if that changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
. "$scratch/venv/bin/activate"
pip install -q huggingface_hub==2.4.0 2>/dev/null
cat > "$scratch/run.py" <<'PY'
import json
import os
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from threading import Thread

CONTENT, COMMIT = bytes(range(256)) * 64, "1" * 40


class Mirror(BaseHTTPRequestHandler):
    """One repository with one file, and no ranges."""

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send(json.dumps([{"type": "file", "path": "data.bin", "size": len(CONTENT), "oid": COMMIT}]).encode())

    def do_GET(self):
        if "/resolve/" in self.path:
            self.send(CONTENT)
        elif "/tree/" in self.path:
            self.send(json.dumps([{"type": "file", "path": "data.bin", "size": len(CONTENT), "oid": COMMIT}]).encode())
        else:
            self.send(json.dumps({"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": "data.bin"}]}).encode())

    def send(self, content):
        self.send_response(200)
        for name, value in (("Content-Length", str(len(content))), ("ETag", '"x"'), ("X-Repo-Commit", COMMIT)):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=tempfile.mkdtemp(), HF_HUB_DISABLE_XET="1")
from huggingface_hub import HfFileSystem

print("huggingface_hub", version("huggingface_hub"))
with HfFileSystem().open("a/b/data.bin", "rb", block_size=16) as file:
    file.seek(1000)
    found = file.read(10)
print("bytes 1000 to 1010 of the file:", list(CONTENT[1000:1010]))
print("what the file object reads    :", list(found))
sys.exit(0 if found == CONTENT[:10] else 1)
PY
python "$scratch/run.py"
