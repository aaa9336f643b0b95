"""An artifact's tensors as a model's layers want them, and how they are put among a layer's own."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from intactkv.artifact import IntactKV
from intactkv.attaching.locate import Sites
from intactkv.error import IntactKVError
from intactkv.heads import Heads


class IntactTensors:
    """An artifact's keys and values on the devices and in the dtypes that a model's layers ask for, remembered.

    `heads` are those that the process computes, None for all.
    """

    def __init__(self, kv: IntactKV, heads: Heads | None = None) -> None:
        self.kv, self.heads = kv, heads
        self._placed: dict[Any, tuple[Tensor, Tensor]] = {}
        self._whole: dict[Any, tuple[Tensor, Tensor]] = {}
        self._stacked: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        shapes = {x.shape for pair in kv.layers.values() for x in pair}
        self._alike = len(shapes) == 1 and set(kv.layers) == set(range(len(kv.layers)))
        self._ids: dict[torch.device, Tensor] = {}
        self._logits: dict[Any, Tensor] = {}

    def ids(self, device: torch.device) -> Int[Tensor, "prefix"]:
        """The prefix on a device."""
        if device not in self._ids:
            with torch.inference_mode(False):
                self._ids[device] = self.kv.ids.to(device)
        return self._ids[device]

    def logits(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "prefix vocab"]:
        """The prefix's logits on a device and in a dtype; for artifacts that have them."""
        if (device, dtype) not in self._logits:
            assert self.kv.logits is not None
            with torch.inference_mode(False):
                self._logits[device, dtype] = self.kv.logits.to(device, dtype)
        return self._logits[device, dtype]

    def like(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of `layer`, `(prefix, head, dim)`, each on the device and in the dtype of what is given."""
        place = (layer, key.device, key.dtype, value.device, value.dtype)
        frozen = self._frozen(layer)
        if frozen and place in self._placed:
            return self._placed[place]
        stack = self._stacked.get(place[1:3]) if frozen and place[1:3] == place[3:] else None
        own = self._own(layer) if stack is None else stack[layer]
        with torch.inference_mode(False):
            pair = (
                own[0].transpose(0, 1).to(key.device, key.dtype),
                own[1].transpose(0, 1).to(value.device, value.dtype),
            )
        if frozen:
            self._placed[place] = pair
        return pair

    def beginning(self, layer: int, key: Tensor, value: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` tokens as `layer`'s cache begins with them, `(batch, head, count, dim)`: views."""
        place = (layer, len(key), key.device, key.dtype, value.device, value.dtype)
        usual = count == len(self.kv.ids) and self._frozen(layer)
        if usual and place in self._whole:
            return self._whole[place]
        own = self.like(layer, key, value)
        with torch.inference_mode(False):
            pair = (_beginning(own[0], key, count, layer), _beginning(own[1], value, count, layer))
        if usual:
            self._whole[place] = pair
        return pair

    def stacked(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "layer 2 head prefix dim"] | None:
        """All layers' keys and values in one tensor; None where they differ in shape, skip layers, or learn.

        A compiled forward guards every tensor that it reads: this is one instead of four for each layer.
        """
        if not self._alike or not all(map(self._frozen, self.kv.layers)):
            return None
        if (device, dtype) not in self._stacked:
            with torch.inference_mode(False):
                stack = torch.stack([torch.stack(self._own(i)) for i in range(len(self.kv.layers))])
                self._stacked[device, dtype] = stack.to(device, dtype)
        return self._stacked[device, dtype]

    def _own(self, layer: int) -> tuple[Tensor, Tensor]:
        key, value = self.kv.layers[layer]
        return (key, value) if self.heads is None else (self.heads.own(key), self.heads.own(value))

    def _frozen(self, layer: int) -> bool:
        """Whether nothing is learned: what is changes and carries gradients, so that it is never remembered."""
        key, value = self.kv.layers[layer]
        return not (key.requires_grad or value.requires_grad)


def put(
    x: Float[Tensor, "batch head token dim"], intact: Float[Tensor, "prefix head dim"], sites: Sites, *, layer: int
) -> Float[Tensor, "batch head token dim"]:
    """`x` with `intact` at `sites`, differentiable in both; in place where that is one plain slice and nothing learns.

    A compiler decides itself what it writes in place. `layer` is named if the shapes do not fit.
    """
    _check_shape(x, intact, layer)
    if sites.whole and torch.compiler.is_compiling():
        return x.slice_scatter(_beginning(intact, x, sites.whole, layer), 2, 0, sites.whole)
    if sites.whole and not torch.is_grad_enabled() and 0 not in x.stride():  # 0: heads or rows that share memory
        x.narrow(2, 0, sites.whole).copy_(intact.narrow(0, 0, sites.whole).transpose(0, 1))
        return x
    sites = sites.to(x.device)
    # a copy in the layout of `x`, written through a transposed view: attention over a transposed copy is slower
    out = x.clone()
    out.transpose(1, 2)[sites.row, sites.col] = intact[sites.index]
    return out


def _beginning(intact: Tensor, x: Tensor, count: int, layer: int) -> Float[Tensor, "batch head count dim"]:
    """The first `count` intact rows for every row of `x`."""
    _check_shape(x, intact, layer)
    return intact[:count].transpose(0, 1).expand(len(x), -1, -1, -1)


def _check_shape(x: Tensor, intact: Tensor, layer: int) -> None:
    if (x.shape[1], x.shape[3]) != intact.shape[1:]:
        raise IntactKVError(
            f"layer {layer} has (head, dim) {(x.shape[1], x.shape[3])} in this call, the intact KV has "
            f"{tuple(intact.shape[1:])}; split the model over processes by transformers' own tp_size, if it is "
            "split, otherwise capture it again"
        )
