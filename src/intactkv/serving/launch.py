"""How vLLM is told to serve a checkpoint with its intact KV: the arguments, and the command. Imports no engine."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intactkv.artifact import IntactKV
from intactkv.artifact.hub import artifact_file
from intactkv.artifact.served import checkpoint_folder, refuse_unchecked, served_architectures
from intactkv.error import IntactKVError

CONNECTOR = {
    "kv_connector": "IntactKVConnector",
    "kv_connector_module_path": "intactkv.serving.vllm",
    "kv_role": "kv_both",
}


def vllm_arguments(
    model: str | os.PathLike[str], kv: str | os.PathLike[str] | None = None, *, mode: str = "auto", check: bool = True
) -> dict[str, Any]:
    """What `vllm.LLM` is given beside the model: the connector, and the name of a marked checkpoint's architecture.

        llm = LLM("MODEL-W4", **vllm_arguments("MODEL-W4"), max_model_len=4096)

    `model` is a folder or Hub name, `kv` a file, folder or Hub name; by default the artifact beside `model`. `mode` and
    `check` as in `serving.vllm`. Raises `IntactKVError` where there is no model or artifact, or nothing says that it is
    in the model's basis.
    """
    folder = checkpoint_folder(model)
    file = artifact_file(model if kv is None else kv)
    artifact = IntactKV.load(file)
    extra: dict[str, Any] = {"artifact": str(file.resolve() if kv is None or Path(kv).exists() else kv)}
    extra |= {} if mode == "auto" else {"mode": mode}
    if not check:
        extra["check"] = False
    elif any(folder.glob("*.safetensors")):  # of a Hub's name the engine checks, once it has the weights
        refuse_unchecked(artifact, folder, str(model))
    arguments: dict[str, Any] = {"kv_transfer_config": {**CONNECTOR, "kv_connector_extra_config": extra}}
    if (names := served_architectures(folder)) is not None:
        arguments["hf_overrides"] = {"architectures": names}
    return arguments


def vllm_command(
    model: str, kv: str | None = None, *, mode: str = "auto", check: bool = True, more: Sequence[str] = ()
) -> list[str]:
    """The command line of the same; `more` goes to vLLM as it is.

    Raises `IntactKVError` as `vllm_arguments` does, and where `more` has an option that is ours to give.
    """
    arguments = vllm_arguments(model, kv, mode=mode, check=check)
    options = {f"--{name.replace('_', '-')}": json.dumps(value) for name, value in arguments.items()}
    for given in more:  # vLLM reads _ as -, and a part of what is JSON behind a dot
        name = given.partition("=")[0].partition(".")[0].replace("_", "-")
        if name in options:
            raise IntactKVError(f"{name} is what this command gives to vLLM; leave it out")
    return ["vllm", "serve", model, *(part for pair in options.items() for part in pair), *more]
