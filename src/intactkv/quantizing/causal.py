"""Calibrate with the attention that the model has: llm-compressor 0.14 leaves the mask out for some architectures.

It traces a model and calls its blocks one by one, with eager attention. Where a model picks the function that makes its
mask at run time (Mistral, Phi-3 and others of transformers 5), the trace holds no mask, and eager attention without one
is not causal: every token sees the whole window, and the quantizer learns from activations that the model never has.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from intactkv.decoder import HIDDEN_STATES, Argument, blocks, cache_name, hooked


@contextmanager
def causal(model: PreTrainedModel) -> Iterator[None]:
    """While it is open, a block of `model` that is called without a mask gets the one that the model would make."""
    with hooked([hook for i, block in enumerate(blocks(model)) for hook in _hook_block(model, i, block)]):
        yield


def _hook_block(model: PreTrainedModel, layer: int, block: nn.Module) -> Iterator[Any]:
    if "attention_mask" not in inspect.signature(block.forward).parameters:
        return
    attention_mask = Argument.of(block.forward, "attention_mask")

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, given = HIDDEN_STATES.read(args, kwargs), attention_mask.read(args, kwargs)
        if given is not None or hidden.is_meta or model.config._attn_implementation != "eager":
            return None
        return attention_mask.replaced(args, kwargs, _mask(model, layer, hidden))

    yield block.register_forward_pre_hook(enter, with_kwargs=True)


def _mask(model: PreTrainedModel, layer: int, hidden: Tensor) -> Any:
    """The mask of whole windows without padding, of the layer's own type."""
    config = model.config.get_text_config(decoder=True)
    rows, length = hidden.shape[-3:-1]
    masks = create_masks_for_generate(
        config=config,
        inputs_embeds=hidden.new_empty(rows, length, 0),
        attention_mask=None,
        position_ids=torch.arange(length, device=hidden.device)[None],
        **{cache_name(create_masks_for_generate): None},
    )
    return masks[config.layer_types[layer]] if isinstance(masks, dict) else masks
