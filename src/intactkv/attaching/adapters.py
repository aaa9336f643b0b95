"""Adapters (LoRA and its kin, by PEFT) on a model: an intact KV is of the weights and adapters that computed it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def adapters(model: PreTrainedModel) -> list[str]:
    """The names of the adapters that take part in what `model` computes: active, or merged and still told of.

    PEFT's layers are told by what they carry, so that PEFT need not be installed. What was merged for good
    (`merge_and_unload`) is part of the weights and cannot be told.
    """
    names: set[str] = set()
    for module in model.modules():
        # Every `attach` comes by here: a class and a dictionary are asked, not the module, whose "no" is slow.
        if "merged_adapters" not in vars(module) and not hasattr(type(module), "merged_adapters"):
            continue
        layer: Any = module
        if hasattr(layer, "active_adapters"):
            names |= set(layer.merged_adapters)
            if not getattr(layer, "disable_adapters", False):
                names |= set(layer.active_adapters)
    return sorted(names)


def unlike(captured: list[str], model: PreTrainedModel) -> str | None:
    """One sentence where `model` computes with other adapters than the intact KV was captured with; None else."""
    here = adapters(model)
    if here == captured:
        return None
    told = f"with the adapters {', '.join(captured)}" if captured else "without adapters"
    now = f"the adapters {', '.join(here)}" if here else "no adapters"
    return (
        f"the intact KV was captured {told}, and this model computes with {now}: its keys and values are others; "
        "capture it from the full-precision model with the same adapters active"
    )
