"""What the full model gives for each sample: computed when it is asked for, or read back from disk (`spool`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact.digest import weights_digest
from intactkv.calibrating.outputs import Outputs, batched, outputs
from intactkv.calibrating.samples import Sample


class Targets(Protocol):
    """Where the full model's outputs for samples come from."""

    def of(self, samples: Sequence[Sample], *, blocks: bool, logits: bool) -> Outputs:
        """Every block's output at learned tokens, the logits at predicting ones, as far as asked for."""

    @property
    def weights(self) -> str:
        """The digest of the full model's weights."""


@dataclass(frozen=True, eq=False)
class Live:
    """The full model itself: every batch's targets are computed when they are asked for."""

    full: PreTrainedModel
    prefix: Int[Tensor, "prefix"]

    @torch.no_grad()
    def of(self, samples: Sequence[Sample], *, blocks: bool, logits: bool) -> Outputs:
        """The full model's outputs for `samples`, with its own prefix."""
        return outputs(self.full, batched(samples, prefix=self.prefix), blocks=blocks, logits=logits)

    @property
    def weights(self) -> str:
        """The digest of the full model's weights."""
        return weights_digest(self.full)
