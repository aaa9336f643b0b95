"""Does an artifact fit the checkpoint that an engine serves? What can be said without loading the model.

Keys and values in another basis do harm in silence, and an engine cannot compare them. So somebody must have:
`quantize` writes the artifact of a checkpoint's own basis beside it, and `intactkv check` compares the two and writes
down with which files it did.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from intactkv.artifact.hub import FILE
from intactkv.error import IntactKVError, first_line
from intactkv.files import write_atomically
from intactkv.lines import from_json

if TYPE_CHECKING:
    from intactkv.artifact.data import IntactKV

RECIPE = "intactkv.json"  # what `quantize` says of a checkpoint, in its folder
NEEDS = "NeedsIntactKV"  # behind an architecture's name: engines know no such model, and refuse it with this word


def checkpoint_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A checkpoint's folder: itself, or a Hub name's in the cache, with what says how it is served, not its weights.

    Raises `IntactKVError` where there is none and the Hub has none or is not reached.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[FILE, RECIPE, "config.json"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise IntactKVError(
            f"{source} is no folder here and was not found on the Hub ({first_line(error)}); give a model's folder or "
            "its name on the Hub"
        ) from error


def files_digest(folder: Path) -> str:
    """SHA-256 over the names, sizes and headers of a folder's weights: read in milliseconds, whatever their size.

    It tells quantizations and architectures apart, not two fine-tunes of one shape; of `.bin` files, which have no
    header, only names and sizes. Raises `IntactKVError` where there are no weights.
    """
    sha, files = sha256(), sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise IntactKVError(f"{folder} holds no *.safetensors or *.bin; give the folder of a checkpoint")
    for path in files:
        sha.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                sha.update(file.read(min(int.from_bytes(file.read(8), "little"), 2**28)))
    return sha.hexdigest()


def with_check(kv: IntactKV, folder: Path) -> IntactKV:
    """`kv` with the word in its provenance that its basis was compared with the checkpoint in `folder`."""
    checked = {"checkpoint": folder.name, "files": files_digest(folder)}
    return replace(kv, provenance={**kv.provenance, "checked": checked})


def made_for_prefix(folder: Path) -> Mapping[str, Any] | None:
    """What a folder's `intactkv.json` says of the prefix that its checkpoint was made for; None if it was for none.

    Raises `IntactKVError` where it cannot be read.
    """
    return _recipe(folder).get("prefix_aware")


def quantizer_settings(folder: Path) -> Mapping[str, Any]:
    """What a folder's `intactkv.json` says of its quantizer, bits and calibration text, whatever prefix it is for."""
    return {
        name: value for name, value in _recipe(folder).items() if name not in ("prefix", "prefix_aware", "versions")
    }


def mark_needing(folder: Path) -> None:
    """Let the checkpoint in `folder`, made for its prefix, name an architecture that no engine serves by accident.

    transformers goes by the model's type and loads it as before; vLLM, SGLang and llama.cpp's converter go by the name.
    """
    config = _config(folder)
    config["architectures"] = [f"{name}{NEEDS}" for name in config.get("architectures") or []]
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def served_architectures(folder: Path) -> list[str] | None:
    """The architectures by which an engine serves a checkpoint that `mark_needing` marked; None for any other."""
    names = _config(folder).get("architectures") or []
    if not isinstance(names, list):
        raise IntactKVError(f"{folder}/config.json has architectures={names!a}; it must be a list of names")
    plain = [str(name).removesuffix(NEEDS) for name in names]
    return plain if plain != names else None


def is_mlx(folder: Path) -> bool:
    """Whether the checkpoint in `folder` was quantized by mlx-lm, which says so under a name of its own."""
    return "quantization" in _config(folder)


def refuse_unchecked(kv: IntactKV, folder: Path, name: str) -> None:
    """Raise `IntactKVError` where nothing says that `kv` is in the basis of the checkpoint in `folder`.

    Good are: the artifact of a folder made by `quantize`, also calibrated; one that `intactkv check -o` compared with
    these files; and, for a model that is not quantized, the one captured from a model of its `name`.
    """
    recipe = _recipe(folder)
    if recipe.get("prefix") is not None:
        if recipe["prefix"] != kv.ids.tolist():
            raise IntactKVError(
                f"{name} was quantized with the intact KV of the tokens {recipe['prefix']} beside it, and the artifact "
                f"is of {kv.ids.tolist()}; serve {FILE} in its folder"
            )
        if _is_beside(kv, folder) or kv.provenance.get("calibration") is not None:
            return
    elif "quantization_config" not in _config(folder) and str(kv.provenance.get("model")) == name:
        return
    checked = kv.provenance.get("checked") or {}
    if isinstance(checked, dict) and checked.get("files") == files_digest(folder):
        return
    raise IntactKVError(
        f"nothing says that this intact KV is in the basis of {name}, and in another one it does harm: run `intactkv "
        f"check {name} --full FULL --kv KV -o CHECKED` and serve CHECKED, or if you know better say so "
        '(--unchecked, "check": false)'
    )


def _is_beside(kv: IntactKV, folder: Path) -> bool:
    from intactkv.artifact.data import IntactKV

    return (folder / FILE).is_file() and IntactKV.load(folder / FILE).digest == kv.digest


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(from_json((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise IntactKVError(f"{folder} has no readable config.json ({error}); give a model's folder") from error


def _recipe(folder: Path) -> dict[str, Any]:
    """What `intactkv.json` says; nothing where there is none. One that cannot be read might say that no model fits."""
    path, wrong = folder / RECIPE, None
    try:
        said = from_json(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            wrong = f"it is {said!a:.40}, no object"
        elif not isinstance(said.get("prefix_aware"), dict | None):
            wrong = f"prefix_aware is {said['prefix_aware']!a:.40}, no object"
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        wrong = first_line(error)
    if wrong is not None:
        raise IntactKVError(
            f"{path} says what prefix it was made for, and cannot be read: {wrong}; copy it again from where the "
            "checkpoint came from, or quantize again"
        )
    return said
