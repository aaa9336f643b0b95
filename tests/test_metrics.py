"""Laws of the metrics and of the paired bootstrap: pure maths, in float64 where it matters."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from intactkv.error import IntactKVError
from intactkv.evaluating import (
    TokenMetrics,
    difference_statistic,
    full_metrics,
    gap_closed_statistic,
    metrics,
    paired_bootstrap,
    summary,
    summary_statistic,
    token_metrics,
)

VOCAB = 29


def logits_and_labels(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    full = 3 * torch.randn(*shape, VOCAB, generator=generator, dtype=torch.float64)
    model = full + torch.randn(*shape, VOCAB, generator=generator, dtype=torch.float64)
    return full.to(dtype), model.to(dtype), torch.randint(VOCAB, shape, generator=generator)


def random_arm(windows: int = 20, length: int = 15, *, seed: int = 0, ragged: bool = True) -> TokenMetrics:
    """An arm as `evaluate` leaves it: NaN and False where unscored, here differently many in each window."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(3, windows, length, generator=generator, dtype=torch.float64)
    first = 2 + torch.arange(windows)[:, None] % 5 if ragged else torch.full((windows, 1), 2)
    scored = torch.arange(length) >= first
    kl, nll, delta_p = values.masked_fill(~scored, torch.nan)
    return TokenMetrics(kl=kl, same_top1=(values[0] < 0.9) & scored, nll=nll, delta_p=delta_p - 0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_is_at_no_distance_from_itself(dtype: torch.dtype) -> None:
    full, _, labels = logits_and_labels(4, 7, dtype=dtype)
    found = token_metrics(full, full.clone(), labels)
    assert (found.kl == 0).all()
    assert found.same_top1.all()
    assert (found.delta_p == 0).all()
    torch.testing.assert_close(vars(found), vars(full_metrics(full, labels)), rtol=0, atol=0)


@given(seed=st.integers(0, 2**32), noise=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 30.0]))
def test_kl_is_never_negative(seed: int, noise: float) -> None:
    full, model, labels = logits_and_labels(5, seed=seed, dtype=torch.float32)
    assert (token_metrics(full, full + noise * (model - full), labels).kl >= 0).all()


def test_token_metrics_equal_torch_in_float64() -> None:
    full, model, labels = logits_and_labels(3, 8)
    found = token_metrics(full, model, labels)
    log_p, full_log_p = model.log_softmax(-1), full.log_softmax(-1)
    reference = kl_div(log_p, full_log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.kl, reference, rtol=1e-12, atol=1e-14)
    nll = cross_entropy(model.flatten(0, 1), labels.flatten(), reduction="none").view(3, 8)
    torch.testing.assert_close(found.nll, nll, rtol=1e-12, atol=1e-14)
    chosen = [x.exp().gather(-1, labels[..., None])[..., 0] for x in (log_p, full_log_p)]
    torch.testing.assert_close(found.delta_p, chosen[0] - chosen[1], rtol=1e-12, atol=1e-14)
    assert torch.equal(found.same_top1, full.argmax(-1) == model.argmax(-1))


def test_low_precision_logits_are_measured_in_float32() -> None:
    full, model, labels = logits_and_labels(6, dtype=torch.bfloat16)
    found = token_metrics(full, model, labels)
    reference = token_metrics(full.double(), model.double(), labels)
    assert found.kl.dtype == found.nll.dtype == torch.float32
    torch.testing.assert_close(found.kl.double(), reference.kl, rtol=1e-5, atol=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    full, model, labels = logits_and_labels(3, 11)
    whole, own = token_metrics(full, model, labels), full_metrics(full, labels)
    arm = random_arm()
    quantiles = paired_bootstrap(summary_statistic, arm, generator=generator(), resamples=20)
    monkeypatch.setattr(metrics, "WORKING_ELEMENTS", 4 * VOCAB)
    torch.testing.assert_close(vars(token_metrics(full, model, labels)), vars(whole))
    torch.testing.assert_close(vars(full_metrics(full, labels)), vars(own))
    assert paired_bootstrap(summary_statistic, arm, generator=generator(), resamples=20) == quantiles


def test_tokens_that_the_full_model_rules_out_add_nothing() -> None:
    full, model, labels = logits_and_labels(5)
    labels = labels.clamp(max=VOCAB - 2)
    full[:, -1], model[:, -1] = -torch.inf, -torch.inf
    found = token_metrics(full, model, labels)
    torch.testing.assert_close(vars(found), vars(token_metrics(full[:, :-1], model[:, :-1], labels)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smaller_id_wins_a_tie(dtype: torch.dtype) -> None:
    full, model = torch.zeros(2, 2, 4099, dtype=dtype)
    full[:, 7], model[0, 7:] = 1, 1  # row 0: all from 7 on are equal; row 1: all are equal
    assert token_metrics(full, model, torch.tensor([0, 0])).same_top1.tolist() == [True, False]


@pytest.mark.parametrize(
    ("model", "labels", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), "same vocabulary"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), "non-empty int64 labels"),
        (torch.zeros(2, 4), torch.zeros(2), "non-empty int64 labels"),
        (torch.zeros(2, 4), torch.tensor([0, 4]), "label 4 is outside the vocabulary of 4"),
        (torch.zeros(2, 4), torch.tensor([0, -1]), "label -1 is outside"),
    ],
)
def test_token_metrics_refuse(model: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(IntactKVError, match=message):
        token_metrics(torch.zeros(2, 4), model, labels)


def test_summary_is_its_definitions() -> None:
    arm = random_arm()
    kl, nll, delta_p = (x[arm.scored] for x in (arm.kl, arm.nll, arm.delta_p))
    expected = {
        "kl_mean": kl.mean(),
        "kl_median": kl.quantile(0.5),
        "kl_99": kl.quantile(0.99),
        "kl_99_9": kl.quantile(0.999),
        "same_top1_percent": 100 * arm.same_top1[arm.scored].double().mean(),
        "perplexity": nll.mean().exp(),
        "rms_delta_p_percent": 100 * delta_p.square().mean().sqrt(),
    }
    assert summary(arm) == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-12)


def test_perplexity_equals_a_loop() -> None:
    full, model, labels = logits_and_labels(40)
    total = 0.0
    for row, label in zip(model.tolist(), labels.tolist(), strict=True):
        total += math.log(sum(math.exp(x) for x in row)) - row[label]
    assert summary(token_metrics(full, model, labels))["perplexity"] == pytest.approx(math.exp(total / 40))


def test_summary_of_the_same_model() -> None:
    full, _, labels = logits_and_labels(40)
    figures = summary(token_metrics(full, full, labels))
    assert figures.pop("perplexity") > 1
    assert figures.pop("same_top1_percent") == 100
    assert set(figures.values()) == {0.0}


def test_nothing_scored_is_refused() -> None:
    nothing = random_arm(2, 3).map(lambda x: x & False if x.dtype == torch.bool else x * torch.nan)
    with pytest.raises(IntactKVError, match="no scored token"):
        summary(nothing)


def test_resampled_figures_equal_the_figures_of_the_resample() -> None:
    arm = random_arm()
    draws = torch.randint(20, (30, 20), generator=generator())
    counts = torch.stack([row.bincount(minlength=20) for row in draws])
    found = summary_statistic(arm, counts)
    for i, row in enumerate(draws):
        again = summary(arm.map(lambda values, row=row: values[row]))
        assert {name: values[i].item() for name, values in found.items()} == pytest.approx(again, rel=1e-9)


def test_identical_arms_do_not_differ() -> None:
    arm = random_arm()
    found = paired_bootstrap(difference_statistic, arm, arm.map(torch.clone), generator=generator())
    assert {(x.value, x.low, x.high) for x in found.values()} == {(0.0, 0.0, 0.0)}
    gap = paired_bootstrap(gap_closed_statistic, arm, arm, generator=generator())["gap_closed"]
    assert (gap.value, gap.low, gap.high) == (0.0, 0.0, 0.0)


def test_a_constant_shift_is_found_exactly() -> None:
    intact = random_arm()
    own = replace(intact, kl=intact.kl + 0.25)
    found = paired_bootstrap(difference_statistic, own, intact, generator=generator())
    for name in ("kl_mean", "kl_median", "kl_99", "kl_99_9"):
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx((0.25,) * 3, abs=1e-12)
    assert found["perplexity"].high == 0


def test_halving_the_kl_closes_half_the_gap() -> None:
    own = random_arm()
    gap = paired_bootstrap(gap_closed_statistic, own, replace(own, kl=own.kl / 2), generator=generator())
    assert (gap["gap_closed"].low, gap["gap_closed"].high) == pytest.approx((0.5, 0.5), abs=1e-12)


def test_the_interval_of_a_known_normal_covers() -> None:
    """Window means are normal with sd 0.1: the interval has the right width and covers about 95 % of
    times."""
    windows, covered, repeats = 60, 0, 200
    noise = generator(1)
    for seed in range(repeats):
        means = 5 + 0.1 * torch.randn(windows, 1, generator=noise, dtype=torch.float64)
        arm = replace(random_arm(windows, 15, ragged=False), kl=means.expand(-1, 15))
        arm = arm.map(lambda x: x[:, 2:])
        found = paired_bootstrap(
            lambda a, counts: {"kl": counts.double() @ a.kl.mean(dim=1) / windows},
            arm,
            generator=generator(seed),
        )["kl"]
        assert found.high - found.low == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(windows), rel=0.35)
        covered += found.low <= 5 <= found.high
    assert 0.90 <= covered / repeats <= 0.98


def test_the_seed_decides() -> None:
    arm = random_arm()
    a, b, c = (paired_bootstrap(summary_statistic, arm, generator=generator(s)) for s in (1, 1, 2))
    assert a == b
    assert a["kl_mean"] != c["kl_mean"]
    assert a["kl_mean"].value == c["kl_mean"].value == pytest.approx(summary(arm)["kl_mean"])


def test_pairing_narrows_the_interval() -> None:
    intact = random_arm()
    own = replace(intact, kl=intact.kl + 0.1 + 0.01 * random_arm(seed=1).kl)
    difference = paired_bootstrap(difference_statistic, own, intact, generator=generator())["kl_mean"]
    alone = paired_bootstrap(summary_statistic, own, generator=generator())["kl_mean"]
    assert difference.high - difference.low < 0.1 * (alone.high - alone.low)


def test_one_window_has_no_interval() -> None:
    found = paired_bootstrap(summary_statistic, random_arm(1), generator=generator())["kl_mean"]
    assert math.isfinite(found.value)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_bootstrap_refuses() -> None:
    arm = random_arm()
    with pytest.raises(IntactKVError, match="no arm"):
        paired_bootstrap(summary_statistic, generator=generator())
    with pytest.raises(IntactKVError, match="resamples=0"):
        paired_bootstrap(summary_statistic, arm, generator=generator(), resamples=0)
    with pytest.raises(IntactKVError, match="same tokens"):
        paired_bootstrap(difference_statistic, arm, random_arm(ragged=False), generator=generator())
    with pytest.raises(IntactKVError, match=r"must be \(window, length\)"):
        paired_bootstrap(summary_statistic, arm.map(torch.flatten), generator=generator())


def test_a_thousand_resamples_take_no_time() -> None:
    own, intact = random_arm(100, 257), random_arm(100, 257, seed=1)
    began = time.perf_counter()
    paired_bootstrap(difference_statistic, own, intact, generator=generator(), resamples=1000)
    assert time.perf_counter() - began < 5
