"""What a call's attention mask and position ids say: which tokens are real, where they stand, what they see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from intactkv.error import IntactKVError


def as_tensor(mask: Any) -> Tensor | None:
    """The mask to read padding from; of one mask per layer type, the one that covers most."""
    if isinstance(mask, Mapping):
        given = [m for m in mask.values() if m is not None]
        mask = max(given, key=lambda m: m.shape[-1]) if given else None
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim not in (2, 4)):
        found = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise IntactKVError(f"the attention mask is {found}; give a 2D mask (batch, token) or a 4D tensor")
    return mask


def real_tokens(mask: Tensor | None, ids: Int[Tensor, "batch token"], past: int) -> Bool[Tensor, "batch token"]:
    """Which tokens are no padding, `(batch, token)`."""
    batch, length = ids.shape
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape[-1] < (past + length if mask.ndim == 2 else length):
        raise IntactKVError(
            f"the attention mask covers {mask.shape[-1]} tokens, the cache and this call hold {past + length}; "
            "give a mask of the whole length, or none"
        )
    if mask.ndim == 2:
        return mask[:, past : past + length].to(ids.device).bool()
    at = min(past, mask.shape[-1] - length)  # a rolling window ends with the call's own tokens
    diagonal = mask[:, 0, :, at : at + length].diagonal(dim1=1, dim2=2)
    return visible(diagonal).expand(batch, length).to(ids.device)


def token_positions(
    mask: Tensor | None, given: Tensor | None, ids: Int[Tensor, "batch token"], past: int
) -> Int[Tensor, "batch token"]:
    """Every token's position in its own sequence, `(batch, token)`: as given, or counted from the first real token."""
    if given is not None:
        given = given[0] if given.ndim == 3 else given  # multimodal RoPE: text tokens have equal components
        return given.to(ids.device).expand_as(ids)
    if mask is not None and mask.ndim == 2:
        counted = mask.to(ids.device).long().cumsum(1) - 1
        return counted[:, past : past + ids.shape[1]].clamp(min=0)
    return slots(ids, past)


def slots(ids: Tensor, past: int) -> Tensor:
    """Every token's column in the cache, `(batch, token)`."""
    return torch.arange(past, past + ids.shape[1], device=ids.device).expand_as(ids)


def sees_previous(mask: Tensor, past: int) -> Tensor:
    """For a 4D mask: whether each token but the first sees the one before it, `(batch, token - 1)`."""
    length = mask.shape[2]
    past = min(past, mask.shape[-1] - length)
    return visible(mask[:, 0, 1:, past : past + length - 1].diagonal(dim1=1, dim2=2))


def visible(mask: Tensor) -> Tensor:
    """A mask as booleans; an additive one may carry a bias, and hides with very negative numbers only."""
    return mask if mask.dtype == torch.bool else mask > -9000
