"""Whose model a GGUF is: its fields, its first layer, and the order of channels in llama.cpp's cache.

llama.cpp checks sizes and types of a state, not whose keys and values it holds: one of another model of equal shapes is
taken in silence. The first layer's values are a norm and a product of the tokens' embeddings, so a GGUF itself says
whether it makes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from intactkv.artifact import IntactKV
from intactkv.artifact.door import DOOR, relative_error
from intactkv.error import IntactKVError, first_line
from intactkv.gguf_header import check_header

# Whether llama.cpp's converter reorders a head's channels so that the two of a rotary pair are neighbours.
ARCHITECTURES = {
    "llama": True, "granite": True, "olmo": True, "deci": True,
    "qwen2": False, "qwen3": False, "gemma": False, "gemma2": False, "gemma3": False, "phi3": False, "olmo2": False,
    "starcoder2": False, "stablelm": False, "smollm3": True,
}  # fmt: skip
TWO_CACHES = {"gemma2", "gemma3"}  # full layers in one, sliding ones in another
BOS = "tokenizer.ggml.bos_token_id"


def slides(kv: IntactKV) -> bool:
    """Whether the model has sliding windows."""
    return "sliding_attention" in (kv.fingerprint.get("layer_types") or ())


def in_pairs(key: Float[Tensor, "head prefix dim"], rotary: int) -> Float[Tensor, "head prefix dim"]:
    """Keys whose rotary channels i and i + rotary/2 are neighbours: from transformers' order to llama.cpp's.

    >>> in_pairs(torch.arange(6.0).reshape(1, 1, 6), 4)
    tensor([[[0., 2., 1., 3., 4., 5.]]])
    """
    turned = key[..., :rotary].unflatten(-1, (2, rotary // 2)).transpose(-1, -2).flatten(-2)
    return torch.cat([turned, key[..., rotary:]], -1)


@dataclass(frozen=True, eq=False)
class Gguf:
    """What is read of a GGUF: its fields by name, and its tensors, dequantized when they are asked for."""

    path: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> Any:
        """llama.cpp's name of the model's architecture."""
        return self.fields.get("general.architecture")

    def value(self, name: str) -> Any:
        """A field of the architecture, None where it is not there."""
        return self.fields.get(f"{self.architecture}.{name}")

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> Tensor | None:
        """A tensor as float32, or some of its rows; None where there is none of that name."""
        from gguf.quants import dequantize

        found = self.tensors.get(name)
        if found is None:
            return None
        data = found.data if rows is None else found.data[list(rows)]
        return torch.from_numpy(dequantize(data, found.tensor_type).copy())


def opened(path: str | os.PathLike[str]) -> Gguf:
    """The GGUF at `path`, its weights unread. Raises `IntactKVError` where it is none."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise IntactKVError("reading a GGUF needs gguf: pip install 'intactkv[gguf]'") from error
    check_header(path)
    try:
        reader = GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.") or name == BOS  # a vocabulary takes seconds
        }
    except Exception as error:  # whatever the reader makes of spoilt bytes
        raise IntactKVError(f"{path} is no readable GGUF ({first_line(error)}); give the one that is served") from error
    return Gguf(os.fspath(path), fields, {tensor.name: tensor for tensor in reader.tensors})


def check_gguf(kv: IntactKV, model: Gguf, *, weights: bool = True) -> None:
    """Raise `IntactKVError` where `kv` is not of this GGUF's model, by its configuration and its first layer."""
    name, told = model.architecture, kv.fingerprint
    if name not in ARCHITECTURES:
        raise IntactKVError(
            f"the order of {model.path}'s architecture {name!r} in llama.cpp's cache is not known here; let llama.cpp "
            "compute the state of its full-precision GGUF itself"
        )
    key, value = next(iter(kv.layers.values()))
    theirs = {
        "block_count": told.get("num_hidden_layers"), "embedding_length": told.get("hidden_size"),
        "attention.head_count": told.get("num_attention_heads"), "attention.head_count_kv": key.shape[0],
        "attention.key_length": key.shape[2], "attention.value_length": value.shape[2],
    }  # fmt: skip
    for field, want in theirs.items():
        have = model.value(field)
        if have is not None and have != want:
            raise IntactKVError(
                f"{model.path} has {name}.{field}={have}, the intact KV {want}; give a form of its model"
            )
    if sorted(kv.layers) != list(range(told["num_hidden_layers"])):
        raise IntactKVError("some layers of this intact KV have no keys and values; such models are not supported here")
    window = told.get("sliding_window")
    sliding = slides(kv)
    if sliding and name not in TWO_CACHES:
        raise IntactKVError(f"{name} with sliding windows is not supported; let llama.cpp compute the state")
    if sliding and window and len(kv) > window:
        raise IntactKVError(
            f"the prefix has {len(kv)} tokens, and of sliding layers llama.cpp keeps the last {window}; use fewer"
        )
    if weights:
        key, value = kv.layers[0]
        key = in_pairs(key[:, :1], key.shape[2]) if ARCHITECTURES[name] else key[:, :1]
        check_first_layer(FirstLayer(key, value), model, kv.ids.tolist(), "the intact KV")


@dataclass(frozen=True, eq=False)
class FirstLayer:
    """What a model's first layer makes of some tokens, in llama.cpp's order of channels.

    Its values of all of them, and its key of the first one, whose rotary angle is 0.
    """

    key: Float[Tensor, "head 1 dim"]
    value: Float[Tensor, "head token dim"]


def first_layer(model: Gguf, ids: Sequence[int]) -> FirstLayer:
    """The first layer of a GGUF, from its weights. Raises `IntactKVError` where it has no plain one."""
    try:
        return _first_layer(model, ids)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, IntactKVError):
            raise
        raise IntactKVError(
            f"the first layer of {model.path} cannot be computed ({first_line(error)}); give a whole GGUF of its model"
        ) from error


def _first_layer(model: Gguf, ids: Sequence[int]) -> FirstLayer:
    embedded = model.tensor("token_embd.weight", ids)
    norm, wide = model.tensor("blk.0.attn_norm.weight"), model.tensor("blk.0.attn_v.weight")
    narrow = model.tensor("blk.0.attn_k.weight")
    if embedded is None or norm is None or wide is None or narrow is None:
        raise IntactKVError(
            f"{model.path} has no plain first layer to compare with, so nobody can tell whose keys and values are its; "
            "pass check=False (--unchecked) if you know"
        )
    if str(model.architecture).startswith("gemma"):
        embedded = embedded * embedded.shape[1] ** 0.5
    eps = float(model.value("attention.layer_norm_rms_epsilon") or 1e-6)
    heads = int(model.value("attention.head_count_kv") or model.value("attention.head_count"))
    read = _normed(embedded, norm, eps)
    value = _projected(read, wide, model.tensor("blk.0.attn_v.bias"), heads)
    key = _projected(read[:1], narrow, model.tensor("blk.0.attn_k.bias"), heads)
    if (of_heads := model.tensor("blk.0.attn_k_norm.weight")) is not None:
        key = _normed(key, of_heads, eps)
    return FirstLayer(key, value)


def check_first_layer(told: FirstLayer, model: Gguf, ids: Sequence[int], whose: str) -> None:
    """Raise `IntactKVError` where the GGUF's first layer makes something else of the tokens than `told`."""
    made = first_layer(model, ids)
    for name, here, there in (("values", made.value, told.value), ("keys", made.key, told.key)):
        if here.shape != there.shape:
            raise IntactKVError(
                f"{model.path} has {name} of shape {tuple(here.shape)}, {whose} {tuple(there.shape)}; give a GGUF of "
                "its own model"
            )
        error = relative_error(here, there)
        if error > DOOR:
            raise IntactKVError(
                f"the first layer of {model.path} makes other {name} of these tokens than {whose} has "
                f"({100 * error:.0f} % off; rounding leaves less than {100 * DOOR:.0f} %): another model or basis; "
                "give a GGUF of its own model"
            )


def _normed(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps) * weight


def _projected(
    read: Float[Tensor, "token hidden"], weight: Float[Tensor, "out hidden"], bias: Tensor | None, heads: int
) -> Float[Tensor, "head token dim"]:
    made = read @ weight.T + (0 if bias is None else bias)
    return made.unflatten(-1, (heads, -1)).transpose(0, 1)
