"""Quantize with the prefix in mind: prefix tokens do not count, and later tokens read their intact keys and values.

With an intact KV attached nobody reads what the quantized model computes at prefix positions, not its hidden states,
its keys and values, nor its logits. A quantizer that learns from activations counts these tokens all the same, and
theirs are the largest there are. Here its windows are shown as the served model will see them: what it learns from
leaves prefix tokens out, and each layer's attention reads the prefix's intact keys and values meanwhile.

No quantizer is copied. Four places in llm-compressor 0.14, found by what its modifiers have in common:

    register_hook  every modifier hooks modules through `HooksMixin`, and is handed the counted tokens' rows there:
                   GPTQ's Hessian, SmoothQuant's ranges, the observers of static activation scales
    blocks         are called with their cache as an argument, None while calibrating: they get one that substitutes
                   at `Cache.update`, as `attach` does, so that any architecture is served in any basis
    AWQ            takes a token mask itself (`loss_mask`); its grid search runs attention on trial weights, and then
                   reads the keys and values that the block had before
    AutoRound      compares blocks' outputs, which are made zero at prefix positions
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.attaching.locate import Sites
from intactkv.attaching.tensors import IntactTensors, put
from intactkv.decoder import HIDDEN_STATES, Argument, blocks, hooked
from intactkv.error import IntactKVError
from intactkv.quantizing.quiet import patched

_CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value", "cache")


class PrefixAware:
    """What a recipe's steps are shown of calibration windows of `length` tokens that all begin with a prefix of `size`.

    `ordinary` says of each batch which of its windows are shown the ordinary way: prefix counted, and read as the
    model computes it. Open it around the recipe's run.
    """

    def __init__(self, size: int, length: int, ordinary: list[Bool[Tensor, "window"]]) -> None:
        self.size, self.length, self.ordinary = size, length, ordinary
        self._intact: IntactTensors | None = None
        self._calls: dict[int, int] = {}  # how often each block was called, by layer
        self._running: _Intact | None = None  # the cache of the block that runs now
        self._routed = False  # inside experts, which get no other tokens
        self._trial = False  # AWQ tries weights
        self._tuned = False  # AutoRound compares outputs

    @property
    def masks(self) -> list[Bool[Tensor, "window token"]]:
        """Of each batch, the tokens that count."""
        return [_counted(rows, self.size, self.length) for rows in self.ordinary]

    def show(self, kv: IntactKV) -> None:
        """From now on later tokens read `kv`, which must be in the basis the model has now."""
        self._intact = IntactTensors(kv)
        self._calls.clear()

    @contextmanager
    def opened(self, model: PreTrainedModel) -> Iterator[None]:
        """Hook `model` and llm-compressor's modifiers; afterwards both are as they were."""
        from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
        from llmcompressor.modifiers.autoround import AutoRoundModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.modifiers.utils.hooks import HooksMixin

        hooks = [hook for i, block in enumerate(blocks(model)) for hook in self._hook_block(i, block)]
        for module in model.modules():
            if isinstance(module, LinearExperts2D):
                hooks += self._hook_experts(module)
        with hooked(hooks), ExitStack() as stack:
            for owner, name, around in (
                (HooksMixin, "register_hook", self._registering),
                (AWQModifier, "_compute_best_scale", self._while("_trial")),
                (AutoRoundModifier, "apply_autoround", self._while("_tuned")),
            ):
                stack.enter_context(patched(owner, name, around(vars(owner)[name])))
            yield

    # What counts.

    def _registering(self, register: Callable[..., Any]) -> Callable[..., Any]:
        """`register_hook`, for hooks that are handed counted tokens; those that keep a call's arguments get all."""
        from llmcompressor.modifiers.transform.awq import AWQModifier

        def registered(modifier: Any, target: Any, hook: Any, hook_type: str, **settings: Any) -> Any:
            keeps_the_call = settings.get("with_kwargs", False) or isinstance(modifier, AWQModifier)
            if hook_type in ("forward", "forward_pre") and not keeps_the_call:
                hook = self._on_counted(hook)
            return register(modifier, target, hook, hook_type, **settings)

        return registered

    def _on_counted(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def seen(module: nn.Module, *given: Any) -> None:
            hook(module, *(tuple(map(self._select, x)) if isinstance(x, tuple) else self._select(x) for x in given))

        return seen

    def _select(self, x: Any) -> Any:
        """The counted tokens' rows of one of a module's inputs or outputs, of the batch that is being shown."""
        from llmcompressor.core import active_session

        if not isinstance(x, Tensor) or self._routed:
            return x
        mask = _counted(self.ordinary[active_session().state.current_batch_idx], self.size, self.length).to(x.device)
        if x.shape[:2] == mask.shape:
            return x[mask]
        if x.ndim == 2 and len(x) == mask.numel():
            return x[mask.flatten()]
        if x.ndim == 4 and x.shape[:3] == (len(mask), 1, mask.shape[1]):  # latents as one head
            return x[:, 0][mask]
        raise IntactKVError(
            f"activations of shape {tuple(x.shape)} do not show which of {tuple(mask.shape)} tokens they belong to, so "
            "that prefix tokens cannot be left out; make the ordinary checkpoint (prefix_weight=1)"
        )

    def _hook_experts(self, experts: nn.Module) -> list[RemovableHandle]:
        """Let no prefix token into experts; their output there is zero, which nobody reads."""
        if list(inspect.signature(experts.forward).parameters) != ["hidden_states", "top_k_index", "top_k_weights"]:
            return []  # these are handed every token, in order

        def enter(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
            if self._running is None:
                return None
            self._routed, mask = True, self._running.mask.flatten()
            return tuple(x[mask.to(x.device)] for x in (*args, *kwargs.values())), {}

        def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if not self._routed or self._running is None:
                return None
            self._routed, mask = False, self._running.mask.flatten().to(output.device)
            whole = output.new_zeros(len(mask), output.shape[1])
            whole[mask] = output
            return whole

        return [
            experts.register_forward_pre_hook(enter, with_kwargs=True),
            experts.register_forward_hook(leave),
        ]

    # What later tokens read.

    def _hook_block(self, layer: int, block: nn.Module) -> list[RemovableHandle]:
        parameters = inspect.signature(block.forward).parameters
        name = next((name for name in _CACHE_NAMES if name in parameters), _CACHE_NAMES[0])
        cache_argument = Argument.of(block.forward, name)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache, hidden = cache_argument.read(args, kwargs), HIDDEN_STATES.read(args, kwargs)
            if hidden.is_meta:
                return None  # llm-compressor traces the model
            if isinstance(cache, _Intact) and self._trial:
                self._running = cache  # AWQ replays a call of a whole block
            elif cache is None or isinstance(cache, _Intact):
                rows, length = hidden.shape[-3:-1]
                self._running = _Intact(self, _counted(self._shown(layer, rows), self.size, length))
            else:
                return None  # somebody's own call, such as `capture`'s
            return cache_argument.replaced(args, kwargs, self._running)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            cache, self._running = self._running, None
            if cache is None:
                return None
            if self._intact is not None and layer in self._intact.kv.layers and layer not in cache.seen:
                raise IntactKVError(
                    f"layer {layer} does not pass its keys and values through the cache that its block is given, so "
                    "that later tokens cannot read intact ones; make the ordinary checkpoint (prefix_weight=1)"
                )
            return _change_first(output, cache.silenced) if self._tuned else None

        return [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.register_forward_hook(leave),
        ]

    def _shown(self, layer: int, rows: int) -> Bool[Tensor, "window"]:
        """Which of a call's windows are shown the ordinary way: a pass calls a block once for each batch, in order."""
        if not any(bool(batch.any()) for batch in self.ordinary):
            return torch.zeros(rows, dtype=torch.bool)  # in any batches, such as AutoRound's own
        call = self._calls.get(layer, 0)
        self._calls[layer] = call + 1
        return self.ordinary[call % len(self.ordinary)]

    def read(self, cache: _Intact, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values `(batch, head, token, dim)` that attention reads."""
        if self._intact is not None:
            if layer not in self._intact.kv.layers:
                return key, value
            pair = self._intact.like(layer, key, value)
            return put(key, pair[0], cache.sites, layer=layer), put(value, pair[1], cache.sites, layer=layer)
        if not self._trial:  # the block's own, which AWQ's scales leave as they are
            cache.kept[layer] = key[:, :, : self.size].clone(), value[:, :, : self.size].clone()
            return key, value
        trial = cache.mask[:, None, : self.size, None].to(key.device)
        own_key, own_value = cache.kept[layer]
        return (
            torch.cat([torch.where(trial, key[:, :, : self.size], own_key), key[:, :, self.size :]], 2),
            torch.cat([torch.where(trial, value[:, :, : self.size], own_value), value[:, :, self.size :]], 2),
        )

    def _while(self, state: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Around a method of a modifier: `self` has this state while it runs."""

        def around(method: Callable[..., Any]) -> Callable[..., Any]:
            def called(modifier: Any, *args: Any, **kwargs: Any) -> Any:
                setattr(self, state, True)
                try:
                    return method(modifier, *args, **kwargs)
                finally:
                    setattr(self, state, False)

            return called

        return around


class _Intact(DynamicCache):
    """One batch's cache: it stores nothing, and lets attention read what `PrefixAware` says."""

    def __init__(self, aware: PrefixAware, mask: Bool[Tensor, "window token"]) -> None:
        super().__init__()
        self.aware, self.mask = aware, mask
        row, col = (~mask).nonzero(as_tuple=True)
        self.sites = Sites(row, col, col)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.seen: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen.add(layer_idx)
        return self.aware.read(self, layer_idx, key_states, value_states)

    def silenced(self, output: Tensor) -> Tensor:
        """A block's output `(…, window, token, hidden)` with nothing at tokens that do not count."""
        return output * self.mask.to(output.device, output.dtype)[..., None]


def _counted(ordinary: Bool[Tensor, "window"], size: int, length: int) -> Bool[Tensor, "window token"]:
    return ordinary[:, None] | (torch.arange(length) >= size)


def _change_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with its hidden states changed, be they alone or the first of several."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
