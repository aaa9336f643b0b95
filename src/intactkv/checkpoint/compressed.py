"""compressed-tensors checkpoints: what must be known before one is read, and one that is unpacked layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from intactkv.error import IntactKVError


def check_packing(
    source: str | os.PathLike[str], settings: Mapping[str, Any], packed: Iterable[tuple[str, int, int]]
) -> None:
    """Refuse weights that were packed otherwise than the installed version reads them.

    Numbers of bits that do not divide 32 are dense since compressed-tensors 0.18; before, no value crossed an integer's
    end. Either version loads the other's files without an error, as other weights. `packed` are names, how many
    integers a row takes, and how many values; only looked at where the numbers of bits ask for it.
    """
    groups = settings.get("config_groups", {}).values()
    bits = {group["weights"]["num_bits"] for group in groups if group.get("weights")}
    if settings.get("quant_method") != "compressed-tensors" or not any(32 % number for number in bits):
        return
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for name, width, row in packed:
        values = torch.zeros(1, row, dtype=torch.int8)
        reads = {number: pack_to_int32(values, number).shape[-1] for number in sorted(bits)}
        if width not in reads.values():
            written, installed = settings.get("version", "an unknown version"), version("compressed-tensors")
            expected = " or ".join(f"{count} ({number} bits)" for number, count in reads.items())
            raise IntactKVError(
                f"{source} was packed by compressed-tensors {written}: rows of {name} take {width} integers, "
                f"where {installed}, installed here, reads {expected} and would load other weights; install "
                "a version of the same side of 0.18, or quantize again"
            )


def online_transforms(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of transforms that a checkpoint wants done while the model runs, beside those in its weights."""
    groups = (settings.get("transform_config") or {}).get("config_groups", {})
    return {
        name: {**group, "apply": online}
        for name, group in groups.items()
        if (online := [place for place in group["apply"] if not place["location"].startswith("weight")])
    }


def packed_modules(model: Any) -> set[nn.Module]:
    """The modules of a model without weights that hold packed ones; each is unpacked on its own from now on."""
    if not hasattr(model, "ct_decompress_hook"):
        return set()
    from compressed_tensors.quantization.utils import is_module_quantized

    model.ct_decompress_hook.remove()  # at the first forward it would unpack all
    del model.ct_decompress_hook
    return {module for module in model.modules() if is_module_quantized(module)}


def unpack_(module: nn.Module) -> None:
    """Make a module's packed weight one to compute with, as at the first forward of a loaded model."""
    from compressed_tensors.compressors import decompress_module

    decompress_module(module)


def packed_again_(module: Any) -> None:
    """A module's parameters are taken away, and it counts as packed."""
    from compressed_tensors.quantization import QuantizationStatus

    module._parameters.clear()
    module.quantization_status = QuantizationStatus.COMPRESSED
