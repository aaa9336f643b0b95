"""Where each row of a batch begins and how many of its first tokens are kept, as the cache knows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from intactkv.attaching.locate import NEVER, Sites
from intactkv.error import IntactKVError


@dataclass
class Rows:
    """Row r keeps `count[r]` tokens from column `start[r]` on in full precision; `keep` is asked for in every row.

    `start` is NEVER for a row that has shown no token yet. From `until` columns on every row holds all that it keeps.
    `padding_known` says so, `uniform` that all rows begin and keep alike (start and count as plain integers).
    """

    keep: int = 0
    start: Int[Tensor, "batch"] | None = None
    count: Int[Tensor, "batch"] | None = None
    until: int = 0
    padding_known: bool = False
    uniform: tuple[int, int] | None = (0, 0)
    widest: int = 0

    def set_padding(self, real: Bool[Tensor, "batch token"], past: int) -> None:
        """Take each row's first real token for its beginning; `real` excludes padding, `past` columns came before."""
        first = torch.where(real.any(1), real.int().argmax(1) + past, NEVER)
        start = first if self.start is None else torch.minimum(self.start.to(first.device), first)
        self.padding_known = True
        self._set(start, torch.full_like(start, self.keep))

    def keep_sites(self, sites: Sites, batch: int, past: int) -> None:
        """Keep the intact tokens of this call too; `sites` are columns of the call."""
        device, at = sites.row.device, sites.col + past - sites.index
        start = torch.full((batch,), NEVER, device=device) if self.start is None else self.start.to(device)
        start = start.scatter_reduce(0, sites.row, at, "amin")
        other = start[sites.row] != at
        if bool(other.any()):
            raise IntactKVError(
                f"row {int(sites.row[other][0])} holds several sequences that begin with the prefix; a packed cache "
                "keeps one beginning per row; give each sequence a row of its own"
            )
        count = torch.full((batch,), self.keep, device=device)
        self._set(start, count.scatter_reduce(0, sites.row, sites.index + 1, "amax"))

    def kept(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Start and count of each row's kept tokens among the first `length` columns, on `device`."""
        if self.start is None or self.count is None:
            raise RuntimeError("rows whose beginnings are not known keep nothing")
        start, count = self.start.to(device), self.count.to(device)
        if length >= self.until:
            return start, count
        return start, torch.minimum((length - start).clamp(min=0), count)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, select or repeat rows."""
        if self.start is not None and self.count is not None:
            self.start, self.count = change(self.start), change(self.count)
            self._summarise(self.start, self.count)

    def cut(self, length: int) -> None:
        """Only `length` columns are left: rows that began later have not begun, and may begin elsewhere."""
        if self.start is None or self.count is None:
            return
        gone = self.start >= length
        if bool(gone.any()):
            self.padding_known = False
            self.start, self.count = self.start.masked_fill(gone, NEVER), self.count.masked_fill(gone, 0)
            self._summarise(self.start, self.count)

    def reset(self) -> None:
        """Forget the rows."""
        self.start = self.count = None
        self.until, self.padding_known, self.uniform, self.widest = 0, False, (0, 0), 0

    def _set(self, start: Tensor, count: Tensor) -> None:
        self.start = start
        self.count = count if self.count is None else torch.maximum(count, self.count.to(count.device))
        self._summarise(self.start, self.count)

    def _summarise(self, start: Tensor, count: Tensor) -> None:
        self.widest = int(count.max())
        self.until = int(torch.where(count > 0, start + count, 0).max())
        first = int(start[0]), int(count[0])
        self.uniform = first if bool(((start == first[0]) & (count == first[1])).all()) else None
