"""Percentile intervals by resampling windows, lm-eval's items or MT-Bench's questions: the one bootstrap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan

import torch
from jaxtyping import Int
from torch import Tensor

from intactkv.error import IntactKVError


@dataclass(frozen=True)
class Interval:
    """A measured value and the ends of its 95 % confidence interval, in the value's unit."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Int[Tensor, "resample item"]], dict[str, Tensor]],
    items: int,
    *,
    generator: torch.Generator,
    resamples: int = 1000,
) -> dict[str, Interval]:
    """Named figures of `items` independent items, and their 95 % percentile intervals over resampled items.

    `statistic` maps how often each item was drawn, integers `(resample, item)`, to named float64 values `(resample)`.
    A paired comparison gives every arm the same counts: what the arms share cancels. A resample in which a figure is
    NaN says nothing of it. One item alone says nothing about others: its ends are NaN. `generator` is a CPU generator.

    Raises `IntactKVError` where `resamples` is below 1.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979.
    """
    if resamples < 1:
        raise IntactKVError(f"resamples={resamples} is too few; use 1 or more, 1000 for a 95 % interval")
    point = statistic(torch.ones(1, items, dtype=torch.int64))
    if items == 1:
        return {name: Interval(value.item(), nan, nan) for name, value in point.items()}
    draws = torch.randint(items, (resamples, items), generator=generator)
    counts = torch.zeros_like(draws).scatter_add_(1, draws, torch.ones_like(draws))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {
        name: Interval(point[name].item(), *values.nanquantile(ends).tolist())
        for name, values in statistic(counts).items()
    }
