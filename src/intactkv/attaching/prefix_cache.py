"""A cache that holds the intact prefix before the model runs, for prompts that all begin with it in column 0.

`generate` hands its model only the tokens that the cache lacks, so a forward never sees whether the prompt did begin
with the prefix. As long as such a cache lives, its model therefore looks at whole prompts where `generate` prepares
them. Who calls the model itself answers for that.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.artifact.fingerprint import check_fingerprint
from intactkv.attaching.coverage import uncovered_layers
from intactkv.attaching.handle import is_attached
from intactkv.attaching.locate import Progress
from intactkv.basis.compare import refuse_foreign
from intactkv.decoder import given_cache, input_device
from intactkv.error import IntactKVError
from intactkv.heads import heads_of

_PREPARE = "prepare_inputs_for_generation"
_alike: weakref.WeakKeyDictionary[PreTrainedModel, set[str]] = weakref.WeakKeyDictionary()  # artifacts let in before
_alive: weakref.WeakKeyDictionary[PreTrainedModel, weakref.WeakSet[PrefixCache]] = weakref.WeakKeyDictionary()


class PrefixCache(DynamicCache):
    """A dynamic cache filled before the model ran: each layer's prefix follows that layer's device and type."""

    intactkv: Progress
    prefix: Int[Tensor, "prefix"]
    seen: Int[Tensor, "batch token"] | None = None  # the whole ids that `generate` last prepared

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer is not None and layer.is_initialized:
            if len(layer.keys) != len(key_states):
                raise IntactKVError(
                    f"the cache was made for {len(layer.keys)} rows and is used with {len(key_states)}; make it with "
                    "kv.cache(model, batch_size=rows × beams)"
                )
            layer.keys, layer.values = layer.keys.to(key_states), layer.values.to(value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def check_prompt(self, ids: Int[Tensor, "batch token"], mask: Tensor | None) -> None:
        """Raise `IntactKVError` where the tokens that the cache holds are not the first ones of `ids`."""
        size, past = len(self.prefix), int(self.get_seq_length())
        if past == size or self.seen is None:
            known, held = self.prefix.to(ids.device).expand(len(ids), size), "the prefix"
        else:
            known, held = self.seen[:, :past].to(ids.device), "the tokens of an earlier call"
        foreign: Bool[Tensor, "batch"] = (
            torch.ones(len(ids), dtype=torch.bool)
            if ids.shape[1] <= known.shape[1] or len(known) != len(ids)
            else (ids[:, : known.shape[1]] != known).any(1)
        )
        if mask is not None and mask.ndim == 2:
            foreign = foreign | (mask[:, : known.shape[1]] == 0).any(1).to(foreign.device)
        if bool(foreign.any()):
            raise IntactKVError(
                f"the cache holds {known.shape[1]} tokens, {held}, with which row {int(foreign.nonzero()[0])} of the "
                "prompt does not begin, or begins and ends (no BOS? padded on the left?): make a new cache for each "
                "prompt, pad on the right, or use attach(model, kv), which takes any prompt"
            )


def prefix_cache(model: PreTrainedModel, kv: IntactKV, batch_size: int = 1, *, check: bool = True) -> PrefixCache:
    """`IntactKV.cache`, which says more."""
    if batch_size < 1:
        raise IntactKVError(f"batch_size={batch_size} must be at least 1; give the number of rows")
    check_fingerprint(kv, model.config)
    uncovered = uncovered_layers(kv, model.config)
    if uncovered:
        raise IntactKVError(
            f"layers {uncovered} of {model.config.model_type} are recurrent layers or keep another state that this "
            "artifact does not hold; use attach(model, kv), which lets the model compute it"
        )
    if check and not is_attached(model) and kv.digest not in (known := _alike.setdefault(model, set())):
        refuse_foreign(model, kv)
        known.add(kv.digest)
    cache = PrefixCache(config=model.config)
    cache.prefix = kv.ids
    heads, device = heads_of(model), input_device(model)
    for i, pair in kv.layers.items():
        own = pair if heads is None else (heads.own(pair[0]), heads.own(pair[1]))
        rows = [t.to(device, model.dtype).expand(batch_size, *t.shape) for t in own]
        cache.update(rows[0], rows[1], i)
    matched = torch.full((batch_size,), len(kv))
    cache.intactkv = Progress(owner=kv.digest, until=len(kv), done=True, matched=matched)
    _watch_(model, cache)
    return cache


def _watch_(model: PreTrainedModel, cache: PrefixCache) -> None:
    """Let `model` check the prompts that `generate` prepares for caches made here, until the last of them is gone."""
    caches = _alive.setdefault(model, weakref.WeakSet())
    caches.add(cache)
    weakref.finalize(cache, _unwatch, weakref.ref(model))
    if _PREPARE in vars(model):
        return
    prepare: Any = getattr(model, _PREPARE)

    @functools.wraps(prepare)
    def checked(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        held = given_cache(kwargs)
        if isinstance(held, PrefixCache):
            if kwargs.get("is_first_iteration"):
                held.check_prompt(input_ids, kwargs.get("attention_mask"))
            held.seen = input_ids
        return prepare(input_ids, *args, **kwargs)

    watched: Any = model
    setattr(watched, _PREPARE, checked)


def _unwatch(model: weakref.ref[PreTrainedModel]) -> None:
    alive = model()
    if alive is not None and not list(_alive.get(alive, ())):  # its length may still count the one that just went
        vars(alive).pop(_PREPARE, None)
