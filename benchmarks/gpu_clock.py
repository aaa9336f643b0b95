"""The card, and seconds on it: work timed from an idle card to an idle card, ways that take turns, CUDA graphs."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
import triton

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for every length of a growing cache: 8 ms a layer
ROUNDS = 7


def where() -> dict[str, Any]:
    """Machine and versions."""
    card = torch.cuda.get_device_name() if CUDA else f"no GPU, {platform.processor() or platform.machine()}"
    return {"card": card, **{library.__name__: library.__version__ for library in (torch, triton, transformers)}}


def turns(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds that every way gives in every round, after one that does not count; each round begins elsewhere."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for name in order:
        ways[name]()
    for _ in range(rounds):
        for name in order:
            seconds[name].append(ways[name]())
        order.append(order.pop(0))
    return seconds


def clocked(work: Callable[[], Any]) -> float:
    """Seconds from an idle card to an idle card."""
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def allocated(way: Callable[[], Any]) -> float:
    """MiB that a few steps allocate at their peak beyond what was there, growth of the cache included."""
    way()
    if not CUDA:
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def graphed(calls: list[Callable[[], Any]]) -> Callable[[], float]:
    """Runs all calls and gives the seconds of one; on a GPU as one CUDA graph, so that launches cost nothing.

    Starting a graph costs some ten microseconds: a graph has 32 calls at least, as a model has layers.
    """
    for call in calls[:2]:
        call()
    if not CUDA:
        return lambda: clocked(lambda: [call() for call in calls]) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    calls = calls * math.ceil(32 / len(calls))
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return lambda: clocked(graph.replay) / len(calls)


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """Replays `step` from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        assert step  # what it reads must live as long as the graph
        graph.replay()

    return replay
