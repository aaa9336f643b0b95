#!/usr/bin/env bash
# torch 2.13.0 (CPU), transformers 5.17.0, safetensors 0.8.0: the same weights in another file give one token other logits.
#
# Guess before running: weights that are equal bit for bit give equal logits on one machine, threads and library; how a
# file is cut into shards, or how long its metadata is, cannot matter.
# Seen: safetensors begins a file's tensors at a multiple of 8 bytes, transformers maps them where they lie, and a
# matrix-vector product of one token in float32 sums in another order where its matrix does not lie at a multiple of 16
# bytes. So a longer note in a file's metadata changes the last bits of a one-token forward; a prompt of several tokens
# does not change here. Whoever compares digests of keys, values or logits across copies of a checkpoint compares that
# too. Exits with 1 if that changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
. "$scratch/venv/bin/activate"
pip install -q torch==2.13.0
pip install -q transformers==5.17.0 safetensors==0.8.0 2>/dev/null
cat > "$scratch/run.py" <<'PY'
import logging
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as quiet

quiet.set_verbosity_error()
quiet.disable_progress_bar()
for package in ("torch", "transformers", "safetensors"):
    print(package, version(package))
torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                     vocab_size=96, initializer_range=0.15)
logits = {}
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    LlamaForCausalLM(config).save_pretrained(folder)
    file = Path(folder) / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for note in ("", "12345678"):
        save_file(weights, file, {"format": "pt", "note": note})
        begin = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        equal = all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        logits[note] = [model(torch.tensor([ids])).logits[0, -1].clone() for ids in ([5], [5, 6, 7, 8])]
        print(f"tensors begin at byte {begin} ({begin % 16} beyond a multiple of 16), weights equal: {equal}")
one, several = (float((a - b).abs().max()) for a, b in zip(*logits.values()))
print(f"largest difference of a logit: one token {one:.1e}, four tokens {several:.1e}")
sys.exit(0 if 0 < one < 1e-4 else 1)
PY
python "$scratch/run.py"
