"""Measure what an intact prefix gives back: three arms, per-token metrics, paired intervals."""

from intactkv.evaluating.bootstrap import Interval, bootstrap
from intactkv.evaluating.compare import Arm, evaluate, three_arms
from intactkv.evaluating.evaluation import Evaluation
from intactkv.evaluating.metrics import (
    TokenMetrics,
    difference_statistic,
    full_metrics,
    gap_closed_statistic,
    paired_bootstrap,
    summary,
    summary_statistic,
    token_metrics,
)
from intactkv.evaluating.verdict import WORTH_IT, decide, verdict
from intactkv.evaluating.windows import Windows, paper_windows, prefixed_windows

__all__ = [
    "WORTH_IT",
    "Arm",
    "Evaluation",
    "Interval",
    "TokenMetrics",
    "Windows",
    "bootstrap",
    "decide",
    "difference_statistic",
    "evaluate",
    "full_metrics",
    "gap_closed_statistic",
    "paired_bootstrap",
    "paper_windows",
    "prefixed_windows",
    "summary",
    "summary_statistic",
    "three_arms",
    "token_metrics",
    "verdict",
]
