"""Load models and tokenizers, with one clear sentence where that fails: the one loader there is."""

from __future__ import annotations

import io
import logging as logs
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

from intactkv.attaching.plain import made_for_prefix, warn_when_plain_
from intactkv.checkpoint.compressed import check_packing, online_transforms
from intactkv.checkpoint.source import check_exists, config_of, holds_floats, located, weight_files
from intactkv.checkpoint.stream import CannotStream, larger_than_memory, load_streamed
from intactkv.error import IntactKVError, first_line

log = logs.getLogger(__name__)


def load_model(source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal LM in eval mode from a folder, a hub name or a GGUF file, quantized checkpoints included.

    Of a GGUF transformers makes a dense model; it counts as quantized unless all its tensors are floating-point.
    Rotations that a compressed-tensors checkpoint wants done while the model runs, which transformers drops, are put
    back. A checkpoint made for its intact KV warns once when it runs without. Raises `IntactKVError` where there is no
    model, and where the checkpoint and transformers' model do not hold the same tensors: what is missing would be
    random, what is unexpected would be dropped.
    """
    model, losses = load_with_losses(source, dtype=dtype)
    for kind, names in losses.items():
        if names:
            raise IntactKVError(
                f"{source} does not fit transformers' {type(model).__name__}: {kind.replace('_', ' ')} such as "
                f"{names[0]}; load it with the library that made it and call intactkv from Python"
            )
    return model


def load_with_losses(
    source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """As `load_model`, but what did not fit is returned by kind: missing, unexpected and mismatched keys."""
    check_exists(source)
    made_for = made_for_prefix(source)
    _check_packing(source)
    try:
        with _quiet():
            folder, options = located(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
            model, report = loaded
            if options and holds_floats(source):
                _forget_gguf_(model)
            restored: set[str] = set()
            if getattr(model.config, "quantization_config", None) is not None:
                with torch.no_grad():  # some checkpoints unpack, with a progress bar, at their first forward
                    model(torch.zeros(1, 1, dtype=torch.int64, device=model.device))
                _let_weights_move_(model)
                if report["unexpected_keys"]:
                    restored = _restore_transforms_(model, source, set(report["unexpected_keys"]))
    except Exception as error:  # whatever transformers makes of spoilt files
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise IntactKVError(f"{source} cannot be loaded as a causal LM: {first_line(error)}") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if made_for is not None:
        warn_when_plain_(model, made_for, source)
    losses = {kind: sorted({*map(str, report[kind])} - restored) for kind in kinds}
    losses["unexpected_keys"] = _but_zero_biases(source, losses["unexpected_keys"])
    return model.eval(), losses


def _but_zero_biases(source: str | os.PathLike[str], names: list[str]) -> list[str]:
    """The tensors that are lost where transformers drops these: not biases of zeros, which GPTQ's packers write."""
    biases = {name for name in names if name.endswith(".bias")}
    zero = set()
    if biases:
        for file in weight_files(source):
            zero |= {name for name in biases & set(file.keys()) if not bool(file.get_tensor(name).any())}
    return [name for name in names if name not in zero]


def _check_packing(source: str | os.PathLike[str]) -> None:
    try:
        config = PreTrainedConfig.get_config_dict(source)[0].get("quantization_config") or {}
    except (OSError, ValueError):  # loading says what is wrong
        return

    def packed() -> Iterator[tuple[str, int, int]]:
        for file in weight_files(source):
            for name in file.keys():  # noqa: SIM118 (a file is no mapping)
                if name.endswith(".weight_packed"):
                    row = int(file.get_tensor(f"{name[:-6]}shape")[-1])
                    yield name, file.get_slice(name).get_shape()[-1], row

    check_packing(source, config, packed())


def _let_weights_move_(model: PreTrainedModel) -> None:
    """Undo the offloading that compressed-tensors sets up where it unpacks: `.to(device)` would leave weights behind.

    They would stay on the CPU, and so would all that is computed with them, without a word.
    """
    if model.config.quantization_config.quant_method == QuantizationMethod.COMPRESSED_TENSORS:
        from compressed_tensors.offload import remove_dispatch

        remove_dispatch(model)


def _restore_transforms_(model: PreTrainedModel, source: str | os.PathLike[str], unexpected: set[str]) -> set[str]:
    """Put a compressed-tensors checkpoint's online transforms back and return which unexpected tensors they took.

    transformers 5.15 to 5.23 ignores `transform_config`. Transforms of weights are in the weights already; those of
    inputs and outputs are hooks, with matrices of their own in the checkpoint, of which tied ones are stored once.
    """
    settings = PreTrainedConfig.get_config_dict(source)[0]["quantization_config"]
    groups = online_transforms(settings)
    if not groups:
        return set()
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    before = set(model.state_dict())
    config = {**settings["transform_config"], "config_groups": groups}
    apply_transform_config(model, TransformConfig.model_validate(config))
    wanted = (set(model.state_dict()) - before) & unexpected
    tensors: dict[str, Tensor] = {}
    for file in weight_files(source):
        tensors |= {name: file.get_tensor(name) for name in wanted & set(file.keys())}
    model.load_state_dict(tensors, strict=False)
    return set(tensors)


def load_model_on(
    source: str | os.PathLike[str], device: str = "auto", *, dtype: str | torch.dtype = "auto"
) -> PreTrainedModel:
    """As `load_model`, on a device and in a dtype by their names, of which "auto" is the fastest that is right.

    A device: the accelerator if there is one. A dtype: the one the checkpoint is stored in, but float32 on processors
    that have no instructions for it. Raises `IntactKVError` for names that torch does not know or cannot serve.
    """
    where = device_named(device)
    model: Any = load_model(source, dtype=dtype_named(dtype, source, where))
    try:
        return model.to(where)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise IntactKVError(
            f"{source} cannot be put on --device {device} ({first_line(error)}); use cpu, or one that torch sees"
        ) from error


def load_full(
    source: str | os.PathLike[str],
    device: str = "auto",
    *,
    dtype: str | torch.dtype = "auto",
    stream: bool | None = None,
) -> PreTrainedModel:
    """A full model by the names of a device and a dtype, as `load_model_on`, or streamed: where `stream` says so, by
    default where it is larger than memory.

    Raises `IntactKVError` as both do.
    """
    if not (larger_than_memory(source) if stream is None else stream):
        return load_model_on(source, device, dtype=dtype)
    where = device_named(device)
    log.info("streaming %s", source)
    return load_streamed(source, dtype=dtype_named(dtype, source, where), device=where)


def load_compared(
    source: str | os.PathLike[str], device: str = "auto", *, dtype: str | torch.dtype = "auto", stream: bool = False
) -> PreTrainedModel:
    """One of two models that are compared, as `load_model_on`, or streamed where `stream` says so.

    Warns where its format cannot be streamed, and loads it whole. Raises `IntactKVError` as both do.
    """
    if stream:
        where = device_named(device)
        try:
            model = load_streamed(source, dtype=dtype_named(dtype, source, where), device=where, quantized=True)
        except CannotStream as error:
            warnings.warn(f"{error}; it is loaded whole", stacklevel=2)
        else:
            log.info("streaming %s", source)
            return model
    return load_model_on(source, device, dtype=dtype)


def device_named(name: str) -> torch.device:
    """A device by its name; "auto" is the accelerator if there is one. Raises `IntactKVError` for unknown names."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        # float64, in which figures are summed, is not to be had on "mps"
        if accelerator is None or accelerator.type == "mps":
            return torch.device("cpu")
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    try:
        found = torch.device(name)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        return found
    except RuntimeError as error:
        raise IntactKVError(
            f"a model cannot be put on --device {name} ({first_line(error)}); use auto, cpu or cuda"
        ) from error


def dtype_named(name: str | torch.dtype, source: str | os.PathLike[str], device: torch.device) -> torch.dtype | str:
    """A dtype by its name; "auto" is the checkpoint's own, float32 where that one is slow.

    Forwards in bfloat16 take six times as long as in float32 on x86 processors without instructions for it, in float16
    three times on those of 2024 too. Raises `IntactKVError` for unknown names.
    """
    if isinstance(name, torch.dtype):
        return name
    if name != "auto":
        found = getattr(torch, name, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise IntactKVError(f"--dtype {name} is unknown to torch; use auto, float32, bfloat16 or float16")
        return found
    if device.type != "cpu":
        return "auto"
    config = config_of(source)
    if config is None:
        return "auto"
    stored = config.get_text_config(decoder=True).dtype
    slow = stored == torch.float16 or (stored == torch.bfloat16 and not _computes_bfloat16())
    return torch.float32 if slow else "auto"


def _computes_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices; what an older torch cannot tell counts as no."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, or of the folder that a GGUF lies in. Raises `IntactKVError` without one.

    Never the tokenizer that transformers reads out of a GGUF, which can be another than the model's: 5.17 splits the
    text of Gemma 3's into characters and takes `<|im_start|>` for the end of SmolLM2's.
    """
    check_exists(source)
    folder, options = located(source)
    if options and not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise IntactKVError(
            f"{source} has no tokenizer.json beside it, and the tokenizer that transformers reads out of a GGUF can be "
            "another than the model's; put the model's tokenizer.json and tokenizer_config.json there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise IntactKVError(f"{source} has no tokenizer that can be loaded: {first_line(error)}") from error


def _forget_gguf_(model: PreTrainedModel) -> None:
    """Make a model that was read from floating-point tensors one like any other: not quantized, and to be saved."""
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of other libraries: their own switches, stderr for those without one."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of lost keys becomes our error
    logger: Any = import_module("loguru").logger if find_spec("loguru") else None
    if logger is not None:
        logger.disable("compressed_tensors")
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if logger is not None and "COMPRESSED_TENSORS_LOG_DISABLED" not in os.environ:
            logger.enable("compressed_tensors")
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
