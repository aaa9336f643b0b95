"""Sampling whose randomness belongs to the question: not to the batch, the rows beside it, the device or a restart.

Every row has a generator of its own, on the CPU, and every step adds that row's Gumbel noise to its logits over the
temperature; the largest is then a sample of their softmax (the Gumbel-max trick), so that greedy decoding samples. All
arms draw the same noise, hence they choose the same token wherever their distributions agree enough: what differs
between them is then less a matter of luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor


def row_generator(seed: int, question: int | str, turn: int) -> torch.Generator:
    """The generator of one question's turn: the same in every batch, arm and run."""
    digest = sha256(f"{seed} {question!r} {turn}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class SampleByRow(LogitsProcessor):
    """Add each row's own Gumbel noise to its logits over its temperature; temperature 0 leaves a row greedy.

    `temperatures` and `generators` have one entry for each row of the batch. Use it with `do_sample=False`.

    Source: Gumbel, "Statistical Theory of Extreme Values", 1954; Maddison et al., "A* Sampling", NeurIPS 2014.
    """

    def __init__(self, temperatures: Sequence[float], generators: Sequence[torch.Generator]) -> None:
        self.rows = [
            (i, temperature, generator)
            for i, (temperature, generator) in enumerate(zip(temperatures, generators, strict=True))
            if temperature > 0
        ]

    def __call__(self, input_ids: Int[Tensor, "row token"], scores: Float[Tensor, "row vocab"]) -> Tensor:
        if not self.rows:
            return scores
        scores = scores.float().clone()
        for i, temperature, generator in self.rows:
            exponential = torch.empty(scores.shape[1]).exponential_(generator=generator)
            scores[i] = scores[i] / temperature - exponential.log().to(scores.device)
        return scores
