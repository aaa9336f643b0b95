"""The full model's distribution as its k likeliest tokens and one bucket for all others: small enough to keep.

What it gives up: KL(full ‖ model) over these k + 1 outcomes is a *lower bound* of the KL over the vocabulary, because
merging outcomes cannot raise a divergence (the log-sum inequality). Perplexity, same-top-1 and Δp lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from intactkv.error import IntactKVError
from intactkv.evaluating.metrics import TokenMetrics, check_labels, in_chunks

OVERHEAD_BYTES = 16  # of a token beside its k: total, rest, first, nll in 4 bytes each (8 for float64 models' three)


@dataclass(frozen=True, eq=False)
class Top:
    """The full model's `k` likeliest next tokens at each position, by falling logit.

    `ids` are their ids (int32), `logits` theirs in the model's dtype. `total` is the logsumexp of all logits, `rest`
    that of the logits which are not kept, `nll` the label's negative log-likelihood, in nats, float32 at least;
    `first` is the id of the likeliest token, the smallest of several.
    """

    ids: Int[Tensor, "*token k"]
    logits: Float[Tensor, "*token k"]
    total: Float[Tensor, "*token"]
    rest: Float[Tensor, "*token"]
    first: Int[Tensor, "*token"]
    nll: Float[Tensor, "*token"]

    @property
    def rest_mass(self) -> Float[Tensor, "*token"]:
        """The probability that the full model gives to the tokens which are not kept."""
        return (self.rest - self.total).exp()


def token_bytes(k: int, dtype: torch.dtype) -> int:
    """How many bytes `Top` takes for each token."""
    size = dtype.itemsize
    return k * (size + 4) + OVERHEAD_BYTES + (12 if size == 8 else 0)


def top(full_logits: Float[Tensor, "*token vocab"], labels: Int[Tensor, "*token"], *, k: int) -> Top:
    """The `k` likeliest tokens of each position and what is needed of the others.

    Raises `IntactKVError` for a `k` that is not below the vocabulary.

    >>> kept = top(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([1]), k=1)
    >>> kept.ids.tolist(), kept.first.tolist(), round(kept.rest_mass.item(), 4)
    ([[0]], [0], 0.3348)
    """
    check_labels(full_logits, labels)
    vocab = full_logits.shape[-1]
    if not 0 < k < vocab:
        raise IntactKVError(f"k={k} keeps no part of the vocabulary of {vocab}; use 1 to {vocab - 1}, or keep all")
    precision = torch.promote_types(full_logits.dtype, torch.float32)
    parts = []
    for part, label in in_chunks(full_logits.reshape(-1, vocab), labels.reshape(-1)):
        kept, ids = part.topk(k, dim=-1)
        log_p = part.log_softmax(-1, dtype=precision)
        others = part.to(precision).scatter(-1, ids, -torch.inf)
        numbers = part.to(precision).logsumexp(-1), others.logsumexp(-1), part.max(-1).indices.int()
        parts.append((ids.int(), kept, *numbers, -log_p.gather(-1, label[:, None])[:, 0]))
    whole = (torch.cat(column) for column in zip(*parts, strict=True))
    return Top(*(column.reshape(*labels.shape, *column.shape[1:]) for column in whole))


def top_metrics(full: Top, logits: Float[Tensor, "*token vocab"], labels: Int[Tensor, "*token"]) -> TokenMetrics:
    """`metrics.token_metrics` with the full model's distribution given as `Top`: `kl` is a lower bound, the rest exact.

    Each position's KL is Σ p·log(p/q) over the kept tokens plus the same term for the bucket of all others, float32 or
    float64 as the logits are. Chunks, precision and errors as in `token_metrics`.

    Source: Cover and Thomas, "Elements of Information Theory", theorem 2.7.1 (log-sum inequality).
    """
    check_labels(logits, labels)
    vocab = logits.shape[-1]
    if full.ids.shape[:-1] != labels.shape or full.ids.shape[-1] >= vocab or int(full.ids.max()) >= vocab:
        raise IntactKVError(
            f"the full model's distributions are of shape {tuple(full.ids.shape)} with ids up to "
            f"{int(full.ids.max())}, the logits of shape {tuple(logits.shape)}; compare models of one vocabulary on "
            "the same tokens"
        )
    flat = [x.reshape(labels.numel(), *x.shape[labels.ndim :]) for x in vars(full).values()]
    parts = []
    for part, label, *kept in in_chunks(logits.reshape(-1, vocab), labels.reshape(-1), *flat):
        ids, full_logits, total, rest, first, full_nll = kept
        precision = torch.promote_types(torch.promote_types(part.dtype, total.dtype), torch.float32)
        log_p, log_p_rest = full_logits.to(precision) - total[:, None], rest - total
        all_log_q = part.log_softmax(-1, dtype=precision)
        log_q = all_log_q.gather(-1, ids.long())
        log_q_rest = all_log_q.scatter(-1, ids.long(), -torch.inf).logsumexp(-1)
        p, p_rest = log_p.exp(), log_p_rest.exp()
        kl = (log_p - log_q).mul_(p).masked_fill_(p == 0, 0).sum(-1)
        kl = kl + ((log_p_rest - log_q_rest) * p_rest).masked_fill(p_rest == 0, 0)
        log_q_label = all_log_q.gather(-1, label[:, None])[:, 0]
        parts.append(
            TokenMetrics(
                kl=kl.clamp(min=0),
                same_top1=first == part.max(-1).indices,
                nll=-log_q_label,
                delta_p=log_q_label.exp() - (-full_nll).exp(),
            )
        )
    return TokenMetrics.cat(parts).map(lambda values: values.reshape(labels.shape))
