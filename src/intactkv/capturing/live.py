"""Let the full-precision model compute a prefix once, and keep what each layer hands to its cache."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from intactkv.artifact import IntactKV
from intactkv.artifact.data import check_finite
from intactkv.artifact.digest import weights_digest
from intactkv.artifact.fingerprint import fingerprint
from intactkv.attaching.adapters import adapters
from intactkv.attaching.handle import is_attached
from intactkv.capturing.partial import Partial
from intactkv.capturing.record import recorded
from intactkv.checkpoint.load import load_full
from intactkv.checkpoint.source import quantizer, refuse_quantized
from intactkv.checkpoint.stream import streamed
from intactkv.error import IntactKVError
from intactkv.positions import check_positions

log = logging.getLogger(__name__)

# By this share a later token may seem to change an earlier one's keys or values: arithmetic in bfloat16, whose order
# can depend on the batch. Attention that looks ahead changes them by tenths.
_LEAK = 0.02


@torch.no_grad()
def capture(
    model: PreTrainedModel | str | os.PathLike[str],
    ids: Sequence[int] | Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    logits: bool = True,
    allow_quantized: bool = False,
    stream: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> IntactKV:
    """The intact KV of the prefix `ids`, computed by `model` in one forward of P tokens.

    `model` is the full-precision causal LM, or a path or hub name to load it from, in float32: so few tokens cost
    nothing, where bfloat16 would take up to 0.4 % off a value and float16 can overflow at a massive one. Layers are
    recorded at `Cache.update`, before a sliding window drops anything. `tokenizer`, if given, is remembered by its
    digest. Without `logits` the artifact is smaller, by two thirds for a chat prefix, and an attached model gives its
    own logits at prefix positions, the prediction of the first token after the prefix included; those after it are the
    same. The model is left as it was, training mode included. A quantized model, whose keys and values are what an
    intact KV is to replace, is taken only with `allow_quantized`; the provenance then names its quantizer. A path is
    streamed, its weights read matrix by matrix and never held, where `stream` says so, by default where it takes
    more than a quarter of the free memory and accelerate is installed; the result is the same, bit for bit. It computes
    on `device`, by default the accelerator if there is one; a model given whole computes where it is. A streamed
    capture leaves what it has in the file `resume` after each block, goes on from that where it is there already, and
    removes it at the end. The processes of a tensor-parallel model all capture, and all get the whole.

    Raises `IntactKVError` for ids that are no token ids of the vocabulary, for a path without a causal LM or with
    tensors that do not fit it, for quantized models, encoder-decoders, for a model that has an intact KV attached, for
    one that does not route its keys and values through `Cache.update`, for bidirectional ones, and where a key or
    value is NaN or infinite.
    """
    if not isinstance(model, PreTrainedModel):
        model = _loaded(model, bool(stream) if allow_quantized else stream, "auto" if device is None else device)
    elif device is not None:
        raise IntactKVError(f"device={device!r} goes with a path; a model that is loaded computes on its own device")
    if not allow_quantized:
        refuse_quantized(model.config)
    if model.config.is_encoder_decoder:
        raise IntactKVError(f"{model.config.model_type} is an encoder-decoder; intact KV needs a decoder-only model")
    if is_attached(model):
        raise IntactKVError("the model has an intact KV attached; remove it first, or it would be captured again")
    head = model.get_output_embeddings()
    if head is None:
        raise IntactKVError(f"{type(model).__name__} has no output embedding; load it with AutoModelForCausalLM")
    prefix = checked_ids(ids, model.config.get_text_config(decoder=True).vocab_size)
    check_positions(model.config, len(prefix), "the prefix")

    raw: list[Tensor] = []
    partial = None
    if (store := streamed(model)) is not None:
        store.begin(head=logits)
        partial = None if resume is None else Partial(resume, model, store, prefix)
    elif resume is not None:
        raise IntactKVError(f"resume={os.fspath(resume)!r} goes with a streamed model; add stream=True")
    handle = head.register_forward_hook(lambda module, args, output: raw.append(output[0].detach().cpu().clone()))
    try:
        batch = recorded(model, prefix[None], partial=partial)
    finally:
        handle.remove()
    _check_causal(model, prefix, most=None if store is None else 2)
    layers = {i: (key[0].clone(), value[0].clone()) for i, (key, value) in batch.items()}
    try:
        check_finite(layers, "load the full model in float32 or bfloat16 and check its weights")
    except IntactKVError as error:
        if store is not None and (found := store.not_finite()) is not None:
            raise IntactKVError(f"{model.config.name_or_path}: {found} holds NaN or infinity; get it again") from error
        raise
    if store is not None:
        store.end()
    about = fingerprint(model.config), _provenance(model, tokenizer)
    kv = IntactKV(prefix, layers, raw[0] if logits else None, *about)
    if partial is not None:
        partial.remove()
    log.info("captured %r with %s", kv, type(model).__name__)
    return kv


def _check_causal(model: PreTrainedModel, prefix: Tensor, *, most: int | None) -> None:
    """Refuse a model in which a later token changes an earlier one's keys and values: these could not be kept.

    One forward of four tokens: the first prefix token twice, followed by two different ones. What looks ahead does so
    from the second layer on, so that `most` 2 is enough where each layer has to be read.
    """
    vocab = model.config.get_text_config(decoder=True).vocab_size
    first = int(prefix[0])
    for layer, pair in recorded(model, torch.tensor([[first, vocab // 2], [first, vocab - 1]]), most=most).items():
        for name, tensor in zip(("keys", "values"), pair, strict=True):
            one, other = tensor[:, :, 0].double()
            off = float((one - other).norm() / one.norm().clamp(min=1e-30))
            if off > _LEAK:
                raise IntactKVError(
                    f"{type(model).__name__} is bidirectional: a later token changes the first one's {name} in layer "
                    f"{layer} by {100 * off:.0f} %; load it as a causal decoder (is_decoder=True) or use another model"
                )


def _loaded(path: str | os.PathLike[str], stream: bool | None, device: str) -> PreTrainedModel:
    if not isinstance(path, str | os.PathLike):
        raise IntactKVError(
            f"capture needs a transformers PreTrainedModel or a path, not {type(path).__name__}; give it the model "
            "inside the wrapper (before torch.compile or PEFT)"
        )
    return load_full(path, device, dtype=torch.float32, stream=stream)


def checked_ids(ids: Sequence[int] | Tensor, vocab: int) -> Int[Tensor, "prefix"]:
    """A prefix as int64 ids on the CPU. Raises `IntactKVError` for what is no flat list of a vocabulary's ids."""
    try:
        prefix = torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise IntactKVError(f"the prefix is no list of token ids ({error}); give one flat list of integers") from error
    if prefix.ndim != 1 or len(prefix) == 0:
        raise IntactKVError(f"the prefix has shape {tuple(prefix.shape)}; give one flat, non-empty list of token ids")
    if prefix.dtype == torch.bool or prefix.is_floating_point() or prefix.is_complex():
        raise IntactKVError(f"the prefix holds {prefix.dtype} numbers; give integer ids, as a tokenizer does")
    prefix = prefix.to(torch.int64, copy=True)
    outside = prefix[(prefix < 0) | (prefix >= vocab)]
    if len(outside):
        raise IntactKVError(
            f"the prefix holds id {int(outside[0])}, outside 0…{vocab - 1}, the model's vocabulary; "
            "take the ids from the model's own tokenizer"
        )
    return prefix


def _provenance(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    quantized = quantizer(model.config)
    return {
        "model": str(model.config.name_or_path),
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights_digest(model) if (store := streamed(model)) is None else store.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        "basis": "full",
        "calibration": None,
        **({} if quantized is None else {"quantized": quantized}),
        **({"adapters": names} if (names := adapters(model)) else {}),
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary with its ids: two tokenizers with one digest give tokens the same numbers."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256("\n".join(f"{i} {token}" for token, i in vocab).encode()).hexdigest()


def check_tokenizer(kv: IntactKV, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Raise `IntactKVError` where the tokenizer of `source` is not the one `kv` was captured with."""
    digest = kv.provenance.get("tokenizer")
    if digest is not None and digest != tokenizer_digest(tokenizer):
        raise IntactKVError(
            f"the tokenizer of {source} is not the one the intact KV was captured with; capture it again"
        )
