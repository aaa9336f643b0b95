"""Two attentions that may attend to nothing, and therefore need no sink.

Sigmoid, the control model's: every weight stands for itself, and nothing is normalised over the keys.

    weights_i = sigmoid(q·k_i - log 512)

At first a head so takes about the mean of a window of 512; no token gains by another's loss (Ramapuram et al.,
arXiv:2409.04431; Gu et al., arXiv:2410.10781, found no sinks with it).

Softmax-plus-one, the first attempt at a control, which kept a sink in one layer:

    weights_i = exp(q·k_i) / (1 + Σ_j exp(q·k_j))

The 1 is a token with a zero key and a zero value in front of all others. A head with nothing to say gives its
weight to it, where ordinary softmax must park that weight on some token, which is how [BOS] becomes a sink
(E. Miller, "Attention is off by one", 2023; Xiao et al., arXiv:2309.17453).

Neither has parameters, so that the weights load as a plain Llama's, but they mean little under ordinary softmax:
load such a model with

    register_attentions()
    AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sigmoid")
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

SOFTMAX_PLUS_ONE = "softmax_plus_one"
SOFTMAX_PLUS_ONE_EAGER = "softmax_plus_one_eager"
SIGMOID = "sigmoid"
SIGMOID_BIAS = -math.log(512)  # the training context's, at every length

# The implementation that returns its weights, for each that does not.
RETURNS_WEIGHTS = {"sdpa": "eager", SOFTMAX_PLUS_ONE: SOFTMAX_PLUS_ONE_EAGER}


def _in_front(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))  # (batch, head, token, dim) -> (batch, head, 1 + token, dim)


def softmax_plus_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend with a zero key and value in front, through PyTorch's fused kernel."""
    key, value = _in_front(key), _in_front(value)
    is_causal = attention_mask is None and query.shape[2] > 1
    if is_causal:
        query = _in_front(query)  # a query that sees the null token only keeps the causal triangle square
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (1, 0), value=True)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=is_causal, scale=scaling, enable_gqa=True
    )
    if is_causal:
        output = output[:, :, 1:]
    return output.transpose(1, 2).contiguous(), None


def softmax_plus_one_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attend the same, in plain operations, and return the weights: they sum to less than one."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.pad(scores, (1, 0)).softmax(-1, dtype=torch.float32)[..., 1:].to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sigmoid(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Weigh every visible key by itself; also return the weights, which may sum to anything.

    In plain operations, which a compiler fuses: PyTorch has no kernel for it. Without a mask it is causal.
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query * scaling @ key.transpose(2, 3)).float() + SIGMOID_BIAS
    if attention_mask is None:
        queries, keys = scores.shape[-2:]
        visible = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
        scores = scores.masked_fill(~visible, -torch.inf)
    else:
        scores = scores + attention_mask
    weights = scores.sigmoid().to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def register_attentions() -> None:
    """Make all of them known to transformers, each with the mask it reads."""
    for name, attention, mask in (
        (SOFTMAX_PLUS_ONE, softmax_plus_one, sdpa_mask),
        (SOFTMAX_PLUS_ONE_EAGER, softmax_plus_one_eager, eager_mask),
        (SIGMOID, sigmoid, eager_mask),
    ):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
