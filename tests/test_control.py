"""No sink, nothing to win: the control model, trained as the embedded one was but for its attention.

`control_model/` has sigmoid attention (recipes/pretrain/attention.py): nothing is normalised over the keys, so no token
must take the attention that a head has no use for. The tools must say so.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from models import rounded
from transformers import AutoModelForCausalLM, PreTrainedModel

from intactkv import bos, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import WORTH_IT, Evaluation, decide, prefixed_windows, three_arms
from intactkv.pivots import diagnose, first_token_pivots, measure
from intactkv.pivots.words import pivot_sentence

RECIPE = Path(__file__).parent.parent / "recipes" / "pretrain"
CONTROL = Path(__file__).parent / "control_model"


@pytest.fixture(scope="module")
def control() -> PreTrainedModel:
    sys.path.insert(0, str(RECIPE))
    try:
        from attention import register_attentions
    finally:
        sys.path.remove(str(RECIPE))
    register_attentions()
    return AutoModelForCausalLM.from_pretrained(CONTROL, dtype=torch.float32, attn_implementation="sigmoid").eval()


def measured(full: PreTrainedModel, folder: Path, bits: int) -> Evaluation:
    """Three arms on the embedded text, with an intact [BOS], in windows of 128."""
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer(TEXT.read_text(), add_special_tokens=False, verbose=False).input_ids
    windows = prefixed_windows(tokens[:2540], prefix=torch.tensor(bos(tokenizer)), window=128)
    kv = capture(full, bos(tokenizer))
    return three_arms(full, rounded(full, bits), kv, windows, block_mse=False)


def test_the_control_has_no_sink_and_the_embedded_model_has(control: PreTrainedModel) -> None:
    full = load_model(MODEL, dtype=torch.float32)
    ids = torch.cat([torch.zeros(4, 1, dtype=torch.int64), torch.randint(300, 8000, (4, 127))], 1)
    assert pivot_sentence(first_token_pivots(measure(full, ids)), 128).startswith("Its pivots are real")
    without = first_token_pivots(measure(control, ids))
    assert max(p.ratio for p in without) < 5
    assert max(p.best_head for p in without if p.best_head is not None) < 0.1
    diagnosis = diagnose(control, ids[:, 1:], bos=0)
    assert diagnosis.pivots == ()
    assert diagnosis.sinks == ()


@pytest.mark.parametrize("bits", [4, 3])
def test_an_intact_bos_wins_nothing_worth_having_on_the_control(control: PreTrainedModel, bits: int) -> None:
    gap = measured(control, CONTROL, bits).gap_closed(own="own", intact="intact")
    assert -WORTH_IT < gap.low < gap.high < WORTH_IT
    assert decide(gap) == "no effect"
    embedded = measured(load_model(MODEL, dtype=torch.float32), MODEL, bits).gap_closed(own="own", intact="intact")
    assert decide(embedded) == "worth it"
