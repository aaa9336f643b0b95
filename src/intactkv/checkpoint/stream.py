"""A model whose weights stay where they lie: each matrix is read, used and let go while a forward passes through.

The model is transformers' own, on the meta device, and a hook fetches each module's weights when it computes
(`store.py`). So a forward needs memory for one matrix, none on the disk, and the time of reading once. On a GPU the
next block's weights are uploaded while this one computes (`ahead.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedConfig, PreTrainedModel

from intactkv.checkpoint.compressed import check_packing, online_transforms
from intactkv.checkpoint.remote import Repository, bytes_on_the_hub, in_cache
from intactkv.checkpoint.shards import Entry, Folder, Shards
from intactkv.checkpoint.source import check_exists, config_of, is_gguf, quantizer, refuse_quantized
from intactkv.checkpoint.store import Store, buffers
from intactkv.error import IntactKVError, first_line


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
    for module, name, full in buffers(model):
        if name in module._non_persistent_buffers_set:
            module._buffers[name] = computed[full]
    return model
