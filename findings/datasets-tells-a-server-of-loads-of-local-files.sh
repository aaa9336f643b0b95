#!/usr/bin/env bash
# datasets 5.2.0: load_dataset("json", data_files=A_LOCAL_FILE) asks s3.amazonaws.com, to count the load.
#
# Guess before running: a local file is read and nobody is asked.
# Seen: a HEAD request for datasets' own "json" builder at every load, with the versions of Python and of libraries in its
# user agent; where there is no network it is swallowed after up to three seconds. HF_HUB_OFFLINE=1 or
# HF_UPDATE_DOWNLOAD_COUNTS=0 stop it, and so does `intactkv lm-eval`, whose tasks are local files. Exits with 1 if that
# changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
. "$scratch/venv/bin/activate"
pip install -q datasets==5.2.0
cat > "$scratch/run.py" <<'PY'
import sys

asked = []


def watch(event, args):
    if event == "socket.getaddrinfo":
        asked.append(args[0])
        raise ConnectionRefusedError("no network")


sys.addaudithook(watch)
from importlib.metadata import version

from datasets import load_dataset

print("datasets", version("datasets"))
path = f"{sys.argv[1]}/a.jsonl"
with open(path, "w") as file:
    file.write('{"text": "A river rises."}\n')
load_dataset("json", data_files={"test": path}, cache_dir=sys.argv[1])
print("asked for:", asked)
sys.exit(0 if asked else 1)
PY
env -u HF_HUB_OFFLINE python "$scratch/run.py" "$scratch"
