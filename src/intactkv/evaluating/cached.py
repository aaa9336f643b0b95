"""Arms measured one model at a time against the full model's distributions on disk, resumable at every batch.

Every batch's figures of every arm are written when they are known. Run again after a stop, only what is missing is
computed, in the same batches, so the result is the same bit for bit; when nothing is missing no model is loaded.
What this gives up beside `evaluate`: block-output MSE, for which hidden states of both models are needed at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.error import IntactKVError
from intactkv.evaluating.compare import (
    Arm,
    at_columns,
    at_labels,
    check_arm,
    check_names,
    check_prefix,
    check_skip,
    check_whole,
    forward,
    own_and_intact,
)
from intactkv.evaluating.evaluation import FULL, Evaluation
from intactkv.evaluating.metrics import TokenMetrics
from intactkv.evaluating.records import read_record, write_record
from intactkv.evaluating.stored import (
    DistributionStore,
    Given,
    against_itself,
    check_top,
    ids_digest,
    metrics_against,
    scored_mean,
)
from intactkv.evaluating.windows import Windows
from intactkv.processes import count, share, wait

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model that need not be in memory: the digest of its files and of how it is loaded, and the loading."""

    digest: str
    load: Callable[[], PreTrainedModel]


@dataclass(frozen=True, eq=False)
class StoredArm:
    """One thing to measure under a name: a checkpoint, with its own prefix or with an intact one attached.

    `skip` as in `Arm`.
    """

    name: str
    checkpoint: Checkpoint
    kv: IntactKV | None = None
    skip: int = 0


@dataclass(eq=False)
class Traces:
    """How a cached evaluation came about: batches computed and read, and the files that were not usable.

    `rest_mass` is the mean probability that the full model gives to tokens which are not kept: how much of each
    distribution the KL takes as one bucket.
    """

    computed: int = 0
    read: int = 0
    unusable: list[str] = field(default_factory=list)
    rest_mass: float = 0.0


@dataclass(frozen=True, eq=False)
class _Batch:
    ids: Tensor
    scored: Tensor
    about: dict[str, Any]  # what the figures of every arm on it depend on


def evaluate_cached(
    full: Checkpoint,
    arms: Sequence[StoredArm],
    windows: Windows,
    *,
    store: DistributionStore,
    batch_size: int = 8,
    shared: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Evaluation, Traces]:
    """As `compare.evaluate`, with one model in memory at a time and everything that was measured kept in `store`.

    The arms of one checkpoint must stand together. `progress(done, total)` counts windows times arms, the full model
    being one. Figures are those of `evaluate` at the same batch size on the same machine, bit for bit, but for KL
    where the store is truncated. `seconds` is NaN where a part was read from disk. A file that is not usable is
    computed again and named in `Traces`. With `shared`, each process of a group measures a share of the batches that
    are missing, and reads the others' from `store`, a folder that all of them see.

    Raises `IntactKVError` as `evaluate` does, and where the store would take more room than it may.
    """
    check_names([arm.name for arm in arms], batch_size)
    for arm in arms:
        check_skip(arm.name, arm.skip, windows)
        if arm.kv is not None:
            check_prefix(arm.name, arm.kv.ids.cpu(), windows)
    skips = {FULL[skip > 0]: skip for skip in dict.fromkeys([0, *(arm.skip for arm in arms)])}
    keys: dict[str, dict[str, Any]] = {name: _key(full.digest, None, skip) for name, skip in skips.items()}
    for arm in arms:
        keys[arm.name] = _key(arm.checkpoint.digest, arm.kv, arm.skip)
    run = _Run(full, windows, store, _batches(windows, batch_size, store), keys, progress, shared)
    began = perf_counter()
    columns = {name: run.known(name) for name in keys}
    missing = [i for i in range(len(run.batches)) if any(column[i] is None for column in columns.values())]
    if shared:
        wait()  # until all have looked, so that all see the same missing
    needed = share(missing) if shared else missing
    run.measure_full(columns, skips, needed)
    for checkpoint in dict.fromkeys(arm.checkpoint for arm in arms):
        run.measure(checkpoint, [arm for arm in arms if arm.checkpoint is checkpoint], columns, needed)
    if shared:
        wait()
        run.read_others(columns)
    seconds = math.nan if run.traces.read else perf_counter() - began
    metrics = {name: TokenMetrics.cat([_metrics(found) for found in column]) for name, column in columns.items()}
    run.traces.rest_mass = scored_mean((found["rest_mass"] for found in columns["full"] if found), windows.scored.cpu())
    pairs = own_and_intact(arms, lambda arm: arm.checkpoint)
    return Evaluation(metrics, {}, pairs, seconds), run.traces


_Column = list[dict[str, Tensor] | None]


@dataclass(eq=False)
class _Run:
    """One evaluation: what it reads and writes, and how far it is."""

    full: Checkpoint
    windows: Windows
    store: DistributionStore
    batches: list[_Batch]
    keys: dict[str, dict[str, Any]]  # by arm, what tells it from others
    progress: Callable[[int, int], None] | None
    shared: bool
    traces: Traces = field(default_factory=Traces)
    done: int = 0

    def known(self, name: str) -> _Column:
        """What an earlier run has written of this arm, by batch."""
        column: _Column = []
        for batch in self.batches:
            column.append(self.usable(partial(read_record, self.arms, {**batch.about, **self.keys[name]})))
            if column[-1] is not None:
                self.traces.read += 1
                self.count(batch)
        return column

    def measure_full(self, columns: dict[str, _Column], skips: dict[str, int], needed: Sequence[int]) -> None:
        """Complete the store and the full model's own figures at the batches `needed`, without `skips` tokens too."""
        wanted = [(name, skip, i) for name, skip in skips.items() for i in needed]
        asked = [self.batches[i].ids[:, skip:] for _, skip, i in wanted]
        self.store_full([ids for ids in asked if not self.usable(partial(self.store.has, ids))])
        for name, skip, i in wanted:
            if columns[name][i] is None:
                given = self.stored(self.batches[i], skip)
                metrics = at_columns(
                    at_labels(against_itself(given), self.batches[i].scored[:, skip:], name=name), skip
                )
                rest = torch.nn.functional.pad(given.rest_mass, (skip, 0))
                self.keep(name, i, columns[name], {**vars(metrics), "rest_mass": rest})

    def store_full(self, missing: list[Tensor]) -> None:
        """Compute and keep the full model's distributions of these windows."""
        if not missing:
            return
        model = self.full.load()
        check_arm(Arm("full", model), self.windows)
        if self.shared:
            check_whole(model)
        vocab = model.config.get_text_config(decoder=True).vocab_size
        check_top(self.store.top, vocab)
        tokens = sum(ids.numel() for ids in missing) * (count() if self.shared else 1)  # other processes write as much
        self.store.check_room(tokens, vocab=vocab, dtype=model.dtype)
        for ids in missing:
            with torch.inference_mode():
                logits, _ = forward(Arm("full", model), ids, hidden=False)
                self.store.write(ids, logits)

    def measure(
        self, checkpoint: Checkpoint, arms: list[StoredArm], columns: dict[str, _Column], needed: Sequence[int]
    ) -> None:
        """Measure what is missing of one checkpoint's arms at the batches `needed`."""
        missing = [i for i in needed if any(columns[arm.name][i] is None for arm in arms)]
        if not missing:
            return
        model = checkpoint.load()
        for arm in arms:
            check_arm(Arm(arm.name, model, arm.kv, arm.skip), self.windows)
        if self.shared:
            check_whole(model)
        for i in missing:
            batch = self.batches[i]
            for skip in dict.fromkeys(arm.skip for arm in arms):
                given, ids = self.stored(batch, skip), batch.ids[:, skip:]
                for arm in arms:
                    if arm.skip == skip and columns[arm.name][i] is None:
                        with torch.inference_mode():
                            logits, _ = forward(Arm(arm.name, model, arm.kv), ids, hidden=False)
                            metrics = metrics_against(given, logits, ids.roll(-1, dims=1))
                        metrics = at_columns(at_labels(metrics, batch.scored[:, skip:], name=arm.name), skip)
                        self.keep(arm.name, i, columns[arm.name], vars(metrics))

    def read_others(self, columns: dict[str, _Column]) -> None:
        """Read what other processes have measured meanwhile; it counts as computed by this run."""
        for name, column in columns.items():
            for i, batch in enumerate(self.batches):
                if column[i] is None:
                    column[i] = read_record(self.arms, {**batch.about, **self.keys[name]})
                    self.traces.computed += 1

    def stored(self, batch: _Batch, skip: int) -> Given:
        """The full model's distributions of one batch without its first tokens, computed again where spoilt."""
        ids = batch.ids[:, skip:]
        given = self.usable(partial(self.store.read, ids))
        if given is None:
            self.store_full([ids])
            given = self.store.read(ids)
        if given is None:
            raise IntactKVError(f"a file of {self.store.folder} was removed meanwhile; run the same command again")
        return given

    def keep(self, name: str, i: int, column: _Column, found: dict[str, Tensor]) -> None:
        """Write one batch's figures of one arm, and count it."""
        write_record(self.arms, {**self.batches[i].about, **self.keys[name]}, found)
        column[i] = found
        self.traces.computed += 1
        self.count(self.batches[i])

    def usable(self, read: Callable[[], Any]) -> Any:
        """What `read` gives; a file that is not usable counts as not there, and is named."""
        try:
            return read()
        except IntactKVError as error:
            self.traces.unusable.append(str(error))
            log.warning("computed again: %s", error)
            return None

    def count(self, batch: _Batch) -> None:
        self.done += len(batch.ids)
        if self.progress is not None:
            self.progress(self.done, len(self.keys) * sum(len(batch.ids) for batch in self.batches))

    @property
    def arms(self) -> Path:
        return self.store.folder / "arms"


def _key(model: str, kv: IntactKV | None, skip: int) -> dict[str, Any]:
    key = {"model": model, "kv": None if kv is None else kv.digest}
    return {**key, "skip": skip} if skip else key


def _batches(windows: Windows, batch_size: int, store: DistributionStore) -> list[_Batch]:
    batches = []
    for ids, scored in zip(windows.ids.cpu().split(batch_size), windows.scored.cpu().split(batch_size), strict=True):
        about = {**store.about, "what": "an arm's figures", "ids": ids_digest(ids), "scored": ids_digest(scored)}
        batches.append(_Batch(ids, scored, about))
    return batches


def _metrics(found: dict[str, Tensor] | None) -> TokenMetrics:
    if found is None:
        raise IntactKVError("a batch was not measured; run the same command again")
    return TokenMetrics(**{name: found[name] for name in ("kl", "same_top1", "nll", "delta_p")})
