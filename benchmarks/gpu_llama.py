"""The Llamas that are timed: random ones of Llama-3-8B's shape, toys without a GPU, and a small one for checks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from gpu_clock import CUDA, DEVICE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


@dataclass(frozen=True)
class Size:
    """How much work a run does."""

    model: Mapping[str, int]
    prompt: int
    steps: int
    eager_steps: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    contexts_batches: tuple[int, ...]
    head_dim: int
    cold: int  # bytes that the layers which are read in turn must have together, to be no second-level cache's


FULL = Size(
    {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
     "num_attention_heads": 32, "num_key_value_heads": 8},
    512, 128, 32, (1, 8, 32), (4096, 16384, 65536), (1, 8), 128, 400_000_000,
)  # fmt: skip
TOY = Size(
    {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64,
     "num_attention_heads": 4, "num_key_value_heads": 2},
    40, 4, 2, (1, 2), (128,), (1,), 64, 1,
)  # fmt: skip


def eight_billion(layers: int) -> PreTrainedModel:
    """So many layers of Llama-3-8B's shape in bfloat16, for contexts of up to 131072 tokens."""
    torch.manual_seed(0)
    size = FULL if CUDA else TOY
    config = LlamaConfig(**{**size.model, "num_hidden_layers": layers, "vocab_size": 32000 if CUDA else 64},
                         max_position_embeddings=131072)  # fmt: skip
    if not CUDA:
        config.head_dim = size.head_dim
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def small() -> PreTrainedModel:
    """Two layers in float32, on which ways are compared before they are timed."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=256, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(DEVICE).eval()


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """The same parameters in another model."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
