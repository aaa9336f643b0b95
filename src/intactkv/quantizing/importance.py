"""llama.cpp's importance matrix of a full model, with the prefix's tokens counted or left out.

`llama-quantize` weighs a column's error by the mean square of its input. A pivot's input is thousands of times as large
as any other token's, so that one row of it in a window decides the weights of some layers, for a token whose keys and
values an intact prefix brings along.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from intactkv.error import IntactKVError
from intactkv.files import check_outputs, replacing


@dataclass
class Importance:
    """Of every linear layer of the decoder: the sum of its input's squares over tokens, float64, and how many.

    `chunk` tokens a window, `chunks` windows.
    """

    squares: dict[str, Float[Tensor, "input"]]
    tokens: int
    chunk: int
    chunks: int


@torch.no_grad()
def importance(
    model: PreTrainedModel, windows: Int[Tensor, "window length"], *, skip: int = 0, batch_size: int = 4
) -> Importance:
    """Run `model` over the windows and sum what its linear layers read, but for the first `skip` tokens of each."""
    if not 0 <= skip < windows.shape[1]:
        raise IntactKVError(f"skip={skip} leaves nothing of windows of {windows.shape[1]} tokens; use fewer")
    found: dict[str, Tensor] = {}
    head = model.get_output_embeddings()

    def add(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        squares = inputs[0][:, skip:].double().square().sum((0, 1)).cpu()
        found[name] = found[name] + squares if name in found else squares

    handles = [
        module.register_forward_pre_hook(partial(add, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    try:
        for batch in windows.split(batch_size):
            model(batch.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    count, length = windows.shape
    return Importance(found, count * (length - skip), length, count)


def write_imatrix(of: Importance, config: PreTrainedConfig, path: Path) -> Path:
    """Write it as `llama-quantize --imatrix` reads it, a GGUF. Raises `IntactKVError` for an unknown architecture."""
    from gguf import GGUFWriter

    check_outputs(path)
    names = _names(of.squares, config)
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["intactkv"])
        writer.add_uint32("imatrix.chunk_count", of.chunks)
        writer.add_uint32("imatrix.chunk_size", of.chunk)
        for name, squares in of.squares.items():
            writer.add_tensor(f"{names[name]}.in_sum2", squares.float().numpy()[None])
            writer.add_tensor(f"{names[name]}.counts", np.array([[of.tokens]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _names(modules: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, str]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = re.sub(r"_text$", "", str(config.model_type))
    arch = next((number for number, name in MODEL_ARCH_NAMES.items() if name == kind), None)
    if arch is None:
        raise IntactKVError(f"the gguf package knows no architecture {kind!r}; its names in an imatrix are not known")
    table = get_tensor_name_map(arch, config.num_hidden_layers)
    found = {name: table.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in modules}
    if unknown := [name for name, there in found.items() if there is None]:
        raise IntactKVError(f"the gguf package has no name for {unknown[0]} of {kind}")
    return {name: str(there) for name, there in found.items()}
