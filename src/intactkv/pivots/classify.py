"""Tell pivots apart: any first token, this token wherever it stands, or no pivot at all but a large key bias.

Three measurements. Plain text without [BOS], cut anywhere, shows whether *any* first token becomes massive. Candidates
are then put into that text, at its beginning and inside it, and measured again: what is massive there, is so because of
what it is. Text behind [BOS] finally shows which later tokens draw attention. A large key bias (Qwen2) looks like none
of these and ruins low-bit keys all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.error import IntactKVError
from intactkv.pivots.measure import PivotMap, measure

PIVOT = 20.0  # a pivot's hidden state is so many times the median token's; large models reach 1000
ALWAYS = 0.8  # the share of trials in which something must hold to be said of a token or a position
SINK = 0.1  # attention received from later tokens, over the upper half of the layers, and ten times the uniform share
KEY_BIAS = 0.5  # the share of the keys' energy in one layer that is trouble for low-bit keys
FIRST = 4  # positions that can be pivots by themselves
MOST_CANDIDATES = 8

Kind = Literal["position", "token", "start"]


@dataclass(frozen=True)
class Pivot:
    """A pivot by its cause. `kind` "position": any token at `position`; "token": this id, wherever it first stands;
    "start": this id, at the beginning only. `strength` is the median ratio of its hidden state to the median token's
    in the layer where that is largest, `channel` the hidden dimension that carries it, `layers` those in which it is
    a pivot, `share` the part of the trials in which it was one.
    """

    kind: Kind
    position: int | None
    token: int | None
    strength: float
    channel: int
    layers: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class Sink:
    """A token beyond the pivots that draws attention: mean share from later tokens over the upper layers."""

    window: int
    position: int
    token: int
    mass: float


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` found: pivots, sinks beyond them, layers with a large key bias, and the three maps' last one.

    `key_bias` maps layers to the share of their keys' energy that is bias, where it is above `KEY_BIAS`. `behind` is
    the measurement of the text behind [BOS] (or of the plain text, where there is none).
    """

    pivots: tuple[Pivot, ...]
    sinks: tuple[Sink, ...]
    key_bias: dict[int, float]
    behind: PivotMap


def diagnose(model: PreTrainedModel, windows: Int[Tensor, "window token"], *, bos: int | None) -> Diagnosis:
    """Find and tell apart the pivots of `model` on `windows` of plain text that hold no [BOS].

    `bos` is the id that the tokenizer puts first, None if there is none. Three batched passes. Raises `IntactKVError`
    for fewer than 4 windows or fewer than 32 tokens each, on which nothing can be told.
    """
    if windows.ndim != 2 or len(windows) < 4 or windows.shape[1] < 32:
        raise IntactKVError(f"windows have shape {tuple(windows.shape)}; give at least 4 of at least 32 tokens each")
    plain = measure(model, windows)
    pivots = _by_position(plain)
    candidates = _candidates(plain, {p.position for p in pivots}, bos)
    pivots += _by_token(model, windows, candidates, any_first=bool(pivots))
    if bos is None:
        behind = plain
    else:
        behind = measure(model, torch.cat([windows.new_full((len(windows), 1), bos), windows[:, :-1]], 1))
    biased = {i: float(share) for i, share in enumerate(behind.key_bias) if share > KEY_BIAS}
    return Diagnosis(tuple(pivots), tuple(sinks(behind)), biased, behind)


def outside(measured: PivotMap, prefix: int) -> Counter[int]:
    """How often each token id is a pivot at or after position `prefix`, over all windows."""
    massive = measured.strength[:, prefix:] >= PIVOT
    return Counter(measured.ids[:, prefix:][massive].tolist())


def without_pivot(model: PreTrainedModel, windows: Int[Tensor, "window token"], *, size: int) -> str | None:
    """One sentence where the first `size` tokens of `windows` hold no pivot while later ones are pivots; else None.

    An intact KV of such a prefix does nothing. Seen in Qwen2.5, whose pivot is any first token but `<|endoftext|>`.
    """
    measured = measure(model, windows)
    inside, beyond = measured.strength[:, :size].amax(1), measured.strength[:, size:].amax(1)
    if float(inside.median()) >= PIVOT or float((beyond >= PIVOT).float().mean()) < ALWAYS:
        return None
    window = int(beyond.argmax())
    at = size + int(measured.strength[window, size:].argmax())
    own, most, token = float(inside.median()), float(beyond.max()), int(windows[window, at])
    return (
        f"the prefix {windows[0, :size][:8].tolist()} holds no pivot (its hidden states reach {own:.1f} times the "
        f"median token's), while token {token} at position {at} does ({most:.0f} times): keeping this prefix intact "
        "does next to nothing; begin prompts with another token, as the chat template does, or let `--prefix auto` "
        "find one"
    )


def sinks(measured: PivotMap, *, most: int = 10) -> list[Sink]:
    """The strongest sinks that are neither among the first tokens nor pivots; a quarter of the window must follow."""
    attending = ~measured.received[:, :, 0].isnan().all(1)
    received = measured.received[attending]
    if not len(received):
        return []
    mass = received[len(received) // 2 :].mean(0)  # (window, token)
    length = mass.shape[1]
    # what a token at t would get from later ones if each attended uniformly
    uniform = torch.tensor(
        [sum(1 / (s + 1) for s in range(t + 1, length)) / max(1, length - 1 - t) for t in range(length)]
    )
    drawn = (mass >= SINK) & (mass >= 10 * uniform) & (measured.strength < PIVOT)
    drawn[:, :FIRST] = drawn[:, max(FIRST, length - length // 4) :] = False
    found = [Sink(w, t, int(measured.ids[w, t]), float(mass[w, t])) for w, t in drawn.nonzero().tolist()]
    return sorted(found, key=lambda sink: -sink.mass)[:most]


def _by_position(plain: PivotMap) -> list[Pivot]:
    """The first positions at which (nearly) any token is a pivot."""
    found = []
    for position in range(FIRST):
        trials = [(window, position) for window in range(len(plain.ids))]
        pivot = _pivot(plain, trials, kind="position", position=position)
        if pivot is None:
            break
        found.append(pivot)
    return found


def _candidates(plain: PivotMap, positions: set[int | None], bos: int | None) -> list[int]:
    beyond = outside(plain, len(positions))
    ids = [] if bos is None else [bos]
    return ids + [token for token, _ in beyond.most_common(MOST_CANDIDATES) if token != bos]


def _by_token(
    model: PreTrainedModel, windows: Int[Tensor, "window token"], candidates: Sequence[int], *, any_first: bool
) -> list[Pivot]:
    """Which candidates are massive when they are put into text in which they do not stand: one batched pass."""
    if not candidates:
        return []
    length = windows.shape[1]
    places = (0, length // 4, length // 2, 3 * length // 4)
    rows: list[Tensor] = []
    trials: list[tuple[int, int]] = []  # of each candidate: (row, position)
    for token in candidates:
        free = windows[(windows != token).all(1)]
        for i, place in enumerate(places):
            row = (free[i % len(free)] if len(free) else _without(windows[i], token)).clone()
            row[place] = token
            trials.append((len(rows), place))
            rows.append(row)
    measured = measure(model, torch.stack(rows))
    found = []
    for i, token in enumerate(candidates):
        own = trials[len(places) * i : len(places) * (i + 1)]
        inside = _pivot(measured, own[1:], kind="token", token=token)
        pivot = inside or (None if any_first else _pivot(measured, own[:1], kind="start", token=token))
        if pivot is not None:
            found.append(pivot)
    return found


def _without(row: Int[Tensor, "token"], token: int) -> Int[Tensor, "token"]:
    """A row with another of its own tokens where `token` stood."""
    other = row[row != token]
    if not len(other):
        raise IntactKVError(f"a window holds nothing but token {token}; give running text")
    return torch.where(row == token, other[0], row)


def _pivot(
    measured: PivotMap,
    trials: Sequence[tuple[int, int]],
    *,
    kind: Kind,
    position: int | None = None,
    token: int | None = None,
) -> Pivot | None:
    """The pivot that these (window, position) trials show, if nearly all of them do."""
    window, at = torch.tensor(trials).unbind(1)
    ratio = measured.ratio[:, window, at]  # (layer, trial)
    share = float((ratio.amax(0) >= PIVOT).float().mean())
    if share < ALWAYS:
        return None
    typical = ratio.median(1).values
    strongest = int(typical.argmax())
    channel = int(measured.channel[strongest, window, at].mode().values)
    layers = tuple((typical >= PIVOT).nonzero()[:, 0].tolist())
    return Pivot(kind, position, token, float(typical[strongest]), channel, layers, share)
