"""Laws of the comparison: on a tiny random Llama and noised copies of it, against hand-written loops."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from models import PREFIX as IDS
from models import VOCAB, build, by_name, rounded
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaConfig, LlamaForCausalLM

from intactkv.artifact import IntactKV
from intactkv.attaching.handle import attach, is_attached
from intactkv.capturing.live import capture
from intactkv.error import IntactKVError
from intactkv.evaluating import Arm, Windows, evaluate, paper_windows, prefixed_windows, three_arms

PREFIX = [1, 5, 9]
LENGTH = 24


def llama(**changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).float().eval()


def noised(model: LlamaForCausalLM, noise: float, seed: int) -> LlamaForCausalLM:
    """A stand-in for a quantized model: every decoder matrix with relative noise."""
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.ndim == 2:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def full() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def model(full: LlamaForCausalLM) -> LlamaForCausalLM:
    return noised(full, 0.2, seed=1)


@pytest.fixture(scope="module")
def kv(full: LlamaForCausalLM) -> IntactKV:
    return capture(full, PREFIX)


@pytest.fixture(scope="module")
def windows() -> Windows:
    tokens = torch.randint(97, (7 * (LENGTH - len(PREFIX)) + 4,), generator=torch.Generator().manual_seed(2))
    return prefixed_windows(tokens, prefix=PREFIX, window=LENGTH)


def by_hand(full: LlamaForCausalLM, arm: Arm, windows: Windows) -> tuple[dict[str, list[float]], Tensor]:
    """Per scored token, window after window, and the mean squared error of each block: one window at a
    time."""
    found: dict[str, list[float]] = {"kl": [], "nll": [], "same_top1": [], "delta_p": []}
    squares = []
    for ids, scored in zip(windows.ids, windows.scored, strict=True):
        with torch.no_grad():
            reference = full(ids[None], output_hidden_states=True)
            with attach(arm.model, arm.kv) if arm.kv is not None else nullcontext():
                output = arm.model(ids[None], output_hidden_states=True)
        for t in scored.nonzero()[:, 0].tolist():
            p, q = (x.logits[0, t - 1].double().log_softmax(-1) for x in (reference, output))
            found["kl"].append(kl_div(q, p, log_target=True, reduction="sum").item())
            found["nll"].append(cross_entropy(output.logits[:1, t - 1].double(), ids[t : t + 1]).item())
            found["same_top1"].append(float(p.argmax() == q.argmax()))
            found["delta_p"].append((q[ids[t]].exp() - p[ids[t]].exp()).item())
            blocks = zip(reference.hidden_states[1:], output.hidden_states[1:], strict=True)
            squares.append([(a - b)[0, t - 1].double().square().mean().item() for a, b in blocks])
    return found, torch.tensor(squares, dtype=torch.float64).mean(dim=0)


def test_the_full_model_is_at_no_distance_from_itself(full: LlamaForCausalLM, windows: Windows) -> None:
    found = evaluate(full, [Arm("same", full), Arm("copy", copy.deepcopy(full))], windows)
    for row in found.table():
        assert row["kl_99_9"] < 1e-6
        assert row["same_top1_percent"] == 100
    assert found.table()[1]["perplexity"] == pytest.approx(found.table()[0]["perplexity"], rel=1e-6)
    assert all((mse < 1e-10).all() for mse in found.block_mse.values())


def test_arms_equal_a_loop_over_single_windows(
    full: LlamaForCausalLM, model: LlamaForCausalLM, kv: IntactKV, windows: Windows
) -> None:
    arms = [Arm("a", model), Arm("b", noised(full, 0.1, seed=3)), Arm("intact", model, kv)]
    found = evaluate(full, arms, windows, batch_size=3)
    assert found.arms == ("a", "b", "intact")
    for arm in arms:
        expected, mse = by_hand(full, arm, windows)
        for name, values in expected.items():
            measured = vars(found.metrics[arm.name])[name][windows.scored].double()
            torch.testing.assert_close(measured, torch.tensor(values, dtype=torch.float64), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.block_mse[arm.name], mse, rtol=1e-4, atol=1e-7)
    perplexity = math.exp(sum(by_hand(full, Arm("full", full), windows)[0]["nll"]) / int(windows.scored.sum()))
    assert found.table()[0]["perplexity"] == pytest.approx(perplexity, rel=1e-5)


def test_the_batch_size_changes_nothing(
    full: LlamaForCausalLM, model: LlamaForCausalLM, kv: IntactKV, windows: Windows
) -> None:
    one, many = (three_arms(full, model, kv, windows, batch_size=size) for size in (1, 5))
    for name in ("full", "own", "intact"):
        a, b = vars(one.metrics[name]), vars(many.metrics[name])
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(dict(one.block_mse), dict(many.block_mse), rtol=1e-5, atol=1e-5)


def test_three_arms_leave_no_trace(
    full: LlamaForCausalLM, model: LlamaForCausalLM, kv: IntactKV, windows: Windows
) -> None:
    with torch.no_grad():
        before = model(windows.ids).logits
    found = three_arms(full, model, kv, windows)
    assert not is_attached(model)
    with torch.no_grad():
        assert torch.equal(model(windows.ids).logits, before)
    assert found.arms == ("own", "intact")
    assert found.pairs == (("own", "intact"),)
    kl = {row["arm"]: row["kl_mean"] for row in found.table()}
    gap = found.gap_closed(own="own", intact="intact")
    assert gap.value == pytest.approx((kl["own"] - kl["intact"]) / kl["own"])
    assert gap.low <= gap.value <= gap.high


def test_the_intact_prefix_of_the_full_model_changes_nothing(
    full: LlamaForCausalLM, kv: IntactKV, windows: Windows
) -> None:
    found = evaluate(full, [Arm("attached", full, kv)], windows)
    assert found.table()[1]["kl_99_9"] < 1e-6
    assert (found.block_mse["attached"] < 1e-10).all()


def test_the_paper_protocol_runs(full: LlamaForCausalLM, model: LlamaForCausalLM) -> None:
    tokens = torch.randint(97, (70,), generator=torch.Generator().manual_seed(4))
    found = three_arms(full, model, capture(full, [1]), paper_windows(tokens, bos=1, window=16))
    assert [row["tokens"] for row in found.table()] == [4 * 14] * 3


def test_tokens_are_measured_where_they_are_scored(
    full: LlamaForCausalLM, model: LlamaForCausalLM, windows: Windows
) -> None:
    found = evaluate(full, [Arm("own", model)], windows, block_mse=False)
    for metrics in found.metrics.values():
        assert torch.equal(metrics.scored, windows.scored)
        assert not metrics.same_top1[~windows.scored].any()
    by_position = found.kl_by_position("own")
    assert by_position.isnan().tolist() == [True] * (len(PREFIX) + 1) + [False] * (LENGTH - len(PREFIX) - 1)
    mean = found.metrics["own"].kl[:, -1].double().mean().item()
    assert by_position[-1].item() == pytest.approx(mean)
    assert found.block_mse == {}


def test_progress_counts_windows(full: LlamaForCausalLM, windows: Windows) -> None:
    calls: list[tuple[int, int]] = []
    evaluate(full, [Arm("same", full)], windows, batch_size=3, progress=lambda *call: calls.append(call))
    assert calls == [(3, 7), (6, 7), (7, 7)]


def test_one_full_forward_serves_all_arms(
    full: LlamaForCausalLM, model: LlamaForCausalLM, kv: IntactKV, windows: Windows
) -> None:
    forwards = []
    hook = full.register_forward_hook(lambda *_: forwards.append(1))
    three_arms(full, model, kv, windows, batch_size=4)
    hook.remove()
    assert len(forwards) == 2


def test_the_figures_are_json(full: LlamaForCausalLM, model: LlamaForCausalLM, kv: IntactKV, windows: Windows) -> None:
    found = three_arms(full, model, kv, windows)
    data = json.loads(json.dumps(found.to_dict(resamples=50, seed=3), allow_nan=False))
    assert data == found.to_dict(resamples=50, seed=3)
    assert data["tokens"] == windows.ids.numel()
    assert data["scored_tokens"] == int(windows.scored.sum())
    assert data["tokens_per_second"] > 0
    assert data["kl_by_position"]["own"][: len(PREFIX) + 1] == [None] * (len(PREFIX) + 1)
    for row in found.table():
        figures = data["arms"][row.pop("arm")]
        row.pop("tokens")
        assert {name: interval["value"] for name, interval in figures.items()} == pytest.approx(row)
    (pair,) = data["pairs"]
    own, intact = (data["arms"][name]["kl_mean"]["value"] for name in ("own", "intact"))
    assert pair["difference"]["kl_mean"]["value"] == pytest.approx(own - intact)
    assert pair["gap_closed"]["value"] == pytest.approx((own - intact) / own)


def overflowing(full: LlamaForCausalLM) -> LlamaForCausalLM:
    broken = copy.deepcopy(full)
    broken.lm_head.weight.data[3] = torch.inf
    return broken


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (lambda full, kv: [], "give at least one arm"),
        (lambda full, kv: [Arm("a", full), Arm("a", full)], "its own name"),
        (lambda full, kv: [Arm("full", full)], "its own name"),
        (lambda full, kv: [Arm("a", copy.deepcopy(full).train())], "call model.eval"),
        (lambda full, kv: [Arm("a", full, capture(full, [1, 5, 8]))], "does not start with the 3 prefix tokens"),
        (lambda full, kv: [Arm("a", llama(vocab_size=101))], "same vocabulary"),
        (
            lambda full, kv: [Arm("a", llama(vocab_size=90))],
            "a window of arm 'a' holds ids .* outside the vocabulary of 90;",
        ),
        (lambda full, kv: [Arm("a", llama(num_hidden_layers=3))], "pass block_mse=False"),
        (lambda full, kv: [Arm("a", overflowing(full))], "NaN or infinite"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(
    full: LlamaForCausalLM,
    kv: IntactKV,
    windows: Windows,
    arms: Callable[[LlamaForCausalLM, IntactKV], list[Arm]],
    message: str,
) -> None:
    with pytest.raises(IntactKVError, match=message):
        evaluate(full, arms(full, kv), windows)


def test_what_the_artifact_predicts_is_not_scored(full: LlamaForCausalLM, kv: IntactKV, windows: Windows) -> None:
    scored = windows.scored.clone()
    scored[:, len(PREFIX)] = True
    flattering = Windows(windows.ids, scored)
    evaluate(full, [Arm("own", full)], flattering)
    with pytest.raises(IntactKVError, match="score from position 4 on"):
        evaluate(full, [Arm("intact", full, kv)], flattering)


def test_an_attached_model_is_refused(full: LlamaForCausalLM, kv: IntactKV, windows: Windows) -> None:
    with attach(full, kv), pytest.raises(IntactKVError, match="already has an intact KV attached"):
        evaluate(full, [Arm("own", full)], windows)


def test_bad_settings_are_refused(full: LlamaForCausalLM, windows: Windows) -> None:
    with pytest.raises(IntactKVError, match="batch_size=0"):
        evaluate(full, [Arm("own", full)], windows, batch_size=0)
    with pytest.raises(IntactKVError, match="no arm 'other'; the arms are full, own"):
        evaluate(full, [Arm("own", full)], windows).kl_by_position("other")


def test_prompts_without_the_prefix_are_an_arm_of_their_own() -> None:
    """It is the model, and the full one, on the windows' tokens alone, scored at the same labels."""
    full = build(by_name("llama-gqa"))
    model, skip = rounded(full), len(IDS)
    windows = prefixed_windows(torch.arange(8, 8 + 300).remainder(VOCAB - 8) + 8, prefix=IDS, window=24)
    arms = [Arm("own", model), Arm("bare", model, None, skip), Arm("intact", model, capture(full, IDS))]
    found = evaluate(full, arms, windows, block_mse=False)
    assert list(found.metrics) == ["full", "own", "intact", "full bare", "bare"]
    assert found.arms == ("own", "intact", "bare")
    assert found.pairs == (("own", "intact"),)
    with torch.no_grad():
        ours, theirs = (m(windows.ids[:, skip:]).logits.double().log_softmax(-1) for m in (full, model))
    kl = (ours.exp() * (ours - theirs)).sum(-1)[:, :-1]  # what predicts each token from the second on
    torch.testing.assert_close(found.metrics["bare"].kl[:, skip + 1 :].double(), kl, rtol=0, atol=1e-5)
    assert found.metrics["bare"].kl[:, : skip + 1].isnan().all()
    labels = windows.ids[:, skip + 1 :, None]
    nll = -ours[:, :-1].gather(-1, labels)[..., 0]
    torch.testing.assert_close(found.metrics["full bare"].nll[:, skip + 1 :].double(), nll, rtol=0, atol=1e-5)
    with pytest.raises(IntactKVError, match=r"score a token up to position 4, which arm 'bare'"):
        evaluate(full, [Arm("bare", model, None, 4)], windows, block_mse=False)
