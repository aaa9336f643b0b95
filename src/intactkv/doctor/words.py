"""What was found, in sentences: the same on the screen and on the page."""

from __future__ import annotations

from collections.abc import Callable

from intactkv.doctor.examine import Examination
from intactkv.evaluating import verdict
from intactkv.pivots.classify import KEY_BIAS, PIVOT, Pivot

LITTLE, MUCH = 1.1, 2.0  # times the error of the forecast: docs/prefix-aware.md has what was measured above and below

Names = Callable[[int], str]  # a token id as people read it


def verdict_sentences(found: Examination) -> list[str]:
    """One sentence for each quantized model."""
    return [
        f"{name}: {verdict(found.gap(name), own_kl=found.own_kl(name), times=found.times(name))}."
        for name in found.models
    ]


def pivot_sentences(found: Examination, name: Names) -> list[str]:
    """Pivots, sinks and key biases, each said to be what it is, also where there are none."""
    diagnosis = found.diagnosis
    said = [_pivot(pivot, name) for pivot in diagnosis.pivots]
    if not said:
        strongest = float(diagnosis.behind.strength.max())
        said.append(
            f"No pivots: the most massive hidden state is {strongest:.1f} times the median token's ({PIVOT:.0f} times "
            "would be a pivot)."
        )
    if diagnosis.sinks:
        top = diagnosis.sinks[0]
        said.append(
            f"{len(diagnosis.sinks)} attention sinks beyond the first tokens without massive hidden states, the "
            f"strongest {name(top.token)} at position {top.position} of window {top.window + 1}, with "
            f"{100 * top.mass:.0f} % of later tokens' attention."
        )
    if diagnosis.key_bias:
        layers = ", ".join(str(i + 1) for i in diagnosis.key_bias)
        said.append(
            f"Key-bias trouble in layers {layers}: more than {100 * KEY_BIAS:.0f} % of the keys' energy is the key "
            "projection's bias. Low-bit keys suffer from it at every token; no intact prefix mends that."
        )
    return said


def prefix_sentence(found: Examination, name: Names) -> str:
    """The prefix, its size, and how it was come by."""
    shown = " ".join(name(token) for token in found.prefix)
    size = f"{len(found.prefix)} token{'s' if len(found.prefix) > 1 else ''} ({shown}), {found.kv.nbytes:,} bytes"
    if found.discovered:
        return f"Recommended prefix: {size} of keys and values; behind it no pivot is left."
    if found.trials[0].pivots == 0:
        return f"There is no pivot to keep intact; measured all the same with {size}."
    left = [trial for trial in found.trials if trial.kept][-1].pivots
    return f"No short prefix removes all pivots ({left} are left); measured with {size}."


def budget_sentence(found: Examination) -> str:
    """The share of attention-output error that goes with the prefix intact, over the layers."""
    if not found.budgets:
        return "The error budget could not be measured."
    gone = [1 - float(b.layer_left[b.sizes.index(len(found.prefix))]) for b in found.budgets]
    best = max(range(len(gone)), key=gone.__getitem__)
    return (
        f"Of the attention-output error that {found.examined} keys and values make, the intact prefix removes "
        f"{100 * sum(gone) / len(gone):.0f} % on average over the layers, most in layer "
        f"{found.budgets[best].layer + 1} ({100 * gone[best]:.0f} %)."
    )


def layer_sentence(found: Examination) -> str:
    """The layer whose intact keys and values alone close most of the KL."""
    if not found.by_layer:
        return "Layers were not measured one by one."
    best = max(found.by_layer, key=lambda i: found.by_layer[i].value)
    gap = found.by_layer[best]
    return (
        f"Most sensitive: layer {best + 1}, whose intact keys and values alone close {100 * gap.value:+.1f} % of "
        f"the KL ({100 * gap.low:+.1f} to {100 * gap.high:+.1f}) of {found.examined}."
    )


def forecast_sentence(found: Examination) -> str:
    """What leaving the prefix out of what GPTQ learns from would gain, before anything is quantized."""
    told = [
        f"{f.times:.1f} times at {f.bits} bits ({f.layers[0].layer}: {f.layers[0].counted:.2g} of its output's energy "
        f"instead of {f.layers[0].left_out:.2g})"
        for f in found.forecast
    ]
    most = max(f.times for f in found.forecast)
    if most < LITTLE:
        return (
            f"Forecast: counting the prefix costs symmetric GPTQ next to nothing ({most:.2f} times the error in the "
            "layers that see most of it): a checkpoint made for it will gain little beyond the intact KV."
        )
    advice = "quantize with this prefix" if most >= MUCH else "quantizing with this prefix gains a little"
    return (
        f"Forecast: in the layers that see most of the prefix, counting it raises the error that later tokens read "
        f"from symmetric GPTQ {', '.join(told)}: {advice}."
    )


def _pivot(pivot: Pivot, name: Names) -> str:
    what = {
        "position": f"Any token at position {pivot.position}",
        "token": f"Token {name(pivot.token or 0)}, wherever it stands,",
        "start": f"Token {name(pivot.token or 0)}, at the beginning only,",
    }[pivot.kind]
    return (
        f"{what} is a pivot: up to {pivot.strength:.0f} times the median token's hidden state, in "
        f"{len(pivot.layers)} layers (from layer {pivot.layers[0] + 1}), carried by channel {pivot.channel}."
    )
