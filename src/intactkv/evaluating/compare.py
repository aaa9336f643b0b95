"""Several models or prefixes measured against the full model, in one pass over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.attaching.handle import attach, check_detached
from intactkv.decoder import input_device
from intactkv.error import IntactKVError
from intactkv.evaluating.evaluation import FULL, Evaluation
from intactkv.evaluating.metrics import TokenMetrics, full_metrics, token_metrics
from intactkv.evaluating.windows import Windows
from intactkv.heads import heads_of
from intactkv.positions import check_tokens
from intactkv.processes import gathered, share


@dataclass(frozen=True, eq=False)
class Arm:
    """One thing to measure under a name: a model, with its own prefix or with an intact one attached.

    `skip` first tokens of every window are not shown to it, nor to the full model it is compared with: the prefix's
    length measures prompts without the prefix.
    """

    name: str
    model: PreTrainedModel
    kv: IntactKV | None = None
    skip: int = 0


def evaluate(
    full: PreTrainedModel,
    arms: Sequence[Arm],
    windows: Windows,
    *,
    batch_size: int = 8,
    block_mse: bool = True,
    shared: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure every arm against the full model on the same windows and the same scored labels.

    The full model reads each batch once, with its own prefix, for all arms. Arms may share one model: an
    arm's `kv` is attached around its forward only. No more than one batch of logits, the full model's and one
    arm's, is alive at a time. `progress(done, total)` is called with the number of windows after each batch.

    Block-output MSE is, for each layer, the mean over hidden dimensions and over the positions that predict a
    scored token, summed in float64. The prefix is not among them: attaching replaces its keys and values, its
    hidden states remain the quantized model's. Rows are transformers' `hidden_states[1:]`; the last is taken
    *after* the final norm and so is on another scale than the others. It holds every layer's output of one
    batch of two models in memory; `block_mse=False` does without.

    With `shared`, each process of torch.distributed's default group measures a share of the batches with models of its
    own, and all of them get the whole evaluation: one process's, bit for bit, where machines and threads are alike.

    Raises `IntactKVError` for arm names that repeat or are "full", a model in training mode or with an
    attachment, windows with ids outside a vocabulary, that do not start with an arm's prefix or that score
    what its artifact predicts, models whose vocabularies or layers differ, logits that are not finite, and for a
    tensor-parallel model that is to share batches.

    Source: token metrics as in llama.cpp's --kl-divergence.
    """
    check_names([arm.name for arm in arms], batch_size)
    for arm in (Arm("full", full), *arms):
        check_arm(arm, windows)
        if shared:
            check_whole(arm.model)
    batches = list(zip(windows.ids.cpu().split(batch_size), windows.scored.cpu().split(batch_size), strict=True))
    mine = share(batches) if shared else batches
    measured: list[dict[str, tuple[TokenMetrics, Tensor]]] = []
    began, done, total = perf_counter(), 0, sum(len(ids) for ids, _ in mine)
    for ids, scored in mine:
        with torch.inference_mode():
            measured.append(_measure_batch(full, arms, ids, scored, block_mse))
        done += len(ids)
        if progress is not None:
            progress(done, total)
    if shared:
        measured = gathered(measured)
    seconds = perf_counter() - began
    metrics = {name: TokenMetrics.cat([batch[name][0] for batch in measured]) for name in measured[0]}
    squares = {name: torch.stack([batch[name][1] for batch in measured]).sum(dim=0) for name in measured[0]}
    pairs = own_and_intact(arms, lambda arm: arm.model)
    mse = {arm.name: squares[arm.name] / int(windows.scored.sum()) for arm in arms if block_mse}
    return Evaluation(metrics, mse, pairs, seconds)


def own_and_intact(arms: Sequence[Any], model: Callable[[Any], object]) -> tuple[tuple[str, str], ...]:
    """The names of every two arms (own, intact) that differ only in the prefix; `model` says whose an arm is."""
    return tuple(
        (own.name, intact.name)
        for own in arms
        for intact in arms
        if model(own) is model(intact) and own.kv is None and intact.kv is not None and own.skip == intact.skip
    )


def three_arms(
    full: PreTrainedModel,
    model: PreTrainedModel,
    kv: IntactKV,
    windows: Windows,
    *,
    batch_size: int = 8,
    block_mse: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure `model` with its own prefix and with the intact one: `evaluate` with arms "own" and "intact".

    Settings and errors as in `evaluate`.
    """
    arms = [Arm("own", model), Arm("intact", model, kv)]
    return evaluate(full, arms, windows, batch_size=batch_size, block_mse=block_mse, progress=progress)


@torch.inference_mode()
def perplexity(arm: Arm, windows: Windows) -> float:
    """exp of the mean negative log-likelihood of the scored tokens, one window at a time."""
    total, count = 0.0, 0
    for ids, scored in zip(windows.ids.cpu().split(1), windows.scored.cpu().split(1), strict=True):
        logits, _ = forward(arm, ids, hidden=False)
        labels = ids.roll(-1, dims=1).to(logits.device)
        nll = at_labels(full_metrics(logits, labels), scored, name=arm.name).nll
        total, count = total + float(nll.double().nansum()), count + int(scored.sum())
    return math.exp(min(total / count, 700.0))


def _measure_batch(
    full: PreTrainedModel,
    arms: Sequence[Arm],
    ids: Int[Tensor, "window length"],
    scored: Bool[Tensor, "window length"],
    block_mse: bool,
) -> dict[str, tuple[TokenMetrics, Float[Tensor, "layer"]]]:
    """One batch's metrics and `_block_squares` by name, "full" first; without `block_mse` none of these."""
    nothing = torch.empty(0, dtype=torch.float64)
    measured = {}
    for skip in dict.fromkeys([0, *(arm.skip for arm in arms)]):
        shown, counts = ids[:, skip:], scored[:, skip:]
        full_logits, full_hidden = forward(Arm("full", full), shown, hidden=block_mse)
        labels = shown.roll(-1, dims=1).to(full_logits.device)  # the last position's is wrong and never scored
        own = at_labels(full_metrics(full_logits, labels), counts, name=FULL[skip > 0])
        measured[FULL[skip > 0]] = at_columns(own, skip), nothing
        for arm in arms:
            if arm.skip == skip:
                logits, hidden = forward(arm, shown, hidden=block_mse)
                metrics = token_metrics(full_logits, logits.to(labels.device), labels)
                squares = _block_squares(full_hidden, hidden, counts, name=arm.name) if block_mse else nothing
                measured[arm.name] = at_columns(at_labels(metrics, counts, name=arm.name), skip), squares
                del logits, hidden  # before the next arm's are made
    return measured


def at_columns(metrics: TokenMetrics, skip: int) -> TokenMetrics:
    """Metrics of windows without their first `skip` tokens, at the columns that the tokens have with them."""

    def moved(values: Tensor) -> Tensor:
        blank = values.new_full((len(values), skip), False if values.dtype == torch.bool else torch.nan)
        return torch.cat([blank, values], dim=1)

    return metrics.map(moved) if skip else metrics


def forward(arm: Arm, ids: Int[Tensor, "window length"], *, hidden: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The arm's logits (window, length, vocab) and, if asked for, hidden states (window, length, hidden)."""
    with attach(arm.model, arm.kv, check=False) if arm.kv is not None else nullcontext():  # harm is to be measured
        output = arm.model(input_ids=ids.to(input_device(arm.model)), use_cache=False, output_hidden_states=hidden)
    return output.logits, output.hidden_states or ()


def at_labels(metrics: TokenMetrics, scored: Bool[Tensor, "window length"], *, name: str) -> TokenMetrics:
    """Metrics moved from predicting positions to the predicted tokens, on the CPU, blank where not scored."""
    shifted = metrics.map(lambda values: values.roll(1, dims=1).cpu())
    finite = shifted.kl.isfinite() & shifted.nll.isfinite()
    if not finite[scored].all():
        raise IntactKVError(
            f"arm {name!r} has NaN or infinite KL or likelihood at {int((~finite & scored).sum())} scored tokens; "
            "float16 overflow is the usual cause, load the model in bfloat16 or float32"
        )
    return shifted.map(lambda x: x & scored if x.dtype == torch.bool else x.masked_fill(~scored, torch.nan))


def _block_squares(
    full_hidden: tuple[Tensor, ...],
    hidden: tuple[Tensor, ...],
    scored: Bool[Tensor, "window length"],
    *,
    name: str,
) -> Float[Tensor, "layer"]:
    """Squared errors of each block's output, mean over dimensions, then summed over predicting positions."""
    if not hidden or [h.shape for h in full_hidden] != [h.shape for h in hidden]:
        raise IntactKVError(
            f"arm {name!r} gives {len(hidden)} hidden states and the full model {len(full_hidden)}, or of other "
            "widths; pass block_mse=False"
        )
    predicting = scored.roll(-1, dims=1).nonzero(as_tuple=True)  # token 0 is never scored, so the last is never set
    places = {block.device: tuple(index.to(block.device) for index in predicting) for block in hidden[1:]}
    layers = []
    for full_block, block in zip(full_hidden[1:], hidden[1:], strict=True):  # (window, length, hidden)
        chosen = places[block.device]
        error = block[chosen].float() - full_block.to(block.device)[chosen].float()
        layers.append(error.square().mean(dim=-1).sum(dtype=torch.float64))
    return torch.stack([layer.cpu() for layer in layers])  # a GPU is waited for once, when all is under way


def check_names(names: Sequence[str], batch_size: int) -> None:
    """Raise `IntactKVError` for arm names that repeat or are "full", and for a batch size below 1."""
    if not names or len(set(names)) < len(names) or set(FULL) & set(names):
        raise IntactKVError(
            f'the arms are named {names}; give at least one arm, every one its own name other than "full"'
        )
    if batch_size < 1:
        raise IntactKVError(f"batch_size={batch_size} is too small; use 1 or more")


def check_arm(arm: Arm, windows: Windows) -> None:
    """Raise `IntactKVError` where `arm` cannot be measured on `windows`."""
    check_tokens(arm.model.config, windows.ids, f"a window of arm {arm.name!r}")
    if arm.model.training:
        raise IntactKVError(f"the model of arm {arm.name!r} is in training mode; call model.eval() first")
    check_detached(arm.model)
    check_skip(arm.name, arm.skip, windows)
    if arm.kv is not None:
        check_prefix(arm.name, arm.kv.ids.cpu(), windows)


def check_whole(model: PreTrainedModel) -> None:
    """Raise `IntactKVError` for a tensor-parallel model, whose processes cannot share batches."""
    if heads_of(model) is not None:
        raise IntactKVError(
            "the processes of a tensor-parallel model need all windows each, and here they are shared; leave "
            "shared=True out, or load the model whole in every process"
        )


def check_skip(name: str, skip: int, windows: Windows) -> None:
    """Raise `IntactKVError` where a window scores what an arm without its first `skip` tokens cannot predict."""
    if skip and windows.scored[:, : skip + 1].any():
        raise IntactKVError(
            f"the windows score a token up to position {skip}, which arm {name!r}, without the first {skip}, cannot "
            f"predict; score from position {skip + 1} on"
        )


def check_prefix(name: str, prefix: Int[Tensor, "prefix"], windows: Windows) -> None:
    """Raise `IntactKVError` where a window does not start with `prefix`, or scores what the artifact predicts."""
    length = len(prefix)
    if windows.ids.shape[1] <= length or not (windows.ids[:, :length].cpu() == prefix).all():
        raise IntactKVError(
            f"a window does not start with the {length} prefix tokens of arm {name!r}; "
            "cut the stream with prefixed_windows(tokens, prefix=kv.ids, window=...)"
        )
    if windows.scored[:, : length + 1].any():
        raise IntactKVError(
            f"the windows score a token up to position {length}, which arm {name!r} predicts from the logits "
            f"stored in its artifact; score from position {length + 1} on"
        )
