"""How to round a cache: KL to the model with its own cache, for each number of bits and kind of scales.

What it does: windows of TEXT that begin with [BOS], each in one forward of the full-precision model through a packed
cache that reads its tokens as rounded, [BOS] kept; so every token but the first is read as the cache would store it.
What it gives up: nothing is decoded, so that no token is read in full precision for being new.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from intactkv import PackedCache, Packing, bos, read_packed
from intactkv.checkpoint.load import load_model_on, load_tokenizer
from intactkv.evaluating import prefixed_windows, token_metrics
from intactkv.packed.cache import PackedLayer
from intactkv.packed.packing import expected_bytes
from intactkv.texts import read_text

SCHEMES: dict[str, dict[str, Any]] = {
    "per channel, the default": {},
    "per channel, groups of 64": {"token_group": 64},
    "per channel, groups of 128": {"token_group": 128},
    "per channel, rotated": {"hadamard": True},
    "per token": {"keys": "per_token"},
    "per token, groups of 32": {"keys": "per_token", "group_size": 32},
    "per token, rotated": {"keys": "per_token", "hadamard": True},
}


def main(
    model: Annotated[str, typer.Argument(help="The full-precision model's folder.")],
    text: Annotated[Path, typer.Argument(help="A UTF-8 text, or .jsonl.")],
    windows: Annotated[int, typer.Option(help="Windows to measure on.")] = 24,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 513,  # 512 are rounded, whole groups
    only: Annotated[str, typer.Option(help="Kinds of scales whose names begin so.")] = "",
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "auto",
) -> None:
    """Print one Markdown table; bits a number are those of the packed layers, scales included."""
    full, tokenizer = load_model_on(model, device, dtype=torch.float32), load_tokenizer(model)
    tokens = tokenizer(read_text(text), add_special_tokens=False, verbose=False).input_ids
    ids = prefixed_windows(tokens, prefix=bos(tokenizer), window=window).ids[:windows].to(full.device)
    print("| keys' scales | bits | bits a number | KL mean | same top-1 % |\n|---|---:|---:|---:|---:|")
    with torch.inference_mode(), read_packed(full):
        for bits in (4, 3, 2):
            for name, settings in SCHEMES.items():
                if not name.startswith(only):
                    continue
                packing = Packing(bits, keep=1, own="rounded", **settings)
                found = []
                for row in ids.split(1):
                    reference = full(row, use_cache=False).logits[:, :-1]
                    cache = PackedCache(full.config, packing)
                    logits = full(row, past_key_values=cache).logits[:, :-1]
                    found.append(token_metrics(reference, logits, row[:, 1:]))
                layer = next(layer for layer in cache.layers if isinstance(layer, PackedLayer))
                shape = (1, layer.kept[0].shape[1], window - 1, layer.kept[0].shape[3])
                size = 8 * expected_bytes(packing, shape) / (2 * torch.Size(shape).numel())
                kl = torch.cat([metrics.kl for metrics in found]).mean()
                top1 = 100 * torch.cat([metrics.same_top1 for metrics in found]).float().mean()
                print(f"| {name} | {bits} | {size:.2f} | {float(kl):.4f} | {float(top1):.1f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
