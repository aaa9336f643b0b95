"""Other libraries' noise and global switches: off or as they were, whatever happens in between."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch._tensor_str import printoptions

# Handlers made at their import write to the real stderr, whatever it is redirected to later.
_LOGGERS = ("autoround", "torch.fx._symbolic_trace")
_SWITCHES = {
    "LLM_COMPRESSOR_LOG_DISABLED": "llmcompressor",
    "COMPRESSED_TENSORS_LOG_DISABLED": "compressed_tensors",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence logs, progress bars and warnings; then environment, loguru, random state and torch are as before."""
    from loguru import logger

    environment = dict(os.environ)
    # Read at the first import: without them llm-compressor throws out the handlers of all other loguru users.
    os.environ.update(dict.fromkeys(_SWITCHES, "true"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # oneshot would set it, with a warning
    for package in _SWITCHES.values():
        logger.disable(package)
    try:
        logger.level("METRIC")
    except ValueError:  # GPTQ logs at it, but llm-compressor makes it only where it logs at all
        logger.level("METRIC", no=38)
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    deterministic = torch.are_deterministic_algorithms_enabled()
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        with (
            torch.random.fork_rng(),
            printoptions(),  # AutoRound sets them for good as well
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),
            redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        torch.use_deterministic_algorithms(deterministic)  # AutoRound switches them on for good
        os.environ.clear()
        os.environ.update(environment)
        for name, package in _SWITCHES.items():
            if name not in environment:
                logger.enable(package)


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside, and afterwards what it was."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
