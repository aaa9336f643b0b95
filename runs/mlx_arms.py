"""A real model as mlx-lm quantizes it, with an intact prefix: does it help, and does mlx-lm's own command take it?

    python runs/mlx_arms.py FOLDER --model HF --data ../shared/data          # where mlx-lm is installed

What it does: lets mlx-lm convert the full model to each number of bits (groups of 64, float32), captures [B], exports
it as a prompt cache, and lets `mlx_lm generate --prompt-cache-file` answer with it. Three arms on C4 windows: KL,
same-top-1, perplexity, paired intervals. Figures go to FOLDER, a checkpoint a JSON; it goes on where it stopped.
What it gives up: the arms are measured in transformers, with the quantized weights made dense by mlx-lm: on a CPU MLX
needs a minute for 256 tokens of a model of 135 M.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from mlx_lm import convert

from intactkv import bos, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.evaluating import prefixed_windows, three_arms
from intactkv.files import write_atomically
from intactkv.serving.mlx import write_prompt_cache
from intactkv.texts import first_tokens, read_text

GROUP = 64
PROMPT = "The river"


def main(
    folder: Path,
    model: Annotated[Path, typer.Option()],
    data: Annotated[Path, typer.Option()],
    windows: int = 32,
    length: int = 512,
    bits: str = "4,3",
) -> None:
    """Make and measure every checkpoint, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(model))
    prefix = bos(tokenizer)
    full = load_model(model, dtype="float32")
    kv = capture(full, prefix, logits=False)
    text = first_tokens(tokenizer, read_text(data / "eval" / "c4_sample_500.jsonl"), None)
    every = prefixed_windows(text, prefix=prefix, window=length)
    shown = every[:: len(every) // windows][:windows]
    for number in map(int, bits.split(",")):
        made, dense, out = (folder / f"q{number}{end}" for end in ("", "-dense", ".json"))
        file = folder / f"q{number}-prefix.safetensors"
        if not made.exists():
            convert(str(model), mlx_path=str(made), dtype="float32", quantize=True, q_bits=number, q_group_size=GROUP)
        if not dense.exists():
            convert(str(made), mlx_path=str(dense), dtype="float32", dequantize=True)
        write_prompt_cache(kv, made, file)
        command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(made), "--prompt", PROMPT,
                   "--max-tokens", "16", "--ignore-chat-template", "--prompt-cache-file", str(file)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"mlx_lm generate ended with {done.returncode}: {done.stderr[-500:]}")
        print(f"{made.name}, {file.name}: {done.stdout.split('=' * 10)[1].strip()!r}", flush=True)
        if not out.exists():
            found = three_arms(full, load_model(dense, dtype="float32"), kv, shown, block_mse=False)
            write_atomically(out, json.dumps(found.to_dict(), indent=1).encode())
    for path in sorted(folder.glob("q*.json"), reverse=True):
        told = json.loads(path.read_text(encoding="utf-8"))
        own, intact, gap = told["arms"]["own"], told["arms"]["intact"], told["pairs"][0]["gap_closed"]

        def both(metric: str, digits: int, own: Any = own, intact: Any = intact) -> str:
            return ", ".join(f"{arm[metric]['value']:.{digits}f}" for arm in (own, intact))

        print(
            f"| {path.stem} | {both('kl_mean', 4)} "
            f"| {100 * gap['value']:.1f} [{100 * gap['low']:.1f}, {100 * gap['high']:.1f}] "
            f"| {both('kl_median', 4)} | {both('kl_99_9', 2)} | {both('same_top1_percent', 1)} "
            f"| {both('perplexity', 2)} ({told['arms']['full']['perplexity']['value']:.2f}) |"
        )


if __name__ == "__main__":
    typer.run(main)
