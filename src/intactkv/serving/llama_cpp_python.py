"""A cache for llama-cpp-python whose one entry is the intact prefix.

    llm = Llama("MODEL-Q3_K_M.gguf", n_ctx=4096)
    llm.set_cache(intact_cache(llm, "KV"))

Completions and chats whose prompts begin with the prefix, or with a part of it, stand on the artifact's rows; others in
between do not take them away. What bypasses the cache (`llm.eval`, `llm.generate`) gets the model's own.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_cpp import Llama, LlamaState, llama_cpp
from llama_cpp.llama_cache import BaseLlamaCache

from intactkv.error import IntactKVError
from intactkv.serving.gguf import opened
from intactkv.serving.layout import common_prefix
from intactkv.serving.llama_capture import states_for


class IntactCache(BaseLlamaCache):
    """What `Llama.set_cache` takes: it gives the state of the prefix `ids`, and keeps nothing else."""

    def __init__(self, llm: Llama, state: LlamaState, ids: Sequence[int]) -> None:
        super().__init__()
        self._llm, self._state, self._ids = llm, state, list(ids)

    @property
    def cache_size(self) -> int:
        """Bytes."""
        return int(self._state.llama_state_size)

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """The state, for the prompt that is about to be computed. Raises `KeyError` where it has no token of it."""
        tokens = list(key)
        self._llm.n_tokens = 0  # whatever the context holds could look as good, and be the model's own
        if not common_prefix(tokens, self._ids):
            raise KeyError(tokens[:1])
        return self._state

    def __contains__(self, key: Sequence[int]) -> bool:
        return common_prefix(list(key), self._ids) > 0

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Nothing is kept: a prompt's own state may hold the model's own rows."""


def intact_cache(llm: Llama, kv: str | os.PathLike[str], *, check: bool = True) -> IntactCache:
    """The cache of an artifact, or of a state that llama.cpp saved, for a loaded GGUF.

    Raises `IntactKVError` for a `kv` of another model, unless `check` is False, and where no state of it is taken.
    """
    types = {0: "f32", 1: "f16"}
    params = llm.context_params
    more = [
        part
        for name, kind in (("-ctk", params.type_k), ("-ctv", params.type_v))
        for part in (name, types.get(kind, f"ggml type {kind}"))
    ]
    model = opened(llm.model_path)
    if llm.chat_handler is not None:
        raise IntactKVError("a chat handler computes images past the cache; load the model without chat_handler")
    if model.value("attention.sliding_window") and not params.swa_full:
        raise IntactKVError(f"{llm.model_path} has sliding windows, which drop the prefix; load it with swa_full=True")
    usual = llama_cpp.llama_context_default_params()
    for name in ("rope_freq_base", "rope_freq_scale", "rope_scaling_type"):
        if getattr(params, name) != getattr(usual, name):
            raise IntactKVError(
                f"the model is loaded with {name}={getattr(params, name)}, which turns later keys otherwise than the "
                "intact ones; load it without"
            )
    states = states_for(str(kv), model, more, check=check)
    llm.reset()
    told: Any = (llama_cpp.llama_token * len(states.ids))()
    count = ctypes.c_size_t()
    with tempfile.TemporaryDirectory(prefix="intactkv-") as folder:
        path = Path(folder, "state.bin")
        for form in states.candidates(1):
            path.write_bytes(form(0))
            context = llm._ctx.ctx
            if llama_cpp.llama_state_seq_load_file(context, os.fsencode(path), 0, told, len(told), count):
                break
        else:
            raise IntactKVError(
                f"llama.cpp takes none of the states that are written here for {llm.model_path}; let it compute one "
                "itself: intactkv capture FULL.gguf --engine llama.cpp"
            )
    llm.input_ids[: len(told)] = states.ids
    llm.n_tokens = len(told)
    state = llm.save_state()
    llm.reset()
    return IntactCache(llm, state, states.ids)
