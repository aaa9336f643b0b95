"""What calibration minimises: the paper's block-output error, KL to the full model, or both (pure maths)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from intactkv.calibrating.outputs import Outputs
from intactkv.error import IntactKVError


@dataclass(frozen=True)
class Objective:
    """Weights of the two losses; the paper's is `Objective(blocks=1, kl=0)`.

    `blocks` weighs ½ · the mean squared error of every block's output, averaged over blocks, learned tokens and
    hidden dimensions. `kl` weighs the mean KL(full ‖ model) in nats over the learned tokens.

    Source: Liu et al., "IntactKV", arXiv 2403.01241, section 3.3; the KL is ours.
    """

    blocks: float = 1.0
    kl: float = 0.0

    def __post_init__(self) -> None:
        if self.blocks < 0 or self.kl < 0 or self.blocks + self.kl == 0:
            raise IntactKVError(
                f"the objective weighs blocks by {self.blocks} and KL by {self.kl}; give one above 0 and none below"
            )

    def sums(self, full: Outputs, own: Outputs) -> tuple[Tensor | None, Tensor | None]:
        """Both losses summed over tokens, None for one of weight 0: the caller knows by how many to divide."""
        blocks = block_loss(full.blocks, own.blocks) if self.blocks else None
        return blocks, kl_loss(full.logits, own.logits) if self.kl else None


def block_loss(
    full: Sequence[Float[Tensor, "token hidden"]], own: Sequence[Float[Tensor, "token hidden"]]
) -> Float[Tensor, ""]:
    """½ · squared error, mean over blocks and dimensions, summed over tokens, in float32 or float64."""
    terms = []
    for target, output in zip(full, own, strict=True):
        precise = torch.promote_types(output.dtype, torch.float32)
        error = output.to(precise) - target.to(output.device, precise)
        terms.append(0.5 * error.square().mean(dim=-1).sum().to(own[0].device))
    return torch.stack(terms).mean()


def kl_loss(full: Tensor | None, own: Tensor | None) -> Float[Tensor, ""]:
    """KL(full ‖ own) in nats, summed over tokens, in float32 or float64."""
    if full is None or own is None or full.shape != own.shape:
        shapes = [None if x is None else tuple(x.shape) for x in (full, own)]
        raise IntactKVError(f"logits have the shapes {shapes}; calibrate with a full model of the same vocabulary")
    precise = torch.promote_types(own.dtype, torch.float32)
    target = full.to(own.device).log_softmax(-1, dtype=precise)
    log_p = own.log_softmax(-1, dtype=precise)
    return torch.nn.functional.kl_div(log_p, target, reduction="sum", log_target=True)
