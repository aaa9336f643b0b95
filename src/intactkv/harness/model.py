"""lm-eval's Hugging Face model with one prefix before every context, intact or the model's own."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from sqlitedict import SqliteDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from intactkv.artifact import IntactKV
from intactkv.artifact.digest import weights_digest
from intactkv.attaching.handle import attach, check_detached
from intactkv.capturing.live import tokenizer_digest
from intactkv.capturing.prefix import bos
from intactkv.checkpoint.load import load_model_on, load_tokenizer
from intactkv.error import IntactKVError
from intactkv.positions import check_positions

_HEEDED = (  # HFLM's arguments that it looks at where the model is loaded already
    "backend", "batch_size", "chat_template_args", "enable_thinking", "logits_cache", "max_batch_size", "max_length",
    "mixed_precision_dtype", "softmax_dtype", "think_end_token", "truncation",
)  # fmt: skip
_OURS = ("pretrained", "kv", "attached", "tokenizer", "dtype", "device")
_OTHER_BEGINNING = ("add_bos_token", "prefix_token_id", "peft", "delta")

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("intactkv")
class IntactLM(HFLM):
    """A causal LM whose every context begins with the prefix, once: what `--model intactkv` makes.

    The three arms of a comparison differ in two arguments and in nothing else:

        --model_args pretrained=FULL,kv=KV,attached=False      the full model
        --model_args pretrained=MODEL,kv=KV,attached=False     the quantized one with its own prefix
        --model_args pretrained=MODEL,kv=KV                    the quantized one with the intact prefix

    Paths with commas need `--model_args '{"pretrained": …, "kv": …}'`, which lm-eval takes as well.

    `pretrained` is a folder, a Hub name or a loaded model, `kv` a file or an `IntactKV`; without it the prefix is the
    tokenizer's [BOS], the model's own. The prefix stays when a context is too long and is cut on the left, and in
    every window of a rolling likelihood. A prompt that already begins with the whole prefix (a chat template's) gets
    it no second time; one that begins with [BOS] and goes on otherwise is refused. Other arguments are HFLM's as far as
    it heeds them for a loaded model (batch_size, max_length, softmax_dtype, think_end_token, …).

    Raises `IntactKVError` for arguments that are unknown, that HFLM would ignore or that would put another beginning
    before contexts, for a tokenizer without [BOS] where no `kv` says what to begin with, and as `attach`.
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        *,
        kv: str | Path | IntactKV | None = None,
        attached: bool = True,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        _check_options(options)
        if not isinstance(attached, bool):
            raise IntactKVError(f"attached={attached!r} is neither True nor False; write one of them")
        if isinstance(pretrained, str | Path):
            name, model = str(pretrained), load_model_on(pretrained, device or "auto", dtype=dtype)
            tokenizer = pretrained if tokenizer is None else tokenizer
        else:
            name, model = str(pretrained.name_or_path), pretrained
        check_detached(model)
        if tokenizer is None:
            raise IntactKVError("a loaded model was given without its tokenizer; give tokenizer= too")
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        if device is not None:
            model.to(device)  # type: ignore[arg-type]
        artifact = IntactKV.from_pretrained(kv) if isinstance(kv, str | Path) else kv
        self.prefix: list[int] = bos(tokenizer) if artifact is None else artifact.ids.tolist()
        self._bos = tokenizer.bos_token_id
        self._asked: dict[int, int] = {}  # the first position whose logits are asked for, by row of a batch
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        check_positions(model.config, self.max_length, "max_length")
        if len(self.prefix) >= self.max_length:
            raise IntactKVError(
                f"the prefix has {len(self.prefix)} tokens and max_length is {self.max_length}; raise max_length"
            )
        self.pretrained = name  # for the result file, which names the model by it
        self.attachment = attach(model, artifact) if artifact is not None and attached else None
        self._kv = artifact

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Keep this arm's answers in a table of its own: lm-eval's `--use_cache` tells apart requests, not models."""
        answers = cache_hook.dbdict
        if answers is not None:
            table = SqliteDict(answers.filename, tablename=self.identity)
            answers.tablename = table.tablename  # lm-eval's wrapper holds the same object
            table.close()
        super().set_cache_hook(cache_hook)

    @property
    def identity(self) -> str:
        """SHA-256 of what decides this arm's answers: weights, prefix, intact KV, tokenizer, longest context."""
        what = [
            weights_digest(self.model), self.pretrained, self.prefix, tokenizer_digest(self.tokenizer), self.max_length,
            None if self.attachment is None or self._kv is None else self._kv.digest,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context ends with."""
        return self.prefix[-1]

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The prefix and the string's tokens; the tokens alone with `add_special_tokens=False`."""
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        if add_special_tokens is not False:
            ids = self._prefixed(ids)
        return ids if not left_truncate_len else self._cut(ids, left_truncate_len)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts for generation: prefixed, cut behind the prefix, padded; `truncation` has nothing left to do."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            where = slice(length - len(row), None) if padding_side == "left" else slice(len(row))
            ids[i, where], mask[i, where] = torch.tensor(row), 1
        return ids, mask

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The continuation's log-likelihood after prefix and context; an empty context is the prefix alone."""
        encoded: list[Encoded] = []
        for context, continuation in (request.args for request in requests):
            if context:
                encoded.append(((context, continuation), *self._encode_pair(context, continuation)))
            else:
                own = self.tok_encode(continuation, add_special_tokens=False)
                encoded.append(((context, continuation), self.prefix, own))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text's log-likelihood in windows that do not overlap: the prefix, the token before, the window.

        Every token is predicted once, the same ones whatever the prefix's keys and values are.
        """
        windows: list[Encoded] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - len(self.prefix),
                context_len=1,
            )
            before = len(windows)
            for context, window in map(make_disjoint_window, pieces):
                first = len(windows) == before
                windows.append((None, self.prefix if first else [*self.prefix, *context], window))
            counts.append(len(windows) - before)
        found = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(found)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        fitted = []
        for text, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < len(self.prefix):
                raise IntactKVError(
                    f"a continuation of {len(continuation)} tokens leaves no room for the prefix of {len(self.prefix)} "
                    f"within max_length={self.max_length}; raise max_length if the model allows it"
                )
            fitted.append((text, self._cut(context, room), continuation))
        self._asked = {}
        for _, context, continuation in fitted:
            row, first = _unpadded([*context, *continuation[:-1]]), len(context) - 1
            self._asked[row] = min(first, self._asked.get(row, first))
        try:
            return super()._loglikelihood_tokens(fitted, disable_tqdm=disable_tqdm, override_bs=override_bs)
        finally:
            self._asked = {}

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits from the first position that is asked for on, [B, K, V]: HFLM counts rows from the end.

        All positions' are most of the time and memory of a small model with many tokens. They are all there where HFLM
        tries batch sizes and where the model takes no `logits_to_keep`.
        """
        first = min(self._asked.get(_unpadded(row), 0) for row in inps.tolist())
        if first == 0 or "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            return super()._model_call(inps, attn_mask, labels)
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.model(inps, logits_to_keep=inps.shape[1] - first).logits

    def _prefixed(self, ids: list[int]) -> list[int]:
        if ids[: len(self.prefix)] == self.prefix:
            return ids
        if ids and ids[0] == self._bos:
            raise IntactKVError(
                f"a prompt begins with {ids[:8]}, the intact KV's prefix is {self.prefix[:8]}…: both begin with [BOS] "
                "and then differ; capture the prefix that these prompts begin with (intactkv capture --prefix chat "
                "--system …), or give the same system prompt to both"
            )
        return [*self.prefix, *ids]

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The last tokens that fit in `length` behind the prefix."""
        if len(ids) <= length:
            return ids
        if length < len(self.prefix):
            raise IntactKVError(
                f"{length} tokens leave no room for the prefix of {len(self.prefix)}; generate fewer tokens or raise "
                "max_length"
            )
        return [*self.prefix, *ids[len(ids) - (length - len(self.prefix)) :]]


def _unpadded(row: list[int]) -> int:
    """A row of tokens as one number, the same whatever HFLM pads it to (with 0, on the right)."""
    size = len(row)
    while size and row[size - 1] == 0:
        size -= 1
    return hash(tuple(row[:size]))


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise `IntactKVError` for what HFLM would swallow in silence; its own defaults do no harm."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(HFLM.__init__).parameters.items()}
    for name, value in options.items():
        if name in _HEEDED or (name in defaults and value == defaults[name]):
            continue
        if name in _OTHER_BEGINNING:
            raise IntactKVError(
                f"{name}={value!r} was given, but contexts begin with the prefix of kv (by default [BOS]) "
                "and the model is the one that kv was made for; leave it out"
            )
        if name in defaults:
            raise IntactKVError(
                f"{name}={value!r} is an argument of lm-eval's hf model that has no effect here, where intactkv loads "
                "the model; leave it out"
            )
        near = difflib.get_close_matches(name, [*_OURS, *_HEEDED], n=1)
        meant = f"did you mean {near[0]}?" if near else f"known are {', '.join([*_OURS, *_HEEDED])}"
        raise IntactKVError(f"{name}={value!r} is no argument of --model intactkv; {meant}")
