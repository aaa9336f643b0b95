"""Against lm-eval: a three-arm pass against three perplexity runs, and multiple choice with logits of all positions."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from interleaved import interleaved, speed_ratios, spread

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from intactkv import capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import prefixed_windows, three_arms
from intactkv.harness.model import IntactLM
from intactkv.texts import read_text

TARGET = 1.5
BATCH = 8
CHOICES = "lm-eval's multiple choice: speed ÷ that with logits of all positions, as lm-eval itself does it"
TITLE = "Three-arm KL in one pass, against three lm-eval perplexity runs (batch 8)"


@pytest.mark.parametrize("window", [128, 512])
def test_three_arms_against_lm_eval(benchmark: Any, report: Callable[..., None], window: int, size: Any) -> None:
    full, tokenizer = load_model(MODEL, dtype=torch.float32), load_tokenizer(MODEL)
    model, kv = copy.deepcopy(full), capture(full, [full.config.bos_token_id])
    text = read_text(os.environ.get("INTACTKV_TEXT", TEXT))
    count = size.windows_tokens // window
    stream = (tokenizer(text, add_special_tokens=False, verbose=False).input_ids * 2)[: count * (window - 1)]
    windows = prefixed_windows(stream, prefix=kv.ids, window=window)
    request = [Instance("loglikelihood_rolling", {}, (tokenizer.decode(stream),), 0)]
    settings: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": BATCH, "max_length": window}
    plain = [HFLM(pretrained=one, device="cpu", **settings) for one in (full, model)]

    def lm_eval() -> None:
        for lm in plain:
            lm.loglikelihood_rolling(request, disable_tqdm=True)
        intact = IntactLM(model, kv=kv, **settings)
        intact.loglikelihood_rolling(request, disable_tqdm=True)
        intact.attachment.remove()

    def ours() -> None:
        three_arms(full, model, kv, windows, batch_size=BATCH, block_mse=False)

    seconds = interleaved(benchmark, {"ours": ours, "lm-eval": lm_eval}, rounds=size.rounds, for_seconds=size.seconds)
    cells = spread(speed_ratios(seconds["ours"], seconds["lm-eval"]), digits=2)
    tokens_per_s = {
        f"{name}_tokens_per_s": f"{windows.ids.numel() / median(times):.0f}" for name, times in seconds.items()
    }
    met = "yes" if float(cells["median"]) >= TARGET else "no"
    report(TITLE, window=window, windows=count, **tokens_per_s, **cells, target=f"≥ {TARGET}", met=met)


class AllPositions(IntactLM):
    """As lm-eval's own model does it: logits of all positions, then those of the answer."""

    _model_call = HFLM._model_call


@pytest.mark.parametrize("batch_size", [8, 32])
def test_choices_against_lm_eval(benchmark: Any, report: Callable[..., None], batch_size: int, size: Any) -> None:
    """Log-likelihoods of answers; INTACTKV_ITEMS is a file of {query, choices}, INTACTKV_MODEL another model."""
    folder = os.environ.get("INTACTKV_MODEL", MODEL)
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    request = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(choices(size.choices))]
    classes = {"ours": IntactLM, "lm-eval's": AllPositions}
    lms = {name: kind(model, tokenizer=tokenizer, batch_size=batch_size) for name, kind in classes.items()}
    found = {name: lm.loglikelihood(request, disable_tqdm=True) for name, lm in lms.items()}
    assert [greedy for _, greedy in found["ours"]] == [greedy for _, greedy in found["lm-eval's"]]
    off = max(abs(a - b) for (a, _), (b, _) in zip(*found.values(), strict=True))
    assert off < 1e-3
    ways = {name: (lambda lm=lm: lm.loglikelihood(request, disable_tqdm=True)) for name, lm in lms.items()}
    seconds = interleaved(benchmark, ways, rounds=size.rounds, for_seconds=size.seconds)
    cells = spread(speed_ratios(seconds["ours"], seconds["lm-eval's"]), digits=2)
    report(CHOICES, model=Path(folder).parent.name, requests=len(request), batch=batch_size, **cells, off=f"{off:.0e}")


def choices(count: int) -> list[tuple[str, str]]:
    """So many items' questions, each with each of its answers: of a file, or lines of the embedded text."""
    if path := os.environ.get("INTACTKV_ITEMS"):
        with open(path, encoding="utf-8") as lines:
            items = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
        return [(item["query"], f" {choice}") for item in items for choice in item["choices"]]
    lines = [line for line in read_text(TEXT).splitlines() if len(line) > 200][:count]
    return [(line[:160], line[160 : 160 + more]) for line in lines for more in (10, 20, 40)]
