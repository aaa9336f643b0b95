"""What a checkpoint made for its prefix will gain, told from the full model alone, before anything is quantized.

Counting the prefix hurts GPTQ in layers whose Hessian is mostly the prefix's: it rounds the prefix's largest channel
first and makes up for it in the others, which later tokens pay for. Those layers are few, and llm-compressor's own step
on them alone, with the prefix counted and left out, tells what they would pay (docs/prefix-aware.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv.decoder import blocks, held, input_device
from intactkv.error import IntactKVError
from intactkv.evaluating import prefixed_windows
from intactkv.positions import check_positions, check_tokens, most_positions

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

LAYERS = 4  # those in which the prefix has the largest share of the Hessian; the others were seen to pay nothing
GROUP_SIZE, DAMPING = 128, 0.01
WINDOW, WINDOWS, SHARE_WINDOWS = 512, 8, 2  # as calibrations have them: a prefix's share depends on their length


@dataclass(frozen=True)
class Counting:
    """What counting the prefix does to one layer; `share` of the trace of its Hessian is the prefix's.

    `counted` and `left_out` are the errors that later tokens read from GPTQ's weights, over their output's energy.
    """

    layer: str
    share: float
    counted: float
    left_out: float


@dataclass(frozen=True)
class Forecast:
    """Of GPTQ with these settings: `layers` by falling cost. `times` is by how much counting raises their error."""

    bits: int
    symmetric: bool
    layers: tuple[Counting, ...]

    @property
    def times(self) -> float:
        return sum(layer.counted for layer in self.layers) / sum(layer.left_out for layer in self.layers)


def forecast(
    full: PreTrainedModel,
    tokens: Sequence[int],
    prefix: Sequence[int],
    *,
    bits: Sequence[int] = (3, 4),
    symmetric: Sequence[bool] = (True,),
    group_size: int = GROUP_SIZE,
) -> list[Forecast]:
    """One forecast for each number of bits and each kind of grid, from `tokens` of a calibration's text without [BOS].

    Costs two passes over at most 8 windows of 512 tokens, or of as many as the model has positions, and a few GPTQ
    steps on four layers. Needs llm-compressor. Raises IntactKVError where no layer is a torch.nn.Linear that sees
    tokens in their places, where text is missing, and for a prefix that leaves no position for it.
    """
    from intactkv.quantizing.quiet import quiet

    if not tokens:
        raise IntactKVError("a forecast needs some text of the kind that is calibrated on; give tokens")
    linears = dict(_linears(full))
    if not linears:
        raise IntactKVError(f"{type(full).__name__} has no torch.nn.Linear in its blocks; there is nothing to forecast")
    check_positions(full.config, len(prefix) + 1, f"a prefix of {len(prefix)} tokens and one later token")
    window = min(WINDOW, len(prefix) + len(tokens), most_positions(full.config) or WINDOW)
    ids = prefixed_windows(tokens, prefix=prefix, window=window).ids[:WINDOWS]
    check_tokens(full.config, ids, "a window")
    shares = prefix_shares(full, linears, ids[:SHARE_WINDOWS], len(prefix))
    if not shares:
        raise IntactKVError(f"no torch.nn.Linear of {type(full).__name__} sees tokens in their places to forecast from")
    most = {name: linears[name] for name in sorted(shares, key=shares.__getitem__)[-LAYERS:]}
    seen = hessians(full, most, ids, len(prefix))
    found = []
    with quiet():
        for kind in symmetric:
            for number in bits:
                grid: dict[str, Any] = {"bits": number, "group_size": group_size, "symmetric": kind}
                layers = [_counting(name, shares[name], most[name], *seen[name], grid) for name in most]
                layers.sort(key=lambda layer: layer.left_out - layer.counted)
                found.append(Forecast(number, kind, tuple(layers)))
    return found


def prefix_shares(
    full: PreTrainedModel, linears: Mapping[str, nn.Linear], ids: Int[Tensor, "window token"], size: int
) -> dict[str, float]:
    """The prefix's share of each layer's Hessian's trace, that is of its inputs' energy."""
    energy = {name: torch.zeros(2, dtype=torch.float64) for name in linears}

    def look(name: str, x: Float[Tensor, "batch token width"]) -> None:
        squared = x.float().square().sum((0, 2)).double().cpu()
        energy[name] += torch.stack([squared[:size].sum(), squared[size:].sum()])

    _shown(full, linears, ids, look)
    return {name: float(ours / (ours + later)) for name, (ours, later) in energy.items() if float(ours + later) > 0}


def hessians(
    full: PreTrainedModel, linears: Mapping[str, nn.Linear], ids: Int[Tensor, "window token"], size: int
) -> dict[str, tuple[Float[Tensor, "width width"], Float[Tensor, "width width"]]]:
    """Σ x xᵀ of each layer's inputs x, over the first `size` tokens and over the later ones; float32, on the CPU."""
    found = {name: [torch.zeros(module.in_features, module.in_features) for _ in range(2)]
             for name, module in linears.items()}  # fmt: skip

    def look(name: str, x: Float[Tensor, "batch token width"]) -> None:
        for total, part in zip(found[name], (x[:, :size], x[:, size:]), strict=True):
            rows = part.flatten(0, 1).float()
            total += (rows.T @ rows).cpu()

    _shown(full, linears, ids, look)
    return {name: (ours, later) for name, (ours, later) in found.items()}


def gptq_step(
    weight: Float[Tensor, "out width"],
    hessian: Float[Tensor, "width width"],
    *,
    bits: int,
    group_size: int = GROUP_SIZE,
    symmetric: bool = True,
) -> Float[Tensor, "out width"]:
    """`weight` as llm-compressor's GPTQ rounds it under this Hessian, on minmax grids, in groups that divide it."""
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args, scale, zero_point = minmax_grid(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    step: Any = quantize_weight(
        weights=weight[None].clone(), hessians=hessian[None].clone(), scale=scale[None], zero_point=zero_point[None],
        global_scale=None, quant_args=args, percdamp=DAMPING,
    )  # fmt: skip
    return step[0][0]


def minmax_grid(
    weight: Float[Tensor, "out width"], *, bits: int, group_size: int, symmetric: bool
) -> tuple[QuantizationArgs, Float[Tensor, "out group"], Tensor]:
    """compressed-tensors' settings, scales and zero points, in the largest groups up to `group_size` that divide."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    size = next(n for n in range(min(group_size, weight.shape[1]), 0, -1) if weight.shape[1] % n == 0)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, group_size=size, strategy="group", actorder="static")
    groups = weight.reshape(len(weight), -1, size)
    return args, *calculate_qparams(groups.amin(-1), groups.amax(-1), args)


def read_error(
    rounded: Float[Tensor, "out width"], weight: Float[Tensor, "out width"], later: Float[Tensor, "width width"]
) -> float:
    """tr ΔW H ΔWᵀ over tr W H Wᵀ, H of later tokens: the share of their output's energy that rounding changes."""
    error, before, hessian = (rounded - weight).double(), weight.double(), later.double()
    return float(((error @ hessian) * error).sum() / ((before @ hessian) * before).sum())


def _counting(
    name: str, share: float, linear: nn.Linear, ours: Tensor, later: Tensor, grid: dict[str, Any]
) -> Counting:
    weight = held(linear).float().cpu()
    counted, left_out = (
        read_error(gptq_step(weight, hessian, **grid), weight, later) for hessian in (ours + later, later)
    )
    return Counting(name, share, counted, left_out)


def _linears(full: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The Linear layers of the blocks, by their names in the model."""
    inside = {id(module) for block in blocks(full) for module in block.modules()}
    for name, module in full.named_modules():
        if type(module) is nn.Linear and id(module) in inside:
            yield name, module


@torch.inference_mode()
def _shown(
    full: PreTrainedModel,
    linears: Mapping[str, nn.Linear],
    ids: Int[Tensor, "window token"],
    look: Callable[[str, Tensor], None],
) -> None:
    """Run `full` over the windows and let `look` see every layer's input `(batch, token, width)`.

    Experts, which are handed tokens without their places, are passed over.
    """
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0]) if args[0].ndim == 3 else None)
        for name, module in linears.items()
    ]
    try:
        for window in ids.split(1):
            full.base_model(input_ids=window.to(input_device(full)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
