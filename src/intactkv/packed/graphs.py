"""Decoding steps over a packed cache replayed from a CUDA graph: the host launches one thing instead of hundreds.

A step is captured once for a cache and replayed for every token after; where the cache stands is read on the device
(`step.py`). It is captured anew when the cache's buffers are exchanged: another cache, other rows, no room left. Calls
that a graph cannot serve (prompts, several tokens, masks that hide more than padding on the left, hidden states or
attentions asked for) go to the model as they are, with the same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.decoder import cache_name, given_cache
from intactkv.error import IntactKVError, first_line
from intactkv.packed.cache import PackedCache, PackedLayer
from intactkv.packed.launch import FUSED, on_device
from intactkv.packed.steady import Steady, rows_of

ROOM = 1024  # tokens for which buffers are made at a capture, and a quarter of what is there
SERVED = {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "use_cache", "return_dict"}
ANY = {"logits_to_keep", "cache_position"}  # one token has one row of logits, and one place, which the cache knows


class CapturedCall(NamedTuple):
    """What a decoding step is asked for; `first` is each row's first real column, None where there is no padding."""

    ids: Tensor
    positions: Tensor
    first: Tensor | None
    cache: PackedCache


class Graphs:
    """`model.forward` with decoding steps replayed, until `remove`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._forward = model, model.forward
        self._signature = inspect.signature(model.forward)
        self._captured: Captured | None = None
        self._own = "forward" in vars(model)

        @wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._call(args, kwargs)
            return self._forward(*args, **kwargs) if call is None else self._replay(call)

        model.forward = forward

    def remove(self) -> None:
        """Give the model its own `forward` back."""
        if self._own:
            self._model.forward = self._forward
        else:
            del self._model.forward
        self._captured = None

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedCall | None:
        """The decoding step that is asked for, None for anything else."""
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        cache, ids, mask = given_cache(given), given.get("input_ids"), given.get("attention_mask")
        if not isinstance(cache, PackedCache) or not isinstance(ids, Tensor) or ids.shape[1] != 1:
            return None
        other = any(x is not None and x is not False for name, x in given.items() if name not in SERVED | ANY)
        if other or False in (given.get("use_cache"), given.get("return_dict")) or torch.is_grad_enabled():
            return None
        if not _steady(cache):
            return None
        past = cache.get_seq_length()
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.full_like(ids, past)
        if mask is None:
            return CapturedCall(ids, positions, None, cache)
        if mask.ndim != 2 or mask.shape[1] != past + 1:
            return None
        first = mask.long().argmax(1)
        columns = torch.arange(past + 1, device=mask.device)
        if not torch.equal(mask != 0, columns >= first[:, None]):  # hides more than padding on the left
            return None
        return CapturedCall(ids, positions, first if bool(first.any()) else None, cache)

    def _replay(self, call: CapturedCall) -> Any:
        if self._captured is None or not self._captured.serves(call):
            self._captured = None  # its memory may be needed for the next one
            self._captured = Captured(self._forward, call)
        return self._captured.step(call)


class Captured:
    """One model's decoding step over one cache's buffers."""

    def __init__(self, forward: Callable[..., Any], call: CapturedCall) -> None:
        self._cache, self._layers = call.cache, _packed_layers(call.cache)
        self._ids, self._positions = call.ids.clone(), call.positions.expand(call.ids.shape).clone()
        self._first = call.first
        steadies = [_held(layer) for layer in self._layers]
        stored, packing = steadies[0].stored, steadies[0].packing
        for steady in steadies:
            steady.prepare(stored // 4 + ROOM, rows_of(call.cache.rows, call.ids.device, call.first))
        self._clock = torch.zeros(3, dtype=torch.int64, device=call.ids.device)
        self._set_clock(steadies[0])
        self._at = stored
        self._buffers = [x for steady in steadies for x in _buffers(steady)]

        def step() -> Any:
            cache = {cache_name(forward): call.cache}
            return forward(input_ids=self._ids, position_ids=self._positions, use_cache=True, **cache)

        def tick() -> None:
            from intactkv.packed import step as kernels

            kernels.tick[(1,)](
                self._clock, RING=steadies[0].size, TOGETHER=packing.together, ROUNDED=packing.own == "rounded",
                **FUSED,
            )  # fmt: skip

        with ExitStack() as stack:
            stack.enter_context(on_device(call.ids))
            for steady in steadies:
                stack.enter_context(steady.following(self._clock))
            self._run, self._output = record(step, tick)

    def serves(self, call: CapturedCall) -> bool:
        """Whether the captured step does what is asked for: same buffers, rows and padding, and room for a token."""
        steadies = [_held(layer) for layer in self._layers]
        now = [x for steady in steadies for x in _buffers(steady)]
        padded = (call.first is None) == (self._first is None)
        return (
            call.cache is self._cache
            and call.ids.shape == self._ids.shape
            and len(now) == len(self._buffers)
            and all(a is b for a, b in zip(now, self._buffers, strict=True))
            and steadies[0].packed + steadies[0].packing.together <= steadies[0].stores[0].codes.shape[2]
            and padded
            and (call.first is None or self._first is None or torch.equal(call.first, self._first))
        )

    def step(self, call: CapturedCall) -> Any:
        """Decode one token."""
        self._ids.copy_(call.ids)
        self._positions.copy_(call.positions)
        steady = _held(self._layers[0])
        if steady.stored != self._at:
            self._set_clock(steady)
        self._run()
        for layer in self._layers:
            _held(layer).advance()
        self._at = _held(self._layers[0]).stored
        output = {name: x.clone() if isinstance(x, Tensor) else x for name, x in self._output.items()}
        return type(self._output)(**output)

    def _set_clock(self, steady: Steady) -> None:
        self._clock.copy_(torch.tensor([steady.stored, steady.packed, steady.read]))


def record(step: Callable[[], Any], tick: Callable[[], None]) -> tuple[Callable[[], None], Any]:
    """What replays `step` and `tick` in a CUDA graph, and the output that it fills.

    `step` runs twice before; it may, since it stores the same token in the same place until `tick`.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and libraries allocate what they need
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = step()
            tick()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise IntactKVError(
            f"a decoding step of this model cannot be captured in a CUDA graph ({first_line(error)}); use read_packed "
            "without graphs=True"
        ) from error
    return graph.replay, output


def _steady(cache: PackedCache) -> bool:
    """Whether all layers are held steady, at the same place."""
    layers = _packed_layers(cache)
    if cache.offloading or len(layers) != len(cache.layers) or any(layer.steady_state() is None for layer in layers):
        return False
    return len({(_held(layer).stored, _held(layer).packed) for layer in layers}) == 1


def _packed_layers(cache: PackedCache) -> list[PackedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PackedLayer)]


def _held(layer: PackedLayer) -> Steady:
    steady = layer.steady_state()
    if steady is None:
        raise RuntimeError("the layer is not held steady")
    return steady


def _buffers(steady: Steady) -> list[Tensor | None]:
    stores = [x for store in steady.stores for x in (store.codes, store.scale, store.low)]
    return [*stores, *steady.ring, *steady.kept, steady.rows]
