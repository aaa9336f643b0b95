"""Load models, tokenizers and text for the command line, with one clear sentence where that fails."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from httpx import HTTPError
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

from intactkv.attaching.plain import warn_when_plain_
from intactkv.error import IntactKVError, first_line
from intactkv.lines import read_lines, read_utf8

_PER_TOKEN, _MARGIN = 6, 256  # characters that a token takes at first sight; tokens that a cut may change
_ROWS = (".jsonl", ".json", ".parquet")  # files whose rows have a `text` field


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
    _check_exists(source)
    _check_packing(source)
    try:
        with _quiet():
            folder, options = _located(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
            model, report = loaded
            if options and _holds_floats(source):
                _forget_gguf_(model)
            restored: set[str] = set()
            if getattr(model.config, "quantization_config", None) is not None:
                with torch.no_grad():  # some checkpoints unpack, with a progress bar, at their first forward
                    model(torch.zeros(1, 1, dtype=torch.int64, device=model.device))
                _let_weights_move_(model)
                if report["unexpected_keys"]:
                    restored = _restore_transforms_(model, source, set(report["unexpected_keys"]))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise IntactKVError(f"{source} cannot be loaded as a causal LM: {first_line(error)}") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    warn_when_plain_(model, source)
    losses = {kind: sorted({*map(str, report[kind])} - restored) for kind in kinds}
    losses["unexpected_keys"] = _but_zero_biases(source, losses["unexpected_keys"])
    return model.eval(), losses


def _but_zero_biases(source: str | os.PathLike[str], names: list[str]) -> list[str]:
    """The tensors that are lost where transformers drops these: not biases of zeros, which GPTQ's packers write."""
    biases = {name for name in names if name.endswith(".bias")}
    zero = set()
    if biases:
        for file in _weight_files(source):
            zero |= {name for name in biases & set(file.keys()) if not bool(file.get_tensor(name).any())}
    return [name for name in names if name not in zero]


def _check_packing(source: str | os.PathLike[str]) -> None:
    """Refuse compressed-tensors weights that were packed otherwise than the installed version reads them.

    Numbers of bits that do not divide 32 are dense since compressed-tensors 0.18; before, no value crossed an integer's
    end. Either version loads the other's files without an error, as other weights.
    """
    try:
        config = PreTrainedConfig.get_config_dict(source)[0].get("quantization_config") or {}
    except (OSError, ValueError):  # loading says what is wrong
        return
    bits = {group["weights"]["num_bits"] for group in config.get("config_groups", {}).values() if group.get("weights")}
    if config.get("quant_method") != "compressed-tensors" or not any(32 % number for number in bits):
        return
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for file in _weight_files(source):
        for name in file.keys():  # noqa: SIM118 (a file is no mapping)
            if not name.endswith(".weight_packed"):
                continue
            width, row = file.get_slice(name).get_shape()[-1], file.get_tensor(f"{name[:-6]}shape")[-1:]
            values = torch.zeros(1, int(row), dtype=torch.int8)
            reads = {number: pack_to_int32(values, number).shape[-1] for number in sorted(bits)}
            if width not in reads.values():
                written, installed = config.get("version", "an unknown version"), version("compressed-tensors")
                expected = " or ".join(f"{count} ({number} bits)" for number, count in reads.items())
                raise IntactKVError(
                    f"{source} was packed by compressed-tensors {written}: rows of {name} take {width} integers, "
                    f"where {installed}, installed here, reads {expected} and would load other weights; install "
                    "a version of the same side of 0.18, or quantize again"
                )


def _weight_files(source: str | os.PathLike[str]) -> Iterator[Any]:
    """The safetensors files of a folder or hub name, open one after the other; a GGUF has none."""
    if _is_gguf(source):
        return
    folder = source if Path(source).is_dir() else snapshot_download(str(source), allow_patterns="*.safetensors")
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield file


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
    config = PreTrainedConfig.get_config_dict(source)[0]["quantization_config"].get("transform_config") or {}
    groups = {
        name: {**group, "apply": online}
        for name, group in config.get("config_groups", {}).items()
        if (online := [place for place in group["apply"] if not place["location"].startswith("weight")])
    }
    if not groups:
        return set()
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    before = set(model.state_dict())
    apply_transform_config(model, TransformConfig.model_validate({**config, "config_groups": groups}))
    wanted = (set(model.state_dict()) - before) & unexpected
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(source):
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


def device_named(name: str) -> torch.device:
    """A device by its name; "auto" is the accelerator if there is one. Raises `IntactKVError` for unknown names."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        # float64, in which figures are summed, is not to be had on "mps"
        if accelerator is None or accelerator.type == "mps":
            return torch.device("cpu")
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    try:
        return torch.device(name)
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
    _check_exists(source)
    folder, options = _located(source)
    if options and not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise IntactKVError(
            f"{source} has no tokenizer.json beside it, and the tokenizer that transformers reads out of a GGUF can be "
            "another than the model's; put the model's tokenizer.json and tokenizer_config.json there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise IntactKVError(f"{source} has no tokenizer that can be loaded: {first_line(error)}") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 text file, or the `text` fields of a .jsonl, .json or .parquet file, with blank lines between.

    Raises `IntactKVError` where it cannot be read, has rows without such a field, or is empty.
    """
    path = Path(path)
    text = "\n\n".join(_texts(path)) if path.suffix in _ROWS else read_utf8(path)
    if not text.strip():
        raise IntactKVError(f"{path} is empty; give a text of at least a few hundred words")
    return text


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None) -> list[int]:
    """The first `count` tokens of a text without special tokens, or all where it is None or the text has fewer.

    Reads no more of the text than it takes: what follows a cut can change the last few tokens before it, and so
    `_MARGIN` more are asked for and left out.
    """
    characters = len(text) if count is None else _PER_TOKEN * (count + _MARGIN)
    while characters < len(text):
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False).input_ids
        if count is not None and len(ids) >= count + _MARGIN:
            return ids[:count]
        characters *= 2
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:count]


def config_of(source: str | os.PathLike[str]) -> PreTrainedConfig | None:
    """A source's configuration, without the model; None where loading will say what is wrong."""
    _check_exists(source)
    folder, options = _located(source)
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError):
        return None


def _texts(path: Path) -> list[str]:
    """The `text` field of every row of a data file."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import read_table
        except ImportError as error:
            raise IntactKVError(f"{path} is read with pyarrow; pip install pyarrow, or give plain text") from error
        try:
            rows = read_table(path).to_pylist()
        except (OSError, ValueError, ArrowException) as error:
            raise IntactKVError(f"{path} cannot be read as Parquet: {first_line(error)}") from error
    elif path.suffix == ".jsonl":
        rows = read_lines(path, needed=["text"])
    else:
        try:
            found = json.loads(read_utf8(path))
        except (ValueError, RecursionError) as error:
            raise IntactKVError(f"{path} is no JSON ({error}); give a list of rows with a text field") from error
        rows = found if isinstance(found, list) else [found]
    texts = [row.get("text") if isinstance(row, dict) else None for row in rows]
    wrong = [i for i, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        row = rows[wrong[0]]
        holds = f"the fields {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise IntactKVError(
            f"row {wrong[0]} of {path} has no text under `text`, but {holds}; rename the field, or give plain text"
        )
    return [text for text in texts if isinstance(text, str)]


def checkpoint_digest(source: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> str:
    """SHA-256 over the configuration and the weight files of a folder or hub name, or over a GGUF, without loading it.

    `progress(done, total)` counts bytes. Raises `IntactKVError` where there are none.
    """
    _check_exists(source)
    try:
        files = [Path(source)] if _is_gguf(source) else _files(source)
        sha, done, total = hashlib.sha256(), 0, sum(file.stat().st_size for file in files)
        for path in files:
            sha.update(f"\n{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(2**24):
                    sha.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
    except (OSError, ValueError) as error:
        if isinstance(error, IntactKVError):
            raise
        raise IntactKVError(f"the weights of {source} cannot be read: {first_line(error)}") from error
    return sha.hexdigest()


def _files(source: str | os.PathLike[str]) -> list[Path]:
    """A folder's or Hub model's configuration and weight files."""
    folder = Path(source if Path(source).is_dir() else _downloaded(str(source)))
    beside = set(folder.glob("*.intactkv.safetensors"))  # an intact KV that `quantize` put there is no weight
    files = sorted(set(folder.glob("*.safetensors")) - beside) or sorted(folder.glob("*.bin"))
    if not files:
        raise IntactKVError(f"{source} holds no weights (*.safetensors or *.bin); give a model's folder or Hub name")
    return [folder / "config.json", *files]


def _located(source: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], dict[str, str]]:
    """What transformers' `from_pretrained` is given for a source: a folder or hub name, and the GGUF file in it."""
    path = Path(source)
    return (path.parent, {"gguf_file": path.name}) if _is_gguf(source) else (source, {})


def _is_gguf(source: str | os.PathLike[str]) -> bool:
    return Path(source).suffix == ".gguf" and Path(source).is_file()


def _holds_floats(source: str | os.PathLike[str]) -> bool:
    """Whether no tensor of a GGUF is quantized."""
    from gguf import GGUFReader

    return {tensor.tensor_type.name for tensor in GGUFReader(source).tensors} <= {"F64", "F32", "F16", "BF16"}


def _forget_gguf_(model: PreTrainedModel) -> None:
    """Make a model that was read from floating-point tensors one like any other: not quantized, and to be saved."""
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)


def _downloaded(name: str) -> str:
    """The local folder of a Hub model's configuration and weights, safetensors where it has them."""
    folder = snapshot_download(name, allow_patterns=["*.safetensors", "config.json"])
    if any(Path(folder).glob("*.safetensors")):
        return folder
    return snapshot_download(name, allow_patterns=["*.bin", "config.json"])


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


def _check_exists(source: str | os.PathLike[str]) -> None:
    """Tell a mistyped name at once: transformers asks the network for it, again and again, and then says little."""
    text = os.fspath(source)
    if Path(text).is_dir():
        return
    if Path(text).is_file():
        if not _is_gguf(source):
            raise IntactKVError(f"{text} is a file; a model is a folder, a name on the Hub, or one .gguf file")
        if find_spec("gguf") is None:
            raise IntactKVError(f"reading {text} needs gguf: pip install 'intactkv[gguf]'")
        return
    looks_like_a_path = text.startswith((".", "~", os.sep)) or text.count("/") > 1 or isinstance(source, Path)
    here = Path(text).parent if Path(text).parent.is_dir() else Path()
    near = difflib.get_close_matches(Path(text).name, [p.name for p in here.iterdir() if p.is_dir()], n=1)
    meant = f"did you mean {here / near[0]}?" if near else "give a model's folder or its name on the Hub"
    if looks_like_a_path:
        raise IntactKVError(f"{text} is not a folder; {meant}")
    if _on_the_hub(text):
        return
    raise IntactKVError(f"{text} is no folder here, is not in the Hub's cache, and was not found on the Hub; {meant}")


@cache
def _on_the_hub(name: str) -> bool:
    """Whether the Hub's cache holds a model of this name, or else the Hub, asked once and for a few seconds."""
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return True
        HfApi().model_info(name, timeout=5)
    except (OSError, ValueError, HfHubHTTPError, HTTPError):  # no such name, none to be seen, or no Hub to be reached
        return False
    return True
