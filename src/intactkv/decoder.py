"""The one file that knows a decoder's anatomy: where its blocks are, and what goes into each."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.pytorch_utils import Conv1D

from intactkv.artifact.digest import offloaded
from intactkv.error import IntactKVError


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks in order: the one list of modules that is as long as the model has layers."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    # a model may keep lists of the same length inside its blocks (experts): the blocks come first
    if not lists:
        raise IntactKVError(f"{type(model).__name__} has no list of {layers} blocks; this model is not supported")
    return list(lists[0])


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its ids: its own device, where its weights are on the disk the one it computes on."""
    if model.device.type != "meta":
        return model.device
    store: Any = getattr(model, "_intactkv_store", None)
    return torch.device("cpu") if store is None else store.device


def held(module: nn.Module, name: str = "weight") -> Tensor:
    """A module's weight wherever it lies: also where accelerate has offloaded it, or processes hold parts of it."""
    tensor: Any = getattr(module, name).detach()
    if tensor.device.type == "meta" and (stored := offloaded(module)) is not None:
        tensor = stored[name]
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def cache_name(function: Callable[..., Any]) -> str:
    """What a model's `forward`, or another function of transformers, calls the cache: `cache` from 5.24 on."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, under either name; None for the paged one of continuous batching."""
    cache = arguments.get("past_key_values")
    if cache is None and not is_paged(arguments):
        cache = arguments.get("cache")
    return cache


def is_paged(arguments: Mapping[str, Any]) -> bool:
    """Whether this is a call of continuous batching (`generate_batch`), which keeps a paged cache of its own."""
    return isinstance(arguments.get("cache"), PagedAttentionCache)


def block_size(cache: PagedAttentionCache) -> int:
    """How many tokens a block of a paged cache holds, which requests may share whole; the smallest of its kinds."""
    if hasattr(cache, "block_size"):  # until transformers 5.23
        return cache.block_size
    since: Any = cache
    return min(kind.tokens_per_page for kind in since.cache_allocators.values())


@dataclass(frozen=True)
class Argument:
    """One of a module's arguments, which a call may give by its place or by its name."""

    name: str
    place: int = sys.maxsize  # by name only

    @classmethod
    def of(cls, function: Callable[..., Any], name: str) -> Argument:
        """The argument of that name where `function` has it; a function that names none takes it by name."""
        names = list(inspect.signature(function).parameters)
        return cls(name, names.index(name)) if name in names else cls(name)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a call gives; None if nothing."""
        return args[self.place] if self.place < len(args) else kwargs.get(self.name)

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with `value` for this one, as forward pre-hooks return them."""
        if self.place < len(args):
            return (*args[: self.place], value, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


HIDDEN_STATES = Argument("hidden_states", 0)  # of every block


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """While it is open, these hooks are on."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While it is open, modules run these instead of their forward, which others may have replaced already."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own


@contextmanager
def watched_inputs(model: PreTrainedModel, look: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While it is open, `look(layer, input)` is shown every block's input `(batch, token, hidden)`, none is kept."""

    def watch(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            look(i, HIDDEN_STATES.read(args, kwargs).detach())

        return hook

    with hooked([b.register_forward_pre_hook(watch(i), with_kwargs=True) for i, b in enumerate(blocks(model))]):
        yield


@contextmanager
def forced_inputs(model: PreTrainedModel, give: Callable[[int], Tensor], made: Callable[[], int]) -> Iterator[None]:
    """While it is open, every block reads `give(layer)`, not what the block before it wrote, for its keys and values.

    `made()` says how many layers' there are. Once a block has made its own, its linear layers give zeros and are not
    computed, nor are their weights read: nothing depends on them.
    """
    begun = 0

    def force(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal begun
            begun = made()
            given = HIDDEN_STATES.read(args, kwargs)
            return HIDDEN_STATES.replaced(args, kwargs, give(i).to(given.device, given.dtype))

        return hook

    def rest(module: Any) -> Any:
        plain, width = module.forward, module.nf if isinstance(module, Conv1D) else module.out_features

        def forward(x: Tensor) -> Tensor:
            return plain(x) if made() == begun else x.new_zeros(*x.shape[:-1], width)

        return forward

    stack = blocks(model)
    linear = [m for block in stack for m in block.modules() if type(m) in (nn.Linear, Conv1D)]
    hooks = [b.register_forward_pre_hook(force(i), with_kwargs=True) for i, b in enumerate(stack)]
    with hooked(hooks), replaced_forwards({module: rest(module) for module in linear}):
        yield


@contextmanager
def watched_outputs(model: PreTrainedModel, look: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While it is open, `look(layer, output)` is shown every block's output `(batch, token, hidden)`, none is kept.

    A model with several residual streams (Gemma 3n) shows the one in which each element is largest.
    """

    def watch(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            look(i, hidden if hidden.ndim == 3 else hidden.abs().amax(0))

        return hook

    with hooked([block.register_forward_hook(watch(i)) for i, block in enumerate(blocks(model))]):
        yield


def key_bias(block: nn.Module) -> Float[Tensor, "dim"] | None:
    """What a block's key projection adds to every token's key, before RoPE, all heads in a row; None if nothing.

    Known for separate key projections and GPT-2's fused one; None also for other fused projections.
    """
    named: dict[str, Any] = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
    for name in ("k_proj", "key"):
        if isinstance(getattr(named.get(name), "bias", None), Tensor):
            return held(named[name], "bias")
    if isinstance(named.get("c_attn"), Conv1D):
        return held(named["c_attn"], "bias").chunk(3)[1]
    return None


def output_weight(attention: nn.Module) -> Float[Tensor, "joined hidden"] | None:
    """An attention's output projection W_O as a matrix to multiply the joined heads with; None if not found."""
    for name in ("o_proj", "out_proj", "dense", "c_proj"):
        module = getattr(attention, name, None)
        if isinstance(module, nn.Linear):
            return held(module).T
        if isinstance(module, Conv1D):
            return held(module)
    return None


@contextmanager
def recorded_outputs(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """While it is open, a forward leaves every block's output `(batch, token, hidden)` in the dictionary, undetached.

    The last one is the block's own, before the final norm. For one forward: of a checkpointed block only the first
    run is kept, not its replay in the backward.
    """
    outputs: dict[int, Tensor] = {}

    def record(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.setdefault(i, output[0] if isinstance(output, tuple) else output)

        return hook

    with hooked([block.register_forward_hook(record(i)) for i, block in enumerate(blocks(model))]):
        yield outputs
