"""An artifact's rows in MLX-LM's own caches, and the file that `mlx_lm.generate --prompt-cache-file` begins with.

The file is written by mlx-lm's own function, whose layout changes from version to version: 0.31 and 0.32 do not read
each other's. Keys are as transformers has them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intactkv.artifact import IntactKV
from intactkv.artifact.door import errors_by_layer, refuse_other_basis
from intactkv.error import IntactKVError
from intactkv.files import check_outputs, replacing


def write_prompt_cache(
    kv: IntactKV, model: str | os.PathLike[str], path: str | os.PathLike[str], *, check: bool = True
) -> Path:
    """Write `kv` to `path` (`.safetensors`) as the prompt cache of `model`, a folder or Hub name that mlx-lm loads.

    The prompt that follows must not hold the prefix again. Raises `IntactKVError` where mlx-lm is missing, for a model
    with other layers or shapes, or whose layers keep states, and, unless `check` is False, for one whose own keys and
    values of the prefix are in another basis.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise IntactKVError(f"{path} must end in .safetensors, which MLX would add to it")
    check_outputs(path)
    try:
        from mlx_lm import load
        from mlx_lm.models.cache import save_prompt_cache
    except ImportError as error:
        raise IntactKVError("this needs mlx-lm: pip install mlx-lm (with mlx[cpu] on Linux)") from error
    loaded: Any = load(os.fspath(model))[0]
    made = filled(loaded, rows_for(kv, loaded, os.fspath(model), check=check), len(kv))
    about = {"model": os.fspath(model), "tokenizer_config": json.dumps({"trust_remote_code": False})}
    with replacing(path) as temporary:
        written = temporary.with_name(f"{temporary.name}.safetensors")  # MLX adds it
        try:
            save_prompt_cache(str(written), made, about)
            os.replace(written, temporary)
        finally:
            written.unlink(missing_ok=True)
    return path


def rows_for(kv: IntactKV, model: Any, name: str, *, check: bool = True) -> list[tuple[Any, Any]]:
    """The keys and values `(1, head, prefix, dim)` of `kv` by layer, as the loaded `model` keeps them.

    Raises `IntactKVError` as `write_prompt_cache` does.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    own: list[Any] = make_prompt_cache(model)
    if len(own) != len(kv.layers) or any(not isinstance(each, KVCache | RotatingKVCache) for each in own):
        raise IntactKVError(
            f"{name} has {len(own)} layers with caches of its own kinds, the intact KV {len(kv.layers)} of keys and "
            "values; give the artifact of this model"
        )
    model(mx.array(kv.ids[None].tolist()), cache=own)
    pairs = {i: (_torch(each.keys, len(kv)), _torch(each.values, len(kv))) for i, each in enumerate(own)}
    errors = errors_by_layer(kv, pairs)
    if check:
        refuse_other_basis(kv, errors)
    found = [
        tuple(mx.array(x[None].float().cpu().numpy()).astype(own[i].keys.dtype) for x in kv.layers[i])
        for i in range(len(own))
    ]
    mx.eval(found)
    return found


def filled(model: Any, rows: Sequence[tuple[Any, Any]], count: int) -> list[Any]:
    """The caches of `model`'s layers, holding the first `count` of `rows`."""
    from mlx_lm.models.cache import make_prompt_cache

    made: list[Any] = make_prompt_cache(model)
    for each, (key, value) in zip(made, rows, strict=True):
        each.update_and_fetch(key[:, :, :count], value[:, :, :count])
    return made


def _torch(states: Any, length: int) -> Tensor:
    """The first `length` rows `(head, token, dim)` of MLX's `(1, head, token, dim)`, which may have more room."""
    import mlx.core as mx
    import numpy as np

    return torch.from_numpy(np.array(states[0, :, :length].astype(mx.float32)))
