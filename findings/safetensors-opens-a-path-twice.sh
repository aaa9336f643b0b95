#!/usr/bin/env bash
# safetensors 0.8.0: safe_open(path, framework="pt") opens the path twice; a file that is replaced in between is two files.
#
# Guess before running: a reader that has opened a file keeps it, whatever is renamed onto its path; replacing a file
# atomically is enough for readers to see the old one or the new one.
# Seen: the header comes from one opening, the tensors are mapped by torch from another, by path. Where a writer replaces
# the file in between, the header of one goes with the bytes of the other: a RuntimeError where the new file is shorter,
# else other numbers without a word. intactkv reads an artifact's bytes once and loads these. Exits with 1 if that changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
. "$scratch/venv/bin/activate"
pip install -q torch==2.13.0 numpy
pip install -q safetensors==0.8.0
cat > "$scratch/run.py" <<'PY'
import os
import sys
from importlib.metadata import version

import torch
from safetensors import safe_open
from safetensors.torch import save_file

for package in ("safetensors", "torch"):
    print(package, version(package))
path = os.path.join(sys.argv[1], "x.safetensors")
save_file({"x": torch.ones(9)}, path, {"says": "ones"})
save_file({"x": torch.full((9,), 2.0)}, path + ".new", {"says": "twos"})
plain = torch.UntypedStorage.from_file


def late(*args, **kwargs):
    os.replace(path + ".new", path)  # another process, at this moment
    return plain(*args, **kwargs)


torch.UntypedStorage.from_file = late
with safe_open(path, framework="pt") as file:
    says, holds = file.metadata()["says"], float(file.get_tensor("x")[0])
print(f"the header says {says}, the tensor holds {holds}")
sys.exit(0 if (says, holds) == ("ones", 2.0) else 1)
PY
python "$scratch/run.py" "$scratch"
