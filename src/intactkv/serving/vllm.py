"""A KV connector for vLLM: the artifact's rows are in the cache wherever a request begins with its tokens.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "IntactKVConnector", "kv_role": "kv_both",
      "kv_connector_module_path": "intactkv.serving.vllm", "kv_connector_extra_config": {"artifact": "KV"}}'

Two ways. *External*: the shared tokens are reported as computed elsewhere, and their rows written before the forward.
*Overwrite*: the engine computes them, and between a layer's own write and its read they are replaced. vLLM takes no
external tokens for prompt log-probabilities, nor the last token of a prompt, and draft models would miss them; then it
is overwriting, also in mode "auto", the default.

Layers that keep states (Mamba) are served with their own; LoRA and prompt embeddings get no rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from vllm.v1.kv_cache_interface import MambaSpec

from intactkv.artifact import IntactKV
from intactkv.artifact.fingerprint import check_fingerprint
from intactkv.artifact.served import checkpoint_folder, refuse_unchecked
from intactkv.error import IntactKVError
from intactkv.serving.layout import Plan, Scheduled, Step
from intactkv.serving.vllm_counts import IntactKVProm, IntactKVStats
from intactkv.serving.vllm_worker import Worker

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
