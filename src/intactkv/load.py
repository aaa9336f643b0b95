"""Load models, tokenizers and text for the command line, with one clear sentence where that fails."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from intactkv.kv import IntactKVError


def load_model(source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal LM in eval mode from a folder or hub name, quantized checkpoints included.

    Raises `IntactKVError` where there is none, and where the checkpoint and transformers' model do not hold the
    same tensors: what is missing would be random, what is unexpected (a rotated checkpoint's online transforms, for
    one) would be dropped.
    """
    _check_exists(source)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
            model, report = loaded
            if getattr(model.config, "quantization_config", None) is not None:
                with torch.no_grad():  # some checkpoints unpack, with a progress bar, at their first forward
                    model(torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise IntactKVError(f"{source} cannot be loaded as a causal LM: {_first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise IntactKVError(
                f"{source} does not fit transformers' {type(model).__name__}: {kind.replace('_', ' ')} such as "
                f"{sorted(report[kind])[0]}; load it with the library that made it and call intactkv from Python"
            )
    return model.eval()


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name. Raises `IntactKVError` where there is none."""
    _check_exists(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise IntactKVError(f"{source} has no tokenizer that can be loaded: {_first_line(error)}") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 text file. Raises `IntactKVError` where it cannot be read or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntactKVError(f"{path} cannot be read as UTF-8 text: {_first_line(error)}") from error
    if not text.strip():
        raise IntactKVError(f"{path} is empty; give a text of at least a few hundred words")
    return text


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of other libraries: transformers' own switch, and stderr for those that have none."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_exists(source: str | os.PathLike[str]) -> None:
    """Tell a mistyped folder from a hub name before transformers asks the network for it."""
    text = os.fspath(source)
    looks_like_a_path = text.startswith((".", "~", os.sep)) or text.count("/") > 1 or isinstance(source, Path)
    if looks_like_a_path and not Path(text).is_dir():
        raise IntactKVError(f"{text} is not a folder; give a model's folder or its name on the Hub")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
