"""A quantized model without a quantizer: weights rounded to nearest, as they would be after unpacking.

For a first answer when no quantized checkpoint is at hand, with nothing to install. The levels are those of
`intactkv.quantizing.RTN` with `symmetric=False`; weights stay in the model's dtype and nothing is packed.
"""

from __future__ import annotations

import copy
from math import gcd

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from intactkv.checkpoint.stream import streamed
from intactkv.decoder import blocks
from intactkv.error import IntactKVError

GROUP_SIZE = 128


def rounded_model(full: PreTrainedModel, *, bits: int, group_size: int = GROUP_SIZE) -> PreTrainedModel:
    """A copy of `full` with every matrix of its blocks rounded: norms, biases, embeddings and the head are not.

    Groups run along a matrix's input; where `group_size` does not divide that, their common divisor is used. Of
    experts kept in one tensor, groups run along the last axis. Needs memory for a second model.
    """
    if not 2 <= bits <= 8 or group_size < 1:
        raise IntactKVError(f"bits={bits}, group_size={group_size}: use 2 to 8 bits and a positive group size")
    if any(parameter.device.type == "meta" for parameter in full.parameters()):
        raise IntactKVError(
            "rounding is not simulated on a model with offloaded weights; load it whole, or give its quantized form"
        )
    model = copy.deepcopy(full)
    for parameter, turned in {id(found): (found, turned) for found, turned in _matrices(model).values()}.values():
        weight = parameter.detach().T if turned else parameter.detach()
        weight.copy_(round_to_nearest(weight, bits=bits, group_size=group_size))
    return model.eval()


def round_streamed_(model: PreTrainedModel, *, bits: int, group_size: int = GROUP_SIZE) -> None:
    """Let a streamed model round what `rounded_model` rounds, to the same numbers, each time that it is read."""
    store = streamed(model)
    if store is None:
        raise IntactKVError(f"{type(model).__name__} is not streamed; take rounded_model")
    matrices = {name: turned for name, (_, turned) in _matrices(model).items()}

    def rounded(name: str, weight: Tensor) -> Tensor:
        if name not in matrices:
            return weight
        turned = weight.T if matrices[name] else weight
        found = round_to_nearest(turned, bits=bits, group_size=group_size)
        return found.T.contiguous() if matrices[name] else found

    store.changed = rounded


def _matrices(model: PreTrainedModel) -> dict[str, tuple[nn.Parameter, bool]]:
    """What is rounded, by its names in the model, and whether its input is its first axis."""
    found: dict[str, tuple[nn.Parameter, bool]] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    for block in blocks(model):
        turned = {id(module.weight) for module in block.modules() if isinstance(module, Conv1D)}
        skipped = {id(p) for m in block.modules() if isinstance(m, nn.Conv1d) for p in m.parameters()}
        for name, parameter in block.named_parameters(prefix=paths[id(block)], remove_duplicate=False):
            if parameter.ndim >= 2 and id(parameter) not in skipped:
                found[name] = parameter, id(parameter) in turned
    return found


@torch.no_grad()
def round_to_nearest(
    weight: Float[Tensor, "*rows width"], *, bits: int, group_size: int = GROUP_SIZE
) -> Float[Tensor, "*rows width"]:
    """Each weight at the nearest of 2^bits levels from min(w, 0) to max(w, 0) of its group, one of which is 0.

    >>> round_to_nearest(torch.tensor([[0.0, 0.9, 2.1, 3.0]]), bits=2, group_size=4)
    tensor([[0., 1., 2., 3.]])
    """
    groups = weight.float().reshape(-1, gcd(weight.shape[-1], group_size))
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    zero_point = (-low / scale).round()
    levels = ((groups / scale).round() + zero_point).clamp(0, 2**bits - 1)
    return ((levels - zero_point) * scale).view(weight.shape).to(weight.dtype)
