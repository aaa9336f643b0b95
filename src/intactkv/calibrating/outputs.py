"""A batch of samples through a model: what every block and the head give at the tokens that count."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.calibrating.samples import Sample
from intactkv.decoder import input_device, recorded_outputs
from intactkv.error import IntactKVError


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples side by side, padded on the right.

    `learned` are the tokens whose hidden states count, the prefix excluded; `predicting` the positions that predict
    a learned token, the prefix excluded as well: there an attached model's logits are the artifact's.
    """

    ids: Int[Tensor, "batch token"]
    real: Bool[Tensor, "batch token"]
    learned: Bool[Tensor, "batch token"]
    predicting: Bool[Tensor, "batch token"]


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model gives for a batch: each block's output at learned tokens, the logits at predicting ones.

    Tokens of all rows one after the other. What was not asked for is empty, or None.
    """

    blocks: tuple[Float[Tensor, "token hidden"], ...] = ()
    logits: Float[Tensor, "token vocab"] | None = None


def batched(samples: Sequence[Sample], *, prefix: Int[Tensor, "prefix"]) -> Batch:
    """Samples as one batch. Padding uses an id outside the prefix, so that no mask can seem to hide it."""
    width, own = max(len(sample.ids) for sample in samples), set(prefix.tolist())
    ids = torch.full((len(samples), width), next(i for i in range(len(own) + 1) if i not in own))
    real, learned = torch.zeros(2, *ids.shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        at = (row, slice(len(sample.ids)))
        ids[at], real[at], learned[at] = sample.ids, True, sample.learned
    learned[:, : len(prefix)] = False
    predicting = learned.roll(-1, dims=1)
    predicting[:, : len(prefix)] = False
    return Batch(ids, real, learned, predicting)


def outputs(model: PreTrainedModel, batch: Batch, *, blocks: bool, logits: bool) -> Outputs:
    """One forward without cache; gradients flow where they are on.

    Raises `IntactKVError` for a model whose blocks give no `(batch, token, hidden)`.
    """
    device = input_device(model)
    arguments = {} if bool(batch.real.all()) else {"attention_mask": batch.real.long().to(device)}
    columns = batch.predicting.any(dim=0).nonzero()[:, 0]
    if not logits or len(columns) == 0:
        columns = torch.tensor([batch.ids.shape[1] - 1])
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters  # the head is dear: only what is needed
    if keeps:
        arguments["logits_to_keep"] = columns.to(device)
    recording: Any = recorded_outputs(model) if blocks else nullcontext({})
    with recording as recorded:
        given = model(input_ids=batch.ids.to(device), use_cache=False, **arguments).logits
    picked = None
    if logits:
        given = given if keeps else given[:, columns.to(given.device)]
        picked = given[batch.predicting[:, columns].to(given.device)]
    return Outputs(tuple(_at(recorded[i], batch.learned) for i in sorted(recorded)), picked)


def _at(hidden: Tensor, where: Bool[Tensor, "batch token"]) -> Float[Tensor, "token hidden"]:
    if hidden.ndim != 3 or hidden.shape[:2] != where.shape:
        raise IntactKVError(
            f"a block gives shape {tuple(hidden.shape)} for {tuple(where.shape)} tokens, so its output cannot be "
            "compared token by token; use the KL objective"
        )
    return hidden[where.to(hidden.device)]
