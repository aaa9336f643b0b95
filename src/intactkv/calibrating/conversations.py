"""Conversation files through the tokenizer's own chat template, with a mask of what the assistant says.

Where the template marks the assistant's words (`{% generation %}`), its own mask is taken. Where it does not, the
conversation is rendered up to and including each answer, and the answer is what came on top. What this gives up:
a template that renders earlier turns differently once later ones follow has no such answers, and its rows are
left out by name.
"""

from __future__ import annotations

import os
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from intactkv.calibrating.samples import Sample, Samples
from intactkv.error import IntactKVError
from intactkv.lines import from_json, read_utf8

_ROLES = {"human": "user", "user": "user", "system": "system"}
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _BadRow(Exception):
    """Why a row is left out, in words that many rows may share."""


def conversation_samples(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: Tensor | Sequence[int],
    length: int = 1024,
    count: int = 192,
    seed: int = 0,
    system: str | None = None,
) -> Samples:
    """The first `count` usable conversations of a JSON or JSON Lines file, in an order drawn by `seed`.

    Rows are `{"conversations": [{"from", "value"}]}` (ShareGPT), `{"messages": [{"role", "content"}]}`, or a bare
    list of either. Rows longer than `length` tokens are cut there. `system` is put before rows that have no system
    message, as `chat_prefix(tokenizer, system=…)` does. A row that cannot be used is left out, and `skipped` says
    why and which.

    Raises `IntactKVError` for a file that is no JSON, a tokenizer without a chat template, a length or count below 1,
    and where no row is left.
    """
    if length < 1 or count < 1:
        raise IntactKVError(f"length={length} and count={count} must be at least 1; 1024 and 192 are sensible")
    if tokenizer.chat_template is None:
        raise IntactKVError(
            f"{tokenizer.name_or_path} has no chat template; give plain text, or a tokenizer that has one"
        )
    head, chosen = list(map(int, prefix)), list[Sample]()
    skipped: dict[str, list[str]] = defaultdict(list)
    rows = _rows(Path(path), skipped)
    random.Random(seed).shuffle(rows)
    for name, row in rows:
        if len(chosen) == count:
            break
        try:
            messages = _messages(row)
            if system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
            chosen.append(_sample(*tokenized(tokenizer, messages), head, length))
        except _BadRow as reason:
            skipped[str(reason)].append(name)
    if not chosen:
        reasons = ", ".join(f"{len(names)} × {reason}" for reason, names in skipped.items()) or "it is empty"
        raise IntactKVError(f"{path} has no conversation to learn from ({reasons}); mend the rows or the prefix")
    return Samples(tuple(chosen), str(path), dict(skipped))


def _rows(path: Path, skipped: dict[str, list[str]]) -> list[tuple[str, Any]]:
    """Every row under its name; broken lines of a JSON Lines file are left out by name."""
    text = read_utf8(path)
    try:
        data = from_json(text)
        if isinstance(data, list):
            return [(f"row {i}", row) for i, row in enumerate(data)]
        return [("row 0", data)]
    except ValueError:
        pass  # several JSON texts, one a line
    rows = []
    for i, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append((f"line {i}", from_json(line)))
        except ValueError:
            skipped["no JSON"].append(f"line {i}")
    if not rows:
        raise IntactKVError(f"{path} is no JSON; give conversations as a JSON list or one JSON text a line")
    return rows


def _messages(row: Any) -> list[dict[str, str]]:
    """A row's messages under the roles that chat templates know."""
    if isinstance(row, dict):
        row = row.get("conversations", row.get("messages"))
    if not isinstance(row, list) or not row:
        raise _BadRow("no list of messages under `conversations` or `messages`")
    messages = []
    for message in row:
        if not isinstance(message, dict):
            raise _BadRow("a message that is no dictionary")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise _BadRow(f"a message of the role {role!r}")
        if not isinstance(content, str) or not content.strip():
            raise _BadRow("a message without text")
        messages.append({"role": _ROLES[role.lower()], "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise _BadRow("no message of the assistant")
    return messages


def _sample(ids: list[int], learned: list[bool], prefix: list[int], length: int) -> Sample:
    if ids[: len(prefix)] != prefix:
        raise _BadRow("tokens that do not begin with the prefix")
    learned = [on and i >= len(prefix) for i, on in enumerate(learned)][:length]
    if sum(learned) < 2:  # the first one after the prefix is predicted by the artifact's own logits
        raise _BadRow(f"fewer than two tokens of the assistant within {length}")
    last = max(i for i, on in enumerate(learned) if on) + 1  # what comes after teaches nothing
    return Sample(torch.tensor(ids[:last]), torch.tensor(learned[:last]))


def tokenized(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """A conversation's token ids, and for each token whether the assistant says it."""
    try:
        if _GENERATION.search(str(tokenizer.chat_template)):
            encoded: Any = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(encoded["input_ids"]), [bool(on) for on in encoded["assistant_masks"]]
        return _by_rendering(tokenizer, messages)
    except _BadRow:
        raise
    except Exception as error:  # a template is a program: whatever it raises, it refused these messages
        raise _BadRow("messages that the chat template refuses") from error


def _by_rendering(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """As `tokenized`, for a template that does not mark the assistant's words."""

    def render(count: int, *, ask: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask))

    whole, spans = render(len(messages), ask=False), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(i, ask=True) if i else "", render(i + 1, ask=False)
            if not (whole.startswith(before) and whole.startswith(after)):
                raise _BadRow("turns that the chat template renders differently once others follow")
            spans.append((len(before), len(after.rstrip())))
    if not tokenizer.is_fast:
        raise _BadRow("a tokenizer without offsets and a template without {% generation %}")
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = [any(start < end and a < end and start < b for a, b in spans) for start, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), learned
