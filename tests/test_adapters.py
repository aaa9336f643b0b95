"""An intact KV is of the adapters that it was captured with; a model with others says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import PREFIX, build, by_name
from torch import nn
from transformers import PreTrainedModel

from intactkv import attach, capture
from intactkv.attaching.adapters import adapters


class LikeLora(nn.Module):
    """What a tuner layer of PEFT 0.21 carries, around a Linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"tuned": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"tuned": nn.Linear(2, base.out_features, bias=False)})
        self.active_adapters, self.merged_adapters, self.disable_adapters = ["tuned"], list[str](), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)
        return out if self.disable_adapters else out + self.lora_B["tuned"](self.lora_A["tuned"](x))


def hand_made() -> tuple[PreTrainedModel, list[Any]]:
    model: Any = build(by_name("llama-gqa"))
    layers = []
    for block in model.model.layers:
        block.self_attn.k_proj = LikeLora(block.self_attn.k_proj)
        layers.append(block.self_attn.k_proj)
    return model.eval(), layers


def by_peft() -> tuple[PreTrainedModel, list[Any]]:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(by_name("llama-gqa")), config, adapter_name="tuned").get_base_model().eval()
    return model, [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]


@pytest.mark.parametrize("make", [hand_made, by_peft])
def test_other_adapters_than_those_captured_with_are_told(make: Any) -> None:
    model, _ = make()
    assert adapters(model) == ["tuned"]
    plain, tuned = capture(build(by_name("llama-gqa")), PREFIX), capture(model, PREFIX)
    assert "adapters" not in plain.provenance
    assert tuned.provenance["adapters"] == ["tuned"]
    with pytest.warns(UserWarning, match="captured without adapters, and this model computes with the adapters tuned"):
        attach(model, plain, check=False).remove()
    with pytest.warns(UserWarning, match="captured with the adapters tuned, and this model computes with no adapters"):
        attach(build(by_name("llama-gqa")), tuned, check=False).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, tuned).remove()
        attach(build(by_name("llama-gqa")), plain).remove()


def test_merged_ones_count_and_disabled_ones_do_not() -> None:
    model, layers = hand_made()
    for layer in layers:
        layer.disable_adapters = True
    assert adapters(model) == []
    layers[0].merged_adapters = ["tuned"]
    assert adapters(model) == ["tuned"]


def test_pefts_own_merging_and_disabling_are_told() -> None:
    model, layers = by_peft()
    for layer in layers:
        layer.enable_adapters(False)
    assert adapters(model) == []
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    assert adapters(model) == ["tuned"]
