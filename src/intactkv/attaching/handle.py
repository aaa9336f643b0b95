"""Give a model the intact KV: at the moment a layer hands keys and values to its cache, the prefix's are replaced.

The model still processes the whole prompt; inputs, masks, lengths and beams stay as they are. What the quantized
model computed at prefix positions is read by nobody afterwards: attention reads the intact keys and values, and the
logits of prefix positions come from the artifact. What this gives up: the P prefix tokens are computed once more
per prompt (`IntactKV.cache` avoids that for unpadded prompts), and everything else that mixes tokens, such as
recurrent states, is not covered.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from intactkv.artifact import IntactKV
from intactkv.artifact.fingerprint import check_fingerprint
from intactkv.attaching.adapters import unlike
from intactkv.attaching.coverage import uncovered_layers
from intactkv.attaching.locate import Progress
from intactkv.attaching.plan import Planner
from intactkv.attaching.substitute import Substitution
from intactkv.attaching.tensors import IntactTensors
from intactkv.basis.compare import refuse_foreign
from intactkv.decoder import cache_name, given_cache, input_device, is_paged
from intactkv.error import IntactKVError
from intactkv.heads import heads_of

log = logging.getLogger(__name__)
_attached: weakref.WeakKeyDictionary[PreTrainedModel, Attachment] = weakref.WeakKeyDictionary()


def attach(model: PreTrainedModel, kv: IntactKV | str | os.PathLike[str], *, check: bool = True) -> Attachment:
    """Make `model` read `kv` wherever a row of its input begins with the prefix, until the handle is removed.

    Use it as a context manager or call `.remove()`. Any batch, padding, cache and way of generating works unchanged,
    through `model(...)` and `model.generate(...)`; calling `model.forward` or an inner module directly goes past the
    attachment. A row that shares only the first m prefix tokens gets m intact ones, a row that shares none is the
    plain model. One attachment per model; one `kv` may serve many models. Compile decoding steps, not the prefill.
    `kv` may also be the folder, file or Hub repository that `IntactKV.from_pretrained` reads. The processes of a
    tensor-parallel model all attach the same `kv`, of which each takes its heads.

    `check` compares the model's own keys and values of the prefix with the intact ones first, in one forward of P
    tokens, and refuses those in another basis or of another model. Adapters (PEFT's) change less than that can tell: a
    model with others than the KV was captured with warns.

    Raises `IntactKVError` for a model with another fingerprint or basis, one that already has an attachment, and
    anything that is not a decoder-only transformers model; then at each call that cannot be right (embeddings instead
    of ids, positions that do not start at 0, a mask that hides the prefix, a cache filled without the attachment).

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
    check_detached(model)
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


def check_detached(model: PreTrainedModel) -> None:
    """Raise `IntactKVError` for a model with an intact KV attached, which would make every arm the intact one."""
    if is_attached(model):
        raise IntactKVError("the model already has an intact KV attached; call intactkv.detach(model) first")


def detach(model: PreTrainedModel) -> None:
    """Take the intact KV off `model` whoever holds the handle; nothing happens where none is attached."""
    handle = _attached.get(model)
    if handle is not None:
        handle.remove()


class Attachment:
    """The handle of one `attach`: a context manager, undone by `.remove()`, which may be called twice."""

    def __init__(self, model: PreTrainedModel, kv: IntactKV) -> None:
        signature = inspect.signature(model.forward)
        self.kv = kv
        self._intact = IntactTensors(kv, heads_of(model))
        self._planner = Planner(self._intact, model.config, takes_positions="position_ids" in signature.parameters)
        self._owner = kv.digest
        self._running = threading.local()  # one forward at a time and thread
        self._signature, self._cache_name = signature, cache_name(model.forward)
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
        log.info("attached %r to %s", kv, type(model).__name__)

    def remove(self) -> None:
        """Take the intact KV off the model; nothing is left on it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._leave()
        model = self._model()
        if model is not None and _attached.pop(model, None) is not None:
            log.info("took %r off %s", self.kv, type(model).__name__)

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
        cache: Any = given_cache(kwargs)
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
        cache = given_cache(arguments)
        past, progress = self._open(cache)
        checkpointing = model.training and model.is_gradient_checkpointing
        caches = cache is not None or (_use_cache(arguments, model) and not checkpointing)

        plan = self._planner.plan(arguments, past, progress, caches=caches)
        call = Substitution(self._intact, plan.sites, past, plan.length, arguments.get("logits_to_keep", 0))
        if plan.sites.whole:
            call.prepare(input_device(model), model.dtype)
        if plan.positions is not None:
            arguments["position_ids"] = plan.positions
        if caches:
            cache = cache if cache is not None else self._new_cache(model)
            self._give_(arguments, cache)
            call.enter(cache, progress)
        elif len(plan.sites):
            if checkpointing and uncovered_layers(self.kv, model.config):
                raise IntactKVError(
                    f"gradient checkpointing replays the recurrent layers of {model.config.model_type} with their "
                    "final state; call gradient_checkpointing_disable() on the model"
                )
            if plan.packed and arguments.get("attention_mask") is None and not is_paged(arguments):
                arguments["attention_mask"] = _packed_masks(model, arguments)
            if is_paged(arguments) and self._cache_name == "cache":
                call.enter_paged(arguments["cache"])
            else:
                self._give_(arguments, call.pass_through_(model, checkpointing=checkpointing))
            arguments["use_cache"] = False
        self._running.call = call
        return (), arguments

    def _give_(self, arguments: dict[str, Any], cache: Cache) -> None:
        """Put `cache` among a call's arguments, under the one name that the model has for it."""
        arguments.pop("past_key_values", None)
        arguments[self._cache_name] = cache

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
        if call is None or len(call.sites) == 0 or self.kv.logits is None:
            return None
        return call.logits(output)


def _past_prefix(cache: Cache, progress: Progress) -> bool:
    """Whether no row can meet another prefix token; while a graph is recorded, a static cache cannot be asked."""
    if torch.compiler.is_compiling():
        return progress.done
    length: int | Tensor = cache.get_seq_length()
    if isinstance(length, Tensor) and length.is_cuda and torch.cuda.is_current_stream_capturing():
        return progress.done
    return bool(length >= progress.until)


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


def _packed_masks(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Any:
    """The masks that transformers makes for packed sequences when it sees no cache; ours would hide the packing."""
    ids = arguments["input_ids"]
    shape_only = torch.empty((*ids.shape, 0), dtype=model.dtype, device=ids.device)
    return create_masks_for_generate(
        config=model.config,
        inputs_embeds=shape_only,
        attention_mask=None,
        position_ids=arguments["position_ids"],
        **{cache_name(create_masks_for_generate): None},
    )


def _without(output: Any, cache: Cache) -> Any:
    """A model's output without the cache that we put in."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: value for name, value in output.items() if value is not cache})
    return tuple(value for value in output if value is not cache) if isinstance(output, tuple) else output
