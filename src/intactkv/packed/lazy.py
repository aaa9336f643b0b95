"""What a layer's cache gives back: keys or values that are dense only if somebody computes with them.

`Cache.update` must return tensors. Ours have the right shape, dtype and device but no numbers: our attention function
takes the stored form out of them, and any other operation of torch makes them dense first. So the cache is right with
every model and every attention implementation, and fast with ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from intactkv.packed.readable import Readable


class LazyStates(torch.Tensor):
    """Keys (`which` 0) or values (1) of `stored`; any operation on them works on `stored.dense(which)`."""

    stored: Readable
    which: int

    @staticmethod
    def __new__(cls, stored: Readable, which: int) -> LazyStates:
        like, tokens = stored.like(which)
        batch, head, _, dim = like.shape
        self = torch.Tensor._make_wrapper_subclass(
            cls, (batch, head, tokens, dim), dtype=like.dtype, device=like.device
        )
        self.stored, self.which = stored, which
        return self

    def __init__(self, stored: Readable, which: int) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyStates(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def dense(x: LazyStates) -> Tensor:
            return x.stored.dense(x.which)

        return func(*tree_map_only(cls, dense, args), **tree_map_only(cls, dense, kwargs or {}))
