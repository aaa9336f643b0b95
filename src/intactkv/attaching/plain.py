"""A checkpoint made for its intact KV says so: in its folder, and once when it runs without.

`quantize` leaves prefix tokens out of what a quantizer learns from, since nobody reads them once their KV is intact.
Such a checkpoint is worse than an ordinary one wherever they are read: with its own prefix, and for prompts without it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from transformers import PreTrainedModel

from intactkv.artifact import served
from intactkv.artifact.hub import FILE
from intactkv.artifact.served import RECIPE
from intactkv.attaching.handle import is_attached


def made_for_prefix(source: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """What a quantized folder or Hub name says of the prefix it was made for; None if it was made for none.

    `weight`, the prefix tokens' weight in calibration, below 1; `prefix`, their ids; `perplexity` on held-out windows
    of the calibration text: of the full model, and of the quantized one `with_kv` and `without_kv`. Raises
    `IntactKVError` where a folder's `intactkv.json` cannot be read.
    """
    return served.made_for_prefix(recipe_folder(source))


def recipe_folder(source: str | os.PathLike[str]) -> Path:
    """Where `quantize`'s word on a folder or Hub name lies, if there is any: a GGUF says nothing of it."""
    if Path(source).exists():
        return Path(source)
    try:
        return Path(hf_hub_download(str(source), RECIPE)).parent
    except (OSError, ValueError, EntryNotFoundError, HfHubHTTPError):
        return Path(source)  # the repository has none, or cannot be reached, which loading it says itself


def warn_when_plain_(model: PreTrainedModel, about: Mapping[str, Any], source: str | os.PathLike[str]) -> None:
    """Let `model` of `source`, made for the prefix that `about` tells of, warn at its first forward without its KV."""

    def look(module: PreTrainedModel, args: Any) -> None:
        if torch.compiler.is_compiling() or is_attached(module):
            return
        hook.remove()
        warnings.warn(sentence(about, source), stacklevel=2)

    hook = model.register_forward_pre_hook(look)


def sentence(about: Mapping[str, Any], source: str | os.PathLike[str]) -> str:
    """What is lost where such a checkpoint runs plain, and the remedy."""
    found = about.get("perplexity")
    figures = found if isinstance(found, dict) else {}
    lost = ""
    if all(isinstance(figures.get(name), int | float) for name in ("with_kv", "without_kv")):
        lost = (
            f" (perplexity {figures['without_kv']:.4g} instead of {figures['with_kv']:.4g} on its calibration's text)"
        )
    return (
        f"{source} was quantized for its intact prefix and runs without it{lost}: attach {FILE} beside it "
        "(--kv), or quantize with prefix_weight=1 (--plain-prefix) for use without"
    )
