"""What of a model's configuration changes its keys and values, and whether two models agree in it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from intactkv.error import IntactKVError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from intactkv.artifact.data import IntactKV

# Every configuration field, under transformers' standard names, that changes what a decoder hands to its cache:
# found by changing one field at a time in a hundred architectures (tests/test_artifact.py does so for those we name).
_FINGERPRINT_FIELDS = tuple(
    """
    model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act hidden_activation activation activation_function activation_sparsity_pattern
    rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon use_qk_norm
    rope_parameters partial_rotary_factor rotary_dim rotary_value rope_interleave no_rope_layers layer_rope_theta alibi
    layer_types sliding_window attention_chunk_size num_kv_shared_layers use_bidirectional_attention
    kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    query_pre_attn_scalar attention_multiplier scale_attn_weights scale_attn_by_inverse_layer_idx clip_qkv
    attn_config.clip_qkv attn_config.softmax_scale attn_config.alibi attention_value_scale
    embedding_multiplier embedding_scale scale_embedding rescale_embeddings residual_multiplier mup_enabled
    apply_residual_connection_post_layernorm use_parallel_residual
    altup_active_idx altup_correct_scale hc_eps hc_magnitude hc_sinkhorn_iters H_cycles L_cycles
    num_experts num_local_experts num_experts_per_tok moe_topk n_group topk_group norm_topk_prob scoring_func
    expert_selection_fn routed_scaling_factor moe_routed_scaling_factor router_scaling_factor route_scale
    moe_router_logit_softcapping router_jitter_noise swiglu_alpha swiglu_limit linear_allow_neg_eigval
    """.split()  # noqa: SIM905
)

_REQUIRED_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip
_ABSENT = object()  # no such field, where None is a value


def fingerprint(config: PreTrainedConfig) -> dict[str, Any]:
    """Every field of a decoder's configuration that changes its keys and values, as JSON data.

    Quantization, dtype, names and token ids are left out on purpose: the same fingerprint must fit the full model
    and each of its quantized forms.
    """
    config = config.get_text_config(decoder=True)
    fields = {path: _field(config, path) for path in _FINGERPRINT_FIELDS}
    fields = {path: value for path, value in fields.items() if value is not _ABSENT}
    if fields.get("head_dim") is None and fields.get("hidden_size") and fields.get("num_attention_heads"):
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if fields.get("num_key_value_heads") is None and "num_attention_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if rope := fields.get("rope_parameters"):
        fields["rope_parameters"] = {name: value for name, value in rope.items() if name != "type"}  # "rope_type" once
        if rope.get("rope_type") == "longrope":  # scales keys by the ratio of this length to the original one
            fields["max_position_embeddings"] = config.max_position_embeddings
    return json.loads(json.dumps(fields))


def _field(config: PreTrainedConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        try:
            value = getattr(value, name, _ABSENT)
        except RuntimeError:  # transformers' refusal to name one value for a field that differs from layer to layer
            value = [getattr(layer, name, None) for layer in value.per_layer_config]
    return value


def check_fingerprint(kv: IntactKV, config: PreTrainedConfig) -> None:
    """Raise `IntactKVError` naming the first field in which the model differs from the one `kv` was captured from.

    Type and sizes must be there. Other fields that only one of the two has are no difference: transformers adds and
    moves fields from version to version.
    """
    want, have = kv.fingerprint, fingerprint(config)
    for name in _REQUIRED_FIELDS:
        if name in have and name not in want:
            raise IntactKVError(
                f"this intact KV does not say its model's {name}, so it cannot be told whether it fits the model given "
                f"({name}={have[name]!r}); capture it again"
            )
    for name in sorted(want.keys() & have.keys()):
        if not _same(want[name], have[name]):
            remedy = "capture one from the model's own full-precision form"
            if name == "vocab_size":
                remedy += f", its embeddings resized as this one's were (resize_token_embeddings({have[name]}))"
            raise IntactKVError(
                f"this intact KV was captured from a model with {name}={want[name]!r}, the model given has "
                f"{name}={have[name]!r}; {remedy}"
            )


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON data, floats to the precision of float32, in which some formats (GGUF) keep them."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)
