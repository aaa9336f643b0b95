"""What batching brings to a three-arm evaluation: tokens per second at batch 8 over batch 1, by window length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from interleaved import interleaved, speed_ratios, spread

from intactkv import capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import prefixed_windows, three_arms
from intactkv.texts import read_text

TARGET = 1.5
BATCH = 8
TITLE = "Three-arm evaluation on the embedded model, batch 8 ÷ batch 1"


@pytest.mark.parametrize("window", [64, 128, 256, 512])
def test_three_arms(benchmark: Any, report: Callable[..., None], window: int, size: Any) -> None:
    full = load_model(MODEL, dtype=torch.float32)
    model = copy.deepcopy(full)
    stream = load_tokenizer(MODEL)(read_text(TEXT), add_special_tokens=False, verbose=False).input_ids
    prefix = torch.tensor([full.config.bos_token_id])
    count = size.windows_tokens // window
    tokens = (stream * 2)[: count * (window - 1)]  # twice, should a tokenizer make few tokens of the text
    windows = prefixed_windows(tokens, prefix=prefix, window=window)
    kv = capture(full, prefix)

    def way(batch_size: int) -> Callable[[], Any]:
        return lambda: three_arms(full, model, kv, windows, batch_size=batch_size)

    seconds = interleaved(
        benchmark, {"1": way(1), str(BATCH): way(BATCH)}, rounds=size.rounds, for_seconds=size.seconds
    )
    cells = spread(speed_ratios(seconds[str(BATCH)], seconds["1"]), digits=2)
    tokens_per_s = {f"batch_{b}_tokens_per_s": f"{windows.ids.numel() / median(seconds[b]):.0f}" for b in seconds}
    met = "yes" if float(cells["median"]) >= TARGET else "no"
    report(TITLE, window=window, windows=count, **tokens_per_s, **cells, target=f"≥ {TARGET}", met=met)
