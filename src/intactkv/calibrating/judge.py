"""KL to the full model on held-out samples, and whether a calibrated artifact may replace the one before."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.attaching.handle import attach
from intactkv.calibrating.outputs import batched, outputs
from intactkv.calibrating.samples import Samples
from intactkv.calibrating.targets import Targets
from intactkv.error import IntactKVError
from intactkv.evaluating.metrics import (
    Interval,
    TokenMetrics,
    difference_statistic,
    gap_closed_statistic,
    paired_bootstrap,
    token_metrics,
)
from intactkv.processes import share, sum_


@torch.no_grad()
def held_out_metrics(
    model: PreTrainedModel, kv: IntactKV | None, targets: Targets, samples: Samples, prefix: Tensor
) -> TokenMetrics:
    """Token metrics `(sample, token)` of `model` with `kv` attached, or its own prefix, at the learned tokens.

    Raises `IntactKVError` where a KL is not finite.
    """
    width = max(len(row.ids) for row in samples.rows)
    measured = torch.zeros(4, len(samples), width, dtype=torch.float64)  # the rows of other processes stay 0
    scored = torch.zeros(len(samples), width, dtype=torch.bool)
    mine = set(share(range(len(samples))))
    for i, row in enumerate(samples.rows):
        batch = batched([row], prefix=prefix)
        at = batch.predicting[0].nonzero()[:, 0] + 1
        scored[i, at] = True
        if i not in mine:
            continue
        full = targets.of([row], blocks=False, logits=True).logits
        with attach(model, kv, check=False) if kv is not None else nullcontext():
            own = outputs(model, batch, blocks=False, logits=True).logits
        if full is None or own is None or full.shape != own.shape:
            raise IntactKVError("the two models have different vocabularies; give the full-precision form of MODEL")
        found = token_metrics(full.to(own.device), own, row.ids[at].to(own.device))
        measured[:, i, at] = torch.stack([values.double().cpu() for values in vars(found).values()])
    sum_([measured])
    kl, same, nll, delta = measured.unbind()
    if not kl.isfinite().all():
        raise IntactKVError(
            "the held-out KL is not finite: the model overflows on these samples; load it in bfloat16 or float32"
        )
    blank = ~scored
    return TokenMetrics(
        kl.masked_fill(blank, torch.nan), same.bool(), nll.masked_fill(blank, torch.nan),
        delta.masked_fill(blank, torch.nan),
    )  # fmt: skip


def verdict_of(arms: Mapping[str, TokenMetrics], *, seed: int = 0) -> dict[str, Any]:
    """What the judging samples say of the arms "own", "before" and "after" calibration, as JSON data.

    `adopted` is whether the KL is lower after than before beyond its paired 95 % interval. Intervals are over samples.
    """

    def between(statistic: Any, one: str, other: str, name: str) -> Interval:
        generator = torch.Generator().manual_seed(seed)
        return paired_bootstrap(statistic, arms[one], arms[other], generator=generator)[name]

    lower = between(difference_statistic, "before", "after", "kl_mean")
    return {
        "samples": len(arms["own"].kl),
        "tokens": int(arms["own"].scored.sum()),
        "kl": {name: arm.kl.nanmean().item() for name, arm in arms.items()},
        "kl_removed": vars(lower),
        "gap_closed": {n: vars(between(gap_closed_statistic, "own", n, "gap_closed")) for n in ("before", "after")},
        "adopted": bool(lower.low > 0),
    }
