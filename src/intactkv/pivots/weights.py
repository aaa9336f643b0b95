"""Attention weights in blocks of queries, so that no map of token × token is ever held. Pure tensor maths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_ELEMENTS = 2**23  # of one block's weights: 32 MiB in float32, whatever the length


@dataclass(frozen=True, eq=False)
class Rule:
    """How a layer turns queries and keys into weights.

    Logits are `scaling · q·k`, then `softcap · tanh(logits / softcap)` where there is one; a query sees no later key
    if `causal`, none `window` or more tokens back, and none that `mask` hides (boolean, or added to the logits,
    `(batch or 1, head or 1, query, key)`); `sinks` `(head)` are logits of a token without key and value.
    """

    scaling: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, "head"] | None = None
    mask: Tensor | None = None


def weight_blocks(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch kv_head key dim"],
    rule: Rule,
    *,
    elements: int = BLOCK_ELEMENTS,
) -> Iterator[tuple[slice, Float[Tensor, "batch head row key"]]]:
    """Softmax weights for one slice of queries after the other, in float32 (float64 where the queries are).

    Under a causal rule a block ends with its last query's key: weights are `(batch, head, row, rows.stop)`. At most
    `elements` of them are alive at once, or one query's.
    """
    batch, heads, queries, _ = query.shape
    precision = torch.promote_types(query.dtype, torch.float32)
    groups = heads // key.shape[1]
    rows_at_once = max(1, elements // (batch * heads * key.shape[2]))
    for start in range(0, queries, rows_at_once):
        rows = slice(start, min(start + rows_at_once, queries))
        keys = key[:, :, : rows.stop] if rule.causal else key
        grouped = query[:, :, rows].to(precision).unflatten(1, (-1, groups))  # (batch, kv_head, group, row, dim)
        logits = (grouped @ keys.to(precision).unsqueeze(2).mT).flatten(1, 2) * rule.scaling
        if rule.softcap is not None:
            logits = rule.softcap * torch.tanh(logits / rule.softcap)
        yield rows, _softmax(_hidden(logits, rows, rule), rule.sinks)


def weighted(
    weights: Float[Tensor, "batch head row key"], value: Float[Tensor, "batch kv_head key dim"]
) -> Float[Tensor, "batch head row dim"]:
    """Σ weights · values, in the precision of the weights; values may hold more keys than the block saw."""
    groups = weights.shape[1] // value.shape[1]
    seen = value[:, :, : weights.shape[3]].to(weights.dtype).unsqueeze(2)
    return (weights.unflatten(1, (-1, groups)) @ seen).flatten(1, 2)


def _hidden(logits: Tensor, rows: slice, rule: Rule) -> Tensor:
    """Logits with -inf where the rule hides a key from a query."""
    keys = logits.shape[3]
    query_at = torch.arange(rows.start, rows.stop, device=logits.device)[:, None]
    key_at = torch.arange(keys, device=logits.device)
    if rule.causal:
        logits = logits.masked_fill(key_at > query_at, -torch.inf)
    if rule.window is not None:
        logits = logits.masked_fill(key_at <= query_at - rule.window, -torch.inf)
    if rule.mask is not None:
        mask = rule.mask[:, :, rows, :keys]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(len(logits), -1, logits.shape[2], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]
