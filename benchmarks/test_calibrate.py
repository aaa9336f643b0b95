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

WAYS = ("held", "live", "spooled", "spooled, blocks kept")
TITLE = "Calibration of the embedded model against the paper's scheme (all activations held), one thread"

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")


def test_memory_and_speed(benchmark: Any, report: Callable[..., None], request: pytest.FixtureRequest) -> None:
    samples, window, steps, rounds = (4, 32, 1, 2) if request.config.getoption("--quick") else (128, 256, 3, 3)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    script = str(Path(__file__).with_name("paper_calibration.py"))

    def one_round() -> None:
        for way in WAYS:
            command = [sys.executable, script, way, *map(str, (samples, window, steps))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(one_round, rounds=rounds)
    held = [one["seconds"] for one in found["held"]]
    most = median(one["mib"] for one in found["held"])
    for way in WAYS:
        mib = median(one["mib"] for one in found[way])
        speed = spread(speed_ratios([one["seconds"] for one in found[way]], held), digits=2)
        figures = {"samples": samples, "window": window, "MiB_beyond_the_models": f"{mib:.0f}"}
        report(TITLE, way=way, **figures, memory_ratio=f"{mib / most:.2f}", **speed)
