"""The progress of a calibration as TensorBoard curves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from intactkv.calibrating.train import Report
from intactkv.error import IntactKVError


@contextmanager
def board(folder: str | os.PathLike[str]) -> Iterator[Callable[[Report], None]]:
    """While it is open, give it as `progress` to `calibrate`: loss and held-out KL of every step go to `folder`.

    A resumed run goes on in the same folder, and what was drawn beyond its checkpoint is taken back.
    Raises `IntactKVError` where tensorboard is not installed.

    Example:
        with board("runs") as progress:
            calibrate(kv, model, full, data, progress=progress)
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise IntactKVError("curves need tensorboard; pip install 'intactkv[tensorboard]'") from error
    writer: Any = None

    def draw(now: Report) -> None:
        nonlocal writer
        if writer is None:
            writer = SummaryWriter(os.fspath(folder), purge_step=now.step)
        writer.add_scalar("loss", now.loss, now.step)
        writer.add_scalar("held-out KL", now.kl, now.step)

    try:
        yield draw
    finally:
        if writer is not None:
            writer.close()
