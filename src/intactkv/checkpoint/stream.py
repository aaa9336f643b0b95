"""A model whose weights stay where they lie: each matrix is read, used and let go while a forward passes through.

The model is transformers' own, on the meta device, and a hook fetches each module's weights when it computes. What
that would load whole, and a prefix does not need, is done here: of the vocabulary's embeddings only the rows of the ids
are read, of the head slices, of experts those that tokens are sent to; what transformers merges on loading is merged
when a layer asks for it. So a forward needs memory for one matrix, none on the disk, and the time of reading once. On
a GPU the next block's weights are uploaded while this one computes (`ahead.py`).
"""

from __future__ import annotations

import inspect
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from intactkv.artifact.digest import joined, tensor_digest
from intactkv.checkpoint.ahead import Ahead, Uploads
from intactkv.checkpoint.compressed import check_packing, online_transforms
from intactkv.checkpoint.remote import Repository, bytes_on_the_hub, in_cache
from intactkv.checkpoint.shards import LINE, Entry, Folder, Shards, aligned
from intactkv.checkpoint.source import check_exists, config_of, is_gguf, quantizer, refuse_quantized
from intactkv.decoder import blocks
from intactkv.error import IntactKVError, first_line

_SLICE = 8192  # rows of the head at a time
_HASHERS = max(1, (os.cpu_count() or 1) // 4)  # threads: one hashes as fast as a disk reads, not as memory
_HASHED_LATER = 4 * _HASHERS  # matrices that may wait to be hashed
_AHEAD = ("cuda",)  # where the next block's weights are fetched while this one computes


def stored_bytes(source: str | os.PathLike[str]) -> int:
    """The size of a folder's safetensors, or of a Hub model's; 0 where there are none."""
    folder = Path(source) if Path(source).is_dir() else in_cache(str(source))
    if folder is None:
        return bytes_on_the_hub(str(source))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def larger_than_memory(source: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is streamed without being asked: where it takes more than a quarter of the free memory."""
    if Path(source).is_file() or find_spec("accelerate") is None:
        return False
    check_exists(source)
    import psutil  # accelerate brings it

    return bool(stored_bytes(source) > psutil.virtual_memory().available / 4)


def check_at_hand(source: str | os.PathLike[str], work: str) -> None:
    """Raise `IntactKVError` where `work`, which reads a model many times, would fetch it from the Hub each time."""
    if not Path(source).exists() and in_cache(str(source)) is None:
        raise IntactKVError(
            f"{source} is not in the Hub's cache, and {work} reads it many times; get it first: hf download {source}"
        )


def streamed(model: PreTrainedModel) -> Store | None:
    """Where the weights of a streamed model come from; None for any other."""
    return getattr(model, "_intactkv_store", None)


class CannotStream(IntactKVError):
    """The checkpoint may well be loaded whole."""


def load_streamed(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    quantized: bool = False,
) -> PreTrainedModel:
    """A causal LM in eval mode from a folder or Hub name of safetensors, whose weights are read at each forward.

    It computes on `device`, where the weights go one matrix after the other. What is not in the Hub's cache is read
    from the Hub, of each file the bytes that are needed, and not kept. `quantized` ones are taken where they are of
    compressed-tensors, each matrix unpacked when it computes. Raises `IntactKVError` where a tensor is missing,
    unexpected or of another shape, for other quantized ones `CannotStream`, which is one, and so for GGUFs, adapters,
    and where accelerate is not installed.
    """
    if find_spec("accelerate") is None:
        raise CannotStream("streaming a checkpoint needs accelerate: pip install 'intactkv[stream]'")
    check_exists(source)
    if is_gguf(source):
        raise CannotStream(f"{source} cannot be streamed: give a folder or Hub name of safetensors")
    here = Path(source) if Path(source).is_dir() else in_cache(str(source))
    config = config_of(source)
    if config is None or (here is not None and not stored_bytes(here)):
        raise CannotStream(f"{source} cannot be streamed: give a folder or Hub name of safetensors")
    if quantizer(config) != "fp8" and not quantized:  # of which transformers makes dense ones on a CPU
        refuse_quantized(config)
    settings, method = _settings(config), quantizer(config)
    if method not in (None, "fp8", "compressed-tensors"):
        raise CannotStream(f"{source} cannot be streamed: {method} packs its weights for a kernel of its own")
    if online_transforms(settings):
        raise CannotStream(f"{source} cannot be streamed: it wants rotations done while it runs")
    if here is not None and (here / "adapter_config.json").is_file():
        raise CannotStream(f"{source} holds an adapter; merge it into its model and give that, or add --no-stream")
    shards: Shards = Repository(str(source)) if here is None else Folder(here)
    check_packing(source, settings, _packed_rows(shards))
    try:
        model = _without_weights(config, shards.entries, dtype)
        model._intactkv_store = Store(model, shards, torch.device(device))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, IntactKVError):
            raise
        raise IntactKVError(f"{source} cannot be streamed: {first_line(error)}") from error
    model.config.name_or_path = str(source)
    return model.eval()


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """How a checkpoint was quantized, as its configuration has it; nothing where it was not."""
    settings = getattr(config, "quantization_config", None) or {}
    return settings if isinstance(settings, dict) else dict(settings.to_dict())


def _packed_rows(shards: Shards) -> Iterator[tuple[str, int, int]]:
    for name, entry in shards.entries.items():
        if name.endswith(".weight_packed"):
            yield name, entry.shape[-1], int(shards.read(f"{name[:-6]}shape")[-1])


def _without_weights(config: PreTrainedConfig, entries: Mapping[str, Entry], dtype: torch.dtype | str) -> Any:
    """The model on the meta device, its types as transformers chooses them, its computed buffers in memory."""
    from accelerate import init_empty_weights

    if not isinstance(dtype, torch.dtype):
        dtype = config.dtype or next(each.dtype for each in entries.values() if each.dtype.is_floating_point)
    with init_empty_weights(include_buffers=False):
        skeleton: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in skeleton.modules():
        module._is_hf_initialized = not module._non_persistent_buffers_set
    skeleton.initialize_weights()  # what transformers does to such buffers after loading, in float32
    shapes = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in entries.items()}
    dense = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if quantizer(config) == "fp8" else {}
    loaded: Any = type(skeleton).from_pretrained(
        None, config=config, state_dict=shapes, device_map={"": "meta"}, dtype=dtype, output_loading_info=True, **dense
    )
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise IntactKVError(
                f"the checkpoint does not fit {type(model).__name__}: {kind.replace('_', ' ')}: {names[0]}"
            )
    computed = dict(skeleton.named_buffers())
    for module, name, full in _buffers(model):
        if name in module._non_persistent_buffers_set:
            module._buffers[name] = computed[full]
    return model


def _buffers(model: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """Every buffer's module, its name there and in the model."""
    for prefix, module in model.named_modules():
        for name, held in module._buffers.items():
            if held is not None:
                yield module, name, f"{prefix}.{name}" if prefix else name


def _by_block(model: PreTrainedModel) -> list[list[str]]:
    """The names of every block's parameters."""
    names = {id(module): name for name, module in model.named_modules()}
    return [[f"{names[id(block)]}.{name}" for name, _ in block.named_parameters()] for block in blocks(model)]


@dataclass
class Recipe:
    """What makes a parameter: one tensor of the checkpoint, or several and transformers' conversion of them."""

    target: str
    converter: WeightConverter | None
    dtype: torch.dtype
    quantized: bool  # of fp8 or packed, with scales beside it
    parts: list[tuple[str, str]] = field(default_factory=list)  # a tensor's name and the pattern that it matches

    def make(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """The parameters by name, from the checkpoint's tensors."""
        if self.converter is None:
            return {self.target: tensors[self.parts[0][0]]}
        converter = deepcopy(self.converter)
        for name, pattern in self.parts:
            # scales and what is packed keep their type, as transformers has it
            part: Any = tensors[name].to(self.dtype) if name == self.target or not self.quantized else tensors[name]
            converter.add_tensor(self.target, name, pattern, part)
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

    def of(self, experts: Sequence[int]) -> Recipe:
        """The recipe of some experts alone, where the tensors of each lie apart."""
        seen: dict[str, int] = {}
        parts = []
        for name, pattern in self.parts:
            place = seen[pattern] = seen.get(pattern, -1) + 1
            if place in experts:
                parts.append((name, pattern))
        return replace(self, parts=parts)


def _recipes(model: PreTrainedModel, entries: Mapping[str, Entry]) -> dict[str, Recipe]:
    """Every parameter's recipe, by transformers' own renamings and conversions."""
    transforms: Any = model._weight_conversions or []
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Recipe] = {}
    fp8 = any(each.dtype == torch.float8_e4m3fn for each in entries.values())
    quantized = fp8 or quantizer(model.config) is not None
    for name in sorted(entries, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            converter = None if pattern is None else by_pattern[pattern]
            group = groups.setdefault(target, Recipe(target, converter, state[target].dtype, quantized))
            group.parts.append((name, pattern or name))
    found: dict[str, Recipe] = {}
    for group in groups.values():
        shapes = {name: torch.empty(entries[name].shape, device="meta") for name, _ in group.parts}
        found |= dict.fromkeys(group.make(shapes, model), group)
    tied: dict[str, str] = model.all_tied_weights_keys
    return found | {name: found[source] for name, source in tied.items() if name not in found}


class Store(Mapping[str, Tensor]):
    """The weights of `model` by name, read when its modules ask for them, and the digest of all that was read."""

    def __init__(self, model: PreTrainedModel, shards: Shards, device: torch.device) -> None:
        from intactkv.checkpoint.lent import lend_

        self.device, self.skip_head, self._hashed = device, False, True
        self.changed: Callable[[str, Tensor], Tensor] | None = None  # what is made of a parameter before it is used
        self._model, self._shards = model, shards
        self._recipes = _recipes(model, shards.entries)
        self._ahead: Ahead | None = None
        self._made: dict[str, Tensor] = {}  # what a conversion has made besides, until it is asked for
        self._shapes = {name: each.shape for name, each in model.state_dict().items()}
        self._by_expert: dict[int, bool] = {}  # whether a conversion can make one expert's weights, tried once
        self._routed: list[int] | None = None  # the experts that tokens are sent to, while they work
        self._embedding: str | None = None
        self._pool, self._then = ThreadPoolExecutor(_HASHERS, "sha256"), ThreadPoolExecutor(1, "then")
        self._digests: dict[str, Future[str]] = {}
        self._waiting: deque[Future[str]] = deque(maxlen=_HASHED_LATER)
        for module, name, full in _buffers(model):
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
                self._follow_router_(module, name, arguments.index(name), len(next(iter(own.values()))))
                found |= {f"{path}.{each}" for each in own}
        return found

    def _follow_router_(self, module: Any, name: str, place: int, count: int) -> None:
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            chosen = kwargs[name] if name in kwargs else args[place]
            self._routed = [i for i in chosen.unique().tolist() if i < count]
            try:
                return plain(*args, **kwargs)
            finally:
                self._routed = None

        module.forward = forward
