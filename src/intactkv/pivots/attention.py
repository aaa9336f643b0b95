"""Watch every attention layer of a model while it runs, without ever holding a map of token × token.

Three ways, by what the model has. Ordinary softmax attention (eager, SDPA, flash, flex) is done by ourselves in blocks
of queries, from the queries and keys that transformers' AttentionInterface hands over, with the same output. Another
registered function (sigmoid attention, say) is asked for its weights: shown one-hot values, its outputs *are* the
weights. Models outside the interface are not seen here (see `measure`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intactkv.error import IntactKVError
from intactkv.pivots.weights import Rule, weight_blocks, weighted

LONGEST_MAP = 2048  # tokens, where whole maps of one layer cannot be avoided
_SOFTMAX = {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}

# Shown a slice of queries and its weights (batch, head, row, key).
Blocks = Callable[[slice, Tensor], None]


@dataclass(frozen=True, eq=False)
class Attended:
    """What one layer's attention got in one forward: queries `(batch, head, token, dim)`, keys and values
    `(batch, kv_head, token, dim)` after RoPE, its rule (None if it is no softmax), and the module itself."""

    layer: int
    module: nn.Module
    query: Float[Tensor, "batch head token dim"]
    key: Float[Tensor, "batch kv_head token dim"]
    value: Float[Tensor, "batch kv_head token dim"]
    rule: Rule | None


@contextmanager
def watched_attention(model: PreTrainedModel, look: Callable[[Attended], Blocks | None]) -> Iterator[bool]:
    """While it is open, `look` is called for each attention layer and may return a function to be shown its weights.

    Gives False, and `look` is never called, for models that do not use transformers' AttentionInterface. For calls
    with `input_ids` alone: no padding, nothing in the cache. The model computes what it would compute without.
    """
    before = str(getattr(model.config, "_attn_implementation", "eager"))
    if before not in _SOFTMAX:
        own = ALL_ATTENTION_FUNCTIONS[before]
        ALL_ATTENTION_FUNCTIONS[before] = _probing(own, look)  # on this instance, over the registered one
        try:
            yield True
        finally:
            del ALL_ATTENTION_FUNCTIONS[before]
        return
    name = f"intactkv-watched-{id(look)}"  # no mask is registered under it, so that none is made
    ALL_ATTENTION_FUNCTIONS[name] = _in_blocks(model, look)
    try:
        with _quietly_set(model, name):
            yield str(getattr(model.config.get_text_config(decoder=True), "_attn_implementation", "")) == name
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


@contextmanager
def _quietly_set(model: PreTrainedModel, name: str) -> Iterator[None]:
    from transformers.utils import logging

    before, verbosity = getattr(model.config, "_attn_implementation", "eager"), logging.get_verbosity()
    logging.set_verbosity_error()  # a model outside the interface keeps its own attention, and says so at length
    try:
        model.set_attn_implementation(name)
    finally:
        logging.set_verbosity(verbosity)
    try:
        yield
    finally:
        if getattr(model.config, "_attn_implementation", None) != before:
            model.set_attn_implementation(before)


def _in_blocks(model: PreTrainedModel, look: Callable[[Attended], Blocks | None]) -> Any:
    chunk = getattr(model.config.get_text_config(decoder=True), "attention_chunk_size", None)

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        rule = _rule(module, query, attention_mask, kwargs)
        if chunk is not None and query.shape[2] > chunk:
            raise IntactKVError(
                f"{query.shape[2]} tokens are more than one attention chunk of {model.config.model_type}; give texts "
                f"of at most {chunk} tokens"
            )
        blocks = look(Attended(module.layer_idx, module, query, key, value, rule))
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        for rows, weights in weight_blocks(query, key, rule):
            output[:, :, rows] = weighted(weights, value).to(output.dtype)
            if blocks is not None:
                blocks(rows, weights)
        return output.transpose(1, 2).contiguous(), None

    return attend


def _rule(module: Any, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Rule:
    if kwargs.get("position_bias") is not None:
        raise IntactKVError(
            f"{type(module).__name__} adds a position bias to its logits, which is not watched here; use another model"
        )
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scaling = kwargs.get("scaling")
    return Rule(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=bool(causal) and mask is None,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=None if kwargs.get("s_aux") is None else kwargs["s_aux"].detach(),
        mask=mask,
    )


def _probing(own: Any, look: Callable[[Attended], Blocks | None]) -> Any:
    """The model's own attention function, which is asked again, with one-hot values, where weights are wanted."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        blocks = look(Attended(module.layer_idx, module, query, key, value, None))
        if blocks is not None:
            tokens, width = value.shape[2:]
            if tokens > LONGEST_MAP:
                raise IntactKVError(
                    f"{tokens} tokens are too long for a model with an attention function of its own; give windows of "
                    f"at most {LONGEST_MAP}"
                )
            columns = []
            for start in range(0, tokens, width):
                probe = torch.zeros_like(value)
                at = torch.arange(start, min(start + width, tokens), device=value.device)
                probe[:, :, at, at - start] = 1
                columns.append(own(module, query, key, probe, *args, **kwargs)[0][..., : len(at)])
            weights = torch.cat(columns, -1).transpose(1, 2).float()  # (batch, head, query, key)
            blocks(slice(0, tokens), weights)
        return own(module, query, key, value, *args, **kwargs)

    return attend
