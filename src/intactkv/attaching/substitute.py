"""One forward with prefix tokens in it: put the intact keys, values and logits where the model's own would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, QuantizedLayer
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_layers import GradientCheckpointingLayer

from intactkv.attaching.locate import Progress, Sites
from intactkv.attaching.tensors import IntactTensors, put
from intactkv.error import IntactKVError
from intactkv.packed.cache import PackedCache


@dataclass
class Substitution:
    """What one forward replaces and where, and which layers have come by.

    `sites` are the call's prefix tokens, `past` the tokens cached before it, `length` its own; `logits_to_keep` is the
    call's argument of that name.
    """

    intact: IntactTensors
    sites: Sites
    past: int
    length: int
    logits_to_keep: int | Tensor
    seen: set[int] = field(default_factory=set)
    pass_through: PassThrough | None = None
    stack: Tensor | None = None
    _cache: Any = None
    _shadowed: Any = None
    _opened: list[GradientCheckpointingLayer] = field(default_factory=list)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put in place what a compiled forward of whole `sites` reads, for it to be traced only once.

        What is remembered while a forward is traced changes its guards, and the next one is traced again.
        """
        self.stack = self.intact.stacked(device, dtype)
        if self.intact.kv.logits is not None and (self._first_kept or 0) < self.sites.whole:
            self.intact.logits(device, dtype)

    def enter(self, cache: Cache, progress: Progress) -> None:
        """Shadow `cache.update` until `leave`, where there is something to replace."""
        lossy = any(isinstance(layer, QuantizedLayer) for layer in cache.layers)
        if lossy:
            # transformers' quantized layers cannot reorder or select rows, so a cache's rows stay what they were
            progress.sites = _joined(progress.sites, self.sites, self.past)
        cache.intactkv = progress  # type: ignore[attr-defined]
        if isinstance(cache, PackedCache) and progress.matched is not None:
            cache.keep_sites(self.sites, len(progress.matched), self.past)
        if len(self.sites) == 0 and progress.sites is None:
            return
        update = cache.update

        def replaced(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            given = self._begin(cache, key, value, layer) or self.write(key, value, layer)
            return update(*given, layer, *args, **kwargs)

        def restored(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            # The lossy store rounds tokens in groups, so the prefix must not enter a group's scale: the chunk's last
            # token stands in for it, and the intact rows are put back on every read.
            kept = update(self._neutral(key), self._neutral(value), layer, *args, **kwargs)
            return kept if progress.sites is None else self._put(*kept, layer, progress.sites)

        self._shadow(cache, restored if lossy else replaced)

    def enter_paged(self, cache: PagedAttentionCache) -> None:
        """The same for continuous batching's cache, which layers call themselves from transformers 5.24 on."""
        update = cache.update

        def replaced(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return update(*self.write(key, value, layer), layer, *args, **kwargs)

        self._shadow(cache, replaced)

    def _shadow(self, cache: Any, update: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._cache, self._shadowed = cache, vars(cache).get("update")
        cache.update = update

    def pass_through_(self, model: PreTrainedModel, *, checkpointing: bool) -> PassThrough:
        """The cache for a call without one; checkpointed layers are made to see it until `leave`."""
        self.pass_through = PassThrough(model, self)
        if checkpointing:
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    # transformers' switch for caches that may be replayed in the backward: ours stores nothing
                    layer._can_checkpoint_with_cache = True
                    self._opened.append(layer)
        return self.pass_through

    def leave(self) -> None:
        """Undo `enter` and `pass_through_`, also after a forward that raised; may be called twice."""
        if self._cache is not None:
            if self._shadowed is None:
                del self._cache.update  # the instance attribute; the class's method shows again
            else:
                self._cache.update = self._shadowed
            self._cache = None
        for layer in self._opened:
            del layer._can_checkpoint_with_cache
        self._opened.clear()

    def write(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values `(batch, head, token, dim)` with the prefix tokens' replaced."""
        return self._put(key, value, layer, self.sites)

    def _begin(self, cache: Cache, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor] | None:
        """Let a layer that is empty and appends begin with the prefix; the tokens after it, still to be given to it.

        The layer copies what it is given anyway, so the prefix costs no copy of its own. None for any other layer.
        """
        count = self.sites.whole
        if not count or self.past or cache.offloading or torch.compiler.is_compiling():
            return None  # a compiler fuses `write` into what makes the keys, and reads one tensor for all layers
        if layer == len(cache.layers) and cache.layer_class_to_replicate is DynamicLayer:
            cache.layers.append(DynamicLayer())  # as `Cache.update` does
        empty = cache.layers[layer] if layer < len(cache.layers) else None
        if type(empty) is not DynamicLayer or empty.is_initialized or layer not in self.intact.kv.layers:
            return None
        self.seen.add(layer)
        empty.keys, empty.values = self.intact.beginning(layer, key, value, count)
        empty.dtype, empty.device, empty.is_initialized = key.dtype, key.device, True  # as `lazy_initialization` does
        after = key.shape[2] - count
        return key.narrow(2, count, after), value.narrow(2, count, after)

    def _put(self, key: Tensor, value: Tensor, layer: int, sites: Sites) -> tuple[Tensor, Tensor]:
        intact_key, intact_value = self._intact(layer, key, value)
        self.seen.add(layer)
        if not torch.compiler.is_compiling() and key.data_ptr() == value.data_ptr():
            key = key.clone()  # a layer whose values are its keys: written in turns
        return put(key, intact_key, sites, layer=layer), put(value, intact_value, sites, layer=layer)

    def _intact(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of `layer`, `(prefix, head, dim)`."""
        stack = self.stack if torch.compiler.is_compiling() else None
        if stack is not None and layer < len(stack):
            pair = stack[layer].transpose(1, 2)
            if all((x.device, x.dtype) == (pair.device, pair.dtype) for x in (key, value)):
                return pair[0], pair[1]
        if layer not in self.intact.kv.layers:
            raise IntactKVError(
                f"layer {layer} has keys and values but the intact KV holds none for it; capture it from this model"
            )
        return self.intact.like(layer, key, value)

    def _neutral(self, x: Tensor) -> Tensor:
        """`x` with prefix tokens replaced by the chunk's last token, or by zeros in a row that is all prefix."""
        if len(self.sites) == 0:
            return x
        sites, last = self.sites.to(x.device), x.shape[2] - 1
        stand_in = x[:, :, -1].clone()
        stand_in[sites.row[sites.col == last]] = 0
        return x.transpose(1, 2).index_put((sites.row, sites.col), stand_in[sites.row]).transpose(1, 2)

    def logits(self, output: Float[Tensor, "batch kept vocab"]) -> Float[Tensor, "batch kept vocab"]:
        """The output embedding's result with the artifact's logits at prefix positions; in place if nothing learns."""
        count, first = self.sites.whole, self._first_kept
        if first is not None and count:
            self._check_logits(output, self.length - first)
            if count <= first:
                return output  # no prefix position is kept, as in `generate`, which keeps the last one only
            intact = self._intact_logits(output)[first:count]
            if torch.is_grad_enabled():
                return torch.cat([intact.expand(len(output), -1, -1), output[:, count - first :]], dim=1)
            output[:, : count - first] = intact
            return output
        kept = torch.arange(self.length, device=output.device)[first or 0 :]
        if isinstance(self.logits_to_keep, Tensor):
            chosen = self.logits_to_keep.to(output.device)
            kept = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen % self.length
        self._check_logits(output, len(kept))
        intact, sites = self._intact_logits(output), self.sites.to(output.device)
        at = torch.full((self.length,), -1, device=output.device)
        at[kept] = torch.arange(len(kept), device=output.device)
        here = at[sites.col] >= 0
        where = (sites.row[here], at[sites.col[here]])
        intact = intact[sites.index[here]]
        return output.index_put(where, intact) if torch.is_grad_enabled() else output.index_put_(where, intact)

    @property
    def _first_kept(self) -> int | None:
        """The first position that gets logits; None where the call names positions one by one."""
        keep = self.logits_to_keep
        return slice(-keep, None).indices(self.length)[0] if isinstance(keep, int) else None

    @staticmethod
    def _check_logits(output: Tensor, kept: int) -> None:
        if output.ndim != 3 or output.shape[1] != kept:
            raise RuntimeError(
                f"the output embedding gave shape {tuple(output.shape)} for {kept} kept positions, so prefix "
                "logits cannot be put in their place; this model's head is not supported"
            )

    def _intact_logits(self, output: Tensor) -> Float[Tensor, "prefix vocab"]:
        intact = self.intact.logits(output.device, output.dtype)
        if output.shape[2] != intact.shape[1]:
            raise IntactKVError(
                f"the model has {output.shape[2]} output tokens, the intact KV was captured with {intact.shape[1]}; "
                "capture it from the full-precision form of this model"
            )
        return intact


class PassThrough(DynamicCache):
    """The cache of a call without cache: replaces prefix tokens, stores nothing, and may be replayed."""

    def __init__(self, model: PreTrainedModel, substitution: Substitution) -> None:
        super().__init__(config=model.config)
        self.substitution = substitution

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.substitution.write(key_states, value_states, layer_idx)


def _joined(before: Sites | None, now: Sites, past: int) -> Sites | None:
    """All sites of a cache so far, by cache column; None where there are none."""
    now = Sites(now.row, now.col + past, now.index)
    if before is None:
        return now if len(now) else None
    before = before.to(now.row.device)
    return Sites(
        torch.cat([before.row, now.row]), torch.cat([before.col, now.col]), torch.cat([before.index, now.index])
    )
