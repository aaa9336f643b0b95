"""A module has its weights while it computes, and only then. Of accelerate's hooks, whose own empty a GPU's cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn

from intactkv.checkpoint.compressed import packed_again_, packed_modules, unpack_


class Lent(ModelHook):
    """In a forward, parameters on the meta device are those of `weights_map`, in their type; packed ones unpacked."""

    def __init__(self, weights_map: Any, packed: bool) -> None:
        self.weights_map, self._packed = weights_map, packed
        self._without: dict[str, nn.Parameter | None] = {}

    def init_hook(self, module: Any) -> Any:
        self._without = dict(module._parameters)
        return module

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        for name, without in self._without.items():
            if without is not None:
                weight = self.weights_map[name].to(without.dtype)
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        if self._packed:
            unpack_(module)
        return args, kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        if self._packed:
            packed_again_(module)
        module._parameters |= self._without
        return output


def lend_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Every module of `model` that has parameters of its own takes them from `weights`, by their names in the model."""
    packed = packed_modules(model)
    for path, module in model.named_modules():
        if any(each is not None for each in module._parameters.values()):
            add_hook_to_module(module, Lent(PrefixedDataset(weights, f"{path}." if path else ""), module in packed))
