"""Train the keys and values of an intact prefix to absorb what is left of the quantization error.

AdamW on nothing but the keys and values; the quantized model is frozen. A resumed run needs no more than its state.
What this gives up: a calibrated artifact fits one quantized model only.

Source: Liu et al., "IntactKV", Findings of ACL 2024, arXiv 2403.01241, section 3.3.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.artifact.digest import weights_digest
from intactkv.attaching.handle import attach
from intactkv.calibrating.activations import activations_fit
from intactkv.calibrating.backward import checkpointing, frozen, straight_through
from intactkv.calibrating.judge import held_out_metrics, verdict_of
from intactkv.calibrating.outputs import batched, outputs
from intactkv.calibrating.samples import Sample, Split
from intactkv.calibrating.spool import Kept, Spool
from intactkv.calibrating.state import State, load_state_, save_state
from intactkv.calibrating.step import CalibrationConfig, backward_, order, step_, with_tensors
from intactkv.calibrating.targets import Live, Targets
from intactkv.checkpoint.source import quantizer
from intactkv.decoder import input_device
from intactkv.error import IntactKVError, first_line
from intactkv.files import check_outputs, json_data
from intactkv.heads import heads_of
from intactkv.positions import check_tokens
from intactkv.processes import gathered, grouped, is_main, wait

_SAVE_SECONDS = 30.0
_SAME = 0.02  # of the logits' spread; rounding to bfloat16 stays below, dropout of 0.1 is far above


@dataclass(frozen=True)
class Report:
    """Where a calibration stands: after `step` of `steps`, its loss, the last held-out KL, and the seconds left."""

    step: int
    steps: int
    loss: float
    kl: float
    seconds_left: float


def calibrate(
    kv: IntactKV,
    model: PreTrainedModel,
    full: PreTrainedModel | Spool,
    data: Split,
    *,
    config: CalibrationConfig | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[Report], None] | None = None,
) -> IntactKV:
    """The intact KV with its keys and values trained for `model`, or `kv`'s own where that does not help.

    `full` is the full model, or what `spool` kept of it. Held-out KL chooses the best step; the samples that judge are
    read once, before and after, and only where the KL is lower beyond its paired 95 % interval are the trained
    tensors returned, otherwise the ones given. `provenance["calibration"]` says what was done and found either way.
    Trained tensors are as precise as the more precise of `kv` and `model`.

    With a `checkpoint` file, a run that was stopped at any moment goes on from there; on a CPU its result is the
    uninterrupted one's, bit for bit. In a group of processes, each takes a share of every step.

    Raises `IntactKVError` for samples that do not begin with the prefix, a model whose keys and values are not
    `kv`'s, one through which no gradient comes, a loss that is not finite, and a checkpoint that cannot be written.
    """
    config, file = config or CalibrationConfig(), None if checkpoint is None else Path(checkpoint)
    check_outputs(file)
    targets: Targets = full if isinstance(full, Spool) else Live(full, kv.ids.cpu())
    for each in (model, full):
        if isinstance(each, PreTrainedModel) and heads_of(each) is not None:
            raise IntactKVError(
                "calibrating shares the samples over processes, and those of a tensor-parallel model need them all; "
                "load both models whole in every process"
            )
    _check(kv, model, data, config)
    identity = _identity(kv, model, targets, data, config)
    job = _job(identity)
    state = _start(kv, model, config)
    if file is not None and file.exists():
        load_state_(state, file, job=job)
    with ExitStack() as stack:
        if isinstance(targets, Live) and input_device(targets.full).type == "cpu" and config.keep_bytes:
            targets = stack.enter_context(closing(Kept(targets, most_bytes=config.keep_bytes)))
        with frozen(model), ExitStack() as training:
            config, mended = _settled(training, kv, model, targets, data, config)
            _train_(state, kv, model, targets, data, config, _Keeper(file, job), progress)
        trained = _with(kv, state.best, model)
        arms = {
            name: held_out_metrics(model, arm, targets, data.judge, kv.ids.cpu())
            for name, arm in (("own", None), ("before", kv), ("after", trained))
        }
    verdict = verdict_of(arms)
    about = {
        **identity,
        "skipped": {reason: len(names) for reason, names in data.train.skipped.items()},
        "straight_through": mended,
        "checkpointed": config.checkpoint_blocks,
        "micro_batch": config.micro_batch,
        "steps": state.step,
        "best_step": state.best_step,
        "readings": state.readings,
        "losses": state.losses,
        **verdict,
    }
    return replace(trained if verdict["adopted"] else kv, provenance={**kv.provenance, "calibration": about})


def _check(kv: IntactKV, model: PreTrainedModel, data: Split, config: CalibrationConfig) -> None:
    prefix = kv.ids.cpu()
    for part in (data.train, data.choose, data.judge):
        for i, row in enumerate(part.rows):
            if not torch.equal(row.ids[: len(prefix)], prefix):
                raise IntactKVError(
                    f"sample {i} of {part.source} does not begin with the {len(prefix)} prefix tokens, so the intact "
                    "KV does nothing for it; make samples with prefix=kv.ids"
                )
            check_tokens(model.config, row.ids[None], f"sample {i} of {part.source}")
            if not bool(batched([row], prefix=prefix).predicting.any()):
                raise IntactKVError(f"sample {i} of {part.source} has nothing to learn after the prefix; leave it out")
    missing = sorted(set(config.layers or ()) - set(kv.layers))
    if missing or config.layers == ():
        raise IntactKVError(f"layers={config.layers} are not all in the intact KV; it has {sorted(kv.layers)}")
    if model.training:
        raise IntactKVError("the model is in training mode; call model.eval() first")
    with attach(model, kv):  # refuses foreign models and attached ones
        pass


def _identity(kv: IntactKV, model: PreTrainedModel, targets: Targets, data: Split, config: CalibrationConfig) -> Any:
    """All that decides the result but the number of processes, as JSON data."""
    found = {
        "settings": asdict(config),
        "data": {
            name: {"source": part.source, "samples": len(part), "learned_tokens": part.tokens, "digest": part.digest}
            for name, part in (("train", data.train), ("choose", data.choose), ("judge", data.judge))
        },
        "from": kv.digest,
        "model": {"name": str(model.config.name_or_path), "weights": weights_digest(model), "dtype": str(model.dtype)},
        "full_weights": targets.weights,
    }
    return json_data(found)


def _job(identity: Any) -> str:
    """The digest of what decides the result: not of names, since one file or folder can be spelled in many ways."""
    data = {name: {**part, "source": None} for name, part in identity["data"].items()}
    named = {**identity, "data": data, "model": {**identity["model"], "name": None}}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _start(kv: IntactKV, model: PreTrainedModel, config: CalibrationConfig) -> State:
    """Step 0: the tensors to train, in float32 at least, on the device of the model."""
    tensors = {}
    for i in kv.layers if config.layers is None else config.layers:
        for part, tensor in zip(("key", "value"), kv.layers[i], strict=True):
            if part in config.parts:
                dtype = torch.promote_types(torch.promote_types(tensor.dtype, model.dtype), torch.float32)
                tensors[f"layers.{i}.{part}"] = (
                    tensor.detach().to(input_device(model), dtype, copy=True).requires_grad_()
                )
    # no weight decay: it would pull keys and values to zero, which is nothing they should be near
    optimizer = torch.optim.AdamW(tensors.values(), lr=config.rate(0), weight_decay=0.0)
    return State(tensors, optimizer, {name: tensor.detach().clone() for name, tensor in tensors.items()})


def _with(kv: IntactKV, tensors: dict[str, Tensor], model: PreTrainedModel) -> IntactKV:
    """The artifact as it would be saved: no more precise than what it came from and the model that reads it."""
    dtype = torch.promote_types(next(iter(kv.layers.values()))[0].dtype, model.dtype)
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    changed = with_tensors(kv, detached).to(device=kv.ids.device, dtype=dtype)
    return replace(changed, logits=kv.logits)


def _settled(
    stack: ExitStack, kv: IntactKV, model: PreTrainedModel, targets: Targets, data: Split, config: CalibrationConfig
) -> tuple[CalibrationConfig, dict[str, int]]:
    """The config with it decided how many samples are in a forward and whether blocks are checkpointed, and the kernels
    mended while `stack` is open."""
    longest = sorted(data.train.rows, key=lambda row: len(row.ids))
    own = with_tensors(kv, _start(kv, model, config).tensors)
    # as every reading does: bitsandbytes' nf4 then packs its weights and has no backward any more
    with torch.no_grad():
        outputs(model, batched(longest[-(config.micro_batch or 1) :], prefix=kv.ids.cpu()), blocks=False, logits=True)

    found = sized(own, model, longest, config)
    mended = _let_gradients_through(stack, kv, model, targets, data, found)
    if mended:
        found = sized(own, model, longest, config)
    if found.checkpoint_blocks:
        _refuse_noise(kv, model, data)
    return found, mended


def sized(
    kv: IntactKV, model: PreTrainedModel, longest: Sequence[Sample], config: CalibrationConfig
) -> CalibrationConfig:
    """`config` with what is None in it decided: how many of the samples, longest last, and whether blocks twice."""
    device, room = input_device(model), config.activation_bytes
    if room is None:
        room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2 * 2**30
        room = min(gathered([room]))  # one size of batches for all processes

    @cache
    def fits(count: int) -> bool:
        return activations_fit(kv, model, longest[-count:], config.objective, most_bytes=room)

    size, again = config.micro_batch, config.checkpoint_blocks
    if size is None:
        most = 1 if device.type == "cpu" else min(config.batch_size, len(longest))
        size = most_that_fit(fits, most)
    return replace(config, micro_batch=size, checkpoint_blocks=not fits(size) if again is None else again)


def most_that_fit(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 1, 2, 4, … and `most` that fits; 1 if none does."""
    size = 1
    while size < most and fits(min(2 * size, most)):
        size = min(2 * size, most)
    return size


def _let_gradients_through(
    stack: ExitStack, kv: IntactKV, model: PreTrainedModel, targets: Targets, data: Split, config: CalibrationConfig
) -> dict[str, int]:
    """See that a gradient reaches every trained layer, if need be by mending kernels while `stack` is open."""

    def unreached() -> tuple[list[str], str]:  # every process looks for itself, so that all find the same
        state, row = _start(kv, model, config), [data.train.rows[0]]
        try:
            own = with_tensors(kv, state.tensors)
            backward_(own, model, targets, row, config, (1.0, 1.0))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # "does not require grad", "derivative for … is not implemented"
            return list(state.tensors), f" ({first_line(error)})"
        return [name for name, t in state.tensors.items() if t.grad is None or not bool(t.grad.any())], ""

    if not unreached()[0]:
        return {}
    mended = stack.enter_context(straight_through(model))
    names, why = unreached()
    if names:
        through = " by ".join(filter(None, (type(model).__name__, quantizer(model.config))))
        raise IntactKVError(
            f"no gradient reaches {names[0]} and {len(names) - 1} other tensors through {through}{why}; calibrate "
            "on a dequantized copy of it, without checkpointing its blocks, or with a kernel that has a backward pass "
            "(docs/backends.md)"
        )
    return mended


@torch.no_grad()
def _refuse_noise(kv: IntactKV, model: PreTrainedModel, data: Split) -> None:
    """Refuse blocks that compute something else in training mode, which checkpointing needs: dropout, router noise."""
    batch, found = batched(data.train.rows[:1], prefix=kv.ids.cpu()), []
    for on in (False, True):
        with checkpointing(model, on=on), attach(model, kv, check=False):
            found.append(outputs(model, batch, blocks=False, logits=True).logits)
    quiet, noisy = (logits.float() for logits in found if logits is not None)
    if float((noisy - quiet).std()) > _SAME * float(quiet.std()):
        raise IntactKVError(
            f"the blocks of {type(model).__name__} compute something else in training mode (dropout?), in which alone "
            "they can be checkpointed; set the dropouts of its configuration to 0, or checkpoint_blocks=False"
        )


def _train_(
    state: State, kv: IntactKV, model: PreTrainedModel, targets: Targets, data: Split, config: CalibrationConfig,
    keep: _Keeper, progress: Callable[[Report], None] | None,
) -> None:  # fmt: skip
    """Step until the steps are done or held-out KL has stopped falling."""
    began, first = monotonic(), state.step
    if not state.readings:
        _read_(state, kv, model, targets, data)
    while state.step < config.steps and not state.stopped(config.patience):
        rows = [data.train.rows[i] for i in order(len(data.train), state.step, config)]
        state.losses.append(step_(state, kv, model, targets, rows, config))
        state.step += 1
        if state.step % config.check_every == 0 or state.step == config.steps:
            _read_(state, kv, model, targets, data)
            keep.now(state)
        else:
            keep.sometimes(state)
        if progress is not None:
            each = (monotonic() - began) / (state.step - first)
            left = each * (config.steps - state.step)
            progress(Report(state.step, config.steps, state.losses[-1], state.readings[-1][1], left))


def _read_(state: State, kv: IntactKV, model: PreTrainedModel, targets: Targets, data: Split) -> None:
    """Read the held-out KL of the artifact as it would be saved; keep it if it is the best."""
    now = held_out_metrics(model, _with(kv, state.tensors, model), targets, data.choose, kv.ids.cpu())
    state.readings.append((state.step, now.kl.nanmean().item()))
    if state.best_step == state.step:
        state.best = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}


class _Keeper:
    """Writes the state to a file, if there is one: on demand, or when the last time is half a minute ago."""

    def __init__(self, path: Path | None, job: str) -> None:
        self.path, self.job, self.last = path, job, monotonic()

    def now(self, state: State) -> None:
        self.last = monotonic()
        if self.path is not None and is_main():
            save_state(state, self.path, job=self.job)
        wait()

    def sometimes(self, state: State) -> None:
        if not grouped() and monotonic() - self.last > _SAVE_SECONDS:  # processes' clocks differ
            self.now(state)
