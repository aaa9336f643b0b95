"""The *planted* model: a tiny Llama whose weights are edited so that its pivot, and what an intact KV does, is known.

For tests only; the embedded model's pivots are its own. Construction, on a random Llama with hidden size 64:

- Channel 0 of the residual stream belongs to [BOS]: its embedding is `MASSIVE` there and every other token's is 0, and
  no layer writes into the channel (row 0 of o_proj and down_proj is zero). So [BOS], and nothing else, carries a
  massive activation through all layers.
- Channel 1 is 1 for every other token and nothing writes into it either, so that every query can have a fixed part.
- In every head, the pair of dimensions that RoPE turns slowest gets a key of `SINK` from channel 0 and a query of 1
  from channel 1: every query looks at [BOS], wherever it stands.

What follows: damage to column 0 of k_proj and v_proj touches the keys and values of [BOS] and nothing else, so its
intact KV must undo it *wholly*; damage to lm_head leaves keys and values alone, so it must undo *nothing*.
"""

from __future__ import annotations

import copy

import torch
from models import PREFIX, build, by_name
from transformers import PreTrainedModel

BOS = PREFIX[0]
MASSIVE, SINK = 500.0, 12.0


@torch.no_grad()
def planted() -> PreTrainedModel:
    """The model of this file's text: 4 heads, 2 of them for keys and values, 3 layers, head size 16."""
    model = build(
        by_name("llama-gqa"), tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    hidden, dim = model.config.hidden_size, model.config.head_dim
    embedding = model.get_input_embeddings().weight
    embedding[:, 0], embedding[:, 1] = 0.0, 1.0
    embedding[BOS, 0], embedding[BOS, 1] = MASSIVE, 0.0
    for layer in model.model.layers:
        attention = layer.self_attn
        for writer in (attention.o_proj.weight, layer.mlp.down_proj.weight):
            writer[:2] = 0
        query, key = attention.q_proj.weight.view(-1, dim, hidden), attention.k_proj.weight.view(-1, dim, hidden)
        slowest = dim // 2 - 1  # of the pair (slowest, slowest + dim/2)
        query[:, slowest], key[:, slowest] = 0, 0
        query[:, slowest, 1] = dim**0.5
        key[:, slowest, 0] = SINK / hidden**0.5  # the norm turns [BOS] into sqrt(hidden) in channel 0
    return model


@torch.no_grad()
def damaged(model: PreTrainedModel, where: str, amount: float = 0.3) -> PreTrainedModel:
    """A copy with noise on what only [BOS] reads (`"bos"`), or on the output head alone (`"head"`)."""
    model = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(0)
    if where == "head":
        head = model.lm_head.weight
        head.mul_(1 + amount * torch.randn(head.shape, generator=noise))
        return model
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            column = projection.weight[:, 0]
            column += amount * column.abs().max() * torch.randn(column.shape, generator=noise)
    return model
