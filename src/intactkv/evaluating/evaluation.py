"""What was measured of several arms: per token, per layer, and the figures that are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from intactkv.error import IntactKVError
from intactkv.evaluating.metrics import (
    Interval,
    TokenMetrics,
    difference_statistic,
    gap_closed_statistic,
    paired_bootstrap,
    summary,
    summary_statistic,
)
from intactkv.files import json_data

FULL = ("full", "full bare")  # the full model's own names: shown all of every window, and without the first tokens


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` measured: per token, per layer, and how long it took.

    `metrics` holds, under "full" and then under each arm's name, TokenMetrics of shape (window, length) on
    the CPU, each value at the position of the token that was *predicted*; "full bare" is the full model where arms
    skip the prefix. `block_mse` holds, by arm, float64 (layer), empty if not asked for. `pairs` are the arms
    (own, intact) that differ only in the prefix. `seconds` is the wall time of all forwards and their comparison.
    """

    metrics: Mapping[str, TokenMetrics]
    block_mse: Mapping[str, Float[Tensor, "layer"]]
    pairs: tuple[tuple[str, str], ...]
    seconds: float

    @property
    def arms(self) -> tuple[str, ...]:
        """The names of the arms, without the full model's."""
        return tuple(name for name in self.metrics if name not in FULL)

    @property
    def tokens(self) -> int:
        """Tokens in all windows, prefixes included."""
        return self.metrics["full"].kl.numel()

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the windows per second of the pass; each counts once, however many arms read it."""
        return self.tokens / self.seconds

    def times_perplexity(self, name: str) -> float:
        """The arm's perplexity over the full model's."""
        nll = [self._arm(arm).nll.double().nanmean() for arm in (name, "full")]
        return float((nll[0] - nll[1]).exp())

    def kl_by_position(self, name: str) -> Float[Tensor, "length"]:
        """Mean KL in nats over the windows at each position, float64; NaN where no window scores it."""
        return self._arm(name).kl.double().nanmean(dim=0)

    def table(self) -> list[dict[str, Any]]:
        """One row for the full model and one for each arm: its name, its scored tokens and its `summary`."""
        return [
            {"arm": name, "tokens": int(metrics.scored.sum()), **summary(metrics)}
            for name, metrics in self.metrics.items()
        ]

    def intervals(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, Interval]]:
        """Every arm's `summary` with 95 % intervals; the same windows are drawn for every arm."""
        return {
            name: paired_bootstrap(summary_statistic, metrics, generator=_generator(seed), resamples=resamples)
            for name, metrics in self.metrics.items()
        }

    def difference(self, *, own: str, intact: str, resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
        """Every figure of `summary`, arm `own` minus arm `intact`, with paired 95 % intervals."""
        pair = self._arm(own), self._arm(intact)
        return paired_bootstrap(difference_statistic, *pair, generator=_generator(seed), resamples=resamples)

    def gap_closed(self, *, own: str, intact: str, resamples: int = 1000, seed: int = 0) -> Interval:
        """The part of arm `own`'s mean KL that arm `intact` removes, with a paired 95 % interval; 1: all."""
        pair = self._arm(own), self._arm(intact)
        found = paired_bootstrap(gap_closed_statistic, *pair, generator=_generator(seed), resamples=resamples)
        return found["gap_closed"]

    def to_dict(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """All figures as plain data for JSON; what is not a finite number is None."""
        again = {"resamples": resamples, "seed": seed}
        full = self.metrics["full"]
        data = {
            "windows": len(full.kl),
            "window": full.kl.shape[1],
            "tokens": self.tokens,
            "scored_tokens": int(full.scored.sum()),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "bootstrap": again,
            "arms": {
                name: {metric: asdict(interval) for metric, interval in intervals.items()}
                for name, intervals in self.intervals(**again).items()
            },
            "pairs": [self._pair_to_dict(own, intact, again) for own, intact in self.pairs],
            "block_mse": {name: mse.tolist() for name, mse in self.block_mse.items()},
            "kl_by_position": {name: self.kl_by_position(name).tolist() for name in self.arms},
        }
        return json_data(data)

    def _pair_to_dict(self, own: str, intact: str, again: dict[str, int]) -> dict[str, Any]:
        difference = self.difference(own=own, intact=intact, **again)
        return {
            "own": own,
            "intact": intact,
            "gap_closed": asdict(self.gap_closed(own=own, intact=intact, **again)),
            "difference": {metric: asdict(interval) for metric, interval in difference.items()},
        }

    def _arm(self, name: str) -> TokenMetrics:
        if name not in self.metrics:
            raise IntactKVError(f"there is no arm {name!r}; the arms are {', '.join(self.metrics)}")
        return self.metrics[name]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
