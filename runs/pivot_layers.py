"""Where counting the prefix costs GPTQ: every Linear of a model on its own, with and without [BOS] in its Hessian.

What it does: collects each layer's inputs on TEXT from the full model, runs llm-compressor's GPTQ step on its weights
in memory, and measures the error that *later* tokens read, tr ΔW H_rest ΔWᵀ over tr W H_rest Wᵀ: rounded to nearest;
with the prefix counted; with it counted in the Hessian's diagonal only; not counted. `share` is the prefix's part of
the Hessian's trace, `channel` the part of the prefix's energy in its largest channel. What it gives up: errors do not
travel from layer to layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from torch import Tensor, nn

from intactkv import bos
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.doctor.forecast import gptq_step, hessians, minmax_grid, read_error
from intactkv.evaluating import prefixed_windows
from intactkv.texts import read_text

GROUP = 64


def main(
    model: Annotated[str, typer.Argument(help="The full-precision model's folder.")],
    text: Annotated[Path, typer.Argument(help="A UTF-8 text.")],
    bits: Annotated[int, typer.Option(help="Bits of a weight.")] = 3,
    windows: Annotated[int, typer.Option(help="Windows of 256 tokens.")] = 16,
    rows: Annotated[int, typer.Option(help="Show so many layers, the worst first.")] = 8,
) -> None:
    """Print one Markdown table."""
    full, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    tokens = tokenizer(read_text(text), add_special_tokens=False, verbose=False).input_ids
    ids = prefixed_windows(tokens, prefix=bos(tokenizer), window=256).ids[:windows]
    head = full.get_output_embeddings()
    linears = {name: m for name, m in full.named_modules() if type(m) is nn.Linear and m is not head}
    found = []
    for name, (prefix, later) in hessians(full, linears, ids, 1).items():
        weight = linears[name].weight.detach()
        share, channel = prefix.trace() / (prefix + later).trace(), prefix.diagonal().max() / prefix.trace()
        cells = [share, channel]
        for symmetric in (True, False):
            grid: dict[str, Any] = {"bits": bits, "group_size": GROUP, "symmetric": symmetric}
            cells.append(read_error(nearest(weight, grid), weight, later))
            for counted in (prefix, prefix.diagonal().diag(), torch.zeros(())):
                cells.append(read_error(gptq_step(weight, later + counted, **grid), weight, later))
        found.append((name, *cells))
    print("| layer | share | channel | symmetric: nearest | counted | diagonal only | not counted "
          "| asymmetric: nearest | counted | diagonal only | not counted |\n|---|" + "---:|" * 10)  # fmt: skip
    found.sort(key=lambda row: row[6] - row[4])
    for name, *figures in found[:rows]:
        print(f"| {name} | {' | '.join(f'{figure:.4f}' for figure in figures)} |")
    gains = sorted(row[4] - row[6] for row in found)
    print(f"\n{len(found)} layers; of all the error that counting adds, the two worst layers have "
          f"{100 * sum(gains[-2:]) / sum(max(gain, 0) for gain in gains):.0f} %")  # fmt: skip


def nearest(weight: Tensor, grid: dict[str, Any]) -> Tensor:
    args, scale, zero_point = minmax_grid(weight, **grid)
    return fake_quantize(weight, scale, zero_point, args)


if __name__ == "__main__":
    typer.run(main)
