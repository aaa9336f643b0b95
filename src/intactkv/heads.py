"""Tensor-parallel models: transformers splits a layer's heads over processes, and each caches its own alone.

Processes call the same things in the same order: what is gathered here waits for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from transformers import PreTrainedModel

from intactkv.error import IntactKVError
from intactkv.processes import count

# What makes the keys, fused or not, and the style under which its output stays split: transformers 5.23 tells the heads
# of its static cache by the same names (`get_kv_heads_per_rank`). MLA's latents are made whole by every process.
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
_SPLIT = "colwise"
_SAME = 0.02  # of a tensor's norm: what processes that compute the same may differ by, in bfloat16


@dataclass(frozen=True)
class Heads:
    """The heads that this process caches: the `rank`-th of `size` equal parts, or all where they are not `split`."""

    rank: int
    size: int
    split: bool

    def own(self, x: Float[Tensor, "head prefix dim"]) -> Float[Tensor, "own prefix dim"]:
        """Of an artifact's heads this process's: a view. Raises `IntactKVError` for a number that cannot be split."""
        if not self.split:
            return x
        check_divides(len(x), self.size)
        return x.chunk(self.size)[self.rank]

    def whole(self, x: Float[Tensor, "batch own token dim"]) -> Float[Tensor, "batch head token dim"]:
        """All heads, of what this process caches of a layer; every process gets them.

        Raises `IntactKVError` where processes that should cache the same do not.
        """
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        distributed.all_gather(parts, x.contiguous())
        if self.split:
            return torch.cat(parts, dim=1)
        first = parts[0].double()
        if any(float((part.double() - first).norm()) > _SAME * float(first.norm()) for part in parts):
            raise IntactKVError(
                "the processes of this tensor-parallel model cache different keys or values, though its plan splits no "
                "key projection that is known here; load it whole (tp_size=1)"
            )
        return parts[0]


def heads_of(model: PreTrainedModel) -> Heads | None:
    """Which heads of `model` this process caches; None for a model that it holds whole.

    Raises `IntactKVError` for a model that is split otherwise, or whose key heads transformers cannot split so.
    """
    about = getattr(model.config, "distributed_config", None)
    if (getattr(about, "pp_size", None) or 1) > 1:
        raise IntactKVError(
            "each process of a pipeline-parallel model holds some of the layers only, and an intact KV speaks for all; "
            'load it tensor-parallel (tp_size), or with device_map="auto"'
        )
    size = getattr(model, "tp_size", None) or 1
    if size == 1:
        return None
    if count() != size:
        raise IntactKVError(
            f"the model is split over {size} processes, which are not all there are; start as many processes as tp_size"
        )
    split = any(name.rpartition(".")[2] in _KEY_PROJECTIONS and how == _SPLIT for name, how in model.tp_plan.items())
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if split:
        check_divides(heads, size)
    return Heads(distributed.get_rank(), size, split)


def check_divides(heads: int, size: int) -> None:
    """Raise `IntactKVError` where a layer's key heads cannot be split over so many processes."""
    if heads % size:
        raise IntactKVError(
            f"transformers cannot split {heads} key heads over {size} processes; use a divisor of {heads} for tp_size"
        )
