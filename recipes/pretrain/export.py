"""Turn a run's checkpoint into a Hugging Face folder in bfloat16, tokenizer included.

    python export.py --data DATA RUN OUT

A run with another attention than softmax becomes a plain Llama folder too; attention.py says how to load it.
"""

import argparse
import shutil
from pathlib import Path

import torch
from attention import register_attentions
from train import Settings, build_model
from transformers import AutoTokenizer, GenerationConfig


def main() -> None:
    """Write the model, its generation config and its tokenizer to OUT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    args = parser.parse_args()

    register_attentions()
    state = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)
    settings = Settings(**state["settings"])
    tokenizer = AutoTokenizer.from_pretrained(args.data / "tokenizer")
    model = build_model(settings, tokenizer)
    model.load_state_dict(state["model"])
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(special)
    if settings.attention != "sdpa":
        model.config.update({"trained_attention": settings.attention})  # for the reader: nothing acts on it
    model.generation_config = GenerationConfig(**special)
    model.to(torch.bfloat16).save_pretrained(args.out)
    shutil.copytree(args.data / "tokenizer", args.out, dirs_exist_ok=True)
    print(f"{args.out}: step {state['step']}, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
