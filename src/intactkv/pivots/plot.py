"""The paper's pictures, for any model: massive activations, the attention map, error against the intact prefix's size.

Source: Liu et al., arXiv 2403.01241, its figures of output activations, attention and MSE. Each function writes one
file, PNG, SVG or PDF by its name's ending, atomically; all need matplotlib (`pip install 'intactkv[doctor]'`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from intactkv.error import IntactKVError
from intactkv.picture import picture
from intactkv.pivots.pair import LayerBudget, drops

Theme = Literal["light", "dark"]

# Okabe and Ito's colours, told apart by all kinds of colour vision; the lighter ones for a dark page.
_COLOURS: dict[str, tuple[str, str]] = {"light": ("#0072B2", "#D55E00"), "dark": ("#56B4E9", "#E69F00")}
_INK: dict[str, tuple[str, str]] = {"light": ("#1a1a1a", "#ffffff"), "dark": ("#e8e8e8", "#16181c")}
_MOST_CHANNELS = 128


def plot_activations(
    hidden: Float[Tensor, "token channel"],
    path: str | os.PathLike[str],
    *,
    layer: int,
    tokens: Sequence[str] | None = None,
    theme: Theme = "light",
) -> Path:
    """|Hidden state| after one block in 3D, token × channel, so that massive activations stand out as needles.

    Of more than 128 channels, neighbours are drawn as the largest of them. `tokens` names the first few.
    """
    height = hidden.detach().float().abs().cpu()
    group = -(-height.shape[1] // _MOST_CHANNELS)
    padded = torch.nn.functional.pad(height, (0, -height.shape[1] % group))
    bars = padded.unflatten(1, (-1, group)).amax(-1)  # (token, group of channels)
    with picture(path, paper=_INK[theme][1], size=(7, 5)) as figure:
        axes: Any = figure.add_subplot(projection="3d")
        colour, massive = _COLOURS[theme]
        channel = (torch.arange(bars.shape[1]) * group).numpy()
        top = bars.amax(1)
        tall = top >= 0.25 * top.max()
        for t in range(len(bars) - 1, -1, -1):
            strong = bool(tall[t])
            axes.plot(
                channel, [t] * len(channel), bars[t].numpy(), color=massive if strong else colour,
                linewidth=1.4 if strong else 0.6, alpha=1.0 if strong else 0.55,
            )  # fmt: skip
        axes.set(xlabel="channel", ylabel="token", zlabel="|hidden state|", title=f"Output of block {layer + 1}")
        for t in tall.nonzero()[:4, 0].tolist():
            at = int(bars[t].argmax())
            name = f"token {t}" if tokens is None else f"{t}: {tokens[t]}"
            axes.text(channel[at], t, float(bars[t, at]), f" {name}, channel {int(height[t].argmax())}", fontsize=9)
        axes.view_init(elev=22, azim=-58)
        _themed(figure, axes, theme)
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.pane.set_facecolor(_INK[theme][1])
            axis.label.set_color(_INK[theme][0])
    return Path(path)


def plot_attention(
    weights: Float[Tensor, "query key"],
    path: str | os.PathLike[str],
    *,
    layer: int,
    theme: Theme = "light",
) -> Path:
    """One layer's attention averaged over heads, query × key; darker is more (lighter on a dark page), as a root."""
    shown = weights.detach().float().cpu().clamp(min=0)
    with picture(path, paper=_INK[theme][1], size=(5.6, 4.8)) as figure:
        axes: Any = figure.add_subplot()
        norm = _power_norm(float(shown.max()))
        image = axes.imshow(
            shown.numpy(), cmap="Blues" if theme == "light" else "cividis", norm=norm, interpolation="nearest"
        )
        bar = figure.colorbar(image, ax=axes, label="attention weight, mean over heads")
        bar.ax.tick_params(colors=_INK[theme][0])
        bar.ax.yaxis.label.set_color(_INK[theme][0])
        bar.outline.set_edgecolor(_INK[theme][0])
        axes.set(xlabel="key (token attended to)", ylabel="query (token)", title=f"Attention in layer {layer + 1}")
        _themed(figure, axes, theme)
    return Path(path)


def plot_mse(
    mse: Float[Tensor, "size"],
    path: str | os.PathLike[str],
    *,
    tokens: Sequence[str] | None = None,
    theme: Theme = "light",
) -> Path:
    """Block-output MSE against how many first tokens are intact, 0…P, each sudden drop marked with its token."""
    values = mse.detach().double().cpu()
    with picture(path, paper=_INK[theme][1], size=(7, 4)) as figure:
        axes: Any = figure.add_subplot()
        colour, mark = _COLOURS[theme]
        axes.plot(range(len(values)), values.numpy(), "o-", color=colour, linewidth=1.8)
        for number, size in enumerate(drops(values)):
            fall = 100 * float(1 - values[size] / values[size - 1])
            name = f"token {size - 1}" if tokens is None else tokens[size - 1]
            axes.plot([size, size], [float(values[size - 1]), float(values[size])], "--", color=mark, linewidth=1.6)
            axes.plot([size], [float(values[size])], "D", color=mark, markersize=8)
            aside = (12, (14, -22)[number % 2])  # neighbours do not write over each other
            axes.annotate(
                f"{name} intact: −{fall:.0f} %", (size, float(values[size])), xytext=aside,
                textcoords="offset points", color=_INK[theme][0],
            )  # fmt: skip
        axes.set(
            xlabel="size of the intact prefix (tokens)", ylabel="block-output MSE", ylim=(0, 1.1 * float(values.max()))
        )
        axes.set_title("What each intact token takes off the error")
        axes.grid(alpha=0.3)
        _themed(figure, axes, theme)
    return Path(path)


def plot_budget(
    budgets: Sequence[LayerBudget], path: str | os.PathLike[str], *, prefix: int, theme: Theme = "light"
) -> Path:
    """By layer, the share of attention-output error that the prefix's tokens carry, and that goes if they are intact.

    `prefix` must be one of the sizes that the budgets were measured for.
    """
    if any(prefix not in budget.sizes for budget in budgets):
        raise IntactKVError(f"prefix={prefix} is not among the sizes {budgets[0].sizes} that were measured; use one")
    with picture(path, paper=_INK[theme][1], size=(7, 4)) as figure:
        axes: Any = figure.add_subplot()
        colour, other = _COLOURS[theme]
        layers = [budget.layer + 1 for budget in budgets]
        carried = [100 * float(b.layer_carried[:prefix].sum()) for b in budgets]
        removed = [100 * (1 - float(b.layer_left[b.sizes.index(prefix)])) for b in budgets]
        axes.bar([x - 0.2 for x in layers], carried, 0.4, color=colour, label="carried by the prefix (first order)")
        axes.bar([x + 0.2 for x in layers], removed, 0.4, color=other, hatch="//", edgecolor=_INK[theme][1],
                 label="gone with an intact prefix (exact)")  # fmt: skip
        axes.axhline(0, color=_INK[theme][0], linewidth=0.8)
        axes.set(xlabel="layer", ylabel="share of attention-output error (%)", title="Where the error comes from")
        axes.grid(alpha=0.3, axis="y")
        axes.legend(frameon=False, labelcolor=_INK[theme][0])
        _themed(figure, axes, theme)
    return Path(path)


def _themed(figure: Any, axes: Any, theme: Theme) -> None:
    ink, paper = _INK[theme]
    figure.set_facecolor(paper)
    axes.set_facecolor(paper)
    axes.tick_params(colors=ink)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(ink)
    for spine in axes.spines.values():
        spine.set_edgecolor(ink)
    for text in axes.texts:
        text.set_color(ink)


def _power_norm(largest: float) -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=max(largest, 1e-9))
