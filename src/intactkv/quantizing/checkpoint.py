"""Quantize a full model's Linear layers into a packed checkpoint that transformers and vLLM load.

The arithmetic is llm-compressor's. This file keeps the full model untouched, captures the intact KV in the quantized
model's own basis, records what was done as plain JSON, and writes the folder whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from intactkv.artifact import IntactKV
from intactkv.artifact.digest import weights_digest
from intactkv.artifact.hub import FILE as PREFIX_KV
from intactkv.artifact.served import RECIPE, mark_needing
from intactkv.capturing.live import capture, checked_ids
from intactkv.checkpoint.load import load_model, load_tokenizer, load_with_losses
from intactkv.checkpoint.source import config_of, is_gguf, refuse_quantized
from intactkv.error import IntactKVError
from intactkv.evaluating.windows import prefixed_windows
from intactkv.files import check_folder, scratch_beside, writing
from intactkv.positions import check_tokens, most_positions
from intactkv.provenance import installed
from intactkv.quantizing.aware import PrefixAware
from intactkv.quantizing.compress import compress_
from intactkv.quantizing.made_for import MadeFor, check_weight
from intactkv.quantizing.methods import Method, recipe
from intactkv.quantizing.quiet import quiet
from intactkv.texts import first_tokens

_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "chat_template*", "*.model", "*.tiktoken")
log = logging.getLogger(__name__)

_WINDOW, _WINDOWS = 512, 128


def quantize(
    model: PreTrainedModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: Method,
    calibration: Int[Tensor, "window token"] | str | None = None,
    prefix: Sequence[int] | Tensor | None = None,
    prefix_weight: float | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Quantize the Linear layers of `model` by `method` and save a compressed-tensors checkpoint in folder `out`.

        quantize("Llama-3.1-8B", "Llama-3.1-8B-W3", method=GPTQ(bits=3), calibration=text, prefix=bos(tokenizer))
        model = load_model("Llama-3.1-8B-W3")
        attach(model, IntactKV.load("Llama-3.1-8B-W3/prefix.intactkv"))

    `model` is a folder, a name on the Hub, a GGUF file, or a model in memory, and stays as it is. Embeddings and output
    head are not quantized. llm-compressor works in `dtype`, by default the one the model was saved in: in bfloat16 the
    error can exceed scale/2, at 8 bits two- to threefold. `device` is where it computes, None: an accelerator if there
    is one. Tokenizer files come along unless the model was in memory.

    `calibration` are token windows, or a text, of which the first 128 windows of 512 tokens (more after a long
    prefix) are taken, each beginning with the prefix or else with BOS. With `prefix` ids, the folder also holds their
    intact KV, computed by the full model after the method's transforms and before its rounding: this, and not the full
    model's own, fits this checkpoint. `intactkv.json` in it says how it was made. `progress(done, total)` counts
    blocks.

    With a prefix, a method that learns from text is shown it as the served model will see it: prefix tokens do not
    count, and later tokens read their intact keys and values. **Such a checkpoint wants its KV**: with its own prefix,
    or for prompts without one, it can be worse than the ordinary checkpoint, which `prefix_weight=1` makes. Its
    `config.json` names an architecture that engines refuse, so that none serves it without: `intactkv serve` does it
    with. A weight in between is the share of windows shown the ordinary way. Unless given it is 1/16; 0 for methods
    that know no part (those that learn ranges, AutoRound); 1 where layers keep states that no KV covers.

    Raises IntactKVError when llm-compressor is missing, `out` is not empty, `model` cannot be read, is
    quantized already, has nothing to quantize or does not fit `method`, where calibration is needed and not given,
    where windows do not begin with the prefix or are no longer than it, for a weight outside 0 to 1 or one that the
    method or the model cannot have, or where transformers cannot load the result back.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise IntactKVError(f"{out} exists and is not empty; remove it or choose another folder")
    if importlib.util.find_spec("llmcompressor") is None:
        raise IntactKVError("quantizing needs llm-compressor: pip install 'intactkv[quantize]'")
    if method.needs_calibration and calibration is None:
        name = type(method).__name__
        raise IntactKVError(f"{name} learns from text and calibration is None; give token windows, or use RTN")
    check_weight(prefix_weight, method, prefix)
    check_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    with writing(out), quiet(), scratch_beside(out) as scratch:
        checkpoint = scratch / "quantized"
        if isinstance(model, PreTrainedModel):  # llm-compressor works in place: give it a model of its own
            refuse_quantized(model.config)
            source: str | os.PathLike[str] = scratch / "full"
            name = str(model.config.name_or_path)
            model.save_pretrained(source)
        else:
            source, name = model, str(model)
        full, tokenizer = _load(source, dtype), _tokenizer(source)
        if is_gguf(source):  # llm-compressor looks for a configuration beside the weights, which a GGUF has inside
            full.name_or_path = full.config._name_or_path = str(scratch / "full")
            full.config.save_pretrained(full.name_or_path)
        ids = None if prefix is None else checked_ids(prefix, full.config.get_text_config(decoder=True).vocab_size)
        windows, held_out = _windows(calibration, full, tokenizer, ids) if method.needs_calibration else (None, None)
        made_for = None
        if ids is not None and windows is not None and held_out is not None:
            made_for = MadeFor.decide(full, ids, method, windows, prefix_weight, said)
        if made_for is not None and held_out is not None:
            made_for.see(full, held_out, device)
        aware = None if made_for is None else made_for.aware
        keep = _keeper(full, ids, tokenizer, checkpoint, name, aware)
        log.info("quantizing %s by %s", name, method)
        method = compress_(
            full, method, windows, aware=aware, transformed=None if keep is None else partial(keep, method.basis),
            device=device, progress=progress,
        )  # fmt: skip
        full.save_pretrained(checkpoint, save_compressed=True)
        del full
        # Its YAML names Python objects, which no safe loader reads; `intactkv.json` says more.
        (checkpoint / "recipe.yaml").unlink()
        quantized = _loaded_back(checkpoint)
        if made_for is not None and held_out is not None:
            kv = IntactKV.load(checkpoint / PREFIX_KV)
            made_for.measure(quantized, kv, held_out, device)
            about = {**kv.provenance, "prefix_aware": made_for.to_dict()}
            replace(kv, provenance=about).save(checkpoint / PREFIX_KV)
        del quantized
        _record(checkpoint, method, windows, ids, made_for)
        _copy_tokenizer(Path(source), tokenizer, checkpoint)
        if made_for is not None:
            mark_needing(checkpoint)
        checkpoint.replace(out)
        log.info("written: %s", out)
    for sentence in said:
        warnings.warn(sentence, stacklevel=2)
    return out


def _load(source: str | os.PathLike[str], dtype: torch.dtype | str) -> PreTrainedModel:
    """The full model, fresh from its checkpoint."""
    config = config_of(source)
    if config is not None:
        refuse_quantized(config)
    model = load_model(source, dtype=dtype)
    refuse_quantized(model.config)  # of a GGUF only its tensors tell
    return model


def _tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(source)
    except IntactKVError:  # a model without one can be quantized all the same
        return None


def _windows(
    calibration: Any,
    full: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prefix: Tensor | None,
) -> tuple[Int[Tensor, "window token"], Int[Tensor, "window token"]]:
    """The calibration as checked token windows on the CPU, and others of the same text if there is more of it."""
    if isinstance(calibration, str):
        if tokenizer is None:
            raise IntactKVError("calibration is text, but the model has no tokenizer beside it; give token windows")
        start = [tokenizer.bos_token_id] if prefix is None else prefix.tolist()
        start = first_tokens(tokenizer, calibration, 1) if start == [None] else start
        longest = most_positions(full.config) or _WINDOW
        window = min(max(_WINDOW, len(start) + _WINDOW // 2), longest)
        tokens = first_tokens(tokenizer, calibration, 2 * _WINDOWS * window)  # as many again are held out
        window = min(window, len(tokens) + len(start))
        windows = prefixed_windows(tokens, prefix=start, window=window).ids
        check_tokens(full.config, windows, "a calibration window")
        return windows[:_WINDOWS], windows[_WINDOWS:] if len(windows) > _WINDOWS else windows
    windows = torch.as_tensor(calibration).cpu()
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.numel() == 0:
        raise IntactKVError(
            f"calibration is {windows.dtype} of shape {tuple(windows.shape)}; it must be non-empty int64 of shape "
            "(window, token), such as prefixed_windows(…).ids, or a text"
        )
    check_tokens(full.config, windows, "a calibration window")
    return windows, windows


def _keeper(
    full: PreTrainedModel,
    prefix: Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    checkpoint: Path,
    name: str,
    aware: PrefixAware | None,
) -> Callable[[str, PreTrainedModel], None] | None:
    """What keeps the intact KV of the transformed model beside the checkpoint, or None without a prefix.

    `aware` is shown it.
    """
    if prefix is None:
        return None
    origin = {"model": name, "weights": weights_digest(full)}  # of the full model as it was given

    def keep(basis: str, transformed: PreTrainedModel) -> None:
        kv = capture(transformed, prefix, tokenizer=tokenizer)
        checkpoint.mkdir(exist_ok=True)
        replace(kv, provenance={**kv.provenance, **origin, "basis": basis}).save(checkpoint / PREFIX_KV)
        if aware is not None:
            aware.show(kv)

    return keep


def _record(
    checkpoint: Path,
    method: Method,
    windows: Int[Tensor, "window token"] | None,
    prefix: Tensor | None,
    made_for: MadeFor | None,
) -> None:
    """Write `intactkv.json`: the method with its settings, its basis, the calibration's digest, the versions."""
    learned = None
    if windows is not None:
        digest = hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
        learned = {"windows": windows.shape[0], "tokens": windows.shape[1], "sha256": digest}
    data = {
        **recipe(method),
        "basis": method.basis,
        "calibration": learned,
        "prefix": None if prefix is None else prefix.tolist(),
        "prefix_aware": None if made_for is None else made_for.to_dict(),
        "versions": {name: installed(name) for name in ("intactkv", "llmcompressor", "compressed-tensors",
                                                       "auto-round", "transformers", "torch")},
    }  # fmt: skip
    (checkpoint / RECIPE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _loaded_back(checkpoint: Path) -> PreTrainedModel:
    """The checkpoint's model. Refuses what transformers would complete with random weights (GPT-OSS's experts)."""
    try:
        model, losses = load_with_losses(checkpoint)
    except IntactKVError as error:
        raise IntactKVError(
            f"transformers cannot load the quantized model back ({error.__cause__ or error}); use another method"
        ) from error
    lost = sorted(name for names in losses.values() for name in names)
    if lost:
        raise IntactKVError(f"transformers cannot load the quantized {lost[0]} back; use another architecture")
    return model


def _copy_tokenizer(source: Path, tokenizer: PreTrainedTokenizerBase | None, checkpoint: Path) -> None:
    """A folder's tokenizer files as they are; of a model on the Hub, what its tokenizer writes."""
    if not source.is_dir():
        if tokenizer is not None:
            tokenizer.save_pretrained(checkpoint)
        return
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, checkpoint / file.name)
