"""Regressions on the planted model, where the effect of an intact KV is known beforehand."""

from __future__ import annotations

import pytest
import torch
from models import prompts, rounded
from planted import BOS, damaged, planted
from transformers import PreTrainedModel

from intactkv import IntactKV, attach, capture
from intactkv.evaluating import Windows, decide, three_arms, verdict
from intactkv.pivots import first_token_pivots, measure, without_pivot


@pytest.fixture(scope="module")
def full() -> PreTrainedModel:
    return planted()


@pytest.fixture(scope="module")
def kv(full: PreTrainedModel) -> IntactKV:
    return capture(full, [BOS])


def windows() -> Windows:
    """Twenty random windows of 24 tokens behind [BOS]."""
    ids = prompts(rows=20, length=24)
    ids[:, 1:3] = prompts(rows=20, length=24, seed=2)[:, 5:7]
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, :2] = False
    return Windows(ids, scored)


def test_the_pivot_is_there(full: PreTrainedModel) -> None:
    pivots = first_token_pivots(measure(full, windows().ids))
    assert all(p.mass > 0.8 and p.ratio > 50 for p in pivots)


def test_damage_that_only_bos_reads_is_undone_wholly(full: PreTrainedModel, kv: IntactKV) -> None:
    found = three_arms(full, damaged(full, "bos"), kv, windows())
    own, intact = (row["kl_mean"] for row in found.table() if row["arm"] in ("own", "intact"))
    assert own > 0.1
    assert intact < 1e-6
    gap = found.gap_closed(own="own", intact="intact")
    assert gap.low > 0.9999
    assert decide(gap, own_kl=own) == "worth it"
    assert verdict(gap).startswith("worth it: the intact prefix closes +100.0 %")


def test_damage_to_the_output_head_is_not_undone_at_all(full: PreTrainedModel, kv: IntactKV) -> None:
    found = three_arms(full, damaged(full, "head"), kv, windows())
    own, intact = (row["kl_mean"] for row in found.table() if row["arm"] in ("own", "intact"))
    assert own > 1e-3
    assert intact == pytest.approx(own, rel=1e-4)
    assert abs(found.gap_closed(own="own", intact="intact").value) < 1e-4


def test_no_damage_leaves_nothing_to_close(full: PreTrainedModel, kv: IntactKV) -> None:
    found = three_arms(full, full, kv, windows())
    assert all(row["kl_mean"] < 1e-6 for row in found.table())
    gap, own = found.gap_closed(own="own", intact="intact"), found.table()[1]["kl_mean"]
    assert decide(gap, own_kl=own) == "no effect"
    assert "nothing to close" in verdict(gap, own_kl=own)


def test_rounding_is_mostly_damage_to_the_pivot(full: PreTrainedModel, kv: IntactKV) -> None:
    found = three_arms(full, rounded(full, bits=3), kv, windows())
    assert found.gap_closed(own="own", intact="intact").low > 0


def test_the_artifact_of_another_seeds_weights_does_harm_and_is_said_to(full: PreTrainedModel, kv: IntactKV) -> None:
    loud = IntactKV(kv.ids, {i: (k, 20 * v + 1) for i, (k, v) in kv.layers.items()}, kv.logits, kv.fingerprint)
    found = three_arms(full, rounded(full, bits=4), loud, windows())
    gap = found.gap_closed(own="own", intact="intact")
    assert gap.high < 0
    assert decide(gap) == "harmful"
    assert "makes it worse" in verdict(gap)


@torch.no_grad()
def test_bos_is_the_only_token_whose_keys_and_values_the_damage_changes(full: PreTrainedModel, kv: IntactKV) -> None:
    model = damaged(full, "bos")
    ids = windows().ids
    with attach(model, kv, check=False):  # the damage is 80 %
        attached = model(ids, output_hidden_states=True).hidden_states
    want = full(ids, output_hidden_states=True).hidden_states
    for ours, theirs in zip(attached, want, strict=True):
        assert torch.allclose(ours[:, 1:], theirs[:, 1:], atol=1e-4)


def test_a_prefix_without_the_pivot_is_said_to_do_nothing(full: PreTrainedModel) -> None:
    """[BOS] behind another first token is the pivot all the same; keeping that other token intact is of no use."""
    ids = windows().ids
    displaced = torch.cat([ids[:, 5:6], ids], 1)
    said = without_pivot(full, displaced, size=1)
    assert said is not None
    assert f"token {BOS} at position 1 does" in said
    assert without_pivot(full, displaced, size=2) is None
    assert without_pivot(full, ids, size=1) is None
    assert without_pivot(full, ids[:, 1:], size=1) is None, "where nothing is a pivot there is nothing to miss"
