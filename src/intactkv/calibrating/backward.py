"""Does a gradient come through the quantized model, and what to do where a kernel has no backward.

The remedy that fits every backend: the real kernel computes the forward, and its effective weight, read off by
showing it the identity, carries the gradient back. What this gives up: one dense copy of those weights, and for
rounded activations the gradient is the straight-through one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from intactkv.decoder import input_device, replaced_forwards

_ROWS = 512  # of the identity at a time


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """While it is open, no weight of `model` learns; afterwards each is as it was."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def checkpointing(model: PreTrainedModel, *, on: bool) -> Iterator[None]:
    """While it is open, blocks keep their inputs only and compute again in the backward.

    transformers does so in training mode only; just the model and its blocks are put into it, not what is inside
    them, so that dropout modules stay off.
    """
    if not on:
        yield
        return
    switched = [model, *(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))]
    was_on = model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in switched:
        module.training = True
    try:
        yield
    finally:
        for module in switched:
            module.training = False
        if not was_on:
            model.gradient_checkpointing_disable()


class _StraightThrough(torch.autograd.Function):
    """A kernel's own forward, and the backward of multiplying by its effective weight `(in, out)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return kernel(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return (gradients[0].to(weight.dtype) @ weight.T).to(ctx.dtype), None, None


@contextmanager
def straight_through(model: PreTrainedModel) -> Iterator[dict[str, int]]:
    """While it is open, Linear layers whose kernel has no backward pass get one; yields how many of which class."""
    mended = {
        module: _wrapped(module.forward, effective_weight(module, model))
        for module in model.modules()
        if _is_linear(module) and not passes_gradient(module, model)
    }
    with replaced_forwards(mended):
        yield dict(Counter(type(module).__name__ for module in mended))


def _wrapped(kernel: Callable[[Tensor], Tensor], weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: _StraightThrough.apply(x, weight, kernel)


def _is_linear(module: nn.Module) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes) and not any(module.children())


def passes_gradient(module: nn.Module, model: PreTrainedModel) -> bool:
    """Whether a gradient of the module's output reaches its input."""
    size: Any = module.in_features
    x = (1 + torch.arange(size, device=input_device(model)) % 3).to(model.dtype)[None].requires_grad_()
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(module(x).float().square().sum(), x, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # "does not require grad", "derivative for … is not implemented"
        return False
    return gradient is not None and bool(gradient.any())


@torch.no_grad()
def effective_weight(module: nn.Module, model: PreTrainedModel) -> Float[Tensor, "in out"]:
    """The matrix that the module's kernel multiplies by, read off the identity, in the model's dtype."""
    size: Any = module.in_features
    like: dict[str, Any] = {"device": input_device(model), "dtype": model.dtype}
    bias = module(torch.zeros(1, size, **like))
    rows = []
    for start in range(0, size, _ROWS):
        part = torch.zeros(min(_ROWS, size - start), size, **like)
        part[torch.arange(len(part)), start + torch.arange(len(part))] = 1
        rows.append(module(part) - bias)
    return torch.cat(rows).to(model.dtype)
