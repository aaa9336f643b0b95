"""What shows a pivot, per layer and position: massive hidden states, attention received, sizes of keys and values.

One pass over a few windows of token ids. Everything is reduced where it arises: no attention map, no hidden state and
no key outlives its layer, and the output head is not run, so that a long text needs memory in proportion to its length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.capturing.record import Watched
from intactkv.decoder import blocks, cache_name, input_device, key_bias, watched_outputs
from intactkv.error import IntactKVError
from intactkv.pivots.attention import LONGEST_MAP, Attended, Blocks, watched_attention
from intactkv.positions import check_tokens

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class PivotMap:
    """Measurements `(layer, window, token)` in float32 on the CPU; NaN where a layer has no such thing.

    `largest` is max |hidden state| after the block and `channel` where it stands. `received` is the attention that
    later tokens give this one, averaged over heads and over those tokens; `best_head` the same in the head that
    gives it most; NaN at the last token, which has no later ones. `key_norm` and `value_norm` are root mean squares
    over heads of ‖k‖₂ and ‖v‖₂ as handed to the cache. `key_bias` `(layer)` is the share of the keys' energy that is
    the key projection's bias, 0 without one.

    Source of `largest`: Sun et al., "Massive activations in large language models", arXiv 2402.17762.
    """

    ids: Int[Tensor, "window token"]
    largest: Float[Tensor, "layer window token"]
    channel: Int[Tensor, "layer window token"]
    received: Float[Tensor, "layer window token"]
    best_head: Float[Tensor, "layer window token"]
    key_norm: Float[Tensor, "layer window token"]
    value_norm: Float[Tensor, "layer window token"]
    key_bias: Float[Tensor, "layer"]

    @property
    def ratio(self) -> Float[Tensor, "layer window token"]:
        """`largest` over the same at the window's median token: how massive a token is in each layer."""
        return self.largest / self.largest.median(-1, keepdim=True).values.clamp(min=1e-30)

    @property
    def strength(self) -> Float[Tensor, "window token"]:
        """The largest `ratio` over the layers."""
        return self.ratio.amax(0)


@dataclass(frozen=True)
class LayerPivot:
    """How strong the first token's pivot is in one layer, averaged over windows.

    `ratio`: the largest |hidden state| after the block at the first token over the same at the median token (a
    massive activation, arXiv 2402.17762). `mass`: the share of attention that later tokens give the first, averaged
    over heads and queries; `best_head`: the same in the head that gives it most. Both None in layers without
    attention.
    """

    layer: int
    ratio: float
    mass: float | None
    best_head: float | None


def uniform_mass(length: int) -> float:
    """The attention mass on the first token if each of the later queries attended uniformly."""
    return sum(1 / (t + 1) for t in range(1, length)) / (length - 1)


def first_token_pivots(measured: PivotMap) -> list[LayerPivot]:
    """The pivot at the first token of each window, in every layer."""

    def number(value: Tensor) -> float | None:
        return None if value.isnan() else float(value)

    first = [values[:, :, 0].mean(1) for values in (measured.ratio, measured.received, measured.best_head)]
    return [
        LayerPivot(layer, float(ratio), number(mass), number(best))
        for layer, (ratio, mass, best) in enumerate(zip(*first, strict=True))
    ]


def mean_mass(pivots: Iterable[LayerPivot]) -> float:
    """The share of attention that the first token gets, a mean over the layers that have attention; NaN if none has.

    >>> mean_mass([LayerPivot(0, 1.0, 0.25, 0.5), LayerPivot(1, 1.0, None, None), LayerPivot(2, 90.0, 0.75, 1.0)])
    0.5
    """
    masses = [pivot.mass for pivot in pivots if pivot.mass is not None]
    return sum(masses) / len(masses) if masses else math.nan


@torch.inference_mode()
def measure(model: PreTrainedModel, ids: Int[Tensor, "window token"]) -> PivotMap:
    """Measure every layer and position of `ids`, in one pass.

    At most `TOKENS_AT_ONCE` tokens, or one window, are run at a time. Attention is watched in blocks of queries, for
    any model that uses transformers' AttentionInterface; older ones (GPT-J, Falcon, Bloom, MPT) must be asked for one
    layer map after the other, which limits their windows to 2048 tokens. Raises `IntactKVError` for windows of fewer
    than two tokens, models in training mode, and longer windows where maps are needed.
    """
    if ids.ndim != 2 or ids.shape[1] < 2 or not len(ids):
        raise IntactKVError(f"ids has shape {tuple(ids.shape)}; give (window, token) with at least two tokens each")
    check_tokens(model.config, ids, "a window")
    if model.training:
        raise IntactKVError("the model is in training mode, which makes measurements random; call model.eval() first")
    parts = [_measure_batch(model, part) for part in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1]))]
    joined = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    energy = joined.pop("key_energy").mean((1, 2))  # over all tokens, summed over heads
    biases = [key_bias(block) for block in blocks(model)]
    sizes = torch.tensor([0.0 if b is None else float(b.float().square().sum()) for b in biases])
    return PivotMap(ids=ids.cpu(), key_bias=sizes / energy, channel=joined.pop("channel").long(), **joined)


def _measure_batch(model: PreTrainedModel, ids: Int[Tensor, "window token"]) -> dict[str, Tensor]:
    layers = len(blocks(model))
    names = "largest channel received best_head key_norm value_norm key_energy".split()  # noqa: SIM905
    found = {name: torch.full((layers, *ids.shape), torch.nan) for name in names}

    def look_hidden(layer: int, hidden: Tensor) -> None:
        largest = hidden.float().abs().max(-1)  # over hidden: (window, token)
        found["largest"][layer], found["channel"][layer] = largest.values.cpu(), largest.indices.cpu().float()

    def look_kv(layer: int, key: Tensor, value: Tensor) -> None:
        for name, x in (("key_norm", key), ("value_norm", value)):
            squares = x.float().square().sum(-1).cpu()  # (window, head, token)
            found[name][layer] = squares.mean(1).sqrt()
            if x is key:
                found["key_energy"][layer] = squares.sum(1)

    def look_attention(call: Attended) -> Blocks:
        total = Received(ids.shape[1])
        found_now = (found["received"], found["best_head"])

        def block(rows: slice, weights: Tensor) -> None:
            total.add(rows, weights)
            if rows.stop == ids.shape[1]:
                for into, value in zip(found_now, total.over_heads(), strict=True):
                    into[call.layer] = value.cpu()

        return block

    ids = ids.to(input_device(model))
    with watched_attention(model, look_attention) as sees_attention, watched_outputs(model, look_hidden):
        cache = {cache_name(model.base_model.forward): Watched(model, look_kv)}
        model.base_model(input_ids=ids, use_cache=True, **cache)
    if not sees_attention:
        _add_maps_(model, ids, found)
    return found


class Received:
    """The attention each token gets from later ones, summed block by block of queries: `(batch, head, token)`."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.sums: Tensor | None = None

    def add(self, rows: slice, weights: Float[Tensor, "batch head row key"]) -> None:
        """Count the weights of the queries in `rows`, each token's on itself left out."""
        if self.sums is None:
            self.sums = weights.new_zeros(*weights.shape[:2], self.length)
        later = weights.sum(2)
        own = weights.diagonal(rows.start, dim1=2, dim2=3)
        self.sums[:, :, : weights.shape[3]] += later
        self.sums[:, :, rows] -= own

    def over_heads(self) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token"]]:
        """Mean over later queries, then mean over heads, and the largest head's; NaN at the last token."""
        if self.sums is None:
            raise IntactKVError("no attention was seen; measure a model with attention layers")
        later = torch.arange(self.length - 1, -1, -1, device=self.sums.device)
        received = (self.sums / later).masked_fill(later == 0, torch.nan)
        return received.mean(1), received.amax(1)


def _add_maps_(model: PreTrainedModel, ids: Int[Tensor, "window token"], found: dict[str, Tensor]) -> None:
    """Attention received from the maps that the model gives itself, one window at a time."""
    if ids.shape[1] > LONGEST_MAP:
        raise IntactKVError(
            f"{ids.shape[1]} tokens are too long for {model.config.model_type}, which must give whole attention maps; "
            f"give windows of at most {LONGEST_MAP} tokens"
        )
    for window in range(len(ids)):
        maps = model.base_model(input_ids=ids[window : window + 1], use_cache=False, output_attentions=True).attentions
        if not maps or maps[0] is None:
            return  # it stays NaN: this model shows its attention to nobody
        for layer, weights in enumerate(maps):
            causal = weights.float().tril()  # Falcon's map, made without a mask, looks ahead; its output does not
            total = Received(ids.shape[1])
            total.add(slice(0, ids.shape[1]), causal / causal.sum(-1, keepdim=True))
            mean, best = total.over_heads()
            found["received"][layer, window], found["best_head"][layer, window] = mean[0].cpu(), best[0].cpu()
