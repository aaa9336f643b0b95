"""The weights of a streamed model: read when its modules ask for them, and of some only the part that is needed.

Of the vocabulary's embeddings the rows of the ids are read, of the head one slice after the other, of experts those
that tokens are sent to.
"""

from __future__ import annotations

import inspect
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv.artifact.digest import joined, tensor_digest
from intactkv.checkpoint.ahead import Ahead, Uploads
from intactkv.checkpoint.recipe import Recipe, recipes
from intactkv.checkpoint.shards import LINE, Shards, aligned
from intactkv.decoder import Argument, blocks

_SLICE = 8192  # rows of the head at a time
_HASHERS = max(1, (os.cpu_count() or 1) // 4)  # threads: one hashes as fast as a disk reads, not as memory
_HASHED_LATER = 4 * _HASHERS  # matrices that may wait to be hashed
_AHEAD = ("cuda",)  # where the next block's weights are fetched while this one computes


class Store(Mapping[str, Tensor]):
    """The weights of `model` by name, read when its modules ask for them, and the digest of all that was read."""

    def __init__(self, model: PreTrainedModel, shards: Shards, device: torch.device) -> None:
        from intactkv.checkpoint.lent import lend_

        self.device, self.skip_head, self._hashed = device, False, True
        self.changed: Callable[[str, Tensor], Tensor] | None = None  # what is made of a parameter before it is used
        self._model, self._shards = model, shards
        self._recipes = recipes(model, shards.entries)
        self._ahead: Ahead | None = None
        self._made: dict[str, Tensor] = {}  # what a conversion has made besides, until it is asked for
        self._shapes = {name: each.shape for name, each in model.state_dict().items()}
        self._by_expert: dict[int, bool] = {}  # whether a conversion can make one expert's weights, tried once
        self._routed: list[int] | None = None  # the experts that tokens are sent to, while they work
        self._embedding: str | None = None
        self._pool, self._then = ThreadPoolExecutor(_HASHERS, "sha256"), ThreadPoolExecutor(1, "then")
        self._digests: dict[str, Future[str]] = {}
        self._waiting: deque[Future[str]] = deque(maxlen=_HASHED_LATER)
        for module, name, full in buffers(model):
            held = module._buffers[name] if name in module._non_persistent_buffers_set else self[full]
            module._buffers[name] = held.to(device, module._buffers[name].dtype)
        self._held, self._digests, self._hashed = self._digests, {}, False
        lend_(model, self)
        self._read_rows_(model)
        self._read_slices_(model)
        routed = self._read_routed_(model)
        ahead = [[name for name in names if name not in routed] for names in _by_block(model)]
        if device.type in _AHEAD:
            send = Uploads(device).send if device.type == "cuda" else lambda tensor: lambda: tensor

            def fetch(name: str) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
                weight, read = self._fetch(name)
                return send(weight), read

            self._ahead = Ahead(ahead, fetch)

    def begin(self, *, head: bool, hashed: bool = True) -> None:
        """A forward begins, and nothing has been read yet: without `head` no logits, without `hashed` no digest."""
        self.end()
        self.skip_head, self._hashed, self._digests = not head, hashed, {}

    def end(self) -> None:
        """It is over: no further block need be on its way, and forwards give logits again and are not hashed."""
        if self._ahead is not None:
            self._ahead.stop()
        self.skip_head = self._hashed = False

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of what is held in memory, and of every tensor, row and slice that was read."""
        return "read: " + joined({}, {name: each.result() for name, each in {**self._held, **self._digests}.items()})

    @property
    def identity(self) -> str:
        """Another one where a file of the checkpoint was changed."""
        return self._shards.identity

    def not_finite(self) -> str | None:
        """The first of the tensors that were read that holds NaN or an infinity, and its file."""
        for name in self._digests:
            if name in self._shards.entries and not bool(self._shards.read(name).float().isfinite().all()):
                return f"{name} in {self._shards.entries[name].file}"
        return None

    def digests(self) -> dict[str, str]:
        """What was read so far, and its digests."""
        return {name: each.result() for name, each in list(self._digests.items()) if each.done()}

    def go_on(self, digests: Mapping[str, str]) -> None:
        """An earlier capture has read this."""
        for name, digest in digests.items():
            self._digests[name] = Future()
            self._digests[name].set_result(digest)

    def later(self, work: Callable[[], None]) -> Future[None]:
        """Do it once all that was read so far is hashed, and what was to be done before is done."""
        waiting = list(self._waiting)

        def then() -> None:
            wait(waiting)
            work()

        return self._then.submit(then)

    def __getitem__(self, name: str) -> Tensor:
        recipe = self._recipes[name]
        if self._routed is not None and self._apart(name, recipe):
            weight = self._some(name, recipe, self._routed)
        else:
            weight = self._whole(name)
        return weight if self.changed is None else self.changed(name, weight.to(recipe.dtype))

    def _whole(self, name: str) -> Tensor:
        if self._ahead is None:
            weight, read = self._fetch(name)
            weight = weight.to(self.device)
        else:
            receive, read = self._ahead.take(name)
            weight = receive()
        for part, tensor in read.items():
            self._hash(part, tensor)
        return weight

    def _fetch(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """A weight in memory, of the type that the files give it, and the tensors that were read to make it."""
        read = dict[str, Tensor]()
        if name not in self._made:
            recipe = self._recipes[name]
            read = {part: self._shards.read(part) for part, _ in recipe.parts}
            made = recipe.make(read, self._model)
            self._made = made if name in made else {name: next(iter(made.values()))}  # a tied one's other name
        return self._made.pop(name), read

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def embeddings(self, rows: slice) -> Float[Tensor, "row hidden"] | None:
        """Rows of the input embeddings in the model's type, where `module.weight` cannot be read; None where it can."""
        if self._embedding is None:
            return None
        most = self._shards.entries[self._embedding].shape[0]
        return self._read(self._embedding, slice(rows.start, min(rows.stop, most))).to(self._model.dtype)

    def _read(self, part: str, rows: slice | None = None) -> Tensor:
        """A tensor of the checkpoint, or some of its rows, as stored."""
        stored = self._shards.read(part, rows)
        self._hash(part if rows is None else f"{part}[{rows.start}:{rows.stop}]", stored)
        return stored

    def _hash(self, name: str, stored: Tensor) -> None:
        if self._hashed and name not in self._digests:
            if len(self._waiting) == _HASHED_LATER:
                self._waiting[0].result()
            self._digests[name] = self._pool.submit(tensor_digest, stored)
            self._waiting.append(self._digests[name])

    def _apart(self, name: str, recipe: Recipe) -> bool:
        """Whether experts' weights are one tensor here, of which each expert's can be made alone."""
        shape = self._shapes[name]
        if len(shape) != 3 or recipe.converter is None:
            return len(shape) == 3
        if (known := self._by_expert.get(id(recipe.converter))) is None:
            one = recipe.of([0])
            shapes = {part: torch.empty(self._shards.entries[part].shape, device="meta") for part, _ in one.parts}
            told = {each: tuple(tensor.shape) for each, tensor in one.make(shapes, self._model).items()}
            known = self._by_expert[id(recipe.converter)] = told == {name: (1, *shape[1:])}
        return known

    def _some(self, name: str, recipe: Recipe, experts: list[int]) -> Tensor:
        """Experts' weights, in which only some are read and others are zeros."""
        shape = self._shapes[name]
        if recipe.converter is None:
            made = torch.cat([self._read(recipe.parts[0][0], slice(i, i + 1)) for i in experts])
        else:
            few = recipe.of(experts)
            made = few.make({part: self._read(part) for part, _ in few.parts}, self._model)[name]
        if self.device.type == "cpu":
            size = shape.numel() * recipe.dtype.itemsize
            memory = torch.from_numpy(numpy.zeros(size + LINE, "uint8"))  # pages that nobody writes take no memory
            whole = aligned(memory, size, 0).view(recipe.dtype).view(shape)
        else:
            whole = torch.zeros(shape, dtype=recipe.dtype, device=self.device)
        whole[experts] = made.to(self.device, recipe.dtype)
        return whole

    def _taken_over(self, model: PreTrainedModel, module: nn.Module) -> str | None:
        """The checkpoint's name of a module's weight, if a hook would load it whole; it does not from now on."""
        from accelerate.hooks import remove_hook_from_module

        path = next(name for name, each in model.named_modules() if each is module)
        recipe = self._recipes.get(f"{path}.weight")
        if recipe is None or recipe.converter is not None:
            return None
        remove_hook_from_module(module)
        return recipe.parts[0][0]

    def _read_rows_(self, model: PreTrainedModel) -> None:
        """The embeddings read the rows of the ids alone: the input's, and those like them (Gemma 3n's by layer)."""
        inputs = model.get_input_embeddings()
        for module in list(model.modules()):
            if isinstance(module, nn.Embedding) and type(module) in (nn.Embedding, type(inputs)):
                name = self._taken_over(model, module)
                if name is not None:
                    self._read_rows_of_(module, name)
                    self._embedding = name if module is inputs else self._embedding

    def _read_rows_of_(self, module: Any, name: str) -> None:
        plain, padding = type(module).forward, module.padding_idx
        # not "meta", where Llama 4 would put the ids; it takes no memory, and whoever reads it sees that it is none
        nowhere = torch.full((), torch.nan, dtype=module.weight.dtype, device=self.device).expand(module.weight.shape)
        module.weight = placeholder = nn.Parameter(nowhere, requires_grad=False)

        def forward(ids: Int[Tensor, "*token"]) -> Tensor:
            unique, places = ids.unique(return_inverse=True)
            rows = torch.cat([self._read(name, slice(i, i + 1)) for i in unique.tolist()]).to(nowhere)
            module.weight, module.padding_idx = nn.Parameter(rows, requires_grad=False), None
            try:
                return plain(module, places)
            finally:
                module.weight, module.padding_idx = placeholder, padding

        module.forward = forward

    def _read_slices_(self, model: PreTrainedModel) -> None:
        """The head works a slice of the vocabulary at a time, or not at all."""
        module: Any = model.get_output_embeddings()
        if type(module) is not nn.Linear or module.bias is not None or "weight" not in module._parameters:
            return
        shape, dtype = module.weight.shape, module.weight.dtype
        vocabulary = shape[0]
        name = self._taken_over(model, module)
        if name is None:
            return

        def forward(hidden: Float[Tensor, "*token hidden"]) -> Tensor:
            if self.skip_head:
                return hidden[..., :1]
            cuts = [slice(i, min(i + _SLICE, vocabulary)) for i in range(0, vocabulary, _SLICE)]
            if self.device.type == "cpu":
                return torch.cat([nn.functional.linear(hidden, self._read(name, cut).to(dtype)) for cut in cuts], -1)
            whole = torch.empty(shape, dtype=dtype, device=self.device)  # a GPU's products depend on their width
            for cut in cuts:
                whole[cut] = self._read(name, cut).to(self.device)
            return nn.functional.linear(hidden, whole)

        module.forward = forward

    def _read_routed_(self, model: PreTrainedModel) -> set[str]:
        """Of experts whose weights are one tensor, a call reads those that its router names; the names of all those."""
        found = set[str]()
        for path, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if not any(each.ndim == 3 for each in own.values()):
                continue
            arguments = list(inspect.signature(type(module).forward).parameters)[1:]
            if name := next((each for each in ("top_k_index", "router_indices") if each in arguments), None):
                self._follow_router_(module, Argument(name, arguments.index(name)), len(next(iter(own.values()))))
                found |= {f"{path}.{each}" for each in own}
        return found

    def _follow_router_(self, module: Any, routed: Argument, count: int) -> None:
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._routed = [i for i in routed.read(args, kwargs).unique().tolist() if i < count]
            try:
                return plain(*args, **kwargs)
            finally:
                self._routed = None

        module.forward = forward


def buffers(model: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """Every buffer's module, its name there and in the model."""
    for prefix, module in model.named_modules():
        for name, held in module._buffers.items():
            if held is not None:
                yield module, name, f"{prefix}.{name}" if prefix else name


def _by_block(model: PreTrainedModel) -> list[list[str]]:
    """The names of every block's parameters."""
    names = {id(module): name for name, module in model.named_modules()}
    return [[f"{names[id(block)]}.{name}" for name, _ in block.named_parameters()] for block in blocks(model)]
