"""What each layer hands to its cache in one forward, before a window drops or a store rounds anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from intactkv.decoder import cache_name, forced_inputs, input_device
from intactkv.error import IntactKVError
from intactkv.heads import Heads, heads_of

if TYPE_CHECKING:
    from intactkv.capturing.partial import Partial


@torch.no_grad()
def recorded(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch token"],
    *,
    most: int | None = None,
    partial: Partial | None = None,
    inputs: Callable[[int], Tensor] | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """What each layer hands to `Cache.update` for `ids`: keys and values `(batch, head, token, dim)` on the CPU.

    Computed in eval mode; the model is left as it was. After `most` layers the forward is broken off; with `partial` it
    goes on where an earlier one ended; with `inputs` every block reads `inputs(layer)`, whatever the one before it
    wrote. Every process of a tensor-parallel model gets all heads. Raises `IntactKVError`
    where no layer has keys and values.
    """
    cache = _Recorder(most, heads_of(model), config=model.config)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with (
            nullcontext() if partial is None else partial.followed(model, cache),
            nullcontext() if inputs is None else forced_inputs(model, inputs, lambda: len(cache.recorded)),
        ):
            model(input_ids=ids.to(input_device(model)), use_cache=True, **{cache_name(model.forward): cache})
    except _Enough:
        pass
    except ValueError as error:
        if isinstance(error, IntactKVError) or "cache" not in str(error).lower():
            raise
        raise IntactKVError(
            f"{model.config.model_type} does not run with a DynamicCache ({error}); it is not supported"
        ) from error
    finally:
        for module in training:  # one by one: a model may be trained with some of its parts in eval mode
            module.training = True
    if not cache.recorded:
        raise IntactKVError(
            f"no layer of {model.config.model_type} called Cache.update, so it has no keys and values to "
            "keep; use a model with attention layers"
        )
    return {i: cache.recorded[i] for i in sorted(cache.recorded)}


class _Enough(Exception):
    """As many layers as were asked for."""


class _Recorder(DynamicCache):
    """A dynamic cache that also keeps a copy of what each layer handed in."""

    def __init__(self, most: int | None = None, heads: Heads | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}
        self._most, self._heads = most, heads

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self.recorded:
            raise IntactKVError(f"layer {layer_idx} updates its cache twice in one forward; this model is unsupported")
        key, value = key_states, value_states
        if self._heads is not None:
            key, value = self._heads.whole(key), self._heads.whole(value)
        self.recorded[layer_idx] = (key.cpu().clone(), value.cpu().clone())
        if len(self.recorded) == self._most:
            raise _Enough
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def restore(self, layers: Mapping[int, tuple[Tensor, Tensor]], device: torch.device) -> None:
        """What layers handed in in an earlier forward."""
        for i, (key, value) in layers.items():
            self.update(key.to(device), value.to(device), i)


class Watched(DynamicCache):
    """A cache that shows each layer's keys and values to `look(layer, key, value)`, and stores none."""

    def __init__(self, model: PreTrainedModel, look: Callable[[int, Tensor, Tensor], None]) -> None:
        super().__init__(config=model.config)
        self.look = look

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.look(layer_idx, key_states, value_states)
        return key_states, value_states
