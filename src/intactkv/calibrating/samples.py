"""What calibration learns from: token rows that begin with the prefix, and which of their tokens count."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from intactkv.error import IntactKVError
from intactkv.evaluating.windows import prefixed_windows
from intactkv.texts import first_tokens, read_text


@dataclass(frozen=True, eq=False)
class Sample:
    """One row of token ids, int64 `(token)`, and which of them are learned, bool `(token)`: the assistant's."""

    ids: Int[Tensor, "token"]
    learned: Bool[Tensor, "token"]

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype != torch.int64 or self.learned.shape != self.ids.shape:
            raise IntactKVError(
                f"a sample has {self.ids.dtype} ids of shape {tuple(self.ids.shape)} and a mask of shape "
                f"{tuple(self.learned.shape)}; give one int64 vector and a bool mask as long"
            )
        if self.learned.dtype != torch.bool or not self.learned.any():
            raise IntactKVError("a sample's mask must be bool and select a token; leave such samples out")

    @property
    def digest(self) -> str:
        """SHA-256 over ids and mask: the name of what is kept of this sample."""
        sha = hashlib.sha256(self.ids.numpy().tobytes())
        sha.update(self.learned.numpy().tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in order, where they are from, and the rows that were left out: a reason and the rows it met."""

    rows: tuple[Sample, ...]
    source: str = "memory"
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens that are learned, in all samples."""
        return sum(int(row.learned.sum()) for row in self.rows)

    @property
    def digest(self) -> str:
        """SHA-256 over all samples in order."""
        return hashlib.sha256("".join(row.digest for row in self.rows).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Split:
    """Samples to learn from, samples that choose among the steps, and samples that judge the choice once.

    The judges are not those that choose: the best of several readings of one text flatters itself.
    """

    train: Samples
    choose: Samples
    judge: Samples

    def __post_init__(self) -> None:
        if len(self.train) < 1 or len(self.choose) < 1 or len(self.judge) < 2:
            raise IntactKVError(
                f"{len(self.train)} samples to learn from, {len(self.choose)} to choose and {len(self.judge)} to judge "
                "are too few; at least 1, 1 and 2 are needed, 128, 20 and 20 are sensible"
            )


def split(samples: Samples, *, held_out: int) -> Split:
    """The last `held_out` samples choose and judge, turn about; the rest are learned.

    Raises `IntactKVError` where either side would have too few.
    """
    if not 3 <= held_out < len(samples):
        raise IntactKVError(
            f"held_out={held_out} of {len(samples)} samples cannot be; hold out at least 3 and leave one to learn from"
        )
    cut = len(samples) - held_out
    parts = (samples.rows[:cut], samples.rows[cut + 1 :: 2], samples.rows[cut::2])
    return Split(*(Samples(rows, samples.source, samples.skipped) for rows in parts))


def text_samples(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: Tensor | Sequence[int],
    length: int = 1024,
    count: int = 192,
) -> Samples:
    """A UTF-8 text in pieces of `length` tokens, the prefix at the head of each, every token after it learned.

    The first `count` pieces. Raises `IntactKVError` where the text does not give one.
    """
    tokens = first_tokens(tokenizer, read_text(path), count * length)
    ids = prefixed_windows(tokens, prefix=prefix, window=length).ids[:count]
    learned = torch.arange(length) >= len(prefix)
    return Samples(tuple(Sample(row.clone(), learned) for row in ids), source=str(path))
