"""The error budget: which tokens' keys and values carry the error of an attention's output. Pure tensor maths.

One row of queries q, keys k and values v against changed ones k̂ = k + Δk, v̂ = v + Δv; a are the full weights,
h = Σ a_i v_i the full output of a head, s the scaling of its logits. Heads stand in front: `(head, token, dim)`.

    bound        ‖Δh W_O‖₂ ≤ ‖W_O‖₂ · ( s ‖q‖₂ · max_i ‖Δk_i‖₂ · max_i ‖v_i‖₂ + max_i ‖Δv_i‖₂ )
    first order  Δh ≈ Σ_i c_i,  c_i = a_i (s q·Δk_i)(v_i − h) + a_i Δv_i

Of the bound: Δh = Σ (â_i − a_i) v_i + Σ â_i Δv_i, and ‖softmax(x + δ) − softmax(x)‖₁ ≤ max |δ_i|, since the softmax's
Jacobian takes δ to a_i (δ_i − δ̄), whose absolute sum is a mean absolute deviation. The paper (arXiv 2403.01241) states
a bound of this kind as Theorem 1; its text was not at hand, this one and its proof are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from intactkv.pivots.weights import Rule, weight_blocks, weighted

Heads = Float[Tensor, "head token dim"]


@dataclass(frozen=True, eq=False)
class Pair:
    """Keys and values of one layer in the full model and in the changed one, with the full model's queries.

    Give float64 where laws are to hold exactly. `key`, `value`, `changed_key` and `changed_value` may have fewer heads
    (grouped queries). `output_weight` is W_O by head, `(head, dim, hidden)`; None leaves the error before the
    output projection.
    """

    query: Heads
    key: Heads
    value: Heads
    changed_key: Heads
    changed_value: Heads
    rule: Rule
    output_weight: Float[Tensor, "head dim hidden"] | None = None

    @property
    def key_error(self) -> Heads:
        """Δk, one for each query head."""
        return self.per_query_head(self.changed_key - self.key)

    @property
    def value_error(self) -> Heads:
        """Δv, one for each query head."""
        return self.per_query_head(self.changed_value - self.value)

    def per_query_head(self, x: Heads) -> Heads:
        """Keys or values repeated for each query head that reads them."""
        return x.repeat_interleave(len(self.query) // len(x), 0)


def output(query: Heads, key: Heads, value: Heads, rule: Rule) -> Heads:
    """h of every head and query."""
    blocks = weight_blocks(query[None], key[None], rule)
    return torch.cat([weighted(weights, value[None]) for _, weights in blocks], 2)[0]


def output_error(pair: Pair, *, intact: int = 0) -> Heads:
    """Δh W_O of every head and query, exactly, with the first `intact` keys and values those of the full model."""
    key = torch.cat([pair.key[:, :intact], pair.changed_key[:, intact:]], 1)
    value = torch.cat([pair.value[:, :intact], pair.changed_value[:, intact:]], 1)
    changed = output(pair.query, key, value, pair.rule)
    return _projected(changed - output(pair.query, pair.key, pair.value, pair.rule), pair)


def error_bound(pair: Pair) -> Float[Tensor, "head token"]:
    """The bound on ‖Δh W_O‖₂ of every head and query; maxima run over the keys up to the query's own."""

    def running_max(x: Heads) -> Float[Tensor, "head token"]:
        norms = x.norm(dim=-1)
        return norms.cummax(1).values if pair.rule.causal else norms.amax(1, keepdim=True).expand_as(norms)

    values = running_max(pair.per_query_head(pair.value))
    logits = pair.rule.scaling * pair.query.norm(dim=-1) * running_max(pair.key_error)
    inner = logits * values + running_max(pair.value_error)
    if pair.output_weight is None:
        return inner
    return torch.linalg.matrix_norm(pair.output_weight, ord=2)[:, None] * inner


def token_errors(pair: Pair) -> Float[Tensor, "head query token hidden"]:
    """The first-order part c_i W_O of every token i in every query's error: query × token × hidden, for short texts."""
    parts = []
    for _, weights, slope in _slopes(pair):
        keys = slice(0, weights.shape[2])
        value, value_error = pair.per_query_head(pair.value)[:, keys], pair.value_error[:, keys]
        away = value[:, None] - (weights @ value)[:, :, None]  # v_i − h: (head, row, key, dim)
        errors = (weights * slope)[..., None] * away + weights[..., None] * value_error[:, None]
        missing = pair.key.shape[1] - keys.stop
        parts.append(torch.nn.functional.pad(errors, (0, 0, 0, missing)))
    joined = torch.cat(parts, 1)
    return joined if pair.output_weight is None else joined @ pair.output_weight[:, None]


def token_shares(pair: Pair) -> tuple[Float[Tensor, "head token"], Float[Tensor, "head"]]:
    """The first-order error energy that each token carries, summed over queries, and the whole of it, by head.

    With E = Σ_t ‖Σ_i c_ti W_O‖², token i carries Σ_t ⟨c_ti W_O, Σ_j c_tj W_O⟩: these sum to E exactly, and one that
    works against the others is negative. Needs no query × token × hidden.
    """
    carried = pair.query.new_zeros(pair.query.shape[0], pair.key.shape[1])
    for _, weights, slope in _slopes(pair):
        keys = slice(0, weights.shape[2])
        value, value_error = pair.per_query_head(pair.value)[:, keys], pair.value_error[:, keys]
        turned, h = weights * slope, weights @ value
        error = turned @ value - turned.sum(-1, keepdim=True) * h + weights @ value_error  # Σ_j c_j: (head, row, dim)
        seen = error if pair.output_weight is None else error @ pair.output_weight @ pair.output_weight.mT
        along = seen @ value.mT - (seen * h).sum(-1, keepdim=True)  # ⟨v_i − h, error⟩: (head, row, key)
        carried[:, keys] += (turned * along + weights * (seen @ value_error.mT)).sum(1)
    return carried, carried.sum(1)


def _slopes(pair: Pair) -> Iterator[tuple[slice, Float[Tensor, "head row key"], Float[Tensor, "head row key"]]]:
    """Blocks of queries: their full weights a_i, and the change of each logit, s q·Δk_i (to first order if capped)."""
    for rows, weights in weight_blocks(pair.query[None], pair.key[None], pair.rule):
        query, seen = pair.query[:, rows], slice(0, weights.shape[3])
        slope = pair.rule.scaling * query @ pair.key_error[:, seen].mT
        if pair.rule.softcap is not None:
            logits = pair.rule.scaling * query @ pair.per_query_head(pair.key)[:, seen].mT
            slope = slope * (1 - torch.tanh(logits / pair.rule.softcap).square())
        yield rows, weights[0], slope


def energy_left(pair: Pair, sizes: Sequence[int]) -> Float[Tensor, "size head"]:
    """Σ_t ‖Δh_t W_O‖², exactly, with the first N keys and values intact, for each N of `sizes`."""
    return torch.stack([output_error(pair, intact=n).square().sum((1, 2)) for n in sizes])


def _projected(x: Heads, pair: Pair) -> Heads:
    return x if pair.output_weight is None else x @ pair.output_weight
