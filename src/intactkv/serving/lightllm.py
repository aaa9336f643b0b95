"""An artifact as the files that LightLLM's `prompt_cache_kv_buffer` names, one for each tensor-parallel rank.

LightLLM puts them into its prompt cache at its start and never drops them. It reads them with torch's weights-only
loader: a dictionary of one tensor, of layers, tokens, the rank's key heads and then its value heads, and channels.

Source: LightLLM's own code, as read: `preload_prompt_cache_kv_buffer` at 00fb9d7, `MemoryManager` at 148e83c. It was
not run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from intactkv.artifact import IntactKV
from intactkv.artifact.served import checkpoint_folder, refuse_unchecked
from intactkv.error import IntactKVError
from intactkv.files import check_outputs, replacing
from intactkv.serving.layout import head_slice

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # whose keys it rotates as transformers does, in one cache
ADVICE = (
    "LightLLM as read at 148e83c reserves these rows and keeps none of them: its load_index_kv_buffer copies them into "
    "a tensor of their own, and every prompt that begins with the prefix then reads what the memory held before; in "
    "lightllm/common/kv_cache_mem_manager/mem_manager.py let that line be "
    'self.kv_buffer[:, index] = load_tensor_dict["kv_buffer"].to(self.kv_buffer)'
)


def write_prompt_buffer(
    kv: IntactKV,
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    ranks: int = 1,
    check: bool = True,
) -> dict[str, Any]:
    """Write `kv` to `path` for the checkpoint `model`, served on so many `ranks`; what its config.json needs.

    Of several ranks, `_rank_0` and so on go before the suffix. Raises `IntactKVError` for a model whose cache is known
    to be, or may be, another one, for heads that `ranks` does not divide, and, unless `check` is False, where nothing
    says that `kv` is in the checkpoint's basis.
    """
    path = Path(path)
    _check_model(kv)
    if _heads(kv) % ranks:
        raise IntactKVError(f"{_heads(kv)} key heads cannot be split over {ranks} ranks; use a divisor of them")
    files = [path if ranks == 1 else path.with_stem(f"{path.stem}_rank_{rank}") for rank in range(ranks)]
    check_outputs(*files)
    folder = checkpoint_folder(model)
    if check:
        refuse_unchecked(kv, folder, str(model))
    for rank, file in enumerate(files):
        with replacing(file) as temporary:
            torch.save({"kv_buffer": buffer(kv, rank, ranks)}, temporary)
    return {
        "prompt_cache_token_ids": kv.ids.tolist(),
        "prompt_cache_kv_buffer": {f"rank_{rank}": _named(file, folder) for rank, file in enumerate(files)},
    }


def buffer(kv: IntactKV, rank: int = 0, ranks: int = 1) -> Float[Tensor, "layer prefix keys_and_values dim"]:
    """The rows of one tensor-parallel rank."""
    own = head_slice(_heads(kv), rank, ranks)
    layers = [torch.cat([key[own], value[own]]) for _, (key, value) in sorted(kv.layers.items())]
    return torch.stack(layers).transpose(1, 2).contiguous()


def _heads(kv: IntactKV) -> int:
    return next(iter(kv.layers.values()))[0].shape[0]


def _check_model(kv: IntactKV) -> None:
    told = kv.fingerprint
    if told.get("model_type") not in MODEL_TYPES:
        raise IntactKVError(
            f"how LightLLM keeps keys and values of {told.get('model_type')} is not known here; it is of "
            f"{', '.join(MODEL_TYPES)}"
        )
    kinds = told.get("layer_types") or (["sliding_attention"] if told.get("sliding_window") else [])
    if "sliding_attention" in kinds:
        raise IntactKVError("LightLLM's caches of sliding windows are not known here; give a model without them")
    if sorted(kv.layers) != list(range(told["num_hidden_layers"])):
        raise IntactKVError("some layers of this intact KV have no keys and values; LightLLM has one cache of them all")


def _named(file: Path, folder: Path) -> str:
    """A file as LightLLM looks for it: from the checkpoint's folder on."""
    file, folder = file.resolve(), folder.resolve()
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)
