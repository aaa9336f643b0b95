"""Calibration against the paper's scheme, which holds all activations: memory beyond the models, and speed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from interleaved import speed_ratios, spread

WAYS = ("held", "default", "spooled", "least memory")
STEPS = 320  # of 8 samples: as many passes as the paper's 160 steps of 16, 20 over 128 samples
TITLE = "Calibration of the embedded model against the paper's scheme (all activations held), one thread"

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")


def test_memory_and_speed(benchmark: Any, report: Callable[..., None], request: pytest.FixtureRequest) -> None:
    samples, window, steps, rounds = (8, 32, 1, 2) if request.config.getoption("--quick") else (128, 256, 4, 3)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    script = str(Path(__file__).with_name("paper_calibration.py"))

    def one_round() -> None:
        for way in WAYS:
            command = [sys.executable, script, way, *map(str, (samples, window, steps))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(one_round, rounds=rounds)
    most = median(one["mib"] for one in found["held"])
    for way in WAYS:
        mib = median(one["mib"] for one in found[way])
        step = spread(_ratios(found, way, lambda one: one["step"]), digits=2)
        run = spread(_ratios(found, way, lambda one: one["first"] + STEPS * one["step"]), digits=2)
        figures = {"samples": samples, "window": window, "MiB_beyond_the_models": f"{mib:.0f}"}
        speeds = {f"{name}, {key}": value for name, of in (("step", step), ("run", run)) for key, value in of.items()}
        report(TITLE, way=way, **figures, memory_ratio=f"{mib / most:.2f}", **speeds)


def _ratios(found: dict[str, Any], way: str, seconds: Callable[[Any], float]) -> list[float]:
    return speed_ratios([seconds(one) for one in found[way]], [seconds(one) for one in found["held"]])
