"""Several processes at one calibration or evaluation: each takes a share of it, sums and lists are made over all.

The processes are those of the default group of torch.distributed, which `join` sets up under `torchrun`. Without a
group there is one process and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

from intactkv.error import IntactKVError

T = TypeVar("T")


def join() -> str | None:
    """Join the group of the processes that `torchrun` started; this one's device there, None where it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise IntactKVError("several processes need accelerate: pip install 'intactkv[distributed]'") from error
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    return "cpu" if device.type == "cpu" else str(device)  # accelerate numbers CPUs too


def grouped() -> bool:
    """Whether there is a group of processes."""
    return distributed.is_available() and distributed.is_initialized()


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if grouped() else 1


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return not grouped() or distributed.get_rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th item, of n processes: this process's part."""
    return items[distributed.get_rank() :: distributed.get_world_size()] if grouped() else items


def gathered(mine: Sequence[T]) -> list[T]:
    """All items in their order again, each process giving those that it made of its `share`."""
    if not grouped():
        return list(mine)
    parts: list[Sequence[T]] = [[] for _ in range(count())]
    distributed.all_gather_object(parts, mine)
    found: list[T | None] = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        found[rank :: len(parts)] = part
    return found  # type: ignore[return-value]  # each place is filled


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace the tensors, of one dtype, by their sums over all processes, in one exchange."""
    if grouped():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        place = exchange_device(distributed.get_backend_config(), flat.device)
        flat = flat.to(place)
        distributed.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def exchange_device(backends: str, device: torch.device) -> torch.device:
    """Where a tensor of `device` is summed by a group whose backends are, for example, "cuda:nccl".

    NCCL sums nothing that lies on a CPU, so a group of GPUs alone does it on this process's own.
    """
    served = [pair.split(":")[0] for pair in backends.split(",")]
    return device if device.type in served else torch.device(served[0])


def wait() -> None:
    """Wait until all processes are here."""
    if grouped():
        distributed.barrier()
