"""Which tokens of a batch are prefix tokens: per row, by position, as long as they agree. Pure tensor maths.

Keys and values at position p depend only on tokens 0…p, so a row that shares the first m prefix tokens may take m
intact rows (longest common prefix). Positions, not columns, decide: left padding shifts every row by its own
amount, and packed rows hold several sequences that each start at position 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

NEVER = 2**62  # a cache length that no row reaches


@dataclass(frozen=True)
class Sites:
    """Where prefix tokens stand in one call: batch row, column, and index into the prefix, one entry per token."""

    row: Int[Tensor, "site"]
    col: Int[Tensor, "site"]
    index: Int[Tensor, "site"]
    whole: int = 0  # the sites are exactly the first so many columns of every row; 0: anything else

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: torch.device) -> Sites:
        return (
            self
            if device == self.row.device
            else Sites(self.row.to(device), self.col.to(device), self.index.to(device), self.whole)
        )


@dataclass
class Progress:
    """How far the rows of one cache have come; it travels on the cache as the attribute `intactkv`.

    From `until` cached tokens on no row can meet another prefix token, which is all that a decoding step asks; `done`
    says that it was reached, for compiled steps, which cannot ask. `matched` counts each row's agreeing prefix tokens,
    `owner` is the digest of the artifact they came from. `padded` says that the rows' positions have to be supplied at
    every step. `sites` (columns of the cache) are kept for caches that do not give back what was stored.
    """

    owner: str = ""
    until: int = NEVER
    done: bool = False
    matched: Int[Tensor, "batch"] | None = None
    padded: bool = False
    sites: Sites | None = field(default=None, repr=False)

    @property
    def plain(self) -> bool:
        """Nothing is left to do once `until` is reached."""
        return not self.padded and self.sites is None


def locate(
    ids: Int[Tensor, "batch token"],
    prefix: Int[Tensor, "prefix"],
    *,
    real: Bool[Tensor, "batch token"],
    positions: Int[Tensor, "batch token"],
    matched: Int[Tensor, "batch"],
) -> Bool[Tensor, "batch token"]:
    """True where a token is a prefix token all of whose predecessors agree with the prefix as well.

    `real` excludes padding; `matched` is each row's count of agreeing tokens from earlier calls (zeros at first).
    """
    column = torch.arange(ids.shape[1], device=ids.device)
    start = sequence_starts(real, positions, matched)
    follows = torch.zeros_like(real)
    follows[:, 1:] = real[:, 1:] & real[:, :-1] & (positions[:, 1:] == positions[:, :-1] + 1)
    expected = prefix[positions.clamp(0, len(prefix) - 1)]
    agrees = (start | follows) & (positions >= 0) & (positions < len(prefix)) & (ids == expected)
    last_start = torch.where(start, column, -1).cummax(1).values
    last_break = torch.where(agrees, -1, column).cummax(1).values
    return agrees & (last_start > last_break)


def sequence_starts(
    real: Bool[Tensor, "batch token"],
    positions: Int[Tensor, "batch token"],
    matched: Int[Tensor, "batch"],
) -> Bool[Tensor, "batch token"]:
    """True where a sequence begins at position 0, or goes on with a prefix begun in an earlier call."""
    carries_on = first_real(real) & (matched[:, None] >= positions)
    return real & ((positions == 0) | carries_on)


def first_real(real: Bool[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
    """True at each row's first token that is no padding."""
    return real & (real.cumsum(1) == 1)


def hidden_prefix(
    ids: Int[Tensor, "batch token"],
    prefix: Int[Tensor, "prefix"],
    *,
    real: Bool[Tensor, "batch token"],
) -> Bool[Tensor, "batch"]:
    """True for rows whose last masked tokens before the first real one are the prefix, or its beginning."""
    column = torch.arange(ids.shape[1], device=ids.device)
    before = (real.cumsum(1) == 0) & real.any(1, keepdim=True)
    near = column >= before.sum(1, keepdim=True) - len(prefix)
    row, begin = (before & near & (ids == prefix[0])).nonzero(as_tuple=True)  # wherever it could begin
    offset = column - begin[:, None]
    agrees = ids[row] == prefix[offset.clamp(0, len(prefix) - 1)]
    untouched = ~before[row] | (offset < 0)
    hidden = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    hidden[row[(agrees | untouched).all(1)]] = True
    return hidden
