"""Where counting the prefix costs GPTQ: every Linear of a model on its own, with and without [BOS] in its Hessian.

What it does: collects each layer's inputs on TEXT from the full model, runs llm-compressor's GPTQ step on its weights
in memory, and measures the error that *later* tokens read, tr ΔW H_rest ΔWᵀ over tr W H_rest Wᵀ: rounded to nearest;
with the prefix counted; with it counted in the Hessian's diagonal only; not counted. `share` is the prefix's part of
the Hessian's trace, `channel` the part of the prefix's energy in its largest channel. What it gives up: errors do not
travel from layer to layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from torch import Tensor, nn

from intactkv import bos
from intactkv.evaluate import prefixed_windows
from intactkv.load import load_model, load_tokenizer, read_text

GROUP, DAMPING = 64, 0.01


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
    rest, first = hessians(full, linears, ids)
    found = []
    for name, linear in linears.items():
        weight, later, prefix = linear.weight.detach(), rest[name], first[name]
        share, channel = (
            float(prefix.trace() / (prefix + later).trace()),
            float(prefix.diagonal().max() / prefix.trace()),
        )
        cells = []
        for symmetric in (True, False):
            grid = QuantizationArgs(
                num_bits=bits, symmetric=symmetric, group_size=GROUP, strategy="group", actorder="static"
            )
            cells += [
                lost(nearest(weight, grid), weight, later),
                lost(gptq(weight, later + prefix, grid), weight, later),
                lost(gptq(weight, later + torch.diag(prefix.diagonal()), grid), weight, later),
                lost(gptq(weight, later, grid), weight, later),
            ]
        found.append((name, share, channel, *cells))
    print("| layer | share | channel | symmetric: nearest | counted | diagonal only | not counted "
          "| asymmetric: nearest | counted | diagonal only | not counted |\n|---|" + "---:|" * 10)  # fmt: skip
    found.sort(key=lambda row: row[6] - row[4])
    for name, *figures in found[:rows]:
        print(f"| {name} | {' | '.join(f'{figure:.4f}' for figure in figures)} |")
    gains = sorted(row[4] - row[6] for row in found)
    print(f"\n{len(found)} layers; of all the error that counting adds, the two worst layers have "
          f"{100 * sum(gains[-2:]) / sum(max(gain, 0) for gain in gains):.0f} %")  # fmt: skip


@torch.inference_mode()
def hessians(
    full: nn.Module, linears: dict[str, nn.Linear], ids: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Σ x xᵀ of every layer's inputs in float64, over later tokens and over the first one."""
    rest: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        later, prefix = x[:, 1:].flatten(0, 1).double(), x[:, 0].double()
        rest[name] = rest.get(name, torch.zeros(())) + later.T @ later
        first[name] = first.get(name, torch.zeros(())) + prefix.T @ prefix

    hooks = [
        m.register_forward_pre_hook(lambda module, args, name=name: look(name, args[0])) for name, m in linears.items()
    ]
    for batch in ids.split(4):
        full(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return rest, first


def scales(weight: Tensor, grid: QuantizationArgs) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.reshape(len(weight), -1, GROUP)
    return groups, *calculate_qparams(groups.amin(-1), groups.amax(-1), grid)


def nearest(weight: Tensor, grid: QuantizationArgs) -> Tensor:
    groups, scale, zero_point = scales(weight, grid)
    lowest = -(2 ** (grid.num_bits - 1))
    levels = (groups / scale[..., None]).round() + zero_point[..., None]
    levels = levels.clamp(lowest, -lowest - 1) - zero_point[..., None]
    return (levels * scale[..., None]).reshape(weight.shape)


def gptq(weight: Tensor, hessian: Tensor, grid: QuantizationArgs) -> Tensor:
    _, scale, zero_point = scales(weight, grid)
    rounded, _, _ = quantize_weight(
        weights=weight[None].clone(), hessians=hessian[None].float(), scale=scale[None], zero_point=zero_point[None],
        global_scale=None, quant_args=grid, percdamp=DAMPING,
    )  # fmt: skip
    return rounded[0]


def lost(rounded: Tensor, weight: Tensor, later: Tensor) -> float:
    """The share of later tokens' output energy that rounding changes."""
    error = (rounded - weight).double()
    return float(((error @ later) * error).sum() / ((weight.double() @ later) * weight.double()).sum())


if __name__ == "__main__":
    typer.run(main)
