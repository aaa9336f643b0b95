"""Several ways of doing the same work, timed in turns, so that a busy moment of the machine meets all of them.

Every round runs each way once and begins with another way than the round before. Two ways are compared within a
round only; the median of those ratios over all rounds, with their quartiles, is what we report. What this gives up:
a figure for a machine that does nothing else. Seconds of different runs are not comparable, ratios are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from time import perf_counter
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture


def interleaved(
    benchmark: BenchmarkFixture,
    ways: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    for_seconds: float = 0.0,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every way in every round, after one round that does not count; kept in the benchmark's JSON.

    At least `rounds` rounds, and up to 100 if that many take no longer than `for_seconds`.
    """
    began = perf_counter()
    for way in ways.values():
        way()
    rounds = max(rounds, min(100, int(for_seconds / (perf_counter() - began))))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)

    def one_round() -> None:
        gc.collect()
        for name in order:
            began = clock()
            ways[name]()
            seconds[name].append(clock() - began)
        order.append(order.pop(0))

    benchmark.pedantic(one_round, rounds=rounds)
    benchmark.extra_info["seconds"] = seconds
    return seconds


def speed_ratios(seconds: Sequence[float], base: Sequence[float]) -> list[float]:
    """How much faster than `base` a way was in each round: 2 is twice the speed, 0.5 half of it."""
    return [b / s for s, b in zip(seconds, base, strict=True)]


def spread(values: Sequence[float], digits: int) -> dict[str, str]:
    """The median and quartiles of `values`, and over how many rounds, as cells of a table."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return {
        "median": f"{median(values):.{digits}f}",
        "quartiles": f"{low:.{digits}f} – {high:.{digits}f}",
        "rounds": str(len(values)),
    }
