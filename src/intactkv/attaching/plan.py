"""The plan of one call: which of its tokens are the prefix's, what must be supplied, and what cannot be right.

Of the call's arguments and of what its cache holds, without the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import QuantizedLayer

from intactkv.attaching.locate import NEVER, Progress, Sites, first_real, hidden_prefix, locate, sequence_starts
from intactkv.attaching.masks import as_tensor, real_tokens, sees_previous, slots, token_positions, visible
from intactkv.attaching.tensors import IntactTensors
from intactkv.decoder import block_size, given_cache, is_paged
from intactkv.error import IntactKVError
from intactkv.packed.cache import PackedLayer
from intactkv.positions import rope_kinds

_ALIBI_BY_COLUMN = ("bloom", "mpt")  # take no position_ids and need none: only distances between columns count


@dataclass(frozen=True)
class Plan:
    """What a call is to be given. `packed` rows hold several sequences; `length` counts the call's tokens."""

    sites: Sites
    positions: Tensor | None  # what to supply as position_ids, if anything
    packed: bool
    length: int


class Planner:
    """Plans the calls of one model with one artifact."""

    def __init__(self, intact: IntactTensors, config: PreTrainedConfig, *, takes_positions: bool) -> None:
        self.kv, self._intact, self._model_type = intact.kv, intact, config.model_type
        self._takes_positions = takes_positions
        self._rope_limit = _rope_limit(config)
        self._warned = False
        self._cut: set[int] = set()  # where paged calls have left a prefix half-way
        self._last_sites: tuple[Any, Sites, Tensor] | None = None

    def plan(self, arguments: dict[str, Any], past: int, progress: Progress, *, caches: bool) -> Plan:
        """Locate the prefix in this call's tokens, update `progress`, and refuse what cannot be right."""
        ids = _ids(arguments, past, progress)
        length, prefix = ids.shape[1], self._intact.ids(ids.device)
        mask, given = as_tensor(arguments.get("attention_mask")), arguments.get("position_ids")
        paged = is_paged(arguments)
        if paged:  # its mask is over the pages' slots, and its rows are packed without padding
            mask = None
            block = block_size(arguments["cache"])
            self._cut.update(range(block, len(prefix), block))  # whole blocks of another request may be shared
        elif past == 0 and (quick := self._plan_unpadded(ids, prefix, mask, given, progress)) is not None:
            return quick
        real, positions = real_tokens(mask, ids, past), token_positions(mask, given, ids, past)
        if given is None and not self._takes_positions and mask is not None and mask.ndim == 4:
            positions = visible(mask[:, 0]).sum(-1).to(ids.device).expand_as(ids) - 1  # ALiBi: all that it sees
        # Rows that are not at their columns' positions, now or (right padding) when they go on, need them supplied;
        # models that count text and image positions themselves do so.
        shifted = real & (positions != slots(ids, past))
        counts_itself = any(arguments.get(name) is not None for name in ("image_grid_thw", "video_grid_thw"))
        supply = given is None and not counts_itself and mask is not None and mask.ndim == 2
        padded = progress.padded or (supply and bool((shifted | ~real).any()))

        def planned(sites: Sites, packed: bool) -> Plan:
            progress.padded = padded and self._takes_positions
            return Plan(sites, positions if progress.padded and given is None else None, packed, length)

        if past >= progress.until and not bool((real & (positions < len(prefix))).any()):
            none = torch.zeros(0, dtype=torch.int64, device=ids.device)
            return planned(Sites(none, none, none), False)

        first = first_real(real)
        matched = self._matched(given_cache(arguments), past, progress, first, positions)
        inside = locate(ids, prefix, real=real, positions=positions, matched=matched)
        restarts = sequence_starts(real, positions, matched) & ~first
        if past == 0:
            self._refuse(ids, prefix, real, positions, inside)
            if paged:
                self._refuse_continued(ids, prefix, real, positions, inside)
        if bool(inside.any()):
            self._refuse_unseen(mask, past, positions, inside, restarts, caches)
            if not self._takes_positions and self._model_type not in _ALIBI_BY_COLUMN and bool(shifted.any()):
                raise IntactKVError(
                    f"{self._model_type} counts positions by column and takes no position_ids, so keys of a "
                    "left-padded row cannot be right; pad on the right, or give one row at a time"
                )
        row, col = inside.nonzero(as_tuple=True)
        progress.matched = torch.maximum(matched, torch.where(inside, positions + 1, 0).amax(1))
        if progress.until == NEVER and bool(real.any(1).all()):
            offset = torch.where(first, torch.arange(past, past + length, device=ids.device) - positions, -NEVER)
            progress.until = int(offset.max()) + len(prefix)
            if past == 0 and bool((real & (positions == 0)).any()):
                whole = progress.matched if paged else real.sum(1)  # a chunk's end is no prompt's
                self._warn_once(progress.matched, whole)
        progress.done = past + length >= progress.until
        padded = padded and bool((progress.matched > 0).any())
        return planned(Sites(row, col, positions[row, col]), bool(restarts.any()))

    def _plan_unpadded(
        self, ids: Tensor, prefix: Tensor, mask: Tensor | None, given: Tensor | None, progress: Progress
    ) -> Plan | None:
        """`plan` for an empty cache and rows without padding, where columns are positions; None for other calls.

        The common case, quick: the device is asked once where all rows begin with the prefix.
        """
        unpadded = _unpadded(mask, given, ids)
        if unpadded is None:
            return None
        agrees = ids[:, : len(prefix)] == prefix[: ids.shape[1]]
        all_agree, *real = torch.stack([agrees.all(), *unpadded]).tolist()
        if not all(real):
            return None
        if all_agree and agrees.shape[1]:
            sites, progress.matched = self._whole_sites(len(ids), agrees.shape[1], ids.device)
        else:
            inside = agrees.cumprod(1)
            row, col = inside.nonzero(as_tuple=True)
            sites, progress.matched = Sites(row, col, col), inside.sum(1)
        if len(sites):
            self._refuse_position(ids.shape[1] - 1)
        progress.until, progress.padded = len(prefix), False
        progress.done = ids.shape[1] >= len(prefix)
        if not all_agree:
            self._warn_once(progress.matched, torch.tensor(ids.shape[1]))
        return Plan(sites, None, False, ids.shape[1])

    def _whole_sites(self, batch: int, count: int, device: torch.device) -> tuple[Sites, Tensor]:
        """The first `count` columns of all rows, and that many matched for each; the last asked for is remembered."""
        place = (batch, count, device)
        last = self._last_sites  # read once: another thread may put its own there
        if last is None or last[0] != place:
            with torch.inference_mode(False):
                row = torch.arange(batch, device=device).repeat_interleave(count)
                col = torch.arange(count, device=device).repeat(batch)
                matched = torch.full((batch,), count, device=device)
            last = self._last_sites = (place, Sites(row, col, col, count), matched)
        return last[1:]

    def _matched(self, cache: Any, past: int, progress: Progress, first: Tensor, positions: Tensor) -> Tensor:
        """How many prefix tokens each row's cache holds: what the cache itself says, where it can be read.

        Rows may have been reordered, selected or cropped since the last call, so a row has matched m tokens if its
        first m stored keys are the intact ones, bit for bit.
        """
        batch, device, size = len(first), first.device, len(self.kv)
        if past == 0:
            return torch.zeros(batch, dtype=torch.int64, device=device)
        columns = torch.arange(past, past + first.shape[1], device=device)
        offset = torch.where(first, columns - positions, 0).sum(1)
        reached = torch.where(first, positions, NEVER).amin(1)
        inside = reached < size  # the other rows are past the prefix, or all padding: nothing hangs on them
        at = torch.where(inside[:, None], offset[:, None] + torch.arange(size, device=device), -1)
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, PackedLayer) and layer.is_initialized and len(layer.kept[0]) == batch:
                equal = (layer.first_keys(at) == self._intact.like(i, *layer.kept)[0]).flatten(2).all(-1)
                return (equal.to(device) & (at >= 0) & (at < past)).long().cumprod(1).sum(1)
            stored = getattr(layer, "keys", None)
            if i not in self.kv.layers or stored is None or isinstance(layer, QuantizedLayer):
                continue
            gone = max(0, past - stored.shape[2])  # columns that a sliding window has dropped
            if stored.shape[0] == batch and bool(((at >= gone) | (at < 0)).all()):
                rows, here = torch.arange(batch, device=stored.device)[:, None], at.to(stored.device)
                keys = stored.transpose(1, 2)[rows, (here - gone).clamp(0, stored.shape[2] - 1)]
                equal = (keys == self._intact.like(i, stored, layer.values)[0]).flatten(2).all(-1)  # (batch, prefix)
                return (equal & (here >= 0) & (here < past)).long().cumprod(1).sum(1).to(device)
        known = progress.matched
        if known is not None and len(known) == batch and first.shape[1] > 1:
            return torch.minimum(known.to(device), reached)  # a cropped cache goes back behind what had matched
        if known is None or not bool((known == known[0]).all()):
            raise IntactKVError(
                f"the cache's {batch} rows stand at different places of the prefix and cannot be told apart in a "
                "quantized cache or one that has evicted it; process the whole prefix in one call first"
            )
        return torch.minimum(known[:1].to(device).expand(batch), reached)

    def _refuse(self, ids: Tensor, prefix: Tensor, real: Tensor, positions: Tensor, inside: Tensor) -> None:
        """Refuse rows that hold the prefix where the intact KV cannot serve it."""
        first = first_real(real)
        shifted = first & (positions != 0) & (ids == prefix[0])
        if bool(shifted.any()):
            row, col = shifted.nonzero()[0].tolist()
            raise IntactKVError(
                f"row {row} begins with the prefix at position {int(positions[row, col])}, but keys were captured at "
                "position 0; let position_ids start at 0 at each row's first real token, or leave them out"
            )
        hidden = hidden_prefix(ids, prefix, real=real) & ~inside.any(1)
        # A row without padding and without the prefix: prompts have none here, and what looks like it is padding.
        without = bool(real[:, 0].any()) and not bool(inside.any())
        if bool(hidden.any()) and not without:
            raise IntactKVError(
                f"the attention mask hides the prefix of row {int(hidden.nonzero()[0])} (is the pad token one of its "
                "tokens?); set the mask to 1 there, or pad with another token"
            )

    def _refuse_continued(self, ids: Tensor, prefix: Tensor, real: Tensor, positions: Tensor, inside: Tensor) -> None:
        """Refuse a prefix that an earlier paged call has begun and this one goes on with.

        Continuous batching (`generate_batch`) keeps its cache to itself and may cut a prompt into several calls.
        """
        follows = torch.zeros_like(real)
        follows[:, 1:] = real[:, 1:] & real[:, :-1] & (positions[:, 1:] == positions[:, :-1] + 1)
        begins = real & ~follows & (positions > 0) & (positions < len(prefix))
        if self._cut and bool(begins.any()):
            goes_on = begins & (ids == prefix[positions.clamp(0, len(prefix) - 1)])
            for position in self._cut.intersection(positions[goes_on].tolist()):
                raise IntactKVError(
                    f"this call goes on with the prefix at position {position}, whose beginning an earlier call held "
                    "(continuous batching cuts prompts into chunks and shares blocks): let one call hold a whole "
                    "prefix, with a larger max_batch_tokens, and block_size above the prefix's length"
                )
        ends = real & ~torch.cat([follows[:, 1:], torch.zeros_like(real[:, :1])], 1)
        self._cut.update((positions[inside & ends & (positions < len(prefix) - 1)] + 1).tolist())

    def _refuse_unseen(
        self, mask: Tensor | None, past: int, positions: Tensor, inside: Tensor, restarts: Tensor, caches: bool
    ) -> None:
        """Refuse masks and lengths under which later tokens would not read the prefix as it was captured."""
        isolated = mask is None and not caches  # transformers tells packed sequences apart only in this case
        if mask is not None and mask.ndim == 4:
            sees = sees_previous(mask, past).to(inside.device)
            hidden = inside[:, :-1] & (positions[:, 1:] == positions[:, :-1] + 1) & ~sees
            if bool(hidden.any()):
                raise IntactKVError(
                    f"the 4D attention mask hides a prefix token of row {int(hidden.nonzero()[0, 0])} from the token "
                    "after it; let every later token of the row see the prefix"
                )
            isolated = not bool((restarts[:, 1:] & sees).any())
        if bool(restarts.any()) and not isolated:
            raise IntactKVError(
                "position_ids restart inside a row (packed sequences), which transformers keeps apart only without "
                "cache and mask; pass use_cache=False and no mask, or a 4D mask that separates them"
            )
        if self._rope_limit is not None:
            self._refuse_position(int(positions.max()))

    def _refuse_position(self, last: int) -> None:
        if self._rope_limit is not None and last >= self._rope_limit:
            raise IntactKVError(
                f"this call reaches position {last}, but the model's RoPE scaling changes all keys of a call from "
                f"position {self._rope_limit} on; shorten the input"
            )

    def _warn_once(self, matched: Tensor, lengths: Tensor) -> None:
        """Say of rows that do not begin with the prefix, or leave it half-way, that little or nothing is intact."""
        if self._warned:
            return
        left = (matched > 0) & (matched < lengths.to(matched.device).clamp(max=len(self.kv)))
        if not bool(matched.any()):
            sentence = (
                f"no row begins with the prefix {self.kv.ids[:8].tolist()}: the intact KV has no effect on this call "
                "(does the tokenizer add the BOS token?)"
            )
        elif bool(left.any()):
            row = int(left.nonzero()[0])
            sentence = (
                f"row {row} agrees with only {int(matched[row])} of the {len(self.kv)} prefix tokens, and only these "
                "are intact (another system prompt, or [BOS] twice?); capture the prefix that these prompts begin with"
            )
        else:
            return
        self._warned = True
        warnings.warn(sentence, stacklevel=2)


def _unpadded(mask: Tensor | None, given: Tensor | None, ids: Tensor) -> list[Tensor] | None:
    """What must be true for every token to be real and stand at its column's position; None where it cannot be told.

    Masks of other shapes are not looked into.
    """
    if (mask is not None and mask.shape != ids.shape) or (given is not None and given.ndim != 2):
        return None
    found = [] if mask is None else [mask.bool().all()]
    found += [] if given is None else [(given == slots(ids, 0)).all()]
    return [condition.to(ids.device) for condition in found]


def _ids(arguments: Mapping[str, Any], past: int, progress: Progress) -> Tensor:
    """The call's token ids; after the prefix, embeddings may stand for them."""
    ids = arguments.get("input_ids")
    if ids is not None:
        return ids
    embeds = arguments.get("inputs_embeds")
    if embeds is None or past < progress.until:
        raise IntactKVError(
            "the call gives no input_ids, and no prefix can be recognised in inputs_embeds; pass input_ids, or remove "
            "the intact KV for this call"
        )
    return torch.full(embeds.shape[:2], -1, device=embeds.device)


def _rope_limit(config: Any) -> int | None:
    """The first position at which a length-dependent RoPE changes the keys of earlier positions, if there is one."""
    for kind in rope_kinds(config):
        if kind.get("rope_type") in ("dynamic", "longrope"):
            trained = kind.get("original_max_position_embeddings")
            return int(trained or config.get_text_config(decoder=True).max_position_embeddings)
    return None
