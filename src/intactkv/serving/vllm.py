"""A KV connector for vLLM: the artifact's rows are in the cache wherever a request begins with its tokens.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "IntactKVConnector", "kv_role": "kv_both",
      "kv_connector_module_path": "intactkv.serving.vllm", "kv_connector_extra_config": {"artifact": "KV"}}'

Two ways. *External*: the shared tokens are reported as computed elsewhere, and their rows written before the forward.
*Overwrite*: the engine computes them, and between a layer's own write and its read they are replaced. vLLM takes no
external tokens for prompt log-probabilities, nor the last token of a prompt, and draft models would miss them; then it
is overwriting, also in mode "auto", the default. Rows go through the attention backend's own writer, so that cache
types and layouts are the engine's business.

Layers that keep states (Mamba) are served with their own; LoRA and prompt embeddings get no rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.metrics.utils import create_metric_per_engine

from intactkv.artifact import IntactKV
from intactkv.artifact.fingerprint import check_fingerprint
from intactkv.artifact.served import checkpoint_folder, refuse_unchecked
from intactkv.error import IntactKVError, first_line
from intactkv.serving.layout import Ledger, Plan, Rows, Scheduled, Step, head_slice

logger = init_logger(__name__)

MODES = ("auto", "external", "overwrite")
_SETTINGS = {"artifact", "mode", "check"}
_DRAFTS_FROM_TOKENS = {"ngram", "ngram_gpu", "suffix"}  # speculative methods that keep no keys and values of their own


@dataclass
class IntactKVMetadata(KVConnectorMetadata):
    """What the scheduler tells the workers in one step."""

    step: Step


@dataclass
class IntactKVHandshake(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler at the start: its artifact, and the layers that it serves."""

    digest: str
    layers: tuple[int, ...]


COUNTS = ("external", "overwritten", "late")


@dataclass
class IntactKVStats(KVConnectorStats):
    """Rows written since the last report: `external`, `overwritten`, and `late`, after the step that reads them."""

    data: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))

    def reset(self) -> None:
        """Count from 0."""
        self.data = dict.fromkeys(COUNTS, 0)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another report."""
        for name in COUNTS:
            self.data[name] += other.data[name]
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's log line says."""
        return {f"intact rows {name}": self.data[name] for name in COUNTS}

    def is_empty(self) -> bool:
        """Whether nothing was written."""
        return not any(self.data.values())


class IntactKVProm(KVConnectorPromMetrics):
    """The same as Prometheus counters: `vllm:intactkv_rows_external_total`, …"""

    def __init__(
        self, vllm_config: VllmConfig, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(
                    name=f"vllm:intactkv_rows_{name}",
                    documentation=f"Rows of the intact prefix written to the KV cache: {name}.",
                    labelnames=labelnames,
                ),
                per_engine_labelvalues,
            )
            for name in COUNTS
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add a report."""
        for name, counters in self._counters.items():
            counters[engine_idx].inc(transfer_stats_data[name])


class IntactKVConnector(KVConnectorBase_V1, SupportsHMA):
    """One engine's connector; vLLM makes one in the scheduler and one in every worker.

    `kv_connector_extra_config`: `artifact`, a file, folder or Hub name; `mode`, "auto", "external" or "overwrite";
    `check`, False to serve an artifact of which nothing says that it is in the model's basis. Raises `IntactKVError`
    at the start where it cannot be right.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = _settings(vllm_config)
        self.kv = IntactKV.from_pretrained(settings["artifact"])
        groups = kv_cache_config.kv_cache_groups
        if role == KVConnectorRole.SCHEDULER:
            check_engine(vllm_config, self.kv, check=settings.get("check", True))
            mode = settings.get("mode", "auto")
            states = any(isinstance(group.kv_cache_spec, MambaSpec) for group in groups)
            drafts = mode == "auto" and _drafts(vllm_config)
            self._external = mode != "overwrite" and not states and not drafts
            self._plan = Plan(self.kv.ids.tolist(), [group.kv_cache_spec.block_size for group in groups])
            logger.info("intact KV of %d tokens (%s)", len(self.kv), "external" if self._external else "overwrite")
        else:
            self._worker = Worker(vllm_config, self.kv, groups)

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens behind those computed here need not be computed, and that they are there at once."""
        if not self._external or request.skip_reading_prefix_cache:
            return 0, False
        return self._plan.offer(_tokens(request), num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request has got its blocks, anew or after a preemption."""
        self._plan.admit(request.request_id, _tokens(request), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Which rows the step writes where."""
        return IntactKVMetadata(self._plan.step(_scheduled(scheduler_output)) if self._plan.waiting else Step())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request's blocks may go at once."""
        self._plan.finish(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`."""
        return self.request_finished(request, [])

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[Any, KVConnectorHandshakeMetadata]) -> None:
        """Raise `IntactKVError` where a worker has another artifact, or a layer of it has no worker."""
        served: set[int] = set()
        for rank, said in metadata.items():
            if not isinstance(said, IntactKVHandshake):
                continue
            if said.digest != self.kv.digest:
                raise IntactKVError(
                    f"the worker of rank {rank} has an intact KV of digest {said.digest[:12]}, the scheduler one of "
                    f"{self.kv.digest[:12]}; put the same file on every node"
                )
            served |= set(said.layers)
        if missing := sorted(self.kv.layers.keys() - served):
            raise IntactKVError(f"no worker has the layers {missing} of the intact KV; give the artifact of this model")

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed on when a request ends."""
        return False

    # In a worker.

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the scheduler checks before the first request."""
        return IntactKVHandshake(self.kv.digest, self._worker.indices)

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """The caches are there: put the artifact's rows beside them."""
        self._worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, IntactKVMetadata)
        self._worker.begin(connector_metadata.step)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the rows of external tokens."""
        self._worker.before()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Write one layer's rows over those that it has just written itself."""
        self._worker.during(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Write what a full CUDA graph, which runs no Python, has left; it is right from the next step on."""
        self._worker.end()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Rows written since the last call, by the worker of layer 0 and rank 0; the others' are the same."""
        return self._worker.report() if self.role == KVConnectorRole.WORKER else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """The statistics from their data."""
        return IntactKVStats() if data is None else IntactKVStats(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics:
        """Their Prometheus counters."""
        return IntactKVProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)


@dataclass(frozen=True)
class _Layer:
    module: Any  # vLLM's attention layer
    group: int
    key: Tensor  # (prefix, head, dim): this rank's heads
    value: Tensor


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


def _write(layer: _Layer, places: Sequence[tuple[Tensor | slice, Tensor]]) -> None:
    position, slot = places[layer.group]
    if len(slot):
        layer.module.impl.do_kv_cache_update(
            layer.module, layer.key[position], layer.value[position], layer.module.kv_cache, slot
        )


def check_engine(vllm_config: VllmConfig, kv: IntactKV, *, check: bool) -> None:
    """Raise `IntactKVError` for an engine that this artifact cannot serve; warn where a part of it cannot."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model.use_mla:
        raise IntactKVError("this model keeps a latent (MLA), which keys and values do not restore; not supported")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise IntactKVError(f"{name}={getattr(parallel, name)} spreads one prefix over ranks; use 1")
    if model.is_encoder_decoder:
        raise IntactKVError("this model has an encoder; an intact KV is for decoders")
    check_fingerprint(kv, model.hf_text_config)
    if check:
        folder = checkpoint_folder(model.model, model.revision)
        refuse_unchecked(kv, folder, model.model)
    graphs: Any = vllm_config.compilation_config.cudagraph_mode
    if graphs is not None and graphs.mixed_mode().name == "FULL":
        logger.warning(
            "full CUDA graphs for mixed batches run no Python, so prompt log-probabilities are those of the model's "
            "own prefix; use cudagraph_mode FULL_AND_PIECEWISE"
        )


def _settings(vllm_config: VllmConfig) -> dict[str, Any]:
    given = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
    if unknown := given.keys() - _SETTINGS:
        raise IntactKVError(f"kv_connector_extra_config has {sorted(unknown)}; it takes {sorted(_SETTINGS)}")
    if not isinstance(given.get("artifact"), str):
        raise IntactKVError('kv_connector_extra_config needs "artifact": the file, folder or Hub name of an intact KV')
    if given.get("mode", "auto") not in MODES:
        raise IntactKVError(f"mode={given['mode']!r} is none of {', '.join(MODES)}")
    return given


def _drafts(vllm_config: VllmConfig) -> bool:
    """Whether a draft model keeps keys and values, which it would lack for external tokens."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.method not in _DRAFTS_FROM_TOKENS


def _tokens(request: Any) -> Sequence[int]:
    """The request's tokens, as far as the full model's keys and values are theirs."""
    if request.lora_request is not None or request.prompt_token_ids is None or request.prompt_embeds is not None:
        return ()
    images = [feature.mm_position.offset for feature in request.mm_features]
    return request.all_token_ids[: min(images)] if images else request.all_token_ids


def _scheduled(output: Any) -> Iterator[Scheduled]:
    for new in output.scheduled_new_reqs:
        count = output.num_scheduled_tokens[new.req_id]
        yield Scheduled(new.req_id, new.num_computed_tokens, count, new.block_ids, admitted=True)
    old = output.scheduled_cached_reqs
    for request, computed, blocks in zip(old.req_ids, old.num_computed_tokens, old.new_block_ids, strict=True):
        count = output.num_scheduled_tokens[request]
        yield Scheduled(request, computed, count, blocks, admitted=request in old.resumed_req_ids)


def _tensor_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _device(cache: Any) -> torch.device:
    return (cache if isinstance(cache, Tensor) else cache[0]).device
