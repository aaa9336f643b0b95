"""Where a model's pivots are: massive hidden states and attention sinks at the first token, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.kv import IntactKVError


@dataclass(frozen=True)
class LayerPivot:
    """How strong the first token's pivot is in one layer, averaged over windows.

    `ratio`: the largest |hidden state| after the block at the first token over the same at the median token (a
    massive activation, arXiv 2402.17762); None for the last block, whose output transformers gives only after the
    final norm. `mass`: the share of attention that later tokens give the first, averaged over heads and queries;
    `best_head`: the same in the head that gives it most.
    """

    layer: int
    ratio: float | None
    mass: float
    best_head: float


def uniform_mass(length: int) -> float:
    """The attention mass on the first token if each of the later queries attended uniformly."""
    return sum(1 / (t + 1) for t in range(1, length)) / (length - 1)


@torch.inference_mode()
def first_token_pivots(model: PreTrainedModel, ids: Int[Tensor, "window token"]) -> list[LayerPivot]:
    """Measure the pivot at the first token of each window, in every attention layer.

    Needs attention maps, so it runs eager attention and holds (layer, window, head, token, token) floats: keep
    windows few and short. Raises `IntactKVError` for windows of fewer than two tokens and for models that give no
    attention maps.
    """
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise IntactKVError(f"ids has shape {tuple(ids.shape)}; give (window, token) with at least two tokens each")
    with _eager_attention(model):
        out = model(ids.to(model.device), use_cache=False, output_attentions=True, output_hidden_states=True)
    if not out.attentions:
        raise IntactKVError(f"{model.config.model_type} returns no attention maps; its sinks cannot be measured")
    blocks = len(out.hidden_states) - 1
    pivots = []
    for layer, attention in enumerate(out.attentions):
        mass = attention[:, :, 1:, 0].float().mean((0, 2))  # (head,), over windows and queries
        ratio = None
        if layer < blocks - 1:
            largest = out.hidden_states[layer + 1].float().abs().amax(-1)  # (window, token)
            ratio = float((largest[:, 0] / largest.median(1).values).mean())
        pivots.append(LayerPivot(layer, ratio, float(mass.mean()), float(mass.max())))
    return pivots


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    before = getattr(model.config, "_attn_implementation", "eager")
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
