"""The picture of an evaluation: how far each arm is from the full model, by position in the window."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from intactkv.evaluating.evaluation import Evaluation
from intactkv.picture import picture

# Okabe and Ito's colours, told apart by all kinds of colour vision, one hue for each pair of arms.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def plot_kl_by_position(evaluation: Evaluation, path: str | os.PathLike[str], *, smooth: int = 9) -> Path:
    """Draw mean KL(full ‖ arm) in nats by position, own prefix dashed against intact prefix solid.

    Curves are running means over `smooth` positions. PNG, SVG or PDF by the path's ending. Needs matplotlib
    (`pip install 'intactkv[demo]'`).
    """
    with picture(path, size=(8, 4.5), dpi=150) as figure:
        axes = figure.add_subplot()
        for colour, pair in zip(_COLOURS, evaluation.pairs, strict=False):
            for name, style in zip(pair, ("--", "-"), strict=True):
                mean = running_mean(evaluation.kl_by_position(name), smooth)
                axes.plot(mean.numpy(), style, color=colour, label=name, linewidth=1.8)
        axes.set_yscale("log")
        axes.set_xlabel("position in the window (token)")
        axes.set_ylabel("KL to the full model (nats)")
        axes.set_title("Distance to the full model: own prefix (dashed), intact prefix (solid)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return Path(path)


def running_mean(values: Float[Tensor, "position"], width: int) -> Float[Tensor, "position"]:
    """The centred mean over `width` positions, over what there is of them; NaN values do not count.

    >>> running_mean(torch.tensor([float("nan"), 1.0, 3.0, 5.0]), 3).tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    windows = torch.nn.functional.pad(values, (width // 2, (width - 1) // 2), value=float("nan")).unfold(0, width, 1)
    return windows.nanmean(1)
