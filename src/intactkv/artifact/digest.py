"""Digests of tensors: of each on its own, and of all by the sorted digests of each, so that parts can be made alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over a tensor's type, shape and bytes."""
    sha = hashlib.sha256()
    add_tensor(sha, "", tensor)
    return sha.hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Each tensor's digest by its name, sorted."""
    return {name: tensor_digest(tensors[name]) for name in sorted(tensors)}


def joined(header: Mapping[str, Any], parts: Mapping[str, str]) -> str:
    """SHA-256 over a header, its entry "digest" left out, and the digests of the tensors that it stands for."""
    said = {name: value for name, value in header.items() if name != "digest"}
    return hashlib.sha256(json.dumps([said, dict(sorted(parts.items()))], sort_keys=True).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers that a checkpoint of `model` holds.

    What accelerate has offloaded is read where its hooks find it, a DTensor is gathered from its processes. The digest
    says so instead where neither is possible.
    """
    sha, split = hashlib.sha256(), (getattr(model, "tp_size", None) or 1) > 1 and bool(model.tp_plan)
    weights = sorted(model.state_dict().items())
    if split and not any(hasattr(tensor, "full_tensor") for _, tensor in weights):
        return "unknown: weights of one process"
    for name, tensor in weights:
        if tensor.device.type == "meta":
            owner, _, own = name.rpartition(".")
            held = offloaded(model.get_submodule(owner))
            if held is None:
                return "unknown: offloaded weights"
            tensor = held[own]
        add_tensor(sha, name, tensor)
    return sha.hexdigest()


def offloaded(module: nn.Module) -> Any:
    """Where accelerate's hook of a module finds the weights that it has offloaded; None where it has none."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((found for each in hooks if (found := getattr(each, "weights_map", None)) is not None), None)


def add_tensor(sha: Any, name: str, tensor: Tensor) -> None:
    """Hash a tensor on: its name, type, shape and bytes."""
    if hasattr(tensor, "full_tensor"):  # a DTensor: its processes come by here together
        tensor = tensor.full_tensor()
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is not None:  # a tensor that wraps plain ones: torchao's
        for part in inner()[0]:
            add_tensor(sha, f"{name}.{part}", getattr(tensor, part))
        return
    sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
