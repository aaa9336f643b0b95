"""The examination: pivots, the prefix that holds them, the error budget, three arms, layer by layer, and a verdict.

Pivots and the prefix are looked for in the first part of the text; what the verdict rests on is measured on the rest,
which the search never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.capturing.live import capture
from intactkv.capturing.record import recorded
from intactkv.checkpoint.stream import streamed
from intactkv.decoder import input_device, watched_outputs
from intactkv.doctor.forecast import Forecast, forecast
from intactkv.error import IntactKVError
from intactkv.evaluating import Arm, Evaluation, Interval, Windows, decide, evaluate, prefixed_windows
from intactkv.evaluating.verdict import Verdict
from intactkv.pivots.attention import Attended, Blocks, watched_attention
from intactkv.pivots.classify import Diagnosis, diagnose, without_pivot
from intactkv.pivots.discover import Trial, pieces, search
from intactkv.pivots.measure import LayerPivot, first_token_pivots
from intactkv.pivots.pair import LayerBudget, error_budget, mse_by_prefix_size

SEARCHED = 0.3  # the share of the text in which pivots are looked for
MOST_WINDOWS = 24  # of the rest, on which three arms are measured
SHOWN = 64  # tokens in the pictures of activations and attention
SEARCH_WINDOWS = 6
MSE_WINDOWS, BUDGET_WINDOWS, LAYER_WINDOWS = 2, 2, 6
LAYER_TOKENS = 48  # of each window, for one forward a layer


@dataclass(frozen=True, eq=False)
class Pictured:
    """What the pictures show of one window: its ids, `|hidden|` of the strongest layer and the attention of the layer
    in which the first token gets most, each with its number; attention is None where the model shows none."""

    ids: Int[Tensor, "token"]
    hidden: Float[Tensor, "token hidden"]
    hidden_layer: int
    attention: Float[Tensor, "query key"] | None
    attention_layer: int | None


@dataclass(frozen=True, eq=False)
class Examination:
    """All that the doctor found.

    `prefix` is the recommended one and `discovered` says whether the search ended with it (else it is the model's
    [BOS], the first token of its chats, or the text's first, because there was no pivot or no prefix held them all).
    `evaluation` has two arms for each of `models`: "NAME own" and "NAME intact". `budgets`, `mse` `(size, layer)` and
    `by_layer` `(layer)` are of the model named `examined`: the last is the share of KL closed by one layer's intact
    keys and values alone, and is empty where the model is streamed. `forecast` is of the full model: what quantizing
    with the prefix would gain. `missing` says what could not be measured on this model, and why.
    """

    diagnosis: Diagnosis
    pivots: list[LayerPivot]
    trials: list[Trial]
    prefix: list[int]
    discovered: bool
    kv: IntactKV
    evaluation: Evaluation
    models: tuple[str, ...]
    examined: str
    budgets: list[LayerBudget]
    mse: Float[Tensor, "size layer"]
    mse_ids: Int[Tensor, "token"]
    by_layer: dict[int, Interval]
    forecast: list[Forecast]
    pictured: Pictured
    missing: list[str]
    windows: Windows

    def gap(self, name: str) -> Interval:
        """The share of KL closed on the model of this name, with its paired 95 % interval."""
        return self.evaluation.gap_closed(own=f"{name} own", intact=f"{name} intact")

    def own_kl(self, name: str) -> float:
        """The mean KL in nats to the full model, with the model's own prefix."""
        return float(self.evaluation.metrics[f"{name} own"].kl.double().nanmean())

    def times(self, name: str) -> float:
        """The perplexity with the intact prefix over the full model's."""
        return self.evaluation.times_perplexity(f"{name} intact")

    def verdict(self, name: str) -> Verdict:
        """The verdict for the model of this name, by the rule of `evaluating/verdict.py`."""
        return decide(self.gap(name), own_kl=self.own_kl(name), times=self.times(name))


def examine(
    full: PreTrainedModel,
    models: Mapping[str, PreTrainedModel],
    tokens: Sequence[int],
    *,
    start: int | None = None,
    chat: int | None = None,
    window: int = 128,
    step: Callable[[str], None] = lambda message: None,
) -> Examination:
    """Examine `full` and the quantized `models` made from it, by name, on one stream of `tokens` without [BOS].

    `start` is the id that every prompt begins with, None if there is none; `chat` the one that conversations begin
    with, which is preferred where any first token is a pivot. `step` is told what is being done. Raises
    `IntactKVError` where there are too few tokens: about 20 windows make a fair verdict, 4 are the least.
    """
    if not models:
        raise IntactKVError("no quantized model was given; give at least one, rounded_model(full, bits=4) say")
    cut = max(int(SEARCHED * len(tokens)), 4 * 32)
    if len(tokens) - cut < 4 * window:
        raise IntactKVError(
            f"{len(tokens)} tokens are too few for an examination in windows of {window}; give at least "
            f"{int(4 * window / (1 - SEARCHED)) + 129}, better five times as many"
        )
    searched, held_out = tokens[:cut], tokens[cut:]
    step("looking for pivots")
    plain = pieces(searched, length=window)
    diagnosis = diagnose(full, plain, bos=start)
    trials = search(full, pieces(searched, count=SEARCH_WINDOWS), start=start, chat=chat)
    prefix, discovered = _prefix(trials, chat if start is None else start, searched)
    step("capturing the prefix")
    kv = capture(full, prefix)
    cut_to = prefixed_windows(held_out, prefix=prefix, window=max(window, len(prefix) + 32))
    windows = cut_to[:MOST_WINDOWS]
    step("measuring three arms")
    arms = [arm for name, m in models.items() for arm in (Arm(f"{name} own", m), Arm(f"{name} intact", m, kv))]
    evaluation = evaluate(full, arms, windows)
    examined = max(models, key=lambda name: float(evaluation.metrics[f"{name} own"].kl.double().nanmean()))
    model, missing = models[examined], []
    idle = None if discovered else without_pivot(full, windows.ids[:4], size=len(prefix))
    if idle is not None:
        missing.append(f"{idle[0].upper()}{idle[1:]}.")
    step("finding where the error comes from")
    size = len(prefix)
    sizes = sorted({0, 1, 2, 4, 8, size})
    try:
        budgets = error_budget(full, model, windows.ids[:BUDGET_WINDOWS], sizes=[n for n in sizes if n < window])
    except IntactKVError as error:
        budgets = []
        missing.append(f"The error budget was not measured: {error}.")
    mse = mse_by_prefix_size(full, model, windows.ids[:MSE_WINDOWS], most=max(8, size + 2))
    if streamed(model) is None:
        step("measuring one layer after the other")
        by_layer = layer_effects(full, model, kv, windows)
    else:
        by_layer = {}
        missing.append("Layers were not measured one by one: each would read the whole model; --no-stream loads it.")
    step("forecasting what quantizing with the prefix gains")
    try:
        forecasts = forecast(full, searched, prefix)
    except ImportError:
        forecasts = []
        missing.append(
            "What quantizing with the prefix gains was not forecast: that runs a step of llm-compressor's GPTQ; "
            "pip install 'intactkv[quantize]'."
        )
    except IntactKVError as error:
        forecasts = []
        missing.append(f"What quantizing with the prefix gains was not forecast: {error}.")
    pictured = _pictured(full, diagnosis.behind.ids[0][:SHOWN], diagnosis)
    if pictured.attention is None:
        missing.append("The attention map is not shown: the model does not use transformers' AttentionInterface.")
    return Examination(
        diagnosis=diagnosis,
        pivots=first_token_pivots(diagnosis.behind),
        trials=trials,
        prefix=prefix,
        discovered=discovered,
        kv=kv,
        evaluation=evaluation,
        models=tuple(models),
        examined=examined,
        budgets=budgets,
        mse=mse,
        mse_ids=windows.ids[0],
        by_layer=by_layer,
        forecast=forecasts,
        pictured=pictured,
        missing=missing,
        windows=windows,
    )


def layer_effects(full: PreTrainedModel, model: PreTrainedModel, kv: IntactKV, windows: Windows) -> dict[int, Interval]:
    """The share of KL that one layer's intact keys and values close, the other layers keeping the model's own."""
    length = max(LAYER_TOKENS, len(kv) + LAYER_TOKENS // 2)
    few = Windows(windows.ids[:LAYER_WINDOWS, :length], windows.scored[:LAYER_WINDOWS, :length])
    own = {i: (key[0], value[0]) for i, (key, value) in recorded(model, kv.ids[None]).items()}
    if own.keys() != kv.layers.keys():
        raise IntactKVError("the quantized model has keys and values in other layers; give one made from this model")
    arms = [Arm("own", model)]
    for i, pair in kv.layers.items():
        arms.append(Arm(str(i), model, replace(kv, layers={**own, i: pair})))
    found = evaluate(full, arms, few, block_mse=False)
    return {i: found.gap_closed(own="own", intact=str(i)) for i in kv.layers}


def _prefix(trials: Sequence[Trial], start: int | None, tokens: Sequence[int]) -> tuple[list[int], bool]:
    """The prefix to measure with, and whether it is one that the search found to hold all pivots."""
    best = [trial for trial in trials if trial.kept][-1]
    if best.prefix:
        return list(best.prefix), not best.pivots
    return [tokens[0] if start is None else start], False


@torch.inference_mode()
def _pictured(full: PreTrainedModel, ids: Int[Tensor, "token"], diagnosis: Diagnosis) -> Pictured:
    measured = diagnosis.behind
    hidden_layer = int(measured.ratio.amax((1, 2)).argmax())
    mass = measured.received[:, :, 0].mean(1).nan_to_num(-1)
    attention_layer = int(mass.argmax()) if mass.max() >= 0 else None
    hidden: list[Tensor] = []
    weights: list[Tensor] = []

    def keep(layer: int, output: Tensor) -> None:
        if layer == hidden_layer:
            hidden.append(output[0].float().cpu())

    def look(call: Attended) -> Blocks | None:
        if call.layer != attention_layer:
            return None
        return lambda rows, block: weights.append(block[0].mean(0).cpu())

    with watched_attention(full, look), watched_outputs(full, keep):
        full.base_model(input_ids=ids[None].to(input_device(full)), use_cache=False)
    attention = weights[0] if weights else None  # so few tokens are one block
    return Pictured(ids, hidden[0], hidden_layer, attention, attention_layer)


def to_dict(found: Examination) -> dict[str, Any]:
    """All figures as plain data for JSON."""
    return {
        "verdicts": {name: found.verdict(name) for name in found.models},
        "prefix": found.prefix,
        "discovered": found.discovered,
        "prefix_bytes": found.kv.nbytes,
        "pivots": [vars(p) for p in found.diagnosis.pivots],
        "sinks": [vars(s) for s in found.diagnosis.sinks],
        "key_bias": {str(i + 1): share for i, share in found.diagnosis.key_bias.items()},
        "first_token": [vars(p) for p in found.pivots],
        "trials": [vars(t) for t in found.trials],
        "examined": found.examined,
        "budget": [
            {
                "layer": b.layer,
                "sizes": b.sizes,
                "left": b.layer_left.tolist(),
                "carried": b.layer_carried[: b.sizes[-1]].tolist(),
                "error_over_bound": b.tightness,
            }
            for b in found.budgets
        ],
        "mse_by_prefix_size": found.mse.mean(1).tolist(),
        "gap_closed_by_layer": {str(i): vars(interval) for i, interval in found.by_layer.items()},
        "forecast": [
            {"bits": f.bits, "symmetric": f.symmetric, "times": f.times, "layers": [vars(layer) for layer in f.layers]}
            for f in found.forecast
        ],
        "missing": found.missing,
        **found.evaluation.to_dict(),
    }
