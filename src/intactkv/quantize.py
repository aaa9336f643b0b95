"""Quantize a full model's Linear layers into a packed checkpoint that transformers and vLLM load.

The arithmetic is llm-compressor's. This file chooses its settings, keeps the full model untouched, and writes
the folder whole or not at all. A method is a frozen dataclass whose fields are its settings; `RTN`, round to
nearest, needs no data.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from intactkv.kv import IntactKVError

_BITS = (2, 3, 4, 8)
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "chat_template*", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class RTN:
    """Round every weight to the nearest of 2^bits levels, spaced evenly over `group_size` weights of its row.

    Symmetric levels are centred on zero: scale = max|w| / ((2^bits - 1) / 2). Asymmetric ones run from
    min(w, 0) to max(w, 0) and keep a zero point: about 10 % less error, but transformers 5.23 loads them only
    with `quantization_config=CompressedTensorsConfig(dequantize=True)`; 5.17 needs no flag for either.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise IntactKVError(f"bits={self.bits} is not supported; use one of {', '.join(map(str, _BITS))}")
        if self.group_size < 1:
            raise IntactKVError(f"group_size={self.group_size} must be positive; 128 is usual")


def quantize(model: PreTrainedModel | str | os.PathLike[str], out: str | os.PathLike[str], *, method: RTN) -> Path:
    """Quantize the Linear layers of `model` by `method` and save a compressed-tensors checkpoint in folder `out`.

        quantize("Llama-3.1-8B", "Llama-3.1-8B-W3", method=RTN(bits=3))
        AutoModelForCausalLM.from_pretrained("Llama-3.1-8B-W3")

    `model` is a folder, a name on the Hub, or a model in memory, and stays as it is. Embeddings and output
    head are not quantized. llm-compressor rounds in the model's own dtype: in bfloat16 the error can exceed
    scale/2, at 8 bits two- to threefold. Tokenizer files come along unless the model was in memory.

    Raises IntactKVError when llm-compressor is missing, `out` is not empty, `model` cannot be read, is
    quantized already or has nothing to quantize, `group_size` does not divide a layer's width, or
    transformers cannot load the result back.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise IntactKVError(f"{out} exists and is not empty; remove it or choose another folder")
    if importlib.util.find_spec("llmcompressor") is None:
        raise IntactKVError("quantizing needs llm-compressor: pip install 'intactkv[demo]'")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _quiet(), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        checkpoint = Path(scratch) / "quantized"
        if isinstance(model, PreTrainedModel):  # llm-compressor works in place: give it a model of its own
            _refuse_quantized(model.config)
            source = Path(scratch) / "full"
            model.save_pretrained(source)
        else:
            source = Path(model)
        _compress_(_load(source), method, checkpoint)
        _check_loads(checkpoint)
        for pattern in _TOKENIZER_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(file, checkpoint / file.name)
        checkpoint.replace(out)
    return out


def _load(source: Path) -> PreTrainedModel:
    """The full model, fresh from its checkpoint, in the dtype it was saved in."""
    try:
        _refuse_quantized(AutoConfig.from_pretrained(source))
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    except IntactKVError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise IntactKVError(f"{source} is neither a model's folder nor a model on the Hub that can be read") from error


def _refuse_quantized(config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise IntactKVError("the model is quantized already; give the full-precision one")


def _compress_(full: PreTrainedModel, method: RTN, checkpoint: Path) -> None:
    """Quantize `full` in place and save it packed."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier

    linearize_moe(full)  # experts kept in one tensor become Linear layers; a dense model is left alone
    head = full.get_output_embeddings()
    layers = [(name, module) for name, module in full.named_modules() if type(module) is nn.Linear]
    widths = {name: layer.in_features for name, layer in layers if layer is not head}
    if not widths:
        raise IntactKVError(f"{type(full).__name__} has no torch.nn.Linear to quantize; use another model")
    for name, width in widths.items():
        if width % method.group_size:
            raise IntactKVError(
                f"group_size={method.group_size} does not divide in_features={width} of {name}; use a divisor"
            )
    weights = QuantizationArgs(
        num_bits=method.bits, group_size=method.group_size, symmetric=method.symmetric, strategy="group"
    )
    recipe = QuantizationModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=[name for name, layer in layers if layer is head],
    )
    oneshot(model=full, recipe=recipe, output_dir=str(checkpoint), clear_sparse_session=True)
    # Its YAML names Python objects, which no safe loader reads; config.json says the same.
    (checkpoint / "recipe.yaml").unlink()


def _check_loads(checkpoint: Path) -> None:
    """Refuse what transformers would complete with random weights, such as Mixtral's and GPT-OSS's experts."""
    dense = CompressedTensorsConfig(dequantize=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=dense, output_loading_info=True)
    _, report = loaded
    lost = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if lost:
        raise IntactKVError(f"transformers cannot load the quantized {lost[0]} back; use another architecture")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence logs, progress bars and warnings; afterwards loguru and the environment are as they were."""
    from loguru import logger

    switches = {
        "LLM_COMPRESSOR_LOG_DISABLED": "llmcompressor",
        "COMPRESSED_TENSORS_LOG_DISABLED": "compressed_tensors",
    }
    before = {name: os.environ.get(name) for name in (*switches, "TOKENIZERS_PARALLELISM")}
    # Read at the first import: without them llm-compressor throws out the handlers of all other loguru users.
    os.environ.update(dict.fromkeys(switches, "true"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # oneshot would set it, with a warning
    for package in switches.values():
        logger.disable(package)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for name, package in switches.items():
            if before[name] is None:
                logger.enable(package)
