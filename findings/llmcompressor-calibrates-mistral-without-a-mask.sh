#!/usr/bin/env bash
# llm-compressor 0.14.0.1 calibrates Mistral, Mixtral, Qwen3-MoE, Phi-3 and StarCoder2 (transformers 5.17.0) without an attention mask.
#
# Guess before running: a quantizer's calibration passes show a decoder its windows causally, as inference does.
# Seen: the sequential pipeline traces the model and runs its blocks with eager attention. Where a model's forward first
# picks its mask function and then calls it (`mask_function = create_causal_mask if … else create_sliding_window_causal_mask`),
# the trace holds attention_mask=None, and every token attends to the whole window, with or without an attention_mask
# in the data. GPTQ's Hessians and AWQ's means then come from activations that the model never has. Llama is right.
# Exits with 1 if that changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
. "$scratch/venv/bin/activate"
pip install -q torch==2.13.0
pip install -q llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0 2>/dev/null
cat > "$scratch/run.py" <<'PY'
import sys
import tempfile
from importlib.metadata import version

import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader

CASES = {"Llama": ("Llama", {}), "Mistral": ("Mistral", {"sliding_window": None}), "Mistral, window 8": ("Mistral", {"sliding_window": 8}),
         "Phi3": ("Phi3", {"pad_token_id": 0}), "Starcoder2": ("Starcoder2", {})}
WRONG = {"Mistral", "Mistral, window 8", "Phi3", "Starcoder2"}
ids = torch.randint(8, 90, (2, 32), generator=torch.Generator().manual_seed(0))
scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, group_size=32))
found = {}
for name, (family, settings) in CASES.items():
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, **settings,
    )
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    model = getattr(transformers, f"{family}ForCausalLM").from_pretrained(folder).eval()
    seen = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args, seen=seen: None if args[0].is_meta else seen.append(args[0].detach().clone())
    )
    with torch.no_grad():
        model(ids)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    oneshot(model=model, recipe=[recipe], dataset=DataLoader([batch], batch_size=None), processor=object())
    inference, calibration = seen[0], seen[1]
    found[name] = float((calibration - inference).norm() / inference.norm())
for package in ("llmcompressor", "compressed-tensors", "transformers", "torch"):
    print(package, version(package))
for name, off in found.items():
    print(f"{name}: the first attention's output in calibration is off from inference by {100 * off:.2f} %")
sys.exit(0 if {name for name, off in found.items() if off > 0.1} == WRONG and found["Llama"] < 1e-3 else 1)
PY
python "$scratch/run.py" 2>/dev/null
