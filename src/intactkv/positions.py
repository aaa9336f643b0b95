"""Which ids and how many positions a model knows. Beyond them it fails, or goes wrong without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig

from intactkv.error import IntactKVError

_BY_FACTOR = ("linear", "dynamic", "yarn")  # rotary scalings whose factor stretches what the model was trained on


def most_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the model was made for; None where nothing bounds it (ALiBi) or the config is silent.

    `max_position_embeddings` is the scaled length by convention in some RoPE scalings, and the trained one in others:
    the larger of it and of what the scaling's factor makes of the trained length is taken.
    """
    decoder = config.get_text_config(decoder=True)
    limit = getattr(decoder, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(decoder, "alibi", False):
        return None
    for kind in rope_kinds(config):
        if kind.get("rope_type") in _BY_FACTOR:
            trained = kind.get("original_max_position_embeddings") or decoder.max_position_embeddings
            limit = max(limit, int(trained * float(kind.get("factor") or 1)))
    return limit


def rope_kinds(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """The decoder's RoPE parameters: one mapping, or as many as it has kinds of layers; an empty one without RoPE."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return [kind for kind in rope.values() if isinstance(kind, Mapping)] or [rope]


def check_positions(config: PreTrainedConfig, count: int, what: str) -> None:
    """Raise `IntactKVError` where `count` tokens, which `what` names, are more than the model has positions for."""
    limit = most_positions(config)
    if limit is not None and count > limit:
        raise IntactKVError(
            f"{what} takes {count} positions, but {config.model_type} has {limit} (max_position_embeddings and RoPE "
            "scaling): beyond them its output is wrong or fails; use fewer tokens, or a model made for more"
        )


def check_tokens(config: PreTrainedConfig, ids: Int[Tensor, "window token"], what: str) -> None:
    """As `check_positions` for windows, each of which `what` names, and for ids that are not in the vocabulary."""
    smallest, largest, vocab = int(ids.min()), int(ids.max()), config.get_text_config(decoder=True).vocab_size
    if smallest < 0 or largest >= vocab:
        raise IntactKVError(
            f"{what} holds ids from {smallest} to {largest}, outside the vocabulary of {vocab}; tokenize with this "
            "model's tokenizer"
        )
    check_positions(config, ids.shape[1], what)
