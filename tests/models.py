"""Tiny random models of every architecture we name, and the independent reference they are measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from intactkv import IntactKV, capture
from intactkv.serving.layout import common_prefix

PREFIX = [1, 5, 7]
VOCAB = 97
PAD = 0

# Absolute tolerance on logits, by dtype. GPT-OSS's own two ways of computing the same differ by 2e-5.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Architecture:
    """A named tiny model. `recurrent` ones are covered in their attention layers only."""

    name: str
    config: str
    model: str
    settings: dict[str, Any]
    recurrent: bool = False
    tolerance: float = TOLERANCE[torch.float32]
    note: str = ""


def _architecture(name: str, config: str, model: str = "", /, **settings: Any) -> Architecture:
    extra = {key: settings.pop(key) for key in ("recurrent", "tolerance", "note") if key in settings}
    model = model or f"{config}ForCausalLM"
    return Architecture(name, f"{config}Config", model, settings, **extra)


_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LOCAL = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

ARCHITECTURES = [
    _architecture("llama-mha", "Llama", num_attention_heads=4, num_key_value_heads=4),
    _architecture("llama-gqa", "Llama", **_GQA),
    _architecture("mistral-sliding", "Mistral", **_GQA, sliding_window=8, note="window 8"),
    _architecture("qwen2", "Qwen2", **_GQA),
    _architecture("qwen3", "Qwen3", **_GQA, head_dim=16),
    _architecture("qwen3-moe", "Qwen3Moe", **_GQA, **_MOE, num_experts=4, head_dim=16),
    _architecture("mixtral", "Mixtral", **_GQA, num_local_experts=4, num_experts_per_tok=2),
    _architecture("gemma2", "Gemma2", **_GQA, **_LOCAL, head_dim=16, note="window 8, softcapped logits"),
    _architecture("gemma3", "Gemma3Text", "Gemma3ForCausalLM", **_GQA, **_LOCAL, head_dim=16, note="window 8"),
    _architecture("phi3", "Phi3", **_GQA),
    _architecture("opt", "OPT", num_attention_heads=4, ffn_dim=96, word_embed_proj_dim=64, note="learned positions"),
    _architecture("gpt2", "GPT2", "GPT2LMHeadModel", num_attention_heads=4, note="learned positions"),
    _architecture("gpt-neox", "GPTNeoX", num_attention_heads=4),
    _architecture("gpt-j", "GPTJ", num_attention_heads=4, rotary_dim=8),
    _architecture("falcon-rotary", "Falcon", num_attention_heads=4, note="multi-query"),
    _architecture("falcon-alibi", "Falcon", num_attention_heads=4, alibi=True, note="ALiBi"),
    _architecture("bloom", "Bloom", num_attention_heads=4, note="ALiBi"),
    _architecture("mpt", "Mpt", num_attention_heads=4, d_model=64, n_heads=4, n_layers=3, note="ALiBi by column"),
    _architecture("cohere", "Cohere", **_GQA, note="scaled logits"),
    _architecture("cohere2", "Cohere2", **_GQA, **_LOCAL, note="window 8, layers without positions"),
    _architecture("gpt-oss", "GptOss", **_GQA, **_LOCAL, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
                  tolerance=5e-5, note="window 8, learned sinks"),
    _architecture("deepseek-v3", "DeepseekV3", num_attention_heads=4, num_key_value_heads=4, **_MOE, kv_lora_rank=16,
                  q_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4,
                  n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
                  note="MLA: what is cached, K and V of different width"),
    _architecture("olmo2", "Olmo2", **_GQA),
    _architecture("granite", "Granite", **_GQA, tolerance=3e-5, note="scaled logits, attention scale 1"),
    _architecture("smollm3", "SmolLM3", **_GQA, note="layers without positions"),
    _architecture("glm4", "Glm4", **_GQA, head_dim=16),
    _architecture("starcoder2", "Starcoder2", **_GQA),
    _architecture("stablelm", "StableLm", **_GQA),
    _architecture("llama4", "Llama4Text", "Llama4ForCausalLM", **_GQA, head_dim=16, num_local_experts=2,
                  attention_chunk_size=8, num_experts_per_tok=1, intermediate_size_mlp=96, note="chunks of 8"),
    _architecture("gemma3n", "Gemma3nText", "Gemma3nForCausalLM", **_GQA, head_dim=16, num_kv_shared_layers=1,
                  num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8,
                  vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, laurel_rank=8,
                  activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2, intermediate_size=[96] * 4,
                  note="window 8, layers that share KV"),
    _architecture("gemma4", "Gemma4Text", "Gemma4ForCausalLM", **_GQA, num_hidden_layers=4, num_kv_shared_layers=1,
                  layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8, head_dim=16,
                  global_head_dim=32, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
                  tolerance=3e-5, note="window 8, attention scale 1, wider heads in full layers, layers that share KV"),
    _architecture("lfm2", "Lfm2", **_GQA, layer_types=["conv", "full_attention", "conv"], recurrent=True,
                  note="short convolutions"),
    _architecture("qwen3-next", "Qwen3Next", **_GQA, **_MOE, head_dim=16, num_experts=4, linear_num_key_heads=2,
                  linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, recurrent=True,
                  shared_expert_intermediate_size=32, layer_types=["linear_attention", "full_attention"] * 2,
                  num_hidden_layers=4, tolerance=1e-4, note="gated delta net"),
]  # fmt: skip


def build(
    architecture: Architecture, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any
) -> PreTrainedModel:
    """A random model in eval mode whose weights are large enough that tokens differ clearly."""
    settings = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "max_position_embeddings": 128, "bos_token_id": PREFIX[0], "eos_token_id": 2, "pad_token_id": PAD,
        "initializer_range": 0.15, "use_cache": True, **architecture.settings, **more,
    }  # fmt: skip
    config = getattr(transformers, architecture.config)(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture.model)(config)
    # a greedy run must not end early, and must not be forced by defaults of the family
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def by_name(name: str) -> Architecture:
    return next(a for a in ARCHITECTURES if a.name == name)


def rounded(model: PreTrainedModel, bits: int = 3) -> PreTrainedModel:
    """A copy with every matrix but the embeddings rounded to `bits` in groups of 32: a stand-in for a quantizer."""
    model = copy.deepcopy(model)
    kept = {id(p) for e in (model.get_input_embeddings(), model.get_output_embeddings()) for p in e.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and id(parameter) not in kept:
                groups = parameter.reshape(-1, 32 if parameter.numel() % 32 == 0 else parameter.shape[-1])
                low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
                scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
                parameter.copy_((((groups - low) / scale).round() * scale + low).view_as(parameter))
    return model


def prompts(rows: int = 3, length: int = 20, seed: int = 1) -> Tensor:
    """Random ids `(rows, length)` that begin with the prefix and hold no special token after it."""
    ids = torch.randint(8, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, : len(PREFIX)] = torch.tensor(PREFIX)
    return ids


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, 2D mask and position ids of rows of different length, padded on one side."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def reference_cache(model: PreTrainedModel, kv: IntactKV) -> DynamicCache:
    """A cache filled by hand with the artifact's tensors: prefix injection as the paper does it, batch 1."""
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in kv.layers.items():
        cache.update(key[None].to(model.dtype), value[None].to(model.dtype), layer)
    return cache


@torch.no_grad()
def reference_logits(model: PreTrainedModel, kv: IntactKV, row: Tensor) -> Tensor:
    """Logits `(token, vocab)` after the prefix for one row that begins with it, by manual injection."""
    rest = row[len(kv) :][None]
    mask = torch.ones(1, len(row), dtype=torch.int64)
    return model(rest, past_key_values=reference_cache(model, kv), attention_mask=mask).logits[0]


def make_pair(architecture: Architecture, prefix: list[int] = PREFIX) -> Callable[[], Any]:
    full = build(architecture)
    return full, rounded(full), capture(full, prefix)


def greedy(model: PreTrainedModel, kv: IntactKV | None, ids: list[int], count: int) -> list[int]:
    """What engines are held against: rows that `ids` shares with `kv` are its own; the last token is computed."""
    rows = 0 if kv is None else min(common_prefix(ids, kv.ids.tolist()), len(ids) - 1)
    held = DynamicCache(config=model.config)
    for i, (key, value) in kv.layers.items() if kv is not None and rows else ():
        held.update(key[None, :, :rows].clone(), value[None, :, :rows].clone(), i)
    found, given = [], torch.tensor([ids[rows:]])
    with torch.no_grad():
        for _ in range(count):
            found.append(int(model(given, past_key_values=held).logits[0, -1].argmax()))
            if found[-1] == model.config.eos_token_id:
                break
            given = torch.tensor([found[-1:]])
    return found
