"""Give a model the intact KV: at the moment a layer hands keys and values to its cache, the prefix's are replaced.

The model still processes the whole prompt; inputs, masks, lengths and beams stay as they are. What the quantized
model computed at prefix positions is read by nobody afterwards: attention reads the intact keys and values, and the
logits of prefix positions come from the artifact. What this gives up: the P prefix tokens are computed once more
per prompt (`IntactKV.cache` avoids that for unpadded prompts), and everything else that mixes tokens, such as
recurrent states, is not covered.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import QuantizedLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from intactkv.kv import IntactKV, IntactKVError, check_fingerprint
from intactkv.locate import NEVER, Progress, Sites, first_real, hidden_prefix, locate, sequence_starts

_attached: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def attach(model: PreTrainedModel, kv: IntactKV) -> Attachment:
    """Make `model` read `kv` wherever a row of its input begins with the prefix, until the handle is removed.

    Use it as a context manager or call `.remove()`. Any batch, padding, cache and way of generating works unchanged;
    a row that shares only the first m prefix tokens gets m intact ones, a row that shares none is the plain model.
    One attachment per model; one `kv` may serve many models.

    Raises `IntactKVError` for a model with another fingerprint, one that already has an attachment, and anything
    that is not a decoder-only transformers model; then at each call that cannot be right (embeddings instead of
    ids, positions that do not start at 0, a mask that hides the prefix, a cache filled without the attachment).

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
        raise IntactKVError("the model already has an intact KV attached; call .remove() on that handle first")
    check_fingerprint(kv, model.config)
    recurrent = _recurrent(model)
    if recurrent:
        warnings.warn(
            f"layers {recurrent} of {model.config.model_type} are recurrent or convolutional: the intact KV covers "
            "the attention layers only",
            stacklevel=2,
        )
    return Attachment(model, kv)


def is_attached(model: PreTrainedModel) -> bool:
    """Whether `model` has an intact KV attached now."""
    return model in _attached


class Attachment:
    """The handle of one `attach`: a context manager, undone by `.remove()`, which may be called twice."""

    def __init__(self, model: PreTrainedModel, kv: IntactKV) -> None:
        self.kv = kv
        self._call: _Call | None = None
        self._warned = False
        self._signature = inspect.signature(model.forward)
        self._takes_positions = "position_ids" in self._signature.parameters
        self._rope_limit = _rope_limit(model.config)
        self._tensors: dict[Any, tuple[Tensor, Tensor]] = {}
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        head = model.get_output_embeddings()
        if head is not None:
            self._hooks.append(head.register_forward_hook(self._replace_logits))
        self._model = weakref.ref(model)
        _attached.add(model)

    def remove(self) -> None:
        """Take the intact KV off the model; nothing is left on it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        model = self._model()
        if model is not None:
            _attached.discard(model)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _before(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pre-hook. A decoding step ends at its first lines; dynamo traces through them."""
        cache: Any = kwargs.get("past_key_values")
        progress = getattr(cache, "intactkv", None)
        if progress is not None and progress.plain:
            ids = args[0] if args else kwargs.get("input_ids")
            if (
                ids is not None
                and ids.shape[1] == 1
                and (torch.compiler.is_compiling() or cache.get_seq_length() >= progress.until)
            ):
                return None
        return self._begin(model, args, kwargs)

    @torch.compiler.disable
    def _begin(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find the prefix tokens of this call and put our `update` before the cache's."""
        if self._call is not None:
            raise IntactKVError("the attached model is already in a forward; run one forward at a time per model")
        arguments = _by_name(self._signature, args, kwargs)
        cache = arguments.get("past_key_values")
        if cache is not None and not isinstance(cache, Cache):
            raise IntactKVError(
                f"past_key_values is a {type(cache).__name__}; give a transformers Cache, such as DynamicCache()"
            )
        checkpointing = model.training and model.is_gradient_checkpointing
        caches = cache is not None or (_use_cache(arguments, model) and not checkpointing)
        past = 0 if cache is None else int(cache.get_seq_length())
        progress = Progress() if past == 0 else getattr(cache, "intactkv", None)
        if progress is None:
            raise IntactKVError(
                f"the cache already holds {past} tokens computed without this intact KV; start from an empty cache "
                "or from kv.cache(model)"
            )

        plan = self._plan(arguments, past, progress, caches=caches)
        call = _Call(self, plan.sites, past, arguments.get("logits_to_keep", 0), plan.length)
        if plan.positions is not None:
            arguments["position_ids"] = plan.positions
        if caches:
            cache = arguments["past_key_values"] = cache if cache is not None else DynamicCache(config=model.config)
            call.enter(cache, progress)
        elif len(plan.sites):
            if plan.packed and arguments.get("attention_mask") is None:
                arguments["attention_mask"] = _packed_masks(model, arguments)
            arguments["past_key_values"] = call.pass_through = _PassThrough(model, call)
            arguments["use_cache"] = False
            if checkpointing and _recurrent(model):
                raise IntactKVError(
                    f"gradient checkpointing replays the recurrent layers of {model.config.model_type} with their "
                    "final state; call gradient_checkpointing_disable() on the model"
                )
            if checkpointing:
                call.open_checkpoints(model)
        self._call = call
        return (), arguments

    def _plan(self, arguments: dict[str, Any], past: int, progress: Progress, *, caches: bool) -> _Plan:
        """Locate the prefix in this call's tokens, update `progress`, and refuse what cannot be right."""
        ids = _ids(arguments, past, progress)
        length, prefix = ids.shape[1], self.kv.ids.to(ids.device)
        mask, given = _as_tensor(arguments.get("attention_mask")), arguments.get("position_ids")
        real, positions = _real(mask, ids, past), _positions(mask, given, ids, past)
        if given is None and not self._takes_positions and mask is not None and mask.ndim == 4:
            positions = _visible(mask[:, 0]).sum(-1).to(ids.device).expand_as(ids) - 1  # ALiBi: all that it sees
        if past >= progress.until and not bool((real & (positions < len(prefix))).any()):
            none = torch.zeros(0, dtype=torch.int64, device=ids.device)
            return _Plan(
                Sites(none, none, none), positions if progress.padded and given is None else None, False, length
            )

        matched = _matched(progress, len(ids), ids.device)
        inside = locate(ids, prefix, real=real, positions=positions, matched=matched)
        first = first_real(real)
        restarts = sequence_starts(real, positions, matched) & ~first
        if past == 0:
            self._refuse(ids, prefix, real, positions, inside)
        if bool(inside.any()):
            self._refuse_unseen(mask, past, positions, inside, restarts, caches)

        row, col = inside.nonzero(as_tuple=True)
        sites = Sites(row, col, positions[row, col])
        progress.matched = torch.maximum(matched, torch.where(inside, positions + 1, 0).amax(1))
        if progress.until == NEVER and bool(real.any(1).all()):
            slots = torch.arange(past, past + length, device=ids.device)
            progress.until = int(torch.where(first, slots - positions, -NEVER).max()) + len(prefix)
            self._warn_once(past, sites)
        if given is None and self._takes_positions and bool((progress.matched > 0).any()):
            progress.padded = progress.padded or bool((real & (positions != _slots(ids, past))).any())
        return _Plan(sites, positions if progress.padded and given is None else None, bool(restarts.any()), length)

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
        if bool(hidden.any()):
            raise IntactKVError(
                f"the attention mask hides the prefix of row {int(hidden.nonzero()[0])} (is the pad token one of its "
                "tokens?); set the mask to 1 there, or pad with another token"
            )

    def _refuse_unseen(
        self, mask: Tensor | None, past: int, positions: Tensor, inside: Tensor, restarts: Tensor, caches: bool
    ) -> None:
        """Refuse masks and lengths under which later tokens would not read the prefix as it was captured."""
        isolated = mask is None and not caches  # transformers tells packed sequences apart only in this case
        if mask is not None and mask.ndim == 4:
            sees = _sees_previous(mask, past).to(inside.device)
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
        if self._rope_limit is not None and int(positions.max()) >= self._rope_limit:
            raise IntactKVError(
                f"this call reaches position {int(positions.max())}, but the model's RoPE scaling changes all keys of "
                f"a call from position {self._rope_limit} on; shorten the input"
            )

    def _warn_once(self, past: int, sites: Sites) -> None:
        if past == 0 and len(sites) == 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"no row begins with the prefix {self.kv.ids[:8].tolist()}: the intact KV has no effect on this call "
                "(does the tokenizer add the BOS token?)",
                stacklevel=2,
            )

    def _after(self, model: PreTrainedModel, args: Any, kwargs: Any, output: Any) -> Any:
        """The forward hook, also called when the forward raised: leave nothing on the cache, then audit."""
        call = self._call
        if call is None:
            return None
        self._call = None
        call.leave()
        if output is None:
            return None
        return self._audit(call, output)

    @torch.compiler.disable
    def _audit(self, call: _Call, output: Any) -> Any:
        missing = sorted(set(self.kv.layers) - call.seen)
        if len(call.sites) and missing:
            raise RuntimeError(
                f"layers {missing} did not pass keys and values through Cache.update in this call, so their prefix "
                "was not replaced; this model or mode (gradient checkpointing?) is not supported"
            )
        return output if call.pass_through is None else _without(output, call.pass_through)

    def _replace_logits(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        call = self._call
        return None if call is None or len(call.sites) == 0 else call.logits(output)

    def tensors(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of `layer` on the device and in the dtype of `like`, `(prefix, head, dim)`, remembered."""
        place = (layer, like.device, like.dtype)
        if place in self._tensors:
            return self._tensors[place]
        key, value = (t.transpose(0, 1) for t in self.kv.layers[layer])
        with torch.inference_mode(False):
            pair = (key.to(like.device, like.dtype), value.to(like.device, like.dtype))
        if not (key.requires_grad or value.requires_grad):
            self._tensors[place] = pair
        return pair


@dataclass(frozen=True)
class _Plan:
    sites: Sites
    positions: Tensor | None  # what to supply as position_ids, if anything
    packed: bool
    length: int


@dataclass
class _Call:
    """One forward with prefix tokens in it: what is replaced where, and which layers have come by."""

    attachment: Attachment
    sites: Sites
    past: int
    logits_to_keep: int | Tensor
    length: int
    seen: set[int] = field(default_factory=set)
    cache: Cache | None = None
    pass_through: _PassThrough | None = None
    opened: list[GradientCheckpointingLayer] = field(default_factory=list)

    def enter(self, cache: Cache, progress: Progress) -> None:
        """Shadow `cache.update` for this forward, where there is something to replace."""
        lossy = any(isinstance(layer, QuantizedLayer) for layer in cache.layers)
        if lossy:
            # transformers' quantized layers cannot reorder or select rows, so a cache's rows stay what they were
            progress.sites = _joined(progress.sites, self.sites, self.past)
        cache.intactkv = progress  # type: ignore[attr-defined]
        if len(self.sites) == 0 and not (lossy and progress.sites):
            return
        update = cache.update  # the class's method: nothing of ours is on the instance now

        def replaced(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return update(*self.write(key, value, layer), layer, *args, **kwargs)

        def restored(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            # The lossy store rounds tokens in groups, so the prefix must not enter a group's scale: the chunk's last
            # token stands in for it, and the intact rows are put back on every read.
            kept = update(self.neutral(key), self.neutral(value), layer, *args, **kwargs)
            return self.read(*kept, layer, progress.sites)

        cache.update = restored if lossy else replaced  # type: ignore[method-assign,assignment]
        self.cache = cache

    def leave(self) -> None:
        if self.cache is not None:
            del self.cache.update  # the instance attribute; the class's method shows again
            self.cache = None
        for layer in self.opened:
            del layer._can_checkpoint_with_cache
        self.opened.clear()

    def open_checkpoints(self, model: PreTrainedModel) -> None:
        """Let checkpointed layers see our cache, which stores nothing and so may be replayed in the backward."""
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer._can_checkpoint_with_cache = True
                self.opened.append(layer)

    def write(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values `(batch, head, token, dim)` with the prefix tokens' replaced."""
        return self._put(key, value, layer, self.sites)

    def read(self, key: Tensor, value: Tensor, layer: int, sites: Sites | None) -> tuple[Tensor, Tensor]:
        return (key, value) if sites is None else self._put(key, value, layer, sites)

    def _put(self, key: Tensor, value: Tensor, layer: int, sites: Sites) -> tuple[Tensor, Tensor]:
        if layer not in self.attachment.kv.layers:
            raise IntactKVError(
                f"layer {layer} has keys and values but the intact KV holds none for it; capture it from this model"
            )
        self.seen.add(layer)
        intact_key, intact_value = self.attachment.tensors(layer, key)
        return _put(key, intact_key, sites, layer), _put(value, intact_value, sites, layer)

    def neutral(self, x: Tensor) -> Tensor:
        """`x` with prefix tokens replaced by the chunk's last token, or by zeros in a row that is all prefix."""
        if len(self.sites) == 0:
            return x
        sites, last = self.sites.to(x.device), x.shape[2] - 1
        stand_in = x[:, :, -1].clone()
        stand_in[sites.row[sites.col == last]] = 0
        return x.transpose(1, 2).index_put((sites.row, sites.col), stand_in[sites.row]).transpose(1, 2)

    def logits(self, output: Tensor) -> Tensor:
        """The output embedding's result `(batch, kept, vocab)` with the artifact's logits at prefix positions."""
        kept = torch.arange(self.length, device=output.device)
        if isinstance(self.logits_to_keep, int):
            kept = kept[-self.logits_to_keep :] if self.logits_to_keep else kept
        else:
            kept = self.logits_to_keep.to(output.device)
            kept = kept.nonzero()[:, 0] if kept.dtype == torch.bool else kept % self.length
        if output.ndim != 3 or output.shape[1] != len(kept):
            raise RuntimeError(
                f"the output embedding gave shape {tuple(output.shape)} for {len(kept)} kept positions, so prefix "
                "logits cannot be put in their place; this model's head is not supported"
            )
        intact = self.attachment.kv.logits.to(output.device, output.dtype)
        if output.shape[2] != intact.shape[1]:
            raise IntactKVError(
                f"the model has {output.shape[2]} output tokens, the intact KV was captured with {intact.shape[1]}; "
                "capture it from the full-precision form of this model"
            )
        sites = self.sites.to(output.device)
        site, at = (sites.col[:, None] == kept[None, :]).nonzero(as_tuple=True)
        return output.index_put((sites.row[site], at), intact[sites.index[site]])


class _PassThrough(DynamicCache):
    """The cache of a call without cache: replaces prefix tokens, stores nothing, and may be replayed."""

    def __init__(self, model: PreTrainedModel, call: _Call) -> None:
        super().__init__(config=model.config)
        self.call = call

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.call.write(key_states, value_states, layer_idx)


def _put(x: Tensor, intact: Tensor, sites: Sites, layer: int) -> Tensor:
    """`x` `(batch, head, token, dim)` with `intact` `(prefix, head, dim)` at `sites`; differentiable in both."""
    if (x.shape[1], x.shape[3]) != intact.shape[1:]:
        raise IntactKVError(
            f"layer {layer} has (head, dim) {(x.shape[1], x.shape[3])} in this call, the intact KV has "
            f"{tuple(intact.shape[1:])}; tensor-parallel models are not supported, otherwise capture it again"
        )
    sites = sites.to(x.device)
    return x.transpose(1, 2).index_put((sites.row, sites.col), intact[sites.index]).transpose(1, 2)


def _recurrent(model: PreTrainedModel) -> list[int]:
    """The layers whose cache is a recurrent or convolutional state alone."""
    return [i for i, linear in enumerate(DynamicCache(config=model.config).is_linear) if linear]


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All of a call's arguments by name."""
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


def _as_tensor(mask: Any) -> Tensor | None:
    """The mask to read padding from; of one mask per layer type, the one that covers most."""
    if isinstance(mask, Mapping):
        given = [m for m in mask.values() if m is not None]
        mask = max(given, key=lambda m: m.shape[-1]) if given else None
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim not in (2, 4)):
        raise IntactKVError(
            f"the attention mask is a {type(mask).__name__}; give a 2D mask (batch, token) or a 4D tensor"
        )
    return mask


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0  # additive masks: 0 is visible, very negative is not


def _real(mask: Tensor | None, ids: Tensor, past: int) -> Tensor:
    """Which tokens are no padding, `(batch, token)`."""
    batch, length = ids.shape
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape[-1] < past + length:
        raise IntactKVError(
            f"the attention mask covers {mask.shape[-1]} tokens, the cache and this call hold {past + length}; "
            "give a mask of the whole length, or none"
        )
    if mask.ndim == 2:
        return mask[:, past : past + length].to(ids.device).bool()
    diagonal = mask[:, 0, :, past : past + length].diagonal(dim1=1, dim2=2)
    return _visible(diagonal).expand(batch, length).to(ids.device)


def _sees_previous(mask: Tensor, past: int) -> Tensor:
    """For a 4D mask: whether each token but the first sees the one before it, `(batch, token - 1)`."""
    length = mask.shape[2]
    return _visible(mask[:, 0, 1:, past : past + length - 1].diagonal(dim1=1, dim2=2))


def _slots(ids: Tensor, past: int) -> Tensor:
    return torch.arange(past, past + ids.shape[1], device=ids.device).expand_as(ids)


def _positions(mask: Tensor | None, given: Tensor | None, ids: Tensor, past: int) -> Tensor:
    """Every token's position in its own sequence, `(batch, token)`: as given, or counted from the first real token."""
    if given is not None:
        given = given[0] if given.ndim == 3 else given  # multimodal RoPE: text tokens have equal components
        return given.to(ids.device).expand_as(ids)
    if mask is not None and mask.ndim == 2:
        counted = mask.to(ids.device).long().cumsum(1) - 1
        return counted[:, past : past + ids.shape[1]].clamp(min=0)
    return _slots(ids, past)


def _matched(progress: Progress, batch: int, device: torch.device) -> Tensor:
    if progress.matched is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    matched = progress.matched.to(device)
    if len(matched) == batch:
        return matched
    if bool((matched == matched[0]).all()):
        return matched[:1].expand(batch)
    raise IntactKVError(
        f"the cache was filled with {len(matched)} rows and is used with {batch} before its prefix was complete; "
        "process the whole prefix in one call first"
    )


def _joined(before: Sites | None, now: Sites, past: int) -> Sites | None:
    """All sites of a cache so far, by cache column; None where there are none."""
    now = Sites(now.row, now.col + past, now.index)
    if before is None:
        return now if len(now) else None
    before = before.to(now.row.device)
    return Sites(*(torch.cat(pair) for pair in zip(_fields(before), _fields(now), strict=True)))


def _fields(sites: Sites) -> tuple[Tensor, Tensor, Tensor]:
    return sites.row, sites.col, sites.index


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
