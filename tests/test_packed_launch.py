"""Kept launches: a compiled kernel gets what the ordinary launch was given; and how many programs a card holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intactkv.packed.launch import Kept, programs_at_once


class Kernel:
    """What Triton's kernels are to `Kept`; it keeps what it was launched with, and how."""

    arg_names = ("x", "y", "count", "held", "nothing", "scale", "WIDTH", "FAST")

    def __init__(self, compiles: bool) -> None:
        self.compiles, self.launches = compiles, list[Any]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **settings: Any) -> Any:
            self.launches.append(("ordinary", grid, given, settings))
            return self if self.compiles else None

        return lambda *given, **more: launch(*given, **more) if more else self.launches.append(("kept", grid, given))


def launched(compiles: bool, *tensors: torch.Tensor) -> list[Any]:
    kernel, held = Kernel(compiles), torch.zeros(4)
    kept = Kept(kernel, (3, 2), (held, None, 0.5), FAST=True, WIDTH=8, num_warps=4)
    for count, x in enumerate(tensors):
        kept((x, held), count)
    for launch in kernel.launches:
        assert launch[1] == (3, 2, 1)
        if launch[0] == "kept":
            count = launch[2][2]
            address = held.data_ptr()
            assert launch[2] == (tensors[count].data_ptr(), address, count, address, None, 0.5, 8, True)
    return [launch[0] for launch in kernel.launches]


def test_the_first_launch_is_ordinary_and_the_next_ones_are_kept() -> None:
    x = torch.zeros(64)
    assert launched(True, x, x, x) == ["ordinary", "kept", "kept"]


def test_tensors_that_begin_elsewhere_go_the_ordinary_way() -> None:
    x = torch.zeros(64)
    assert launched(True, x, x[1:], x) == ["ordinary", "ordinary", "kept"]
    assert launched(True, x[1:], x, x) == ["ordinary", "ordinary", "kept"]


def test_what_compiles_nothing_keeps_nothing() -> None:
    x = torch.zeros(64)
    assert launched(False, x, x) == ["ordinary", "ordinary"]


class Compiled:
    """What a compiler says of a kernel once it is loaded."""

    def __init__(self, registers: int, shared: int) -> None:
        self.registers, self.metadata = registers, SimpleNamespace(shared=shared)

    def __getitem__(self, grid: tuple[int, ...]) -> None:
        self.n_regs = self.registers


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "each"),
    [  # the first three as Nsight Compute read them on an H200
        (178, 10496, 1, 8), (219, 8704, 1, 8), (189, 4352, 1, 8), (168, 10752, 1, 12),
        (117, 6656, 1, 16), (255, 33000, 1, 6), (137, 19456, 2, 6),
    ],
)  # fmt: skip
def test_a_card_holds_as_many_programs_as_its_registers_and_its_shared_memory_allow(
    registers: int, shared: int, warps: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(
        multi_processor_count=132, regs_per_multiprocessor=65536, shared_memory_per_multiprocessor=233472, warp_size=32
    )
    for name, value in {"is_available": True, "current_device": 0, "get_device_properties": card}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    asked = []

    class Asked:
        def warmup(self, *arguments: Any, grid: tuple[int, ...], **settings: Any) -> Compiled:
            asked.append((arguments, settings))
            return Compiled(registers, shared)

    kernel, settings = Asked(), {"num_warps": warps}
    arguments = torch.zeros(1), torch.float32, 7, None
    assert programs_at_once(kernel, arguments, settings) == 132 * each
    assert programs_at_once(kernel, arguments, settings) == 132 * each
    assert asked == [(arguments, settings)]  # asked once
    half = torch.zeros(1, dtype=torch.float16), *arguments[1:]
    programs_at_once(kernel, half, settings)
    assert len(asked) == 2  # another kernel


def test_without_a_card_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert programs_at_once(None, (), {}) == 16
