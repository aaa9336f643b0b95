"""Give a model the intact KV: at the moment a layer hands keys and values to its cache, the prefix's are replaced.

The model still processes the whole prompt; inputs, masks, lengths and beams stay as they are. What the quantized
model computed at prefix positions is read by nobody afterwards: attention reads the intact keys and values, and the
logits of prefix positions come from the artifact. What this gives up: the P prefix tokens are computed once more
per prompt (`IntactKV.cache` avoids that for unpadded prompts), and everything else that mixes tokens, such as
recurrent states, is not covered.
"""

from __future__ import annotations

import inspect
import os
import threading
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache, QuantizedLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from intactkv.artifact import IntactKV
from intactkv.artifact.fingerprint import check_fingerprint
from intactkv.attaching.adapters import unlike
from intactkv.attaching.coverage import uncovered_layers
from intactkv.attaching.locate import NEVER, Progress, Sites, first_real, hidden_prefix, locate, sequence_starts
from intactkv.attaching.masks import as_tensor, real_tokens, sees_previous, slots, token_positions, visible
from intactkv.attaching.substitute import IntactTensors, Substitution
from intactkv.basis.compare import refuse_foreign
from intactkv.error import IntactKVError
from intactkv.packed.cache import PackedLayer

_attached: weakref.WeakKeyDictionary[PreTrainedModel, Attachment] = weakref.WeakKeyDictionary()

_ALIBI_BY_COLUMN = ("bloom", "mpt")  # take no position_ids and need none: only distances between columns count


def attach(model: PreTrainedModel, kv: IntactKV | str | os.PathLike[str], *, check: bool = True) -> Attachment:
    """Make `model` read `kv` wherever a row of its input begins with the prefix, until the handle is removed.

    Use it as a context manager or call `.remove()`. Any batch, padding, cache and way of generating works unchanged,
    through `model(...)` and `model.generate(...)`; calling `model.forward` or an inner module directly goes past the
    attachment. A row that shares only the first m prefix tokens gets m intact ones, a row that shares none is the
    plain model. One attachment per model; one `kv` may serve many models. Compile decoding steps, not the prefill.
    `kv` may also be the folder, file or Hub repository that `IntactKV.from_pretrained` reads.

    `check` compares the model's own keys and values of the prefix with the intact ones first, in one forward of P
    tokens, and refuses those in another basis or of another model. Adapters (PEFT's) change less than that can tell: a
    model with others than the KV was captured with warns.

    Raises `IntactKVError` for a model with another fingerprint or basis, one that already has an attachment, and
    anything that is not a decoder-only transformers model; then at each call that cannot be right (embeddings instead
    of ids, positions that do not start at 0, a mask that hides the prefix, a cache filled without the attachment).

    Example:
        with attach(model, kv):
            model.generate(**tokenizer(prompts, return_tensors="pt", padding=True))
    """
    if not isinstance(model, PreTrainedModel):
        raise IntactKVError(
            f"attach needs a transformers PreTrainedModel, not {type(model).__name__}; give it the model inside the "
            "wrapper (before torch.compile or PEFT)"
        )
    if model.config.is_encoder_decoder:
        raise IntactKVError(f"{model.config.model_type} is an encoder-decoder; intact KV needs a decoder-only model")
    if is_attached(model):
        raise IntactKVError("the model already has an intact KV attached; call intactkv.detach(model) first")
    if not isinstance(kv, IntactKV):
        kv = IntactKV.from_pretrained(kv)
    check_fingerprint(kv, model.config)
    if check:
        refuse_foreign(model, kv)
    other = unlike(list(kv.provenance.get("adapters", [])), model)
    if other is not None:
        warnings.warn(other, stacklevel=2)
    uncovered = uncovered_layers(kv, model.config)
    if uncovered:
        warnings.warn(
            f"layers {uncovered} of {model.config.model_type} keep a recurrent, convolutional or indexer state: the "
            "intact KV covers keys and values only",
            stacklevel=2,
        )
    return Attachment(model, kv)


def is_attached(model: PreTrainedModel) -> bool:
    """Whether `model` has an intact KV attached now."""
    return model in _attached


def detach(model: PreTrainedModel) -> None:
    """Take the intact KV off `model` whoever holds the handle; nothing happens where none is attached."""
    handle = _attached.get(model)
    if handle is not None:
        handle.remove()


class Attachment:
    """The handle of one `attach`: a context manager, undone by `.remove()`, which may be called twice."""

    def __init__(self, model: PreTrainedModel, kv: IntactKV) -> None:
        self.kv = kv
        self._intact = IntactTensors(kv)
        self._owner = kv.digest
        self._running = threading.local()  # one forward at a time and thread
        self._warned = False
        self._cut: set[int] = set()  # where calls without a cache of transformers' have left a prefix half-way
        self._last_sites: tuple[Any, Sites, Tensor] | None = None
        self._signature = inspect.signature(model.forward)
        self._takes_positions = "position_ids" in self._signature.parameters
        self._rope_limit = _rope_limit(model.config)
        self._plain_layers = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        head = model.get_output_embeddings()
        if head is not None:
            self._hooks.append(head.register_forward_hook(self._replace_logits))
        self._model = weakref.ref(model)
        _attached[model] = self

    def remove(self) -> None:
        """Take the intact KV off the model; nothing is left on it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._leave()
        model = self._model()
        if model is not None:
            _attached.pop(model, None)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise IntactKVError(
            "a model with an intact KV attached cannot be copied or pickled; call .remove() on the handle first, "
            "save_pretrained works either way"
        )

    @property
    def _call(self) -> Substitution | None:
        return getattr(self._running, "call", None)

    def _leave(self) -> Substitution | None:
        """End this thread's forward, if one is running or was interrupted, and clean up behind it."""
        call, self._running.call = self._call, None
        if call is not None:
            call.leave()
        return call

    def _before(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pre-hook. A decoding step ends at its first lines; dynamo traces through them."""
        cache: Any = kwargs.get("past_key_values")
        progress = getattr(cache, "intactkv", None)
        if progress is not None and progress.plain and progress.owner == self._owner:
            ids = args[0] if args else kwargs.get("input_ids")
            if ids is not None and ids.shape[1] == 1 and _past_prefix(cache, progress):
                return None
        return self._begin(model, args, kwargs)

    @torch.compiler.disable
    def _begin(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find the prefix tokens of this call and put our `update` before the cache's."""
        self._leave()  # a KeyboardInterrupt skips forward hooks
        arguments = _by_name(self._signature, args, kwargs)
        cache = arguments.get("past_key_values")
        past, progress = self._open(cache)
        checkpointing = model.training and model.is_gradient_checkpointing
        caches = cache is not None or (_use_cache(arguments, model) and not checkpointing)

        plan = self._plan(model, arguments, past, progress, caches=caches)
        call = Substitution(self._intact, plan.sites, past, plan.length, arguments.get("logits_to_keep", 0))
        if plan.sites.whole:
            call.prepare(model.device, model.dtype)
        if plan.positions is not None:
            arguments["position_ids"] = plan.positions
        if caches:
            cache = arguments["past_key_values"] = cache if cache is not None else self._new_cache(model)
            call.enter(cache, progress)
        elif len(plan.sites):
            if checkpointing and uncovered_layers(self.kv, model.config):
                raise IntactKVError(
                    f"gradient checkpointing replays the recurrent layers of {model.config.model_type} with their "
                    "final state; call gradient_checkpointing_disable() on the model"
                )
            if plan.packed and arguments.get("attention_mask") is None and not _is_paged(arguments):
                arguments["attention_mask"] = _packed_masks(model, arguments)
            arguments["past_key_values"] = call.pass_through_(model, checkpointing=checkpointing)
            arguments["use_cache"] = False
        self._running.call = call
        return (), arguments

    def _new_cache(self, model: PreTrainedModel) -> DynamicCache:
        """The cache that the model would make; without its layers yet if all are plain, so that none is guarded."""
        return DynamicCache() if self._plain_layers else DynamicCache(config=model.config)

    def _open(self, cache: Any) -> tuple[int, Progress]:
        """How many tokens the call's cache holds and how far they are past the prefix; refuses what is not ours."""
        if cache is not None and (not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache)):
            raise IntactKVError(
                f"past_key_values is a {type(cache).__name__}; give a decoder's transformers Cache, such as "
                "DynamicCache()"
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        if past == 0:
            return 0, Progress(owner=self._owner)
        progress = getattr(cache, "intactkv", None)
        if progress is None:
            raise IntactKVError(
                f"the cache already holds {past} tokens computed without this intact KV; start from an empty cache "
                "or from kv.cache(model)"
            )
        if progress.owner != self._owner:
            raise IntactKVError(
                f"the cache holds {past} tokens computed with another intact KV; start from an empty cache"
            )
        return past, progress

    def _plan(
        self, model: PreTrainedModel, arguments: dict[str, Any], past: int, progress: Progress, *, caches: bool
    ) -> _Plan:
        """Locate the prefix in this call's tokens, update `progress`, and refuse what cannot be right."""
        ids = _ids(arguments, past, progress)
        length, prefix = ids.shape[1], self._intact.ids(ids.device)
        mask, given = as_tensor(arguments.get("attention_mask")), arguments.get("position_ids")
        if _is_paged(arguments):  # its mask is over the pages' slots, and its rows are packed without padding
            mask = None
            block = arguments["cache"].block_size
            self._cut.update(range(block, len(prefix), block))  # whole blocks of another request may be shared
        if past == 0 and (quick := self._plan_unpadded(ids, prefix, mask, given, progress)) is not None:
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

        def plan(sites: Sites, packed: bool) -> _Plan:
            progress.padded = padded and self._takes_positions
            return _Plan(sites, positions if progress.padded and given is None else None, packed, length)

        if past >= progress.until and not bool((real & (positions < len(prefix))).any()):
            none = torch.zeros(0, dtype=torch.int64, device=ids.device)
            return plan(Sites(none, none, none), False)

        first = first_real(real)
        matched = self._matched(arguments.get("past_key_values"), past, progress, first, positions)
        inside = locate(ids, prefix, real=real, positions=positions, matched=matched)
        restarts = sequence_starts(real, positions, matched) & ~first
        if past == 0:
            self._refuse(ids, prefix, real, positions, inside)
            if arguments.get("past_key_values") is None:
                self._refuse_continued(ids, prefix, real, positions, inside)
        if bool(inside.any()):
            self._refuse_unseen(mask, past, positions, inside, restarts, caches)
            if not self._takes_positions and model.config.model_type not in _ALIBI_BY_COLUMN and bool(shifted.any()):
                raise IntactKVError(
                    f"{model.config.model_type} counts positions by column and takes no position_ids, so keys of a "
                    "left-padded row cannot be right; pad on the right, or give one row at a time"
                )
        row, col = inside.nonzero(as_tuple=True)
        progress.matched = torch.maximum(matched, torch.where(inside, positions + 1, 0).amax(1))
        if progress.until == NEVER and bool(real.any(1).all()):
            offset = torch.where(first, torch.arange(past, past + length, device=ids.device) - positions, -NEVER)
            progress.until = int(offset.max()) + len(prefix)
            if past == 0 and bool((real & (positions == 0)).any()):
                self._warn_once(progress.matched, real.sum(1))
        progress.done = past + length >= progress.until
        padded = padded and bool((progress.matched > 0).any())
        return plan(Sites(row, col, positions[row, col]), bool(restarts.any()))

    def _plan_unpadded(
        self, ids: Tensor, prefix: Tensor, mask: Tensor | None, given: Tensor | None, progress: Progress
    ) -> _Plan | None:
        """`_plan` for an empty cache and rows without padding, where columns are positions; None for other calls.

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
        if all_agree and not progress.done:
            self._cut.add(ids.shape[1])
        if not all_agree:
            self._warn_once(progress.matched, torch.tensor(ids.shape[1]))
        return _Plan(sites, None, False, ids.shape[1])

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
        """Refuse a prefix that an earlier call has begun and this one goes on with, without a cache that says so.

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

    def _after(self, model: PreTrainedModel, args: Any, kwargs: Any, output: Any) -> Any:
        """The forward hook, also called when the forward raised: leave nothing on the cache, then audit."""
        if self._call is None:
            return None
        return self._end(model, output)

    @torch.compiler.disable
    def _end(self, model: PreTrainedModel, output: Any) -> Any:
        call = self._leave()
        if call is None or output is None:
            return None
        missing = self._missing(model, call) if len(call.sites) and len(call.seen) < len(self.kv.layers) else []
        if missing:
            raise RuntimeError(
                f"layers {missing} did not pass keys and values through Cache.update in this call, so their prefix "
                "was not replaced; this model or mode (gradient checkpointing?) is not supported"
            )
        return output if call.pass_through is None else _without(output, call.pass_through)

    def _missing(self, model: PreTrainedModel, call: Substitution) -> list[int]:
        """The layers that should have come by and have not; early exit lowers a model's depth for a call."""
        depth = model.config.get_text_config(decoder=True).num_hidden_layers
        return sorted(i for i in self.kv.layers if i not in call.seen and i < depth)

    def _replace_logits(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        call = self._call
        untouched = call is None or len(call.sites) == 0 or self.kv.logits is None
        return None if call is None or untouched else call.logits(output)


@dataclass(frozen=True)
class _Plan:
    sites: Sites
    positions: Tensor | None  # what to supply as position_ids, if anything
    packed: bool
    length: int


def _past_prefix(cache: Cache, progress: Progress) -> bool:
    """Whether no row can meet another prefix token; while a graph is recorded, a static cache cannot be asked."""
    if torch.compiler.is_compiling():
        return progress.done
    length: int | Tensor = cache.get_seq_length()
    if isinstance(length, Tensor) and length.is_cuda and torch.cuda.is_current_stream_capturing():
        return progress.done
    return bool(length >= progress.until)


def _unpadded(mask: Tensor | None, given: Tensor | None, ids: Tensor) -> list[Tensor] | None:
    """What must be true for every token to be real and stand at its column's position; None where it cannot be told.

    Masks of other shapes are not looked into.
    """
    if (mask is not None and mask.shape != ids.shape) or (given is not None and given.ndim != 2):
        return None
    found = [] if mask is None else [mask.bool().all()]
    found += [] if given is None else [(given == slots(ids, 0)).all()]
    return [condition.to(ids.device) for condition in found]


def _is_paged(arguments: dict[str, Any]) -> bool:
    """Whether this is a call of continuous batching (`generate_batch`), which keeps a paged cache of its own."""
    return arguments.get("cache") is not None and arguments.get("past_key_values") is None


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All of a call's arguments by name."""
    if not args:
        return dict(kwargs)  # forward itself says what it does not know
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def _use_cache(arguments: Mapping[str, Any], model: PreTrainedModel) -> bool:
    asked = arguments.get("use_cache")
    return bool(getattr(model.config.get_text_config(decoder=True), "use_cache", False) if asked is None else asked)


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


def _packed_masks(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Any:
    """The masks that transformers makes for packed sequences when it sees no cache; ours would hide the packing."""
    ids = arguments["input_ids"]
    shape_only = torch.empty((*ids.shape, 0), dtype=model.dtype, device=ids.device)
    return create_masks_for_generate(
        config=model.config,
        inputs_embeds=shape_only,
        attention_mask=None,
        past_key_values=None,
        position_ids=arguments["position_ids"],
    )


def _rope_limit(config: Any) -> int | None:
    """The first position at which a length-dependent RoPE changes the keys of earlier positions, if there is one."""
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [r for r in rope.values() if isinstance(r, Mapping)]
    for parameters in per_layer_type or [rope]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            trained = parameters.get("original_max_position_embeddings")
            return int(trained or config.max_position_embeddings)
    return None


def _without(output: Any, cache: Cache) -> Any:
    """A model's output without the cache that we put in."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: value for name, value in output.items() if value is not cache})
    return tuple(value for value in output if value is not cache) if isinstance(output, tuple) else output
