"""Where a checkpoint lies: a folder, a name on the Hub or a GGUF file; what it is, before anything is loaded."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # httpx's, and httpx2's from huggingface_hub 2 on
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.import_utils import is_gguf_available

from intactkv.error import IntactKVError, first_line
from intactkv.gguf_header import check_header


def config_of(source: str | os.PathLike[str]) -> PreTrainedConfig | None:
    """A source's configuration, without the model; None where loading will say what is wrong."""
    check_exists(source)
    folder, options = located(source)
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError):
        return None


def refuse_quantized(config: PreTrainedConfig) -> None:
    """Raise `IntactKVError` for the configuration of a model whose weights are quantized, or were."""
    method = quantizer(config)
    if method is not None:
        raise IntactKVError(f"the model is quantized already ({method}); give the full-precision one")


def quantizer(config: PreTrainedConfig) -> str | None:
    """The name of what quantized a model's weights, such as "compressed-tensors"; None for a full-precision one."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def checkpoint_digest(source: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> str:
    """SHA-256 over the configuration and the weight files of a folder or hub name, or over a GGUF, without loading it.

    `progress(done, total)` counts bytes. Raises `IntactKVError` where there are none.
    """
    check_exists(source)
    try:
        files = [Path(source)] if is_gguf(source) else _files(source)
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
    folder = weights_folder(source)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise IntactKVError(f"{source} holds no weights (*.safetensors or *.bin); give a model's folder or Hub name")
    return [folder / "config.json", *files]


def located(source: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], dict[str, str]]:
    """What transformers' `from_pretrained` is given for a source: a folder or hub name, and the GGUF file in it."""
    path = Path(source)
    return (path.parent, {"gguf_file": path.name}) if is_gguf(source) else (source, {})


def is_gguf(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a GGUF file that is there."""
    return Path(source).suffix == ".gguf" and Path(source).is_file()


def holds_floats(source: str | os.PathLike[str]) -> bool:
    """Whether no tensor of a GGUF is quantized, by its header: a vocabulary takes the gguf package's reader seconds."""
    from gguf import GGMLQuantizationType as Type

    return check_header(source) <= {Type.F64, Type.F32, Type.F16, Type.BF16}


def _downloaded(name: str) -> str:
    """The local folder of a Hub model's configuration and weights, safetensors where it has them."""
    folder = snapshot_download(name, allow_patterns=["*.safetensors", "config.json"])
    if any(Path(folder).glob("*.safetensors")):
        return folder
    return snapshot_download(name, allow_patterns=["*.bin", "config.json"])


def weights_folder(source: str | os.PathLike[str]) -> Path:
    """The local folder of a source's safetensors. Raises `IntactKVError` for a GGUF."""
    if is_gguf(source):
        raise IntactKVError(f"{source} is a GGUF file; give a folder or a Hub name of safetensors")
    return Path(source if Path(source).is_dir() else _downloaded(str(source)))


def weight_files(source: str | os.PathLike[str]) -> Iterator[Any]:
    """The safetensors files of a folder or hub name, open one after the other; a GGUF has none."""
    if is_gguf(source):
        return
    for path in sorted(weights_folder(source).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield file


def check_exists(source: str | os.PathLike[str]) -> None:
    """Tell a mistyped name at once: transformers asks the network for it, again and again, and then says little."""
    text = os.fspath(source)
    if not text:
        raise IntactKVError("the model's name is empty; give a folder or a name on the Hub")
    if Path(text).is_dir():
        return
    if Path(text).is_file():
        if not is_gguf(source):
            raise IntactKVError(f"{text} is a file; a model is a folder, a name on the Hub, or one .gguf file")
        if find_spec("gguf") is None:
            raise IntactKVError(f"reading {text} needs gguf: pip install 'intactkv[gguf]'")
        try:
            is_gguf_available()
        except ValueError as error:  # 5.15 and 5.16 ask for its version in a way that Python 3.10 has no answer to
            raise IntactKVError(
                f"{text} cannot be read: transformers {transformers.__version__} does not find gguf's version on this "
                "Python: pip install 'transformers>=5.17'"
            ) from error
        check_header(text)
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
