"""Kept launches: a compiled kernel gets what the ordinary launch was given, where it was compiled for that."""

from __future__ import annotations

from typing import Any

import torch

from intactkv.packed.launch import Kept


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
