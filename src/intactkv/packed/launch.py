"""A Triton kernel that is launched again and again, with what the launcher finds out each time found out once.

An ordinary launch binds and types every argument and looks the compiled kernel up, which for thirty arguments takes the
host longer than a small kernel takes the card. `Kept` makes its first launch so and keeps the compiled kernel, which it
then launches with addresses in place of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

SCHEDULERS = 4  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that each program takes beside its own
# products and sums in one: Triton's default up to 3.9, which warns that 3.10 will make them two
FUSED = {"enable_fp_fusion": True}
ALIGNED = 16  # bytes: what the compiler takes for granted of an address once it has seen it


class Kept:
    """`kernel` over `grid`: `tensors` and `numbers` first in its signature and new in every call, then `rest`, the same
    in every call, then constants of the compiler and options by name, `settings`.

    A kept kernel is right as long as what it was compiled for holds: the caller gives tensors of the same types and
    strides in every call, `numbers` are integers below 2^31 that the kernel does not specialize, and a tensor that does
    not begin at a multiple of 16 bytes goes the ordinary way. So does every launch under Triton's interpreter, which
    compiles nothing.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int], rest: tuple[Any, ...], **settings: Any) -> None:
        self._kernel, self._grid, self._rest, self._settings = kernel, (*grid, 1), rest, settings
        self._compiled: Any = None
        self._fixed: list[Any] = []

    def __call__(self, tensors: tuple[Tensor, ...], *numbers: int) -> None:
        addresses = [x.data_ptr() for x in tensors]
        if self._compiled is not None and not any(address % ALIGNED for address in addresses):
            self._compiled(*addresses, *numbers, *self._fixed)
            return
        compiled = self._kernel[self._grid](*tensors, *numbers, *self._rest, **self._settings)
        if compiled is not None and not any(address % ALIGNED for address in addresses):
            constants = self._kernel.arg_names[len(tensors) + len(numbers) + len(self._rest) :]
            rest = [x.data_ptr() if isinstance(x, Tensor) else x for x in self._rest]
            self._fixed = [*rest, *(self._settings[name] for name in constants)]
            self._compiled = compiled[self._grid]


_AT_ONCE: dict[Any, int] = {}


def programs_at_once(kernel: Any, arguments: tuple[Any, ...], settings: Mapping[str, Any]) -> int:
    """How many programs of `kernel` the current card holds at the same time, by their registers and shared memory.

    Each of a multiprocessor's four schedulers has a quarter of its registers, and gives them out in whole warps. What
    a compiler makes of a kernel changes with its version and options, so the kernel is compiled and asked. AMD's cards
    count registers otherwise, and an interpreter compiles nothing: eight programs to a multiprocessor are taken there.
    """
    if not torch.cuda.is_available():
        return 16
    device = torch.cuda.current_device()
    types = (x.dtype if isinstance(x, Tensor) else x if isinstance(x, torch.dtype) else x is None for x in arguments)
    key = (kernel, device, *types, *settings.values())
    if key not in _AT_ONCE:
        card = torch.cuda.get_device_properties(device)
        _AT_ONCE[key] = card.multi_processor_count * _on_one(kernel, arguments, settings, card)
    return _AT_ONCE[key]


def _on_one(kernel: Any, arguments: tuple[Any, ...], settings: Mapping[str, Any], card: Any) -> int:
    compiled = None if torch.version.hip else kernel.warmup(*arguments, grid=(1,), **settings)
    if compiled is None:
        return 8
    compiled[1, 1, 1]  # loads it: only then are its registers known
    warps, needed = settings["num_warps"], -(-compiled.n_regs // 8) * 8 * card.warp_size
    by_registers = SCHEDULERS * (card.regs_per_multiprocessor // SCHEDULERS // needed) // warps
    by_memory = card.shared_memory_per_multiprocessor // (compiled.metadata.shared + RESERVED)
    return max(1, min(by_registers, by_memory))


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launches inside go to the card that holds `x`: Triton asks for the current one, whatever tensors it is given."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
