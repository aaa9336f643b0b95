"""The doctor's page: one HTML file with everything in it, for screen and paper, light and dark, without scripts."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from intactkv.doctor.examine import Examination
from intactkv.doctor.words import (
    Names,
    budget_sentence,
    forecast_sentence,
    layer_sentence,
    pivot_sentences,
    prefix_sentence,
    verdict_sentences,
)
from intactkv.evaluating import Interval
from intactkv.evaluating.verdict import RULE, Verdict
from intactkv.pivots.pair import drops
from intactkv.pivots.plot import plot_activations, plot_attention, plot_budget, plot_mse

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #555; --paper: #fff; --line: #c8c8c8;
  --good: #005a36; --some: #6b4500; --none: #444; --bad: #a11212; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #b4b4b4; --paper: #16181c; --line: #4a4d55;
  --good: #6fd3a4; --some: #f0b955; --none: #c0c0c0; --bad: #ff9a8f; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.soft, figcaption, caption { color: var(--soft); } .verdict { border: 2px solid; border-radius: .5rem;
  padding: .6rem 1rem; margin: .8rem 0; } .verdict strong { font-size: 1.15rem; } .verdict p { margin: .2rem 0;
  color: var(--ink); }
.worth-it { color: var(--good); } .marginal { color: var(--some); } .no-effect { color: var(--none); }
.harmful, .broken { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; } th, td { padding: .15rem .7rem .15rem 0; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
th { vertical-align: bottom; } thead th { white-space: normal; } table { font-size: .92rem; }
figure { margin: 1.2rem 0; } .on-dark { display: none; }
@media screen and (prefers-color-scheme: dark) { .on-dark { display: inline; } .on-light { display: none; } }
 img { max-width: 100%; height: auto; } code { overflow-wrap: anywhere; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #333; --paper: #fff; --line: #999; --good: #005a36;
  --some: #6b4500; --none: #333; --bad: #a11212; } body { font-size: 11pt; margin: 0; max-width: none; }
  table { font-size: 9pt; } .scroll { overflow: visible; } 
  figure, .verdict, tr { break-inside: avoid; } h2 { break-after: avoid; } img { max-height: 11cm; } }
"""

_MARKS: dict[Verdict, str] = {"worth it": "✔", "marginal": "◐", "no effect": "○", "harmful": "✘", "broken": "⚠"}


def page(found: Examination, *, title: str, name: Names, made_by: dict[str, Any]) -> str:
    """The whole HTML text. `name` writes a token id as people read it, `made_by` says how to get the page again.

    Needs matplotlib. The pictures are PNG data inside the page, each once for light and once for dark screens.
    """
    sections = [
        _verdicts(found, name),
        _pivots(found, name),
        _pictures(found, name),
        _arms(found),
        _layers(found),
        _search(found, name),
        _about(found, made_by),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def _verdicts(found: Examination, name: Names) -> str:
    boxes = []
    for model, sentence in zip(found.models, verdict_sentences(found), strict=True):
        judged = found.verdict(model)
        boxes.append(
            f'<div class="verdict {judged.replace(" ", "-")}"><strong><span aria-hidden="true">{_MARKS[judged]}</span> '
            f"{escape(model)}: {judged}</strong><p>{escape(sentence)}</p></div>"
        )
    return (
        f"<h2>Verdict</h2>\n{''.join(boxes)}\n<p>{escape(prefix_sentence(found, name))}</p>\n"
        f'<p class="soft">The rule. {escape(RULE)}</p>'
    )


def _pivots(found: Examination, name: Names) -> str:
    items = "".join(f"<li>{escape(said)}</li>" for said in pivot_sentences(found, name))
    rows = []
    for p, key, value in zip(found.pivots, *_norms(found), strict=True):
        shares = ["–" if x is None else f"{x:.3f}" for x in (p.mass, p.best_head)]
        bias = float(found.diagnosis.behind.key_bias[p.layer])
        rows.append([str(p.layer + 1), f"{p.ratio:.1f}", *shares, key, value, "–" if bias != bias else f"{bias:.2f}"])
    columns = (
        "layer", "hidden state, × median", "attention received", "in the best head", "‖k‖, × median", "‖v‖, × median",
        "key bias, share of energy",
    )  # fmt: skip
    caption = f"The first token, by layer, averaged over windows of {found.diagnosis.behind.ids.shape[1]} tokens."
    return f"<h2>Pivots</h2>\n<ul>{items}</ul>\n{_table(caption, columns, rows)}"


def _norms(found: Examination) -> list[list[str]]:
    """The first token's key and value norms over the median token's, by layer."""
    columns = []
    for norms in (found.diagnosis.behind.key_norm, found.diagnosis.behind.value_norm):
        ratios = (norms[:, :, 0] / norms.median(-1).values).mean(1).tolist()
        columns.append(["–" if ratio != ratio else f"{ratio:.2f}" for ratio in ratios])
    return columns


def _pictures(found: Examination, name: Names) -> str:
    shown, names = found.pictured, [name(int(token)) for token in found.pictured.ids]
    top = shown.hidden.abs()
    at = divmod(int(top.argmax()), top.shape[1])
    typical = float(top.amax(1).median())
    parts = [
        _picture(
            lambda path, theme: plot_activations(
                shown.hidden, path, layer=shown.hidden_layer, tokens=names, theme=theme
            ),
            alt=f"3D plot of hidden states after block {shown.hidden_layer + 1}: the largest is {float(top.max()):.3g} "
            f"at token {at[0]}, channel {at[1]}; the median token's largest is {typical:.3g}.",
            caption="Output activations, token × channel, in the layer where one token stands out most.",
        )
    ]
    if shown.attention is not None and shown.attention_layer is not None:
        layer, attention = shown.attention_layer, shown.attention
        share = 100 * float(attention[1:, 0].mean())
        parts.append(
            _picture(
                lambda path, theme: plot_attention(attention, path, layer=layer, theme=theme),
                alt=f"Attention map of layer {layer + 1}, mean over heads: later tokens give the first {share:.0f} %.",
                caption="Attention averaged over heads, in the layer where the first token gets most.",
            )
        )
    mse = found.mse.mean(1)
    fallen = drops(mse)
    parts.append(
        _picture(
            lambda path, theme: plot_mse(mse, path, tokens=[name(int(t)) for t in found.mse_ids], theme=theme),
            alt=f"Block-output error of {found.examined} against the number of intact tokens: {float(mse[0]):.3g} with "
            f"none, {float(mse[-1]):.3g} with {len(mse) - 1}; sudden drops at sizes {fallen or 'none'}.",
            caption=f"Block-output MSE of {found.examined}, mean over blocks, with the first tokens of each window "
            "intact. Token names are those of the first window.",
        )
    )
    if found.budgets:
        parts.append(
            _picture(
                lambda path, theme: plot_budget(found.budgets, path, prefix=len(found.prefix), theme=theme),
                alt=f"Bars by layer. {budget_sentence(found)} The figures are in the table below.",
                caption="The error budget: attention-output error carried by the prefix's tokens to first order, and "
                "what is gone, exactly, when they are intact.",
            )
        )
    return "<h2>Pictures</h2>\n" + "\n".join(parts)


def _picture(draw: Callable[[Path, Any], Path], *, alt: str, caption: str) -> str:
    """One figure, drawn for both themes and put into the page as data."""
    data = {}
    with tempfile.TemporaryDirectory() as folder:
        for theme in ("light", "dark"):
            drawn = draw(Path(folder) / f"{theme}.png", theme)
            data[theme] = "data:image/png;base64," + base64.b64encode(drawn.read_bytes()).decode()
    both = "".join(f'<img class="on-{theme}" src="{data[theme]}" alt="{escape(alt)}">' for theme in ("light", "dark"))
    return f"<figure>{both}<figcaption>{escape(caption)}</figcaption></figure>"


def _arms(found: Examination) -> str:
    intervals = found.evaluation.intervals()
    rows = []
    for arm, figures in intervals.items():
        rows.append(
            [
                arm,
                _interval(figures["kl_mean"], "{:.4f}"),
                f"{figures['kl_median'].value:.4f}",
                f"{figures['kl_99_9'].value:.4f}",
                f"{figures['same_top1_percent'].value:.2f}",
                _interval(figures["perplexity"], "{:.2f}"),
            ]
        )
    columns = ("arm", "KL mean [95 %]", "median", "99.9 %", "same top-1 %", "perplexity [95 %]")
    ids = found.windows.ids
    caption = (
        f"{len(ids)} held-out windows of {ids.shape[1]} tokens, {int(found.windows.scored.sum())} labels scored, the "
        "same in every arm; KL to the full model in nats; intervals by paired bootstrap over windows."
    )
    return f"<h2>Three arms</h2>\n{_table(caption, columns, rows)}"


def _layers(found: Examination) -> str:
    budgets = {b.layer: b for b in found.budgets}
    mse = found.evaluation.block_mse
    own, intact = (mse[f"{found.examined} {arm}"].tolist() for arm in ("own", "intact"))
    rows = []
    for layer, (before, after) in enumerate(zip(own, intact, strict=True)):
        row = [str(layer + 1)]
        gap = found.by_layer.get(layer)
        row.append("–" if gap is None else _interval(gap, "{:+.1f}", times=100))
        row += [f"{before:.3g}", f"{after:.3g}", f"{100 * (after / before - 1):+.1f}" if before else "–"]
        if layer in budgets:
            b, size = budgets[layer], len(found.prefix)
            carried, left = float(b.layer_carried[:size].sum()), float(b.layer_left[b.sizes.index(size)])
            row += [f"{100 * carried:.1f}", f"{100 * (1 - left):.1f}", f"{b.tightness:.3f}"]
        else:
            row += ["–"] * 3
        rows.append(row)
    columns = (
        "layer", "KL closed alone, % [95 %]", "block MSE own", "intact", "change %", "error carried by prefix, %",
        "error gone, %", "error ÷ bound",
    )  # fmt: skip
    caption = (
        f"{found.examined}, by layer. KL closed when only this layer's keys and values are intact; block-output MSE "
        "with its own and with the intact prefix (the last layer's after the final norm); the error budget of the "
        "attention output."
    )
    forecast = f" {escape(forecast_sentence(found))}" if found.forecast else ""
    said = f"<p>{escape(layer_sentence(found))} {escape(budget_sentence(found))}{forecast}</p>"
    return f"<h2>Layer by layer</h2>\n{said}\n{_table(caption, columns, rows)}"


def _search(found: Examination, name: Names) -> str:
    rows = [
        [
            " ".join(name(t) for t in trial.prefix) or "nothing intact",
            str(trial.pivots),
            ", ".join(f"{name(t)} ×{n}" for t, n in sorted(trial.left.items(), key=lambda x: -x[1])[:4]) or "none",
            "yes" if trial.kept else "no",
        ]
        for trial in found.trials
    ]
    columns = ("prefix", "pivots left", "which", "kept")
    table = _table("Each row is one measurement of the text behind that prefix.", columns, rows)
    return f"<h2>How the prefix was found</h2>\n{table}"


def _about(found: Examination, made_by: dict[str, Any]) -> str:
    flat = {k: ", ".join(map(" ".join, v.items())) if isinstance(v, dict) else v for k, v in made_by.items()}
    items = [*found.missing, *(f"{key}: {value}" for key, value in flat.items())]
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return (
        "<h2>About these figures</h2>\n<p>Pivots and the prefix were looked for in the first part of the text, the "
        "verdict rests on the rest. It holds for this text, this model and this quantizer; a model simulated by "
        f"rounding its weights shows what to expect, not what your checkpoint does.</p>\n<ul>{listed}</ul>"
    )


def _interval(interval: Interval, form: str, *, times: float = 1) -> str:
    value, low, high = (form.format(times * x) for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]" if interval.low == interval.low else value


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(x)}</td>" for x in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
