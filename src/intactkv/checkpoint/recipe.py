"""What makes a parameter: one tensor of the checkpoint, or several that transformers would merge on loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from intactkv.checkpoint.shards import Entry
from intactkv.checkpoint.source import quantizer


@dataclass
class Recipe:
    """What makes a parameter: one tensor of the checkpoint, or several and transformers' conversion of them."""

    target: str
    converter: WeightConverter | None
    dtype: torch.dtype
    quantized: bool  # of fp8 or packed, with scales beside it
    parts: list[tuple[str, str]] = field(default_factory=list)  # a tensor's name and the pattern that it matches

    def make(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """The parameters by name, from the checkpoint's tensors."""
        if self.converter is None:
            return {self.target: tensors[self.parts[0][0]]}
        converter = deepcopy(self.converter)
        for name, pattern in self.parts:
            # scales and what is packed keep their type, as transformers has it
            part: Any = tensors[name].to(self.dtype) if name == self.target or not self.quantized else tensors[name]
            converter.add_tensor(self.target, name, pattern, part)
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

    def of(self, experts: Sequence[int]) -> Recipe:
        """The recipe of some experts alone, where the tensors of each lie apart."""
        seen: dict[str, int] = {}
        parts = []
        for name, pattern in self.parts:
            place = seen[pattern] = seen.get(pattern, -1) + 1
            if place in experts:
                parts.append((name, pattern))
        return replace(self, parts=parts)


def recipes(model: PreTrainedModel, entries: Mapping[str, Entry]) -> dict[str, Recipe]:
    """Every parameter's recipe, by transformers' own renamings and conversions."""
    transforms: Any = model._weight_conversions or []
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Recipe] = {}
    fp8 = any(each.dtype == torch.float8_e4m3fn for each in entries.values())
    quantized = fp8 or quantizer(model.config) is not None
    for name in sorted(entries, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            converter = None if pattern is None else by_pattern[pattern]
            group = groups.setdefault(target, Recipe(target, converter, state[target].dtype, quantized))
            group.parts.append((name, pattern or name))
    found: dict[str, Recipe] = {}
    for group in groups.values():
        shapes = {name: torch.empty(entries[name].shape, device="meta") for name, _ in group.parts}
        found |= dict.fromkeys(group.make(shapes, model), group)
    tied: dict[str, str] = model.all_tied_weights_keys
    return found | {name: found[source] for name, source in tied.items() if name not in found}
