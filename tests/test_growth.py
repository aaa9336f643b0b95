"""Many short generations, each with an attachment of its own: nothing is kept."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import by_name, make_pair, prompts

from intactkv import IntactKV, attach

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def generations(model: Any, kv: IntactKV, count: int) -> None:
    rows = [prompts(rows=1, length=6 + n, seed=n) for n in range(4)]
    for i in range(count):
        with attach(model, kv, check=i % 50 == 0):
            model.generate(rows[i % 4], attention_mask=torch.ones_like(rows[i % 4]), max_new_tokens=2, do_sample=False)


def grown(count: int, rounds: int) -> list[tuple[int, int, int]]:
    """After each round: bytes in memory, objects that Python tracks, and those of them that are tensors."""
    _, model, kv = make_pair(by_name("llama-gqa"))
    generations(model, kv, 50)
    found = []
    for _ in range(rounds):
        generations(model, kv, count)
        gc.collect()
        objects = gc.get_objects()
        found.append((resident(), len(objects), sum(type(each) is torch.Tensor for each in objects)))
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_hundred_leave_no_object() -> None:
    found = grown(50, 3)
    assert found[1][2] == found[2][2]
    assert found[2][1] - found[1][1] < 50, found  # fewer than one a generation


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_ten_thousand_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    found = grown(1000, 10)
    with capsys.disabled():
        print(f"{time.monotonic() - start:.0f} s", *found, sep="\n")
    assert len({tensors for _, _, tensors in found}) == 1
    assert found[-1][1] - found[0][1] < 1000
    assert found[-1][0] - found[4][0] < 5000 * 200  # of the last 5,000, less than 200 bytes each
