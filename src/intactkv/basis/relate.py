"""What takes one head's keys or values to another's: nothing, a scale per channel, a rotation, or nothing known.

Pure maths on rows that two models gave for the same noise, once let in through one half of the input channels and
once through the other (`compare.py`). Rounding errors are as linear in the input as keys and values are, so holding out
tokens does not tell them from a change of basis; holding out *input channels* does: what is true of a channel is
found again from the other half of its weights, what rounding did to it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["same", "scale", "rotation", "other"]
Halves = tuple[Float[Tensor, "head token dim"], Float[Tensor, "head token dim"]]

# All limits are set from data, see docs/results/basis.md. FLOOR is the energy that rounding in bfloat16 leaves. Above
# REFUSE a head is not the same head: rounding to three levels leaves 0.54, the best rotation of a stranger 0.64 and
# more. MIXED and more, of which a free linear map explains nine tenths, is some other mixing.
FLOOR, REFUSE, MIXED = 1e-5, 0.6, 0.05
# Scales are real if the variance of the slopes that both halves agree on is this share of all of it, over all layers
# and in the layer itself, and if they spread wider than SHRINK times the energy left: coarse rounding shrinks some
# rows more than others, of which wide models are sure too. It shrinks all rows together by less than COMMON times that.
AGREE, AGREE_LAYER, SHRINK, COMMON = 0.6, 0.5, 0.2, 3.0


@dataclass(frozen=True)
class Slopes:
    """The least-squares slope of every channel of a layer's keys or values on the full model's, from either half.

    `left` is the share of each channel's energy that the slope leaves, `known` which heads a scale explains at all.
    """

    slope: Float[Tensor, "half head dim"]
    left: Float[Tensor, "half head dim"]
    known: Float[Tensor, "head"]


def slopes(full: Halves, model: Halves) -> Slopes:
    """Slopes of the centred rows: a bias, which nobody rounds, is one direction of the input and says little."""
    slope, left, unexplained = [], [], []
    for a, b in zip(full, model, strict=True):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        ab, aa, bb = (a * b).sum(1), _energy(a), _energy(b)
        slope.append(ab / aa)
        left.append(1 - ab.square() / (aa * bb))
        unexplained.append((bb - ab.square() / aa).sum(1) / bb.sum(1))
    return Slopes(torch.stack(slope), torch.stack(left), torch.stack(unexplained).mean(0) <= REFUSE)


def rescaled(layers: Sequence[Slopes]) -> list[bool]:
    """In which layers the slopes are a rescaling, rather than what rounding does to them; evidence adds up over layers.

    Each half's slopes are freed of what they have in common and of what follows from the energy left: coarse rounding
    shrinks a row the more, the more of it is lost, by COMMON times that at most. Of the rest the covariance between
    halves is the variance of true scales, and half the variance of their difference is noise.
    """
    found = [_agreement(layer) for layer in layers]
    shared, noise = sum(f[0] for f in found), sum(f[1] for f in found)
    pooled = shared > AGREE * (shared + noise)
    return [
        (pooled and s > max(AGREE_LAYER * (s + n), (SHRINK * left) ** 2, FLOOR))
        or common > max(COMMON * left + 4 * n**0.5, FLOOR**0.5)
        for s, n, left, common in found
    ]


def _agreement(layer: Slopes) -> tuple[float, float, float, float]:
    """Variance of the slopes that both halves share, the rest of it, energy left, and the log of the common slope."""
    slope, left = layer.slope[:, layer.known].flatten(1), layer.left[:, layer.known].flatten(1)
    if slope.shape[1] < 4:
        return 0.0, 0.0, 1.0, 0.0
    common, middle = slope.median(1, keepdim=True).values, left.mean(1, keepdim=True)
    shrunk = ((slope - slope.mean(1, keepdim=True)) * (left - middle)).sum(1, keepdim=True)
    shrunk = (shrunk / _energy(left - middle)[:, None]).clamp(-COMMON, 0)
    z = (slope - slope.mean(1, keepdim=True) - shrunk * (left - middle)) / common
    shared, noise = float((z[0] * z[1]).mean()), float((z[0] - z[1]).square().mean()) / 2
    return max(shared, 0.0), noise, float(left.mean()), float(common.mean().abs().log().abs())


def relate(
    full: Halves, model: Halves, head: int, *, scaled: bool
) -> tuple[Kind, float, float, Float[Tensor, "dim dim"] | None]:
    """The relation of one head, the share of energy that it leaves unexplained, that of no change, and the transform.

    `scaled` is what `rescaled` said of the layer. A rotation is only looked for where the simpler relation fails. It is
    fitted on every second token and judged on the others; shares are of what no multiple of the fit explains.
    """
    a, b = torch.cat([half[head] for half in full]), torch.cat([half[head] for half in model])
    as_is = _unexplained(a, b)
    scale = None
    if scaled:
        x, y = a - a.mean(0), b - b.mean(0)
        scale = torch.diag((x * y).sum(0) / _energy(x, 0))
    left = as_is if scale is None else _unexplained(a @ scale, b)
    free = sum(
        _unexplained(full[1 - i][head] @ torch.linalg.lstsq(full[i][head], model[i][head]).solution, model[1 - i][head])
        for i in (0, 1)
    )
    if _is_right(left, free / 2):
        return "same" if scale is None else "scale", left, as_is, scale
    rotation = nearest_rotation(a[::2], b[::2])
    rotated = _unexplained(a[1::2] @ rotation, b[1::2])
    if rotated < left / 2 and _is_right(rotated, free / 2):  # unrotated, a rotated head looks like a stranger: left ≈ 1
        return "rotation", rotated, as_is, rotation
    return "other", min(left, rotated), as_is, None


def _is_right(left: float, free: float) -> bool:
    return left <= REFUSE and not (left > MIXED and free < left / 10)


def nearest_rotation(a: Float[Tensor, "token dim"], b: Float[Tensor, "token dim"]) -> Float[Tensor, "dim dim"]:
    """The orthogonal matrix R that minimises ‖b − a R‖ (Procrustes); one close to a Hadamard matrix becomes exact.

    Source: Schönemann, 1966.
    """
    u, _, vt = torch.linalg.svd(a.T @ b)
    rotation = u @ vt
    snapped = rotation.sign() / len(rotation) ** 0.5
    close = float((rotation - snapped).abs().max()) < 0.25 / len(rotation) ** 0.5
    exact = torch.allclose(snapped @ snapped.T, torch.eye(len(rotation), dtype=rotation.dtype), atol=1e-9)
    return snapped if close and exact else rotation


def _unexplained(fit: Float[Tensor, "token dim"], rows: Float[Tensor, "token dim"]) -> float:
    """1 − cos² of the angle between `fit` and `rows`: 0 for equal ones, 1 for unrelated ones, whatever their size."""
    size = fit.square().sum() * rows.square().sum()
    return float(1 - (fit * rows).sum().clamp(min=0).square() / size.clamp(min=1e-60))


def _energy(rows: Tensor, tokens: int = 1) -> Tensor:
    return rows.square().sum(tokens).clamp(min=1e-30)
