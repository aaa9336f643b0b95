"""One step: the gradient of the objective over a few samples, left on the keys and values, and AdamW.

One micro-batch of activations is alive at a time. The order of samples follows from the seed and the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.attaching.handle import attach
from intactkv.calibrating.backward import checkpointing
from intactkv.calibrating.objective import Objective
from intactkv.calibrating.outputs import batched, outputs
from intactkv.calibrating.samples import Sample
from intactkv.calibrating.state import State
from intactkv.calibrating.targets import Targets
from intactkv.error import IntactKVError
from intactkv.processes import grouped, share, sum_


@dataclass(frozen=True)
class CalibrationConfig:
    """How to calibrate. The defaults for the paper's objective are the paper's, as far as it has them.

    `learning_rate` None is the paper's 2e-4 for its objective, and 1e-2 where KL is learned from. With `decay` it falls
    to 0 along half a cosine; None does so where KL is learned from.

    `batch_size` samples make a step, `micro_batch` of them are in a forward; None is one on a CPU, elsewhere as many
    as `activation_bytes` has room for, so that a GPU has enough to do. Only `parts` ("key", "value") of `layers` (None:
    all) are trained. Held-out KL is read every `check_every` steps; after `patience` readings without a better one
    training stops.

    `checkpoint_blocks` computes every block twice to save memory; None does so where a micro-batch's graph would take
    more than `activation_bytes` (None: 2 GiB, or half of what is free on an NVIDIA card as training starts). A full
    model on a CPU computes each target once: the next time it is read from a temporary file of at most `keep_bytes` (0:
    computed at every step; elsewhere it always is).
    """

    objective: Objective = field(default_factory=Objective)
    learning_rate: float | None = None
    decay: bool | None = None
    steps: int = 160
    batch_size: int = 16
    micro_batch: int | None = None
    parts: tuple[str, ...] = ("key", "value")
    layers: tuple[int, ...] | None = None
    clip: float = 1.0
    check_every: int = 20
    patience: int = 4
    checkpoint_blocks: bool | None = None
    activation_bytes: int | None = None
    keep_bytes: int = 32 * 2**30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "check_every", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise IntactKVError(f"{name}={getattr(self, name)} is too few; use 1 or more")
        if self.batch_size > 2**16 or not 0 <= self.seed < 2**32:
            raise IntactKVError(
                f"batch_size={self.batch_size}, seed={self.seed} cannot be; use up to 65536 and a seed below 2^32"
            )
        for name in ("activation_bytes", "keep_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise IntactKVError(f"{name}={getattr(self, name)} is below 0; give a number of bytes, or 0")
        for name, value in (("learning_rate", self.learning_rate), ("clip", self.clip)):
            if value is not None and not 0 < value < math.inf:
                raise IntactKVError(f"{name}={value} must be a finite number above 0")
        if not self.parts or set(self.parts) - {"key", "value"}:
            raise IntactKVError(f'parts={self.parts} must name "key", "value" or both')

    def rate(self, step: int) -> float:
        """The learning rate of the step after `step` others."""
        papers = self.objective.kl == 0
        rate = self.learning_rate or (2e-4 if papers else 1e-2)
        decays = not papers if self.decay is None else self.decay
        return rate * 0.5 * (1 + math.cos(math.pi * step / self.steps)) if decays else rate


def with_tensors(kv: IntactKV, tensors: dict[str, Tensor]) -> IntactKV:
    """`kv` with some tensors replaced by name."""
    layers = {
        i: (tensors.get(f"layers.{i}.key", key), tensors.get(f"layers.{i}.value", value))
        for i, (key, value) in kv.layers.items()
    }
    return replace(kv, layers=layers)


def order(count: int, step: int, config: CalibrationConfig) -> list[int]:
    """The samples of a step: the next `batch_size` of one shuffle after the other, each drawn from seed and number."""
    found = []
    for place in range(step * config.batch_size, (step + 1) * config.batch_size):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + place // count)
        found.append(int(torch.randperm(count, generator=generator)[place % count]))
    return found


def step_(
    state: State, kv: IntactKV, model: PreTrainedModel, targets: Targets, rows: Sequence[Sample],
    config: CalibrationConfig,
) -> float:  # fmt: skip
    """One step of AdamW on `rows`; the loss before it."""
    loss = gradients_(state.tensors, kv, model, targets, rows, config)
    norm = torch.nn.utils.clip_grad_norm_(state.tensors.values(), config.clip)
    if not (math.isfinite(loss) and math.isfinite(norm.item())):
        raise IntactKVError(
            f"the loss of step {state.step + 1} is {loss} and its gradient's norm {norm.item()}; a checkpoint, if one "
            "is kept, holds the last good step: use a smaller learning rate, or load the model in bfloat16 or float32"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = config.rate(state.step)
    state.optimizer.step()
    return loss


def gradients_(
    tensors: dict[str, Tensor], kv: IntactKV, model: PreTrainedModel, targets: Targets, rows: Sequence[Sample],
    config: CalibrationConfig,
) -> float:  # fmt: skip
    """Leave the gradient of the loss over `rows`, summed over all processes, on the tensors; the loss."""
    prefix, goal = kv.ids.cpu(), config.objective
    size = config.micro_batch or 1
    batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    whole = batched(rows, prefix=prefix)
    weights = (goal.blocks / max(1, int(whole.learned.sum())), goal.kl / max(1, int(whole.predicting.sum())))
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors.values():
        tensor.grad = None
    for part in share(batches):
        total += backward_(with_tensors(kv, tensors), model, targets, part, config, weights)
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors.values()]
    if grouped():
        sum_(gradients)
        sum_([total])
        for tensor, gradient in zip(tensors.values(), gradients, strict=True):
            tensor.grad = gradient
    return total.item()


def backward_(
    kv: IntactKV, model: PreTrainedModel, targets: Targets, rows: list[Sample], config: CalibrationConfig,
    weights: tuple[float, float],
) -> float:  # fmt: skip
    """Forward and backward of one micro-batch, by this process alone; its part of the loss.

    `weights` are what a token's block error and its KL count in it.
    """
    batch, goal = batched(rows, prefix=kv.ids.cpu()), config.objective
    wanted: dict[str, Any] = {"blocks": goal.blocks > 0, "logits": goal.kl > 0}
    full = targets.of(rows, **wanted)
    with checkpointing(model, on=bool(config.checkpoint_blocks)), attach(model, kv, check=False):
        own = outputs(model, batch, **wanted)
        parts = zip(weights, goal.sums(full, own), strict=True)
        loss = torch.stack([weight * part for weight, part in parts if part is not None]).sum()
        loss.backward()
    return loss.item()
