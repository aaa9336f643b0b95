"""The training stream's order: a pure function of the seed, so that a step number is all a resume needs.

The stream of tokens is cut into windows; an epoch is a random permutation of them. Every epoch cuts at
another offset, so that a text repeated for the tenth time is at least framed anew. What it gives up: a
window's worth of tokens at the two ends of the stream in each epoch.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def load_tokens(path: Path, device: torch.device) -> Tensor:
    """Read a uint16 token file as (token,) int32 on the device, where windows are gathered at no cost."""
    return torch.from_numpy(np.fromfile(path, dtype="<u2").astype(np.int32)).to(device)


@lru_cache(maxsize=2)
def _epoch_starts(epoch: int, tokens: int, context: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(context, (), generator=generator))
    return offset + context * torch.randperm((tokens - context) // context, generator=generator)


def window_starts(first: int, count: int, *, tokens: int, context: int, seed: int) -> Tensor:
    """Return where windows number first, first + 1, … of the endless training order start: (count,) int64."""
    per_epoch = (tokens - context) // context
    if per_epoch < 1:
        raise ValueError(f"{tokens} tokens do not fill two windows of {context}; use more text")
    pieces, last = [], first + count
    while first < last:
        epoch, position = divmod(first, per_epoch)
        take = min(last - first, per_epoch - position)
        pieces.append(_epoch_starts(epoch, tokens, context, seed)[position : position + take])
        first += take
    return torch.cat(pieces)


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, context: int) -> tuple[Tensor, float]:
    """Cut a text into windows of context tokens, (window, token); also return their mean bytes per token."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // context * context].view(-1, context)
    return windows, len(tokenizer.decode(windows.flatten()).encode()) / windows.numel()


def with_bos(windows: Tensor, bos: int) -> Tensor:
    """Return the inputs that predict the windows: [BOS] in front, the last token left out."""
    return torch.cat([torch.full_like(windows[:, :1], bos), windows[:, :-1]], dim=1)
