"""The error budget on a real pair of models: full and quantized, the same tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.attaching.handle import attach
from intactkv.capturing.live import capture
from intactkv.decoder import input_device, output_weight, watched_outputs
from intactkv.error import IntactKVError
from intactkv.pivots.attention import Attended, watched_attention
from intactkv.pivots.budget import Pair, energy_left, error_bound, output_error, token_shares


@dataclass(frozen=True, eq=False)
class LayerBudget:
    """The error of one layer's attention outputs that comes from its keys and values, over all windows.

    `carried` `(head, token)` is the share of the first-order error energy that the token at each position carries
    (sums to 1 over tokens for each head). `left` `(size, head)` is the exact error energy with the first `sizes[n]`
    tokens intact, over that with none; `energy` `(head)` the latter. `tightness` is the median of error over bound,
    and `largest` its maximum, which is at most 1. `projected` says whether errors are behind the output projection
    W_O, or before it where it was not found.
    """

    layer: int
    sizes: tuple[int, ...]
    carried: Float[Tensor, "head token"]
    left: Float[Tensor, "size head"]
    energy: Float[Tensor, "head"]
    tightness: float
    largest: float
    projected: bool

    @property
    def layer_carried(self) -> Float[Tensor, "token"]:
        """The share each token carries of all heads' error energy together."""
        return (self.carried * self.energy[:, None]).sum(0) / self.energy.sum()

    @property
    def layer_left(self) -> Float[Tensor, "size"]:
        """All heads' error energy that is left, over that with nothing intact."""
        return (self.left * self.energy).sum(1) / self.energy.sum()


@torch.inference_mode()
def error_budget(
    full: PreTrainedModel,
    model: PreTrainedModel,
    windows: Int[Tensor, "window token"],
    *,
    sizes: Sequence[int] = (0, 1, 2, 4, 8),
) -> list[LayerBudget]:
    """Measure, for each attention layer, which tokens carry the error of its outputs and what intact ones remove.

    Both models read `windows` with their own weights; in each layer the full model's queries meet its own keys and
    values and those of `model`, so that the error is what `model`'s cache does to the full model's attention. Holds the
    full model's queries, keys and values of one window at a time; sums in float64. Raises `IntactKVError` where the
    models do not attend by softmax through transformers' AttentionInterface, or have different layers.
    """
    if not sizes or sizes[0] != 0 or list(sizes) != sorted(set(sizes)) or sizes[-1] > windows.shape[1]:
        raise IntactKVError(
            f"sizes={list(sizes)} must begin with 0, rise, and end at most at the windows' length {windows.shape[1]}"
        )
    sums: dict[int, dict[str, Tensor]] = {}
    bounds: dict[int, list[Tensor]] = {}
    projected: dict[int, bool] = {}
    for window in windows:
        for layer, pair in layer_pairs(full, model, window).items():
            found, tightness = _measured(pair, sizes)
            projected[layer] = pair.output_weight is not None
            bounds.setdefault(layer, []).append(tightness)
            old = sums.get(layer)
            sums[layer] = found if old is None else {name: old[name] + x for name, x in found.items()}
    budgets = []
    for layer, found in sums.items():
        energy = found["left"][0]
        budgets.append(
            LayerBudget(
                layer=layer,
                sizes=tuple(sizes),
                carried=found["carried"] / found["carried"].sum(1, keepdim=True).clamp(min=1e-300),
                left=found["left"] / energy.clamp(min=1e-300),
                energy=energy,
                tightness=float(torch.cat(bounds[layer]).median()),
                largest=float(torch.cat(bounds[layer]).max()),
                projected=projected[layer],
            )
        )
    return budgets


@torch.no_grad()
def layer_pairs(full: PreTrainedModel, model: PreTrainedModel, window: Int[Tensor, "token"]) -> dict[int, Pair]:
    """Each attention layer's full queries, keys and values and `model`'s keys and values, for one window, in float64.

    Raises as `error_budget` does.
    """
    ours, theirs = _attended(full, window), _attended(model, window)
    if ours.keys() != theirs.keys():
        raise IntactKVError(
            f"the full model attends in layers {sorted(ours)}, the other in {sorted(theirs)}; give the model it was "
            "quantized from"
        )
    return {layer: _pair(ours[layer], theirs[layer]) for layer in sorted(ours)}


def _measured(pair: Pair, sizes: Sequence[int]) -> tuple[dict[str, Tensor], Float[Tensor, "token"]]:
    error, bound = output_error(pair).norm(dim=-1), error_bound(pair)
    tightness = (error / bound.clamp(min=1e-300)).flatten().cpu()
    return {"carried": token_shares(pair)[0].cpu(), "left": energy_left(pair, sizes).cpu()}, tightness


def _attended(model: PreTrainedModel, window: Int[Tensor, "token"]) -> dict[int, Attended]:
    """What each layer's attention got for one window, in float64."""
    calls: dict[int, Attended] = {}

    def look(call: Attended) -> None:
        if call.rule is None:
            raise IntactKVError(
                f"{model.config.model_type} has an attention function of its own; the error budget needs softmax"
            )
        query, key, value = (x[0].double() for x in (call.query, call.key, call.value))
        calls[call.layer] = replace(call, query=query, key=key, value=value)

    with watched_attention(model, look) as sees:
        if not sees:
            raise IntactKVError(
                f"{model.config.model_type} does not use transformers' AttentionInterface, through which the error "
                "budget sees queries, keys and values; use a model that does"
            )
        model.base_model(input_ids=window[None].to(input_device(model)), use_cache=False)
    return calls


def _pair(ours: Attended, theirs: Attended) -> Pair:
    if ours.key.shape != theirs.key.shape or ours.value.shape != theirs.value.shape or ours.rule is None:
        raise IntactKVError(
            f"layer {ours.layer}'s keys have shape {tuple(ours.key.shape)} in the full model and "
            f"{tuple(theirs.key.shape)} in the other; give the model it was quantized from"
        )
    weight = output_weight(ours.module)
    heads, width = len(ours.query), ours.value.shape[-1]
    by_head = weight.double().reshape(heads, width, -1) if weight is not None and len(weight) == heads * width else None
    key, value = theirs.key.to(ours.key.device), theirs.value.to(ours.key.device)
    return Pair(ours.query, ours.key, ours.value, key, value, ours.rule, by_head)


@torch.inference_mode()
def mse_by_prefix_size(
    full: PreTrainedModel, model: PreTrainedModel, windows: Int[Tensor, "window token"], *, most: int = 8
) -> Float[Tensor, "size layer"]:
    """Block-output MSE of `model` against `full` with the first 0, 1, … `most` tokens of each window intact.

    Mean over hidden dimensions and over the positions from `most` on, the same for every size, and over windows;
    float64 `(most + 1, layer)`. Each window is its own prefix: (most + 3) short passes for each.

    Source: Liu et al., arXiv 2403.01241, the figure of MSE against the size of the intact prefix.
    """
    if not 1 <= most < windows.shape[1] - 1:
        raise IntactKVError(f"most={most} must lie between 1 and the windows' length {windows.shape[1]} less 2")
    sums = []
    for window in windows:
        kv = capture(full, window[:most])
        want = _block_outputs(full, window, None)
        rows = []
        for size in range(most + 1):
            got = _block_outputs(model, window, shortened(kv, size) if size else None)
            errors = [(g.cpu() - w.cpu())[most:].double().square().mean() for g, w in zip(got, want, strict=True)]
            rows.append(torch.stack(errors))
        sums.append(torch.stack(rows))
    return torch.stack(sums).mean(0)


def shortened(kv: IntactKV, size: int) -> IntactKV:
    """The intact KV of the first `size` tokens of `kv`'s prefix: causality makes it the captured one's beginning."""
    if not 1 <= size <= len(kv):
        raise IntactKVError(f"size={size} must lie between 1 and the {len(kv)} tokens of this intact KV")
    layers = {i: (key[:, :size], value[:, :size]) for i, (key, value) in kv.layers.items()}
    return replace(kv, ids=kv.ids[:size], layers=layers, logits=None if kv.logits is None else kv.logits[:size])


def _block_outputs(model: PreTrainedModel, window: Int[Tensor, "token"], kv: IntactKV | None) -> list[Tensor]:
    """Every block's output `(token, hidden)` in float32."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> None:
        outputs[layer] = hidden[0].float()

    with attach(model, kv, check=False) if kv is not None else nullcontext(), watched_outputs(model, keep):
        model(input_ids=window[None].to(input_device(model)), use_cache=False)
    return [outputs[i] for i in sorted(outputs)]


def drops(mse: Float[Tensor, "size"], *, least: float = 0.02) -> list[int]:
    """The prefix sizes at which the error falls suddenly: by a share of `least` and by 3 times the median step.

    >>> drops(torch.tensor([1.0, 0.2, 0.19, 0.18, 0.17]))
    [1]
    """
    falls = (mse[:-1] - mse[1:]) / mse[0].clamp(min=1e-30)
    usual = falls.abs().median()
    return [i + 1 for i, fall in enumerate(falls.tolist()) if fall >= least and fall >= 3 * float(usual)]
