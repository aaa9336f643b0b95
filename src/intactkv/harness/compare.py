"""Three arms item by item, from the samples that lm-eval logged: flips, McNemar, paired intervals, recovery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.stats import binomtest
from torch import Tensor

from intactkv.error import IntactKVError
from intactkv.evaluating.bootstrap import Interval, bootstrap
from intactkv.lines import read_lines

GROUPS = ("mmlu",)  # tasks named GROUP_… are counted together too
Items = dict[tuple[str, str], dict[Any, float]]  # (task, metric) → item → value


@dataclass(frozen=True)
class Comparison:
    """One task's metric in three arms over the same items.

    `gain` is intact minus own in the metric's unit, `recovered` the share of the gap from own to full that the intact
    prefix gives back, None where that gap's interval holds 0. Of metrics that are 0 or 1, `mended` and `broken` count
    the items that are right with the intact prefix only and with the own one only, and `p` is McNemar's exact
    two-sided p of the two; otherwise they are None. Intervals are 95 % percentile bootstraps over items.
    """

    task: str
    metric: str
    items: int
    full: float
    own: float
    intact: float
    gain: Interval
    recovered: Interval | None
    mended: int | None
    broken: int | None
    p: float | None


def compare(full: Path, own: Path, intact: Path, *, resamples: int = 1000, seed: int = 0) -> list[Comparison]:
    """Compare three folders (or files) that `lm_eval --log_samples --output_path` wrote, every task, metric and group.

    Raises `IntactKVError` where an arm has no samples, several runs of one task, or other items than the others.
    """
    arms = {name: pooled(read_samples(path)) for name, path in (("full", full), ("own", own), ("intact", intact))}
    first = arms["full"]
    for name, items in arms.items():
        if items.keys() != first.keys():
            task = sorted(items.keys() ^ first.keys())[0]
            raise IntactKVError(
                f"the arms full and {name} do not both have {' '.join(task)}; run the same tasks for both"
            )
    found = []
    for key in sorted(first):
        if any(items[key].keys() != first[key].keys() for items in arms.values()):
            raise IntactKVError(
                f"the arms of {key[0]} have different items; give all of them the same --limit and data"
            )
        columns = torch.tensor([[items[key][item] for item in first[key]] for items in arms.values()]).double()
        found.append(compared(*key, columns, resamples=resamples, seed=seed))
    return found


def compared(task: str, metric: str, arms: Float[Tensor, "arm item"], *, resamples: int, seed: int) -> Comparison:
    """`arms` are full, own and intact, one number for each item."""
    full, own, intact = arms

    def paired(counts: Int[Tensor, "resample item"]) -> dict[str, Tensor]:
        drawn = counts.double()
        gain, gap = drawn @ (intact - own) / len(own), drawn @ (full - own) / len(own)
        return {"gain": gain, "gap": gap, "recovered": gain / gap.masked_fill(gap == 0, torch.nan)}

    generator = torch.Generator().manual_seed(seed)
    found = bootstrap(paired, len(own), generator=generator, resamples=resamples)
    sure = found["gap"].low > 0 or found["gap"].high < 0
    flips: dict[str, Any] = {"mended": None, "broken": None, "p": None}
    if bool(((arms == 0) | (arms == 1)).all()):
        mended, broken = int(((intact == 1) & (own == 0)).sum()), int(((intact == 0) & (own == 1)).sum())
        p = binomtest(mended, mended + broken).pvalue if mended + broken else 1.0
        flips = {"mended": mended, "broken": broken, "p": float(p)}
    return Comparison(
        task=task,
        metric=metric,
        items=len(own),
        full=float(full.mean()),
        own=float(own.mean()),
        intact=float(intact.mean()),
        gain=found["gain"],
        recovered=found["recovered"] if sure else None,
        **flips,
    )


def read_samples(path: Path) -> Items:
    """Every numeric metric of every item in the `samples_TASK_TIME.jsonl` under a folder, or in one such file."""
    files = [path] if path.is_file() else sorted(path.rglob("samples_*.jsonl"))
    if not files:
        raise IntactKVError(f"{path} holds no samples_*.jsonl; run lm_eval with --log_samples --output_path {path}")
    items: Items = {}
    for file in files:
        task = file.stem.removeprefix("samples_").rsplit("_", 1)[0]
        before = set(items)
        for sample in read_lines(file, needed=["doc_id", "metrics"], keys=["doc_id"]):
            item = (sample["doc_id"], str(sample.get("doc_hash")), str(sample.get("filter")))
            if not isinstance(sample["metrics"], list) or not all(isinstance(name, str) for name in sample["metrics"]):
                raise IntactKVError(f"{file} has the metrics {sample['metrics']!a}; give what lm_eval has logged")
            for metric in sample["metrics"]:
                name, value = _per_item(metric, sample.get(metric))
                if (task, name) in before:
                    raise IntactKVError(f"{path} holds several runs of {task}; give the folder or file of one")
                if isinstance(value, int | float):
                    items.setdefault((task, name), {})[item] = float(value)
    return items


def pooled(items: Items) -> Items:
    """`items` and, where several tasks of one group were run, the group's: all their items together."""
    together: Items = {}
    for group in GROUPS:
        members = [key for key in items if key[0].startswith(f"{group}_")]
        for task, metric in members if len({task for task, _ in members}) > 1 else ():
            every = together.setdefault((group, metric), {})
            every.update({(task, item): value for item, value in items[task, metric].items()})
    return {**items, **together}


def _per_item(metric: str, value: Any) -> tuple[str, Any]:
    """What lm-eval logs for one item under a perplexity's name: its log-likelihood, with or without a weight."""
    if not metric.endswith("perplexity"):
        return metric, value
    return "log-likelihood", value[0] if isinstance(value, list) and value else value


def to_dict(found: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Plain data for JSON."""
    return [asdict(comparison) for comparison in found]


def rows(found: Iterable[Comparison]) -> list[Mapping[str, str]]:
    """The cells of a table, one row for each comparison; of a group the whole, not its members."""
    found = list(found)
    grouped = tuple(f"{one.task}_" for one in found if one.task in GROUPS)
    return [
        {
            "task": one.task,
            "metric": one.metric,
            "items": str(one.items),
            "full": f"{one.full:.4f}",
            "own": f"{one.own:.4f}",
            "intact": f"{one.intact:.4f}",
            "intact − own [95 %]": f"{one.gain.value:+.4f} [{one.gain.low:+.4f}, {one.gain.high:+.4f}]",
            "mended, broken": "–" if one.mended is None else f"{one.mended}, {one.broken}",
            "McNemar p": "–" if one.p is None else f"{one.p:.3f}",
            "recovered, % [95 %]": "–"
            if one.recovered is None
            else f"{100 * one.recovered.value:.0f} [{100 * one.recovered.low:.0f}, {100 * one.recovered.high:.0f}]",
        }
        for one in found
        if not one.task.startswith(grouped)
    ]
