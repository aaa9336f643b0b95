"""Let the full-precision model compute a prefix once, and keep what each layer hands to its cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from intactkv.attach import is_attached
from intactkv.kv import IntactKV, IntactKVError, fingerprint, weights_digest


@torch.no_grad()
def capture(
    model: PreTrainedModel | str | os.PathLike[str],
    ids: Sequence[int] | Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> IntactKV:
    """The intact KV of the prefix `ids`, computed by `model` in one forward of P tokens.

    `model` is the full-precision causal LM, or a path or hub name to load it from in its own dtype. Layers are
    recorded at `Cache.update`, before a sliding window drops anything. `tokenizer`, if given, is remembered by its
    digest. The model is left as it was, training mode included.

    Raises `IntactKVError` for ids outside the vocabulary, for encoder-decoders, for a model that has an intact KV
    attached, and for one that does not route its keys and values through `Cache.update`.
    """
    if not isinstance(model, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if model.config.is_encoder_decoder:
        raise IntactKVError(f"{model.config.model_type} is an encoder-decoder; intact KV needs a decoder-only model")
    if is_attached(model):
        raise IntactKVError("the model has an intact KV attached; remove it first, or it would be captured again")
    head = model.get_output_embeddings()
    if head is None:
        raise IntactKVError(f"{type(model).__name__} has no output embedding; load it with AutoModelForCausalLM")
    prefix = _checked_ids(ids, model.config.get_text_config(decoder=True).vocab_size)

    cache, raw = _Recorder(config=model.config), []
    handle = head.register_forward_hook(lambda module, args, output: raw.append(output[0].detach().clone()))
    training = model.training
    model.eval()
    try:
        model(input_ids=prefix[None].to(model.device), past_key_values=cache, use_cache=True)
    finally:
        handle.remove()
        model.train(training)
    if not cache.recorded:
        raise IntactKVError(
            f"no layer of {model.config.model_type} called Cache.update; it has no keys and values that could be kept"
        )
    layers = {i: cache.recorded[i] for i in sorted(cache.recorded)}
    return IntactKV(prefix, layers, raw[0].cpu(), fingerprint(model.config), _provenance(model, tokenizer))


class _Recorder(DynamicCache):
    """A dynamic cache that also keeps a copy of what each layer handed in."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self.recorded:
            raise IntactKVError(f"layer {layer_idx} updates its cache twice in one forward; this model is unsupported")
        self.recorded[layer_idx] = (key_states[0].cpu().clone(), value_states[0].cpu().clone())
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _checked_ids(ids: Sequence[int] | Tensor, vocab: int) -> Tensor:
    prefix = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
    if prefix.ndim != 1 or len(prefix) == 0:
        raise IntactKVError(f"the prefix has shape {tuple(prefix.shape)}; give one flat, non-empty list of token ids")
    if int(prefix.min()) < 0 or int(prefix.max()) >= vocab:
        raise IntactKVError(f"the prefix {prefix.tolist()} has ids outside 0…{vocab - 1}, the model's vocabulary")
    return prefix.clone()


def _provenance(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    return {
        "model": str(model.config.name_or_path),
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        "basis": "full",
        "calibration": None,
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary with its ids: two tokenizers with one digest give tokens the same numbers."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256("\n".join(f"{i} {token}" for token, i in vocab).encode()).hexdigest()
