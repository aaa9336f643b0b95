"""The artifact: the full model's keys and values of a few prefix tokens, as plain frozen data.

One safetensors file holds `ids`, `layers.{i}.key`, `layers.{i}.value` and `logits`, and one JSON text in the
file's metadata says where they come from. Nothing is pickled; a digest over everything makes tampering visible;
a fingerprint of the model's configuration keeps the file off models whose keys and values mean something else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from intactkv.error import IntactKVError
from intactkv.files import check_outputs, write_atomically

if TYPE_CHECKING:
    from intactkv.prefix_cache import PrefixCache

FORMAT_VERSION = 1

# Every configuration field, under transformers' standard names, that changes what a decoder hands to its cache:
# found by changing one field at a time in a hundred architectures (tests/test_kv.py does so for those we name).
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


@dataclass(frozen=True, eq=False)
class IntactKV:
    """The full-precision keys and values of a token prefix, one pair per layer that has them.

    `ids` are the prefix's token ids. `layers[i]` is `(key, value)` exactly as layer `i` hands them to
    `Cache.update`: after RoPE, `(kv_head, prefix, dim)`, where keys and values may differ in heads and width, and
    where a layer without a cache of its own (linear attention, shared KV) has no entry. `logits` are the output
    embedding's raw output at the prefix positions, so that an attached model keeps its output's length.
    `fingerprint` is compared with the model at `attach`; `provenance` says which model, weights and tokenizer the
    tensors come from and in which basis they are.

    Source: Liu et al., "IntactKV", Findings of ACL 2024, arXiv 2403.01241, section 3.
    """

    ids: Int[Tensor, "prefix"]
    layers: Mapping[int, tuple[Float[Tensor, "head prefix dim"], Float[Tensor, "head prefix dim"]]]
    logits: Float[Tensor, "prefix vocab"]
    fingerprint: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_shapes(self)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        kind = self.fingerprint.get("model_type", "?")
        return f"IntactKV({len(self)} tokens, {len(self.layers)} layers of {kind}, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, logits not counted: what a serving engine has to hold."""
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)

    @property
    def digest(self) -> str:
        """SHA-256 over ids, keys, values and logits: what tells one artifact from another.

        Hashed once, and again only after torch has changed a tensor in place, as its version counter says.
        """
        tensors = self.tensors
        state = None
        if not any(t.is_inference() for t in tensors.values()):  # these keep no counter
            state = [(name, t.data_ptr(), t._version) for name, t in tensors.items()]
        known, digest = vars(self).get("_digest", (None, ""))
        if state is None or known != state:
            digest = content_digest({}, {name: t.detach().cpu() for name, t in tensors.items()})
            object.__setattr__(self, "_digest", (state, digest))
        return digest

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors under the names they have in the file."""
        named = {"ids": self.ids, "logits": self.logits}
        for i, (key, value) in self.layers.items():
            named[f"layers.{i}.key"], named[f"layers.{i}.value"] = key, value
        return named

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> IntactKV:
        """A copy on `device` with keys, values and logits in `dtype`; `ids` keep their integer type."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype, copy=True)

        layers = {i: (moved(key), moved(value)) for i, (key, value) in self.layers.items()}
        ids = self.ids.to(device=device, copy=True)
        return replace(self, ids=ids, layers=layers, logits=moved(self.logits))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artifact to `path` atomically: a reader sees the old file, the new one, or none, never half.

        Raises `IntactKVError` where the folder of `path` does not exist, where `path` is a folder itself, and where
        the provenance is no JSON data.
        """
        path = Path(path)
        check_outputs(path)
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.tensors.items()}
        header = {
            "version": FORMAT_VERSION,
            "fingerprint": dict(self.fingerprint),
            "provenance": dict(self.provenance),
        }
        try:
            # what a reader will see: tuples are lists, keys are text; NaN and infinity are no JSON
            header = json.loads(json.dumps(header, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise IntactKVError(
                f"cannot write {path}: the fingerprint or the provenance is no JSON data ({error}); "
                "keep only text, finite numbers, lists and dictionaries in them"
            ) from error
        header["digest"] = content_digest(header, tensors)
        write_atomically(path, save(tensors, metadata={"intactkv": json.dumps(header, sort_keys=True)}))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> IntactKV:
        """Read an artifact and check it whole: version, digest, names, shapes and types.

        Raises `IntactKVError`, one sentence each, for a missing, truncated, foreign, future, tampered or misshapen
        file, and for one with NaN or infinity.
        """
        path = Path(path)
        if not path.is_file():
            raise IntactKVError(f"{path} is not a file; write one with `intactkv capture` or `IntactKV.save`")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                text = (file.metadata() or {}).get("intactkv")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise IntactKVError(f"{path} is truncated or no safetensors file ({error}); capture it again") from error
        header = _header(text, path)
        if content_digest(header, tensors) != header["digest"]:
            raise IntactKVError(
                f"{path} was changed after it was written (its digest does not match its content); capture it again"
            )
        kv = _from_tensors(tensors, header, path)
        check_finite(kv.layers, f"{path} is of no use; capture it again")
        return kv.to(device=device)

    def cache(self, model: PreTrainedModel, batch_size: int = 1, *, check: bool = True) -> PrefixCache:
        """A cache that already holds the prefix, so that its tokens need not be computed again.

        Give the *whole* ids, prefix included, to `generate`, or only the rest to `model(...)` with an attention
        mask of the whole length. Every row must begin with the prefix in column 0: **no left padding**, for which
        `attach` is right. One cache serves one prompt and what is said on after it.

        `generate` is checked: a row that does not begin with what the cache holds is refused. A direct call of the
        model cannot be: the tokens that the cache stands for are not in it, and a mask that hides them, another
        prompt's tokens or a missing BOS give other logits without a word.

        Raises `IntactKVError` where `model`'s fingerprint differs, where (unless `check` is False) its own keys and
        values are in another basis, and where it has recurrent layers, whose state keys and values do not restore.
        The basis is compared, in a forward of P tokens, for the first cache of a model and an artifact only.
        """
        from intactkv.prefix_cache import prefix_cache

        return prefix_cache(model, self, batch_size, check=check)


def uncovered_layers(kv: IntactKV, config: PreTrainedConfig) -> list[int]:
    """Layers that keep more than keys and values of their own from token to token: `kv` does not cover these.

    Recurrent and convolutional states, the keys of sparse-attention indexers, and whatever a layer keeps that has no
    entry in `kv` and does not share another layer's.
    """
    decoder = config.get_text_config(decoder=True)
    own = decoder.num_hidden_layers - (getattr(decoder, "num_kv_shared_layers", None) or 0)
    stateful = [
        i
        for i, layer in enumerate(DynamicCache(config=config).layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin) or hasattr(layer, "update_indexer")
    ]
    return sorted({*stateful, *(set(range(own)) - set(kv.layers))})


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


_ABSENT = object()


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


def check_finite(layers: Mapping[int, tuple[Tensor, Tensor]], remedy: str) -> None:
    """Raise `IntactKVError` naming the first layer whose keys or values hold NaN or infinity, which would spread."""
    for i, pair in layers.items():
        for name, tensor in zip(("keys", "values"), pair, strict=True):
            if not bool(torch.isfinite(tensor.double()).all()):
                raise IntactKVError(f"the {name} of layer {i} hold NaN or infinity; {remedy}")


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON data, floats to the precision of float32, in which some formats (GGUF) keep them."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers that a checkpoint of `model` holds.

    Weights that are offloaded to the meta device cannot be read; the digest then says so instead.
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type == "meta":
            return "unknown: offloaded weights"
        _hash_tensor(sha, name, tensor)
    return sha.hexdigest()


def _hash_tensor(sha: Any, name: str, tensor: Tensor) -> None:
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is not None:  # a tensor that wraps plain ones: torchao's
        for part in inner()[0]:
            _hash_tensor(sha, f"{name}.{part}", getattr(tensor, part))
        return
    sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def content_digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a file's header, its entry "digest" left out, and over its tensors by name."""
    sha = hashlib.sha256()
    sha.update(json.dumps({k: v for k, v in header.items() if k != "digest"}, sort_keys=True).encode())
    for name in sorted(tensors):
        _hash_tensor(sha, name, tensors[name])
    return sha.hexdigest()


def _header(text: str | None, path: Path) -> dict[str, Any]:
    """The checked JSON header of a file at `path`, from the text in its metadata."""
    if text is None:
        raise IntactKVError(f"{path} is a safetensors file but no intact KV; write one with `intactkv capture`")
    try:
        header = json.loads(text)
        version, needed = header["version"], {"digest", "fingerprint", "provenance"} - header.keys()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntactKVError(f"{path} has an unreadable header ({error}); capture it again") from error
    if type(version) is not int or version != FORMAT_VERSION:
        raise IntactKVError(
            f"{path} has format version {version!r}, this intactkv reads version {FORMAT_VERSION}; "
            "update intactkv or capture it again"
        )
    if needed:
        raise IntactKVError(f"{path} lacks {', '.join(sorted(needed))} in its header; capture it again")
    for name in ("fingerprint", "provenance"):
        if not isinstance(header[name], dict):
            kind = type(header[name]).__name__
            raise IntactKVError(f"{path} has a {kind} as {name} in its header, not a dictionary; capture it again")
    return header


_TENSOR_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(key|value)")


def _from_tensors(tensors: dict[str, Tensor], header: dict[str, Any], path: Path) -> IntactKV:
    """The artifact from a file's named tensors; names that are not ours are refused."""
    pairs: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match:
            pairs.setdefault(int(match[1]), {})[match[2]] = tensor
        elif name not in ("ids", "logits"):
            raise IntactKVError(f"{path} holds the unknown tensor {name!r}; capture it again")
    for name in ("ids", "logits"):
        if name not in tensors:
            raise IntactKVError(f"{path} lacks the tensor {name!r}; capture it again")
    for i, pair in pairs.items():
        if len(pair) != 2:
            raise IntactKVError(f"{path} has only the {next(iter(pair))} of layer {i}; capture it again")
    layers = {i: (pairs[i]["key"], pairs[i]["value"]) for i in sorted(pairs)}
    try:
        return IntactKV(tensors["ids"], layers, tensors["logits"], header["fingerprint"], header["provenance"])
    except IntactKVError as error:
        raise IntactKVError(f"{path} is no valid artifact: {error}; capture it again") from error


def _check_shapes(kv: IntactKV) -> None:
    if kv.ids.ndim != 1 or kv.ids.dtype != torch.int64 or len(kv.ids) == 0:
        raise IntactKVError(
            f"ids is {kv.ids.dtype} of shape {tuple(kv.ids.shape)}; it must be a non-empty int64 vector of token ids"
        )
    if not kv.layers:
        raise IntactKVError("no layer has keys and values; an intact KV needs a model with attention layers")
    if kv.logits.ndim != 2 or len(kv.logits) != len(kv.ids) or not kv.logits.is_floating_point():
        raise IntactKVError(
            f"logits is {kv.logits.dtype} of shape {tuple(kv.logits.shape)}; it must be floating point of shape "
            f"({len(kv.ids)}, vocab)"
        )
    for i, pair in kv.layers.items():
        for name, tensor in zip(("key", "value"), pair, strict=True):
            if tensor.ndim != 3 or tensor.shape[1] != len(kv.ids) or not tensor.is_floating_point():
                raise IntactKVError(
                    f"layers.{i}.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be floating point "
                    f"of shape (head, {len(kv.ids)}, dim)"
                )
