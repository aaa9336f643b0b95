"""Our own steps in an llm-compressor recipe. Imported only while quantizing: llm-compressor is optional."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from torch import nn
from transformers import PreTrainedModel


class Callback(Modifier):
    """Call `function(model)` between two other steps."""

    function: Callable[[PreTrainedModel], Any]

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        return True

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        self.function(state.model)


class Rotate(SpinQuantModifier):
    """SpinQuant's rotations without its centring of the embeddings.

    Centring is free before a LayerNorm, which subtracts the mean itself, and wrong before an RMSNorm, which does not:
    there it changes the model (llm-compressor 0.14).
    """

    def _center_embeddings(self, model: nn.Module) -> None:
        pass


HALF = (torch.bfloat16, torch.float16)


def widen_(model: nn.Module) -> None:
    """Cast half-precision numbers to float32."""
    with disable_onloading():  # or copies on the accelerator would be cast, and forgotten
        model._apply(lambda x: x.float() if x.dtype in HALF else x)


def cast_(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Cast the modules of these names, not those below them: rotations done online, added since, keep their type."""
    with disable_onloading():
        for name, module in model.named_modules():
            if (dtype := types.get(name)) is not None:
                module._apply(lambda x, dtype=dtype: x.to(dtype) if x.is_floating_point() else x, recurse=False)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While it is open, `model` computes in float32 with the weights it has; what two models compute can be compared.

    In bfloat16 the noise of one forward can be half as large as the logits' spread (SmolLM2, on tokens of no text).
    """
    with disable_onloading():
        narrow = [parameter for parameter in model.parameters() if parameter.dtype in HALF]
        before = [parameter.data for parameter in narrow]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, data in zip(narrow, before, strict=True):
            parameter.data = data
