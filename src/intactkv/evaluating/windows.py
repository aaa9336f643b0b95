"""A long token stream cut into evaluation windows, and which of their labels count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from intactkv.error import IntactKVError


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of one length and the labels that are scored in them.

    `ids` is int64 `(window, length)`. `scored` is bool `(window, length)`: `scored[n, t]` says that the
    prediction *of* token `t`, made by the logits at `t - 1`, counts. Raises `IntactKVError` for other shapes
    or types, for a scored token 0 (nothing predicts it) and for a window without any scored token.
    """

    ids: Int[Tensor, "window length"]
    scored: Bool[Tensor, "window length"]

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64 or self.ids.numel() == 0:
            raise IntactKVError(
                f"ids is {self.ids.dtype} of shape {tuple(self.ids.shape)}; "
                "it must be non-empty int64 of shape (window, length)"
            )
        if self.scored.shape != self.ids.shape or self.scored.dtype != torch.bool:
            raise IntactKVError(
                f"scored is {self.scored.dtype} of shape {tuple(self.scored.shape)}; "
                f"it must be bool of the ids' shape {tuple(self.ids.shape)}"
            )
        if self.scored[:, 0].any():
            raise IntactKVError("scored[:, 0] is set, but no logits predict token 0; score from token 1 on")
        if not self.scored.any(dim=1).all():
            empty = int((~self.scored.any(dim=1)).nonzero()[0])
            raise IntactKVError(f"window {empty} has no scored token; leave such windows out")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, some: slice) -> Windows:
        """Some of the windows: `windows[:8]`. Raises `IntactKVError` where that is none."""
        return Windows(self.ids[some], self.scored[some])


def prefixed_windows(
    tokens: Int[Tensor, "token"] | Sequence[int],
    *,
    prefix: Int[Tensor, "prefix"] | Sequence[int],
    window: int,
) -> Windows:
    """The ordinary protocol: every window is the prefix followed by the next piece of the stream.

    `tokens` is one long stream *without* the prefix. It is cut into pieces of `window - P` tokens that do not
    overlap, each preceded by the `P` ids of `prefix`; an incomplete last piece is dropped. Labels `P + 1` to
    `window - 1` are scored. Label `P` is not: with an intact KV attached, the logits that predict it are the
    full model's own, stored in the artifact, and scoring it would flatter that arm.

    Raises `IntactKVError` for a stream that is not one vector of ids, an empty prefix, a window below `P +
    2`, and a stream too short for one window.

    >>> windows = prefixed_windows([5, 6, 7, 8, 9], prefix=[0], window=3)
    >>> windows.ids.tolist(), windows.scored.tolist()[0]
    ([[0, 5, 6], [0, 7, 8]], [False, False, True])
    """
    start = _stream(prefix, name="prefix")
    if len(start) == 0:
        raise IntactKVError("prefix is empty; give the ids every window starts with, such as the BOS token's")
    if window < len(start) + 2:
        raise IntactKVError(
            f"window={window} leaves nothing to score after {len(start)} prefix tokens; use {len(start) + 2} or more"
        )
    pieces = _pieces(_stream(tokens, name="tokens"), length=window - len(start))
    ids = torch.cat([start.expand(len(pieces), -1), pieces], dim=1)
    return _scored_from(ids, first=len(start) + 1)


def paper_windows(tokens: Int[Tensor, "token"] | Sequence[int], *, bos: int, window: int) -> Windows:
    """The IntactKV paper's protocol: the first token of every window is *overwritten* by BOS.

    `tokens` is cut into pieces of `window` tokens (the paper: 2048) that do not overlap; an incomplete last
    piece is dropped. The prediction right after BOS is not scored: labels 2 to `window - 1` are.

    Raises `IntactKVError` for a stream that is not one vector of ids, a negative `bos`, a window below 3, and
    a stream too short for one window.

    Source: Liu et al., "IntactKV", Findings of ACL 2024, arXiv 2403.01241, the perplexity runs of its
    official code.

    >>> windows = paper_windows([5, 6, 7, 8, 9, 10, 11], bos=0, window=3)
    >>> windows.ids.tolist(), windows.scored.tolist()[0]
    ([[0, 6, 7], [0, 9, 10]], [False, False, True])
    """
    if bos < 0:
        raise IntactKVError(f"bos={bos} is no token id; give the tokenizer's BOS id, 0 or more")
    if window < 3:
        raise IntactKVError(f"window={window} leaves nothing to score after BOS and one token; use 3 or more")
    ids = _pieces(_stream(tokens, name="tokens"), length=window).clone()
    ids[:, 0] = bos
    return _scored_from(ids, first=2)


def scored_after(ids: Int[Tensor, "window length"], prefix: int) -> Windows:
    """Windows that begin with a prefix of so many tokens already, scored as in `prefixed_windows`."""
    return _scored_from(ids, first=prefix + 1)


def _stream(ids: Tensor | Sequence[int], *, name: str) -> Int[Tensor, "token"]:
    """`ids` as one int64 vector on the CPU."""
    vector = torch.as_tensor(ids)
    if vector.ndim != 1 or (len(vector) and (vector.is_floating_point() or vector.dtype == torch.bool)):
        raise IntactKVError(
            f"{name} is {vector.dtype} of shape {tuple(vector.shape)}; it must be one vector of integer ids"
        )
    return vector.to("cpu", torch.int64)


def _pieces(tokens: Int[Tensor, "token"], *, length: int) -> Int[Tensor, "window length"]:
    count = len(tokens) // length
    if count == 0:
        raise IntactKVError(
            f"{len(tokens)} tokens are too few for one window, which takes {length} of them; "
            "give more text or a smaller window"
        )
    return tokens[: count * length].view(count, length)


def _scored_from(ids: Int[Tensor, "window length"], *, first: int) -> Windows:
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[:, first:] = True
    return Windows(ids, scored)
