"""How far one model's next-token distributions are from the full model's, and how sure we are of it.

Definitions follow llama.cpp's `llama-perplexity --kl-divergence` where it has one. Two differences: it stores
the full model's log-probabilities in 16 bits, we never store them; and it takes tokens as independent, we
resample whole windows, because tokens of one window share their context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from intactkv.error import IntactKVError
from intactkv.evaluating.bootstrap import Interval, bootstrap

# Elements of one (token, vocab) working copy, whatever the batch, window or vocabulary: 4 MiB in float32, which a
# processor's cache holds, and 64 times that on a GPU, where each chunk costs some thirty kernels however small it is.
WORKING_ELEMENTS, GPU_CHUNKS = 2**20, 64

_KL_QUANTILES = {"kl_median": 0.5, "kl_99": 0.99, "kl_99_9": 0.999}


@dataclass(frozen=True, eq=False)
class TokenMetrics:
    """What one model did at each token; all four tensors have the shape of the labels.

    `kl` is KL(full ‖ model) in nats, `same_top1` whether both put the same token first, `nll` the model's
    negative log-likelihood of the label in nats, `delta_p` its probability of the label minus the full
    model's. Tokens that are not scored hold NaN, and False in `same_top1`.
    """

    kl: Float[Tensor, "*token"]
    same_top1: Bool[Tensor, "*token"]
    nll: Float[Tensor, "*token"]
    delta_p: Float[Tensor, "*token"]

    @property
    def scored(self) -> Bool[Tensor, "*token"]:
        """Which tokens hold a measurement."""
        return ~self.kl.isnan()

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenMetrics:
        """The same change made to all four tensors."""
        return TokenMetrics(**{name: change(values) for name, values in vars(self).items()})

    @staticmethod
    def cat(parts: Sequence[TokenMetrics]) -> TokenMetrics:
        """Several measurements one after the other, along the first axis."""
        names = vars(parts[0])
        return TokenMetrics(**{name: torch.cat([vars(part)[name] for part in parts]) for name in names})


# Maps arms (TokenMetrics of shape (window, length)) and how often each window was drawn, an integer tensor
# (resample, window), to named float64 values (resample).
Statistic = Callable[..., dict[str, Tensor]]


def token_metrics(
    full_logits: Float[Tensor, "*token vocab"],
    logits: Float[Tensor, "*token vocab"],
    labels: Int[Tensor, "*token"],
) -> TokenMetrics:
    """Compare a model's next-token distribution with the full model's, token by token.

    `logits[t]` predict `labels[t]`: shift before calling. Everything is float32, or float64 where the logits
    are; KL is cut off at 0, below which only rounding can bring it. Ties for the first place go to the
    smaller id. Tokens are worked through in chunks of bounded size.

    Raises `IntactKVError` where shapes differ or a label lies outside the vocabulary.

    Source: KL, Δp and same-top-1 as in llama.cpp, tools/perplexity/perplexity.cpp, `log_softmax`.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> token_metrics(logits, logits, torch.tensor([0])).kl.tolist()
    [0.0]
    """
    if full_logits.shape != logits.shape:
        raise IntactKVError(
            f"logits have shape {tuple(logits.shape)} and the full model's {tuple(full_logits.shape)}; "
            "compare models of the same vocabulary on the same tokens"
        )
    check_labels(logits, labels)
    parts = []
    for full_part, part, label in _chunks(full_logits, logits, labels=labels):
        precision = torch.promote_types(torch.promote_types(part.dtype, full_part.dtype), torch.float32)
        full_log_p = full_part.log_softmax(-1, dtype=precision)  # (token, vocab)
        log_p = part.log_softmax(-1, dtype=precision)
        p = full_log_p.exp()
        # A token that the full model rules out (p = 0, log p = -inf) adds nothing: 0 · log 0 = 0.
        kl = (full_log_p - log_p).mul_(p).masked_fill_(p == 0, 0).sum(-1)
        log_p_label, full_log_p_label = (x.gather(-1, label[:, None])[:, 0] for x in (log_p, full_log_p))
        parts.append(
            TokenMetrics(
                kl=kl.clamp(min=0),
                same_top1=full_part.max(-1).indices == part.max(-1).indices,  # on a CPU 3 times as fast as argmax
                nll=-log_p_label,
                delta_p=log_p_label.exp() - full_log_p_label.exp(),
            )
        )
    return TokenMetrics.cat(parts).map(lambda values: values.reshape(labels.shape))


def full_metrics(full_logits: Float[Tensor, "*token vocab"], labels: Int[Tensor, "*token"]) -> TokenMetrics:
    """`token_metrics` of the full model against itself: only `nll` has to be computed.

    Shapes, precision and errors as in `token_metrics`.
    """
    check_labels(full_logits, labels)
    parts = []
    for part, label in _chunks(full_logits, labels=labels):
        log_p = part.log_softmax(-1, dtype=torch.promote_types(part.dtype, torch.float32))
        nll = -log_p.gather(-1, label[:, None])[:, 0]
        zero = torch.zeros_like(nll)
        parts.append(TokenMetrics(kl=zero, same_top1=zero == 0, nll=nll, delta_p=zero))
    return TokenMetrics.cat(parts).map(lambda values: values.reshape(labels.shape))


def summary(metrics: TokenMetrics) -> dict[str, float]:
    """The figures of one model over all scored tokens.

    `kl_mean`, `kl_median`, `kl_99`, `kl_99_9` (nats; quantiles interpolate linearly between neighbours),
    `same_top1_percent`, `perplexity` = exp(mean nll), `rms_delta_p_percent` = 100 · √mean(Δp²). Sums in
    float64. Raises `IntactKVError` where no token is scored.

    Source: as printed by llama.cpp's --kl-divergence.
    """
    flat = metrics.map(lambda values: values.reshape(1, -1).cpu())
    every = torch.ones(1, 1, dtype=torch.int64)
    return {name: value.item() for name, value in summary_statistic(flat, every).items()}


def summary_statistic(
    arm: TokenMetrics, counts: Int[Tensor, "resample window"]
) -> dict[str, Float[Tensor, "resample"]]:
    """`summary` of many resamples at once; `counts` says how often each window is in each resample.

    `arm` has the shape (window, length); float64. A quantile is exact, not an average over windows: the
    tokens are sorted once, and each resample only counts how often it holds each of them.
    """
    scored = arm.scored
    if not scored.any(dim=1).all():
        raise IntactKVError("a window has no scored token; leave such windows out")
    drawn = counts.double() @ scored.sum(dim=1).double()  # (resample): tokens in each

    def mean(values: Tensor) -> Tensor:
        return counts.double() @ torch.where(scored, values.double(), 0.0).sum(dim=1) / drawn

    window = torch.arange(len(scored))[:, None].expand_as(scored)[scored]
    quantiles = _resampled_quantiles(arm.kl[scored].double(), window, counts, list(_KL_QUANTILES.values()))
    return {
        "kl_mean": mean(arm.kl),
        **dict(zip(_KL_QUANTILES, quantiles.unbind(dim=1), strict=True)),
        "same_top1_percent": 100 * mean(arm.same_top1),
        "perplexity": mean(arm.nll).exp(),
        "rms_delta_p_percent": 100 * mean(arm.delta_p.double().square()).sqrt(),
    }


def difference_statistic(
    own: TokenMetrics, intact: TokenMetrics, counts: Int[Tensor, "resample window"]
) -> dict[str, Float[Tensor, "resample"]]:
    """Every figure of `summary`, own minus intact, in many resamples at once."""
    theirs = summary_statistic(intact, counts)
    return {name: value - theirs[name] for name, value in summary_statistic(own, counts).items()}


def gap_closed_statistic(
    own: TokenMetrics, intact: TokenMetrics, counts: Int[Tensor, "resample window"]
) -> dict[str, Float[Tensor, "resample"]]:
    """Which part of the mean KL the intact prefix removes, (KL_own - KL_intact) / KL_own, in many resamples.

    1 is all of it, negative is harm; NaN or infinite where KL_own is 0, where there is nothing to close.
    """
    kl_own, kl_intact = (
        counts.double() @ torch.where(arm.scored, arm.kl.double(), 0.0).sum(dim=1) for arm in (own, intact)
    )
    return {"gap_closed": (kl_own - kl_intact) / kl_own}  # the token counts of both means are the same


def paired_bootstrap(
    statistic: Statistic, *arms: TokenMetrics, generator: torch.Generator, resamples: int = 1000
) -> dict[str, Interval]:
    """A statistic of one or more arms and its 95 % percentile interval over resampled windows.

    `arms` have the shape (window, length) and score the same tokens. Each resample draws as many windows as
    there are, with replacement, and gives the same draw to every arm: what the arms share cancels. Windows,
    not tokens, are drawn, because the tokens of a window are not independent. `statistic` is
    `summary_statistic`, `difference_statistic`, `gap_closed_statistic`, or any function like them.
    `generator` is a CPU generator.

    One window alone says nothing about others: its interval is NaN. With fewer than about 20 windows these
    intervals are too narrow, those of the tail quantiles most.

    Raises `IntactKVError` where arms are missing, or were not measured on the same tokens, or `resamples` is
    below 1.
    """
    if not arms:
        raise IntactKVError("no arm was given; pass the TokenMetrics of at least one")
    if arms[0].kl.ndim != 2:
        raise IntactKVError(
            f"an arm has shape {tuple(arms[0].kl.shape)}; it must be (window, length), since windows are resampled"
        )
    for arm in arms[1:]:
        if arm.kl.shape != arms[0].kl.shape or not torch.equal(arm.scored, arms[0].scored):
            raise IntactKVError("the arms do not score the same tokens; pair only arms of one evaluation")
    return bootstrap(partial(statistic, *arms), len(arms[0].kl), generator=generator, resamples=resamples)


def _resampled_quantiles(
    values: Float[Tensor, "token"],
    window: Int[Tensor, "token"],
    counts: Int[Tensor, "resample window"],
    fractions: list[float],
) -> Float[Tensor, "resample fraction"]:
    """Quantiles of every resample's values, linear between neighbours as in llama.cpp's `percentile`."""
    values, order = values.sort()
    window = window[order]
    parts = []
    for part in counts.int().split(max(1, WORKING_ELEMENTS // len(values))):
        # (resample, token): how many drawn values there are up to and including this one
        up_to = part[:, window].cumsum(dim=1, dtype=torch.int32)
        place = torch.tensor(fractions, dtype=torch.float64) * (up_to[:, -1:] - 1)  # (resample, fraction)
        below, above = (torch.searchsorted(up_to, rank.int() + 1) for rank in (place.floor(), place.ceil()))
        parts.append(torch.lerp(values[below], values[above], place - place.floor()))
    return torch.cat(parts)


def _chunks(*logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same tokens of all logits (token, vocab) and the labels (token), a bounded number at a time."""
    return in_chunks(*(x.reshape(-1, x.shape[-1]) for x in logits), labels.reshape(-1))


def in_chunks(logits: Float[Tensor, "token vocab"], *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same tokens of the logits and of all other columns, a bounded number at a time."""
    elements = WORKING_ELEMENTS * (1 if logits.device.type == "cpu" else GPU_CHUNKS)
    size = max(1, elements // logits.shape[-1])
    return zip(*(column.split(size) for column in (logits, *columns)), strict=True)


def check_labels(logits: Tensor, labels: Tensor) -> None:
    vocab = logits.shape[-1]
    if labels.shape != logits.shape[:-1] or labels.dtype != torch.int64 or labels.numel() == 0:
        raise IntactKVError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; logits of shape {tuple(logits.shape)} need "
            f"non-empty int64 labels of shape {tuple(logits.shape[:-1])}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= vocab:
        raise IntactKVError(
            f"label {low if low < 0 else high} is outside the vocabulary of {vocab}; "
            "tokenize with this model's tokenizer"
        )
