"""A vLLM worker's side of the connector: the artifact's rows on its device, and writing them into the engine's cache.

Rows go through the attention backend's own writer, so that cache types and layouts are the engine's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.models.utils import extract_layer_index

from intactkv.artifact import IntactKV
from intactkv.error import IntactKVError, first_line
from intactkv.serving.layout import Ledger, Rows, Step, head_slice
from intactkv.serving.vllm_counts import IntactKVStats

logger = init_logger(__name__)


class Worker:
    """One worker's side: the artifact's rows on its device, and what a step writes of them."""

    def __init__(self, vllm_config: VllmConfig, kv: IntactKV, groups: Sequence[Any]) -> None:
        self._config, self._kv = vllm_config, kv
        self._group_of = {name: i for i, group in enumerate(groups) for name in group.layer_names}
        self._block_sizes = [group.kv_cache_spec.block_size for group in groups]
        self._layers: dict[str, _Layer] = {}
        self._ledger = Ledger(())
        self._step = Step()
        self._during: list[tuple[Tensor | slice, Tensor]] = []
        self._replay: Replay | None = None
        self._reports = False
        self._stats = IntactKVStats()

    @property
    def indices(self) -> tuple[int, ...]:
        """The numbers of the layers that this worker serves."""
        return tuple(sorted(map(extract_layer_index, self._layers)))

    def register(self, kv_caches: Mapping[str, Tensor]) -> None:
        """Find the attention layers and their rows. Raises `IntactKVError` for layers that cannot be served."""
        parallel, dtype = self._config.parallel_config, self._config.model_config.dtype
        for name in kv_caches:
            module = self._config.compilation_config.static_forward_context.get(name)
            if isinstance(module, MLAAttention):
                raise IntactKVError(f"{name} keeps a latent (MLA), which keys and values do not restore; not supported")
            if not isinstance(module, Attention) or module.kv_sharing_target_layer_name is not None:
                continue
            index = extract_layer_index(name)
            if name.startswith("draft_model.") or index not in self._kv.layers:
                continue
            if not hasattr(module.impl, "do_kv_cache_update"):
                backend = type(module.impl).__name__
                raise IntactKVError(f"the attention backend {backend} has no writer for rows; choose another one")
            pair = self._kv.layers[index]
            heads = head_slice(len(pair[0]), _tensor_rank(), parallel.tensor_parallel_size)
            key, value = (
                x[heads].transpose(0, 1).to(_device(kv_caches[name]), dtype, copy=True).contiguous() for x in pair
            )
            if key.shape[1:] != (module.num_kv_heads, module.head_size):
                raise IntactKVError(
                    f"{name} has {module.num_kv_heads} heads of {module.head_size}, the intact KV "
                    f"{tuple(key.shape[1:])}; give the artifact of this model"
                )
            self._layers[name] = _Layer(module, self._group_of[name], key, value)
        self._ledger, self._replay = Ledger(self._layers), None
        self._reports = _tensor_rank() == 0 and 0 in self.indices
        layers = list(self._layers.values())
        if layers and layers[0].key.is_cuda and {layer.group for layer in layers} == set(range(len(self._block_sizes))):
            try:
                self._replay = Replay(layers, self._block_sizes)
            except RuntimeError as error:
                logger.warning("rows are written layer by layer, not by a CUDA graph (%s)", first_line(error))

    def begin(self, step: Step) -> None:
        """Take a step's rows."""
        self._step = step
        if step.during:
            self._ledger.promise()
            self._during = self._places(step.during)

    def before(self) -> None:
        """Write all layers' rows of external tokens."""
        rows, self._step = self._step.before, Step((), self._step.during)
        if not rows:
            return
        if self._replay is not None:
            self._replay(rows)
        else:
            places = self._places(rows)
            for layer in self._layers.values():
                _write(layer, places)
        self._stats.data["external"] += sum(each.end - each.begin for each in rows)

    def during(self, name: str) -> None:
        """Write one layer's rows of tokens that were computed here."""
        if self._during and self._ledger.take(name):
            _write(self._layers[name], self._during)

    def end(self) -> None:
        """Write what is left, and count."""
        if not self._during:
            return
        late = self._ledger.left()
        for name in late:
            _write(self._layers[name], self._during)
        rows = sum(each.end - each.begin for each in self._step.during)
        self._stats.data["late" if late else "overwritten"] += rows
        self._during = []

    def report(self) -> IntactKVStats | None:
        """The rows since the last report, from one worker of all."""
        if not self._reports or self._stats.is_empty():
            return None
        found, self._stats = self._stats, IntactKVStats()
        return found

    def _places(self, rows: Sequence[Rows]) -> list[tuple[Tensor | slice, Tensor]]:
        """For every cache group, positions in the prefix and slots in the cache, on the device."""
        served = {layer.group: layer.key.device for layer in self._layers.values()}
        found: list[tuple[Tensor | slice, Tensor]] = []
        for group, size in enumerate(self._block_sizes):
            if group not in served:
                found.append((slice(0), torch.empty(0, dtype=torch.int64)))
                continue
            pairs = [pair for each in rows for pair in each.slots(group, size)]
            first, count = pairs[0][0] if pairs else 0, len(pairs)
            run = [position for position, _ in pairs] == list(range(first, first + count))
            device = served[group]
            told = [[slot for _, slot in pairs]] + ([] if run else [[position for position, _ in pairs]])
            both = torch.tensor(told, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
            found.append((slice(first, first + count) if run else both[1], both[0]))
        return found


class Replay:
    """The writes of all layers as one CUDA graph, so that a prompt alone does not wait for a launch per layer.

    It writes whole prefixes, as many as fit into `ROOM` rows; a row whose slot is -1 is left out by every backend's
    writer, as vLLM's own padding is.
    """

    ROOM = 256

    def __init__(self, layers: Sequence[_Layer], block_sizes: Sequence[int]) -> None:
        self._length, device = len(layers[0].key), layers[0].key.device
        self._block_sizes, self._copies = block_sizes, max(1, self.ROOM // self._length)
        rows = self._copies * self._length
        self._slots = torch.full((len(block_sizes), rows), -1, dtype=torch.int64, device=device)
        self._rows = [(x, x.key.repeat(self._copies, 1, 1), x.value.repeat(self._copies, 1, 1)) for x in layers]
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # kernels are compiled, and nothing is written
            self._write()
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._write()

    def __call__(self, requests: Sequence[Rows]) -> None:
        """Write the rows of some requests."""
        for first in range(0, len(requests), self._copies):
            slots = torch.empty(self._slots.shape, dtype=torch.int64, pin_memory=True)
            by_group = slots.numpy()
            by_group.fill(-1)
            for i, rows in enumerate(requests[first : first + self._copies]):
                for group, size in enumerate(self._block_sizes):
                    for position, slot in rows.slots(group, size):
                        by_group[group, i * self._length + position] = slot
            self._slots.copy_(slots, non_blocking=True)
            self._graph.replay()

    def _write(self) -> None:
        for layer, key, value in self._rows:
            slots = self._slots[layer.group]
            layer.module.impl.do_kv_cache_update(layer.module, key, value, layer.module.kv_cache, slots)


@dataclass(frozen=True)
class _Layer:
    module: Any  # vLLM's attention layer
    group: int
    key: Tensor  # (prefix, head, dim): this rank's heads
    value: Tensor


def _write(layer: _Layer, places: Sequence[tuple[Tensor | slice, Tensor]]) -> None:
    position, slot = places[layer.group]
    if len(slot):
        layer.module.impl.do_kv_cache_update(
            layer.module, layer.key[position], layer.value[position], layer.module.kv_cache, slot
        )


def _tensor_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _device(cache: Any) -> torch.device:
    return (cache if isinstance(cache, Tensor) else cache[0]).device
