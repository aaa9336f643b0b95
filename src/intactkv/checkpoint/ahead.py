"""The next block's weights are on their way while this one computes; to a GPU by pinned memory and a stream apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class Ahead:
    """What `fetch` gives for each name: from the first of a block's names on, the next block's is fetched as well.

    One thread fetches, in the order of `blocks`: no more than two blocks' weights are there at any time. Any other name
    is fetched when it is asked for.
    """

    def __init__(self, blocks: Sequence[Sequence[str]], fetch: Callable[[str], Any]) -> None:
        self._blocks, self._fetch = blocks, fetch
        self._block = {name: i for i, names in enumerate(blocks) for name in names}
        self._pool = ThreadPoolExecutor(1, "ahead")
        self._coming: dict[str, Future[Any]] = {}
        self._at: int | None = None

    def take(self, name: str) -> Any:
        """What is fetched for a name, handed over once."""
        at = self._block.get(name)
        if at is not None and at != self._at:
            self._at = at
            names = [each for block in self._blocks[at : at + 2] for each in block]
            for gone in self._coming.keys() - set(names):
                self._coming.pop(gone).cancel()
            for each in names:
                if each not in self._coming:
                    self._coming[each] = self._pool.submit(self._fetch, each)
        found = self._coming.pop(name, None)
        return (self._pool.submit(self._fetch, name) if found is None else found).result()

    def stop(self) -> None:
        """Nothing more is asked for: what is not there yet need not come."""
        while self._coming:
            self._coming.popitem()[1].cancel()
        self._at = None


class Uploads:
    """Copies to a GPU that do not wait for what it computes, nor it for them until it needs one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a tensor to the GPU; what is returned gives it to all that the GPU computes from then on."""
        # torch keeps pinned memory for the next tensor, and knows until when a copy reads it
        pinned = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
        with torch.cuda.stream(self._stream):
            there, arrived = pinned.to(self._device, non_blocking=True), self._stream.record_event()

        def receive() -> Tensor:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)
            there.record_stream(current)  # its memory is the other stream's
            return there

        return receive
