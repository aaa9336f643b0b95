"""A model whose weights stay on the disk: each matrix is mapped, used and let go while a forward passes through.

accelerate's disk offload uses what safetensors files hold where it lies; its hooks do the work. What they would load
whole, and a prefix does not need, is done here: of the vocabulary's embeddings only the rows of the ids are read, of
the head slices. So a forward needs memory for one matrix, and the time of reading the blocks once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from intactkv.artifact.digest import digests, joined, tensor_digest
from intactkv.checkpoint.source import check_exists, config_of, refuse_quantized, weights_folder
from intactkv.decoder import blocks
from intactkv.error import IntactKVError, first_line

_SLICE = 8192  # rows of the head at a time
_BIG = 2**25  # bytes from which a module beside the blocks stays on the disk too
_HASHED_LATER = 4  # matrices that may wait to be hashed


def stored_bytes(folder: str | os.PathLike[str]) -> int:
    """The size of a folder's safetensors."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def larger_than_memory(source: str | os.PathLike[str]) -> bool:
    """Whether a folder is streamed without being asked: where it takes more than a quarter of the free memory."""
    if not Path(source).is_dir() or find_spec("accelerate") is None:
        return False
    import psutil  # accelerate brings it

    return bool(stored_bytes(source) > psutil.virtual_memory().available / 4)


def streamed(model: PreTrainedModel) -> Store | None:
    """Where the weights of a streamed model come from; None for any other."""
    return getattr(model, "_intactkv_store", None)


def load_streamed(source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal LM in eval mode from a folder or Hub name of safetensors, whose weights are read at each forward.

    Tensors that transformers merges on loading (experts) are written to a temporary folder once (TMPDIR). Raises
    `IntactKVError` for other sources and for quantized ones, where a tensor is missing, unexpected or of another shape,
    and where accelerate is not installed.
    """
    if find_spec("accelerate") is None:
        raise IntactKVError("streaming a checkpoint needs accelerate: pip install 'intactkv[stream]'")
    check_exists(source)
    where = weights_folder(source)
    if not stored_bytes(where) or (config := config_of(where)) is None:
        raise IntactKVError(f"{source} cannot be streamed: give a folder or Hub name with *.safetensors")
    refuse_quantized(config)
    folder = tempfile.mkdtemp(prefix="intactkv-")
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        # float32 is made of what is stored, matrix by matrix: transformers would hold all of it at once; and what is
        # stored is not always what config.json says
        wide, as_stored = dtype == torch.float32, _stored_as(where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=as_stored if wide else dtype, device_map=_places(skeleton), offload_folder=folder,
            output_loading_info=True,
        )  # fmt: skip
        model, report = loaded
        if wide:
            _widen_(model)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | ValueError | KeyError | RuntimeError | SafetensorError):
            raise IntactKVError(f"{source} cannot be streamed: {first_line(error)}") from error
        raise
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise IntactKVError(f"{source} does not fit {type(model).__name__}: {kind.replace('_', ' ')}: {names[0]}")
    model._intactkv_store = Store(model)
    model.config.name_or_path = str(source)
    return model.eval()


def _stored_as(folder: Path) -> torch.dtype:
    """The widest floating type of a folder's safetensors."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in set(file.keys())}
    if "F32" in found or {"F16", "BF16"} <= found:
        return torch.float32
    return torch.float16 if "F16" in found else torch.bfloat16


def _widen_(model: PreTrainedModel) -> None:
    """Let a model compute in float32: accelerate's hooks give each matrix the type that its place has."""
    for module in model.modules():
        parts: Any = (module._parameters, module._buffers)
        for held in parts:
            for name, tensor in held.items():
                if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16):
                    wide = tensor.detach().float()
                    held[name] = nn.Parameter(wide, requires_grad=False) if held is module._parameters else wide
    model.config.dtype = torch.float32


def _places(skeleton: PreTrainedModel) -> dict[str, str]:
    """Where each part's weights are: the blocks' and other large ones on the disk, small ones in memory."""
    layers = blocks(skeleton)
    inside = {id(module) for block in layers for module in block.modules()}
    heads = {id(block) for block in layers}
    found = {}
    for name, module in skeleton.named_modules():
        if id(module) in heads:
            found[name] = "disk"
        stored = [t for n, t in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
        held = [*module.parameters(recurse=False), *stored]
        if held and id(module) not in inside:
            found[name] = "disk" if sum(4 * each.numel() for each in held) > _BIG else "cpu"
    return found


def _weights_of(module: nn.Module) -> Any:
    """Where accelerate's hook of a module finds its weights; None where it has none on the disk."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((found for each in hooks if (found := getattr(each, "weights_map", None)) is not None), None)


class Store(Mapping[str, Tensor]):
    """The weights on the disk by name, and the digest of all that was read of them.

    It takes the place of accelerate's own loader behind every hook of `model`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.skip_head = False
        self._embedding: str | None = None
        self._pool = ThreadPoolExecutor(1, "sha256")
        self._loader: Any = None
        for module in model.modules():
            if (weights := _weights_of(module)) is not None:
                self._loader = weights.dataset
                weights.dataset = self
        self._held = digests({name: each for name, each in model.state_dict().items() if each.device.type != "meta"})
        self._digests: dict[str, Future[str]] = {}
        self._waiting: deque[Future[str]] = deque(maxlen=_HASHED_LATER)
        if self._loader is not None:
            self._read_rows_(model)
            self._read_slices_(model)

    def begin(self, *, head: bool) -> None:
        """A capture begins: nothing has been read yet; without `head` there are no logits."""
        self.skip_head, self._digests = not head, {}

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of what is held in memory, and of every tensor, row and slice that was read."""
        read = {name: each.result() for name, each in self._digests.items()}
        return "read: " + joined({}, {**self._held, **read})

    def __getitem__(self, name: str) -> Tensor:
        entry = self._loader.index.get(name, {})
        if "safetensors_file" not in entry:  # what was merged on loading
            tensor: Tensor = self._loader[name]
            self._hash(name, tensor)
            return tensor
        try:
            with safe_open(entry["safetensors_file"], framework="pt") as file:
                stored = file.get_tensor(entry["weight_name"])
        except (OSError, SafetensorError) as error:
            raise IntactKVError(
                f"{entry['safetensors_file']} does not give {entry['weight_name']} ({first_line(error)}); get it again"
            ) from error
        self._hash(name, stored)
        return stored  # and the hook makes it of its place's type

    def __iter__(self) -> Iterator[str]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def embeddings(self, rows: slice) -> Float[Tensor, "row hidden"] | None:
        """Rows of the input embeddings, where `module.weight` cannot be read; None where it can."""
        return None if self._embedding is None else self._part(self._embedding, rows, torch.float32)

    def _hash(self, name: str, tensor: Tensor) -> None:
        if name in self._digests:
            return
        if len(self._waiting) == _HASHED_LATER:  # they are hashed in order
            self._waiting[0].result()
        self._digests[name] = self._pool.submit(tensor_digest, tensor)
        self._waiting.append(self._digests[name])

    def _part(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        entry = self._loader.index[name]
        with safe_open(entry["safetensors_file"], framework="pt") as file:
            stored = file.get_slice(entry["weight_name"])[rows]
        self._hash(f"{name}[{rows.start}:{rows.stop}]", stored)
        return stored.to(dtype)

    def _taken_over(self, module: Any) -> str | None:
        """The name of a module's weight, if accelerate would load it whole; it does not from now on."""
        from accelerate.hooks import remove_hook_from_module

        weights = _weights_of(module)
        if weights is None or not isinstance(getattr(module, "weight", None), nn.Parameter):
            return None
        name = f"{weights.prefix}weight"
        if "safetensors_file" not in self._loader.index.get(name, {}):
            return None
        remove_hook_from_module(module)
        return name

    def _read_rows_(self, model: PreTrainedModel) -> None:
        """The embeddings read the rows of the ids alone."""
        module: Any = model.get_input_embeddings()
        if not isinstance(module, nn.Embedding) or (name := self._taken_over(module)) is None:
            return
        self._embedding, plain, padding = name, type(module).forward, module.padding_idx
        # not "meta", where Llama 4 would put the ids; it takes no memory, and whoever reads it sees that it is none
        nowhere = torch.full((), torch.nan, dtype=module.weight.dtype).expand(module.weight.shape)
        module.weight = placeholder = nn.Parameter(nowhere, requires_grad=False)

        def forward(ids: Int[Tensor, "*token"]) -> Tensor:
            unique, places = ids.unique(return_inverse=True)
            rows = torch.cat([self._part(name, slice(i, i + 1), nowhere.dtype) for i in unique.tolist()])
            module.weight, module.padding_idx = nn.Parameter(rows, requires_grad=False), None
            try:
                return plain(module, places)
            finally:
                module.weight, module.padding_idx = placeholder, padding

        vars(module)["forward"] = forward

    def _read_slices_(self, model: PreTrainedModel) -> None:
        """The head works a slice of the vocabulary at a time, or not at all."""
        module: Any = model.get_output_embeddings()
        if type(module) is not nn.Linear or module.bias is not None or (name := self._taken_over(module)) is None:
            return
        vocabulary = module.weight.shape[0]

        def forward(hidden: Float[Tensor, "*token hidden"]) -> Tensor:
            if self.skip_head:
                return hidden[..., :1]
            cuts = [slice(i, min(i + _SLICE, vocabulary)) for i in range(0, vocabulary, _SLICE)]
            dtype = module.weight.dtype
            return torch.cat([nn.functional.linear(hidden, self._part(name, cut, dtype)) for cut in cuts], -1)

        module.forward = forward
