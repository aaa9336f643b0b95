"""What the full model says of each window, on disk, so that many quantized models are compared with one pass over it.

One safetensors file for each window under the digests of the full model's weights and of the window's tokens, prefix
included. A file keeps the logits of all positions in the model's dtype, which loses nothing, or the k likeliest tokens
of each position (`truncated`), which makes KL a lower bound. A file that is truncated or was changed is not used.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from intactkv.error import IntactKVError
from intactkv.evaluating.metrics import TokenMetrics, full_metrics, token_metrics
from intactkv.evaluating.records import has_record, read_record, write_record
from intactkv.evaluating.truncated import Top, token_bytes, top, top_metrics


def ids_digest(ids: Int[Tensor, "*token"]) -> str:
    """SHA-256 over token ids and their shape."""
    return sha256(f"{list(ids.shape)}".encode() + ids.cpu().contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Whole:
    """The full model's logits at every position, so that nothing is lost, and its labels' negative log-likelihoods."""

    logits: Float[Tensor, "window length vocab"]
    nll: Float[Tensor, "window length"]

    @property
    def rest_mass(self) -> Float[Tensor, "window length"]:
        """The probability of tokens that are not kept: none."""
        return torch.zeros_like(self.nll)


Given: TypeAlias = "Whole | Top"


def metrics_against(
    given: Given, logits: Float[Tensor, "window length vocab"], labels: Int[Tensor, "window length"]
) -> TokenMetrics:
    """Another model against the full one: `token_metrics`, or `top_metrics`, whose KL is a lower bound."""
    labels = labels.to(logits.device)
    if isinstance(given, Whole):
        return token_metrics(given.logits.to(logits.device), logits, labels)
    return top_metrics(Top(**{name: values.to(logits.device) for name, values in vars(given).items()}), logits, labels)


def against_itself(given: Given) -> TokenMetrics:
    """`full_metrics` of the full model as it is given, bit for bit."""
    zero = torch.zeros_like(given.nll)
    return TokenMetrics(kl=zero, same_top1=zero == 0, nll=given.nll, delta_p=zero)


@dataclass(frozen=True, eq=False)
class DistributionStore:
    """A folder of one full model's distributions: `full` is its checkpoint's digest, `top` k or None for all tokens.

    `most_bytes` bounds what the folder may hold, but for headers of less than a kilobyte a window.
    """

    folder: Path
    full: str
    top: int | None = None
    most_bytes: int = 50 * 2**30

    def has(self, ids: Int[Tensor, "window length"]) -> bool:
        """Whether there is a file for each of these windows, by their headers; `read` checks what they hold."""
        return all(has_record(self.folder, self._about(row)) for row in ids)

    def read(self, ids: Int[Tensor, "window length"]) -> Given | None:
        """The distributions of these windows, or None where one is missing.

        Raises `IntactKVError` for a file that is truncated, was changed, or is about something else.
        """
        found = [read_record(self.folder, self._about(row)) for row in ids]
        rows = [row for row in found if row is not None]
        if len(rows) < len(ids):
            return None
        whole = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return Whole(**whole) if self.top is None else Top(**whole)

    def write(self, ids: Int[Tensor, "window length"], logits: Float[Tensor, "window length vocab"]) -> Given:
        """Keep the full model's `logits` for these windows, and return them as `read` will."""
        labels = ids.roll(-1, dims=1).to(logits.device)
        given = Whole(logits, full_metrics(logits, labels).nll) if self.top is None else top(logits, labels, k=self.top)
        for i, row in enumerate(ids):
            write_record(self.folder, self._about(row), {name: values[i] for name, values in vars(given).items()})
        return given

    def check_room(self, tokens: int, *, vocab: int, dtype: torch.dtype) -> None:
        """Raise `IntactKVError` where so many more tokens take more bytes than are allowed or free."""
        held, free = self.bytes, shutil.disk_usage(_existing(self.folder)).free
        room = min(self.most_bytes - held, free)
        each = vocab * dtype.itemsize if self.top is None else token_bytes(self.top, dtype)
        if tokens * each <= room:
            return
        fits = (room // tokens - token_bytes(0, dtype)) // (dtype.itemsize + 4)
        remedy = f"keep the {min(fits, vocab - 1):,} likeliest tokens (--top)" if fits > 0 else "use fewer windows"
        raise IntactKVError(
            f"the full model's distributions of {tokens:,} tokens take {tokens * each:,} bytes, {each:,} each; "
            f"{self.most_bytes:,} are allowed, of which {held:,} are used, and {free:,} are free: {remedy}, allow more "
            "(--cache-bytes), or do without a cache"
        )

    @property
    def bytes(self) -> int:
        """Bytes of all files in the folder."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    @property
    def about(self) -> dict[str, Any]:
        """What every file in the folder depends on; other versions may compute other bits, so they do not mix."""
        versions = {name: version(name) for name in ("torch", "transformers")}
        return {"full": self.full, "top": self.top, "versions": versions}

    def _about(self, row: Int[Tensor, "length"]) -> dict[str, Any]:
        return {**self.about, "what": "full model's distributions", "ids": ids_digest(row)}


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_top(k: int | None, vocab: int) -> None:
    """Raise `IntactKVError` for a `k` that is no part of a vocabulary."""
    if k is not None and not 0 < k < vocab:
        raise IntactKVError(f"--top {k} is no part of the vocabulary of {vocab}; use 1 to {vocab - 1}, or leave it out")


def scored_mean(values: Iterable[Float[Tensor, "window length"]], scored: Tensor) -> float:
    """The mean over the tokens that are predicted and scored, of values at the *predicting* positions."""
    return float(torch.cat(list(values)).double().roll(1, dims=1)[scored].mean())
