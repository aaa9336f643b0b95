"""The rows that were written, as vLLM's log line and its Prometheus page count them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

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
