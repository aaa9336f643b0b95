"""What a layer's cache gives to be read: the protocol, and one layer's tokens in their three parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from intactkv.packed.bits import hadamard
from intactkv.packed.store import Packed, Run

Rounded = tuple[Tensor, Tensor, Tensor]  # packed codes, scale and low


class Readable(Protocol):
    """One layer's keys (0) and values (1) at one moment."""

    def like(self, which: int) -> tuple[Tensor, int]:
        """A tensor of their type, heads and width, and how many tokens there are."""

    def dense(self, which: int) -> Float[Tensor, "batch head token dim"]:
        """All of them, in the model's dtype."""

    def in_place(
        self, query: Tensor, mask: Tensor | None, *, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor | None:
        """Attention of `query` by who can read them where they lie; None where nobody can, for `in_parts`."""

    def in_parts(self) -> Stored:
        """The same tokens in three parts."""


@dataclass(frozen=True, eq=False)
class Stored:
    """One layer's tokens as they are stored at one moment, in three parts.

    `runs` are the packed tokens, columns 0 to `tail_column`; `tail` the tokens from there on, in full precision; `kept`
    the first `count` tokens of each row from column `start` on, in full precision, which stand for the packed ones
    there. `take`, if there is one, takes the tail's one token packed by whoever reads it (codes, scale and low of its
    key and of its value); the layer packs it by itself otherwise.
    """

    runs: tuple[tuple[Run, Packed, Packed], ...]
    tail: tuple[Float[Tensor, "batch head token dim"], Float[Tensor, "batch head token dim_v"]]
    tail_column: int
    kept: tuple[Float[Tensor, "batch head kept dim"], Float[Tensor, "batch head kept dim_v"]] | None
    start: Int[Tensor, "batch"] | None
    count: Int[Tensor, "batch"] | None
    uniform: tuple[int, int] | None
    rotated: bool
    take: Callable[[Rounded, Rounded], None] | None = None

    def like(self, which: int) -> tuple[Tensor, int]:
        """A tensor of the type, heads and width of the keys (0) or values (1), and how many tokens there are."""
        return self.tail[which], self.tail_column + self.tail[which].shape[2]

    def in_place(self, query: Tensor, mask: Tensor | None, **scores: Any) -> None:
        """Nothing is read where it lies."""

    def in_parts(self) -> Stored:
        """Itself."""
        return self

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
