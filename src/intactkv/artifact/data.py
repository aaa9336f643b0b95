"""The artifact: the full model's keys and values of a few prefix tokens, as plain frozen data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from intactkv.artifact import file
from intactkv.artifact.digest import digests, joined
from intactkv.error import IntactKVError
from intactkv.files import check_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from intactkv.attaching.prefix_cache import PrefixCache


@dataclass(frozen=True, eq=False)
class IntactKV:
    """The full-precision keys and values of a token prefix, one pair per layer that has them.

    `ids` are the prefix's token ids. `layers[i]` is `(key, value)` exactly as layer `i` hands them to
    `Cache.update`: after RoPE, `(kv_head, prefix, dim)`, where keys and values may differ in heads and width, and
    where a layer without a cache of its own (linear attention, shared KV) has no entry. `logits` are the output
    embedding's raw output at the prefix positions, which an attached model gives there; without them (None), it gives
    its own. `generate` and engines never read them, and they are most of an artifact's bytes.
    `fingerprint` is compared with the model at `attach`; `provenance` says which model, weights and tokenizer the
    tensors come from and in which basis they are.

    Source: Liu et al., "IntactKV", Findings of ACL 2024, arXiv 2403.01241, section 3.
    """

    ids: Int[Tensor, "prefix"]
    layers: Mapping[int, tuple[Float[Tensor, "head prefix dim"], Float[Tensor, "head prefix dim"]]]
    logits: Float[Tensor, "prefix vocab"] | None
    fingerprint: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_shapes(self)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        kind = self.fingerprint.get("model_type", "?")
        return f"IntactKV({len(self)} tokens, {len(self.layers)} layers of {kind}, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, logits not counted: what a serving engine has to hold."""
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)

    @property
    def digest(self) -> str:
        """SHA-256 over ids, keys, values and logits: what tells one artifact from another.

        Hashed once, and again only after torch has changed a tensor in place, as its version counter says.
        """
        tensors = self.tensors
        state = None
        if not any(t.is_inference() for t in tensors.values()):  # these keep no counter
            state = [(name, t.data_ptr(), t._version) for name, t in tensors.items()]
        known, digest = vars(self).get("_digest", (None, ""))
        if state is None or known != state:
            digest = joined({}, digests(tensors))
            object.__setattr__(self, "_digest", (state, digest))
        return digest

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors under the names they have in the file."""
        named = {"ids": self.ids} if self.logits is None else {"ids": self.ids, "logits": self.logits}
        for i, (key, value) in self.layers.items():
            named[f"layers.{i}.key"], named[f"layers.{i}.value"] = key, value
        return named

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> IntactKV:
        """A copy on `device` with keys, values and logits in `dtype`; `ids` keep their integer type."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype, copy=True)

        layers = {i: (moved(key), moved(value)) for i, (key, value) in self.layers.items()}
        ids = self.ids.to(device=device, copy=True)
        logits = None if self.logits is None else moved(self.logits)
        return replace(self, ids=ids, layers=layers, logits=logits)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artifact to `path` atomically: a reader sees the old file, the new one, or none, never half.

        Raises `IntactKVError` where the folder of `path` does not exist, where `path` is a folder itself, and where
        the provenance is no JSON data.
        """
        file.write(self, Path(path))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> IntactKV:
        """Read an artifact and check it whole: version, digest, names, shapes and types.

        Raises `IntactKVError`, one sentence each, for a missing, truncated, foreign, future, tampered or misshapen
        file, and for one with NaN or infinity.
        """
        path = Path(path)
        header, tensors = file.read(path)
        layers = file.by_layer(tensors, path)
        try:
            kv = cls(tensors["ids"], layers, tensors.get("logits"), header["fingerprint"], header["provenance"])
        except IntactKVError as error:
            raise IntactKVError(f"{path} is no valid artifact: {error}; capture it again") from error
        check_finite(kv.layers, f"{path} is of no use; capture it again")
        return kv.to(device=device)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, revision: str | None = None, device: torch.device | str = "cpu"
    ) -> IntactKV:
        """Read the artifact of a folder or a Hub repository, `prefix.intactkv` in it, or of one file.

        `revision` is a branch, tag or commit on the Hub. Raises `IntactKVError` as `load` does, and where there is no
        such folder, repository or file in it.
        """
        from intactkv.artifact.hub import artifact_file

        return cls.load(artifact_file(source, revision=revision), device=device)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the artifact to `prefix.intactkv` in `folder`, which is made where it is missing.

        Raises `IntactKVError` as `save` does.
        """
        from intactkv.artifact.hub import FILE

        path = Path(folder)
        check_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        return self.save(path / FILE)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
    ) -> str:
        """Upload the artifact to a model repository on the Hub, made where it is missing, and return the commit's URL.

        A repository without a card gets one, generated from the provenance. `from_pretrained` and `attach` read it
        back by name. Raises `IntactKVError` where the Hub refuses or is not reached.
        """
        from intactkv.artifact.hub import push

        return push(self, repo_id, private=private, revision=revision, token=token)

    def cache(self, model: PreTrainedModel, batch_size: int = 1, *, check: bool = True) -> PrefixCache:
        """A cache that already holds the prefix, so that its tokens need not be computed again.

        Give the *whole* ids, prefix included, to `generate`, or only the rest to `model(...)` with an attention
        mask of the whole length. Every row must begin with the prefix in column 0: **no left padding**, for which
        `attach` is right. One cache serves one prompt and what is said on after it.

        `generate` is checked: a row that does not begin with what the cache holds is refused. A direct call of the
        model cannot be: the tokens that the cache stands for are not in it, and a mask that hides them, another
        prompt's tokens or a missing BOS give other logits without a word.

        Raises `IntactKVError` where `model`'s fingerprint differs, where (unless `check` is False) its own keys and
        values are in another basis, and where it has recurrent layers, whose state keys and values do not restore.
        The basis is compared, in a forward of P tokens, for the first cache of a model and an artifact only.
        """
        from intactkv.attaching.prefix_cache import prefix_cache

        return prefix_cache(model, self, batch_size, check=check)


def check_finite(layers: Mapping[int, tuple[Tensor, Tensor]], remedy: str) -> None:
    """Raise `IntactKVError` naming the first layer whose keys or values hold NaN or infinity, which would spread."""
    for i, pair in layers.items():
        for name, tensor in zip(("keys", "values"), pair, strict=True):
            if not bool(torch.isfinite(tensor.double()).all()):
                raise IntactKVError(f"the {name} of layer {i} hold NaN or infinity; {remedy}")


def _check_shapes(kv: IntactKV) -> None:
    if kv.ids.ndim != 1 or kv.ids.dtype != torch.int64 or len(kv.ids) == 0:
        raise IntactKVError(
            f"ids is {kv.ids.dtype} of shape {tuple(kv.ids.shape)}; it must be a non-empty int64 vector of token ids"
        )
    if not kv.layers:
        raise IntactKVError("no layer has keys and values; an intact KV needs a model with attention layers")
    if kv.logits is not None and (
        kv.logits.ndim != 2 or len(kv.logits) != len(kv.ids) or not kv.logits.is_floating_point()
    ):
        raise IntactKVError(
            f"logits is {kv.logits.dtype} of shape {tuple(kv.logits.shape)}; it must be floating point of shape "
            f"({len(kv.ids)}, vocab)"
        )
    for i, pair in kv.layers.items():
        for name, tensor in zip(("key", "value"), pair, strict=True):
            if tensor.ndim != 3 or tensor.shape[1] != len(kv.ids) or not tensor.is_floating_point():
                raise IntactKVError(
                    f"layers.{i}.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be floating point "
                    f"of shape (head, {len(kv.ids)}, dim)"
                )
