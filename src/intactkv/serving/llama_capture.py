"""The native route: llama.cpp computes the state of a prefix itself, from the GGUF of the full model.

For users without the Hugging Face checkpoint, and for caches whose rows depend on the build (quantized ones). Beside
the state lies FILE.check: what the full model's first layer makes of the tokens, by which `serve` knows its model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from intactkv.artifact import IntactKV
from intactkv.capturing.prefix import PROBES, shared
from intactkv.error import IntactKVError, first_line
from intactkv.files import check_outputs, write_atomically
from intactkv.serving.gguf import BOS, FirstLayer, Gguf, check_first_layer, check_gguf, first_layer, opened
from intactkv.serving.llama_cpp import ArtifactStates, SavedState, States, is_state
from intactkv.serving.llama_server import Server, named, option

FULL = {"F32", "F16", "BF16", "F64", "Q8_0"}  # types of tensors that are as good as the full model's
_TURNING = ("--rope-", "--yarn-", "--grp-attn-", "-gan", "-gaw")  # options that change RoPE


async def capture_state(
    program: Sequence[str], model: str, out: Path, *, ids: Sequence[int] | None = None, prefix: str = "bos",
    system: str | None = None, served: str | None = None, more: Sequence[str] = (), allow_quantized: bool = False,
) -> tuple[list[int], bool]:  # fmt: skip
    """Let llama-server compute the state of a prefix in the GGUF `model`, and save it to `out`.

    What comes back: the prefix's tokens, and whether the first layer could be compared and written down.

    `ids`, or `prefix`: "bos", "chat" (with `system`) or a text; `served`, the GGUF that will be served with it; `more`,
    the server's options, which must be the same then. Raises `IntactKVError` for a quantized `model`, for a `served`
    of another model, and where the server does not save all tokens. Of an architecture without a plain first layer
    nothing is compared, there is no FILE.check, and the state is served `--unchecked`.
    """
    full, check = opened(model), _check_file(out)
    check_outputs(out, check)
    types = {tensor.tensor_type.name for tensor in full.tensors.values()}
    if types - FULL and not allow_quantized:
        raise IntactKVError(
            f"{model} has tensors of {', '.join(sorted(types - FULL))}; an intact KV comes from the full model: give "
            "an F16, BF16 or Q8_0 GGUF, or allow it (--allow-quantized)"
        )
    with tempfile.TemporaryDirectory(prefix="intactkv-") as folder:
        async with Server(program, model, Path(folder), with_windows(full, more)) as server:
            tokens = list(ids) if ids is not None else await _prefix(server, full, prefix, system)
            made = _first_layer(full, tokens)
            if served is not None and made is not None:
                check_first_layer(made, opened(served), tokens, model)
            body = {"prompt": tokens, "n_predict": 0, "id_slot": 0, "cache_prompt": False}
            await server.ask("/completion", body)
            told = await server.ask("/slots/0?action=save", {"filename": "state.bin"})
        state = Path(folder, "state.bin")
        if (saved := SavedState(state).ids) != tokens:
            raise IntactKVError(
                f"llama-server saved {told.get('n_saved')} tokens, {saved[:8]}…, not {tokens[:8]}…; use another build"
            )
        write_atomically(out, state.read_bytes())
    check.unlink(missing_ok=True)
    if made is None:
        return tokens, False
    held = {"key": made.key.contiguous(), "value": made.value.contiguous()}
    write_atomically(check, save(held, {"gguf": os.path.basename(model), "architecture": str(full.architecture)}))
    return tokens, True


def states_for(kv: str, model: Gguf, more: Sequence[str] = (), *, check: bool = True) -> States:
    """The states with which a server of `model` with the options `more` is filled: from an artifact, or a saved one.

    Raises `IntactKVError` for a `kv` of another model, and for caches and rotary settings that an artifact's rows are
    not for.
    """
    if is_state(kv):
        saved = SavedState(kv)
        if check:
            check_first_layer(_told(saved.path), model, saved.ids, kv)
        return saved
    artifact = IntactKV.from_pretrained(kv)
    check_gguf(artifact, model, weights=check)
    if turned := [each for each in map(named, more) if each.startswith(_TURNING)]:
        raise IntactKVError(
            f"{turned[0]} turns keys otherwise than the model's own, which the artifact holds; leave it out, or let "
            "llama.cpp compute the state with it: intactkv capture FULL.gguf --engine llama.cpp"
        )
    key, value = (option(more, *names) or "f16" for names in (("-ctk", "--cache-type-k"), ("-ctv", "--cache-type-v")))
    if key != value:
        raise IntactKVError(f"keys of {key} beside values of {value} are not written here; use one type for both")
    return ArtifactStates(artifact, str(model.architecture), key)


def with_windows(model: Gguf, more: Sequence[str]) -> list[str]:
    """The server's options; with sliding windows it needs the whole cache, or it does not use restored states."""
    needs = model.value("attention.sliding_window") and "--swa-full" not in more
    return [*more, "--swa-full"] if needs else list(more)


def _first_layer(model: Gguf, ids: Sequence[int]) -> FirstLayer | None:
    """None where the architecture has no plain one: then `serve` cannot tell whose the state is, and says so."""
    try:
        return first_layer(model, ids)
    except IntactKVError:
        return None


async def _prefix(server: Server, model: Gguf, prefix: str, system: str | None) -> list[int]:
    if prefix == "bos":
        if (token := model.fields.get(BOS)) is None:
            raise IntactKVError(f"{model.path} names no BOS token; name the tokens that prompts begin with (--ids)")
        return [int(token)]
    rows = []
    for rest in PROBES:
        text = prefix + rest
        if prefix == "chat":
            head = [] if system is None else [{"role": "system", "content": system}]
            messages = [*head, {"role": "user", "content": rest}]
            text = (await server.ask("/apply-template", {"messages": messages}))["prompt"]
        rows.append(await server.tokens(text))
    if not (common := list(shared(rows))):
        raise IntactKVError("these prompts have no first token in common; name the prefix by --ids")
    return common


def _check_file(state: Path) -> Path:
    return state.with_name(f"{state.name}.check")


def _told(state: Path) -> FirstLayer:
    path = _check_file(state)
    try:
        with safe_open(path, framework="pt") as file:
            return FirstLayer(file.get_tensor("key"), file.get_tensor("value"))
    except (OSError, SafetensorError) as error:
        raise IntactKVError(
            f"{path}, which says whose state it is, cannot be read ({first_line(error)}); copy it along, or serve the "
            "state unchecked (--unchecked)"
        ) from error
