#!/usr/bin/env bash
# compressed-tensors 0.19.0: a module that is offloaded forgets .float(), .to(dtype), .half() and in-place changes of its weight, without a word.
#
# Guess before running: offloading is about where weights lie; a cast or an in-place change of them holds, or raises.
# Seen: `module.weight` of an offloaded module is a fresh copy on the device where it computes, at every access. torch's
# casts write into that copy (`param.data = …`), and so does `weight.zero_()`: the stored weight stays as it was, and the
# next access brings it back in its old type. Assigning a new float32 Parameter keeps its numbers, in the old type. llm-compressor 0.14 offloads every module of
# a model that way while it quantizes on a machine with an accelerator, so that a step which casts the model (as one does
# to rotate weights in float32) works on a CPU alone and does nothing beside a GPU. Shown here with a disk as the place.
# Exits with 1 if that changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
. "$scratch/venv/bin/activate"
pip install -q torch==2.13.0
pip install -q compressed-tensors==0.19.0 transformers==5.17.0 2>/dev/null
cat > "$scratch/run.py" <<'PY'
import sys
import tempfile
from importlib.metadata import version

import torch
from compressed_tensors.offload.module import offload_module

for package in ("compressed-tensors", "torch"):
    print(package, version(package))
found = {}
with tempfile.TemporaryDirectory() as folder:
    layer = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    offload_module(layer, "cpu", "disk", offload_dir=folder)
    for name, cast in (("float()", layer.float), ("to(float32)", lambda: layer.to(torch.float32)), ("half()", layer.half)):
        cast()
        found[name] = layer.weight.dtype
    with torch.no_grad():
        layer.weight.zero_()
    found["weight.zero_()"] = bool((layer.weight == 0).all())
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4))
    found["weight = Parameter"] = (layer.weight.dtype, bool((layer.weight == 0).all()))
for name, state in found.items():
    print(f"after {name}: {state}")
casts_are_lost = {found[name] for name in ("float()", "to(float32)", "half()")} == {torch.bfloat16}
sys.exit(0 if casts_are_lost and not found["weight.zero_()"] and found["weight = Parameter"] == (torch.bfloat16, True) else 1)
PY
python "$scratch/run.py"
