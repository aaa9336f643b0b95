"""A streamed capture that can be killed: after each block what it has is in a small file, from which it goes on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from intactkv.artifact.digest import digests, joined
from intactkv.checkpoint.store import Store
from intactkv.decoder import blocks, replaced_forwards
from intactkv.error import IntactKVError
from intactkv.files import write_atomically

log = logging.getLogger(__name__)


class Partial:
    """What blocks have handed on and to their cache, and the digests of what they read.

    Blocks that are there already are not run again: the model computes its positions and masks anew, the cache gets
    their keys and values, and the next block the last one's output. A file of another checkpoint, prefix, dtype, device
    or library is not used, nor a spoilt one, as its digest tells. A model whose blocks tell each other more than that
    (Gemma 3n and 4) leaves no file.
    """

    def __init__(
        self, path: str | os.PathLike[str], model: PreTrainedModel, store: Store, ids: Int[Tensor, "prefix"]
    ) -> None:
        self._path, self._store = Path(path), store
        versions = {name: version(name) for name in ("torch", "transformers")}
        about = [store.identity, ids.tolist(), str(model.dtype), store.device.type, type(model).__name__, versions]
        self._about, self._told = json.dumps(about, sort_keys=True), False
        self.done, self.layers = 0, dict[int, tuple[Tensor, Tensor]]()
        self._output: list[Tensor | None] | Tensor = []
        try:
            self._load()
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError):
            self.done = 0
        if self.done:
            log.info("going on behind block %d, from %s", self.done, self._path)

    def _load(self) -> None:
        with safe_open(self._path, framework="pt") as file:
            said = file.metadata() or {}
            if said["about"] != self._about:
                return
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
        if said["digest"] != joined(said, digests(tensors)):
            return
        places = json.loads(said["output"])
        outputs = [None if name is None else tensors[name] for name in places or ["output"]]
        self._output = outputs if places is not None else outputs[0]  # type: ignore[assignment]
        numbers = sorted(int(name.partition(".")[2]) for name in tensors if name.startswith("key."))
        self.layers = {i: (tensors[f"key.{i}"], tensors[f"value.{i}"]) for i in numbers}
        read, self.done = json.loads(said["digests"]), int(said["blocks"])
        self._store.go_on(read)  # last: a file that is not used has told nothing

    @contextmanager
    def followed(self, model: PreTrainedModel, cache: Any) -> Iterator[None]:
        """While it is open, a forward skips the blocks that are done, and leaves each further one in the file."""
        stack, first, seen, follows = blocks(model), self.done, set[int](), True

        def wrap(i: int, block: nn.Module) -> Any:
            plain = block.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal follows
                again = i in seen
                seen.add(i)
                if i < first and not again:
                    if i == 0:
                        cache.restore(self.layers, self._store.device)
                    return self._handed_on()
                output = plain(*args, **kwargs)
                more = any(isinstance(each, MutableMapping) and not isinstance(each, Cache) for each in kwargs.values())
                follows = follows and not again and not more and i == self.done
                if follows:
                    self._keep(i + 1, output, cache.recorded)
                return output

            return forward

        with replaced_forwards({block: wrap(i, block) for i, block in enumerate(stack)}):
            yield

    def _handed_on(self) -> Any:
        def copy(tensor: Tensor) -> Tensor:
            return tensor.to(self._store.device, copy=True)

        if isinstance(self._output, Tensor):
            return copy(self._output)
        return tuple(None if each is None else copy(each) for each in self._output)

    def _keep(self, done: int, output: Any, layers: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Leave it in the file, as soon as all that was read so far is hashed."""
        if isinstance(output, Tensor):
            places, tensors = None, {"output": output.to("cpu", copy=True)}
        elif isinstance(output, tuple) and all(each is None or isinstance(each, Tensor) for each in output):
            places = [None if each is None else f"output.{n}" for n, each in enumerate(output)]
            tensors = {f"output.{n}": each.to("cpu", copy=True) for n, each in enumerate(output) if each is not None}
        else:
            return
        self.done = done
        for i, (key, value) in layers.items():
            tensors |= {f"key.{i}": key, f"value.{i}": value}

        def write() -> None:
            said = {"about": self._about, "blocks": str(done), "output": json.dumps(places)}
            said["digests"] = json.dumps(self._store.digests())
            kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
            said["digest"] = joined(said, digests(kept))
            try:
                write_atomically(self._path, save(kept, said))
            except IntactKVError as error:
                if not self._told:
                    log.warning("a capture that is killed begins again: %s", error)
                self._told = True

        self._store.later(write)

    def remove(self) -> None:
        """The capture is whole."""
        self._store.later(lambda: self._path.unlink(missing_ok=True)).result()
