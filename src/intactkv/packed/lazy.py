"""What a layer's cache gives back: keys or values that are dense only if somebody computes with them.

`Cache.update` must return tensors. Ours have the right shape, dtype and device but no numbers: our attention function
takes the stored form out of them, and any other operation of torch makes them dense first. So the cache is right with
every model and every attention implementation, and fast with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map_only

from intactkv.packed.bits import hadamard
from intactkv.packed.store import Packed, Run

Rounded = tuple[Tensor, Tensor, Tensor]  # packed codes, scale and low

if TYPE_CHECKING:
    from intactkv.packed.steady import Standing


@dataclass(frozen=True, eq=False)
class Stored:
    """One layer's tokens as they are stored at one moment, in three parts.

    `runs` are the packed tokens, columns 0 to `tail_column`; `tail` the tokens from there on, in full precision; `kept`
    the first `count` tokens of each row from column `start` on, in full precision, which stand for the packed ones
    there. `take`, if there is one, is glad of the tail's one token packed by whoever reads it (codes, scale and low of
    its key and of its value); the layer packs it by itself otherwise.
    """

    runs: tuple[tuple[Run, Packed, Packed], ...]
    tail: tuple[Float[Tensor, "batch head token dim"], Float[Tensor, "batch head token dim_v"]]
    tail_column: int
    kept: tuple[Float[Tensor, "batch head kept dim"], Float[Tensor, "batch head kept dim_v"]] | None
    start: Int[Tensor, "batch"] | None
    count: Int[Tensor, "batch"] | None
    alike: tuple[int, int] | None
    rotated: bool
    take: Callable[[Rounded, Rounded], None] | None = None

    def like(self, which: int) -> tuple[Tensor, int]:
        """A tensor of the type, heads and width of the keys (0) or values (1), and how many tokens there are."""
        return self.tail[which], self.tail_column + self.tail[which].shape[2]

    def dense(self, which: int) -> Float[Tensor, "batch head token dim"]:
        """All keys (0) or values (1), dense, in the model's dtype."""
        tail = self.tail[which]
        exact = torch.promote_types(tail.dtype, torch.float32)
        packed = [(key, value)[which].dense(exact) for _, key, value in self.runs]
        if self.rotated:
            packed = [x @ hadamard(x.shape[-1], exact, x.device) for x in packed]
        out = torch.cat([*(x.to(tail.dtype) for x in packed), tail], 2)
        if self.kept is not None and self.start is not None and self.count is not None:
            kept = self.kept[which].transpose(1, 2)  # (batch, kept, head, dim)
            row, index = (torch.arange(kept.shape[1], device=out.device) < self.count[:, None]).nonzero(as_tuple=True)
            out.transpose(1, 2)[row, self.start[row] + index] = kept[row, index]
        return out


class LazyStates(torch.Tensor):
    """Keys (`which` 0) or values (1) of `stored`; any operation on them works on `stored.dense(which)`."""

    stored: Stored | Standing
    which: int

    @staticmethod
    def __new__(cls, stored: Stored | Standing, which: int) -> LazyStates:
        like, tokens = stored.like(which)
        shape = (*like.shape[:2], tokens, like.shape[3])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self.stored, self.which = stored, which
        return self

    def __init__(self, stored: Stored | Standing, which: int) -> None:
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
