"""One three-arm pass over the full model, own and intact, against three lm-eval perplexity runs on the same tokens."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
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
