"""Our own steps in an llm-compressor recipe. Imported only while quantizing: llm-compressor is optional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from torch import nn
from transformers import PreTrainedModel


class Call(Modifier):
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
