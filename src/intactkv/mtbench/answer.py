"""A model's answers to two-turn questions, in batches: the second turn sees the first answer.

Batches are always the same pieces of the question list, also when a part of it is answered already, and every
question's randomness is its own; so a run that was stopped ends with the answers it would have had.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from intactkv.artifact import IntactKV
from intactkv.attaching.handle import attach, check_detached
from intactkv.capturing.prefix import shared
from intactkv.decoder import input_device
from intactkv.error import IntactKVError
from intactkv.generate import padding, plain_generation
from intactkv.lines import check_unicode
from intactkv.mtbench.chat import prompt_ids, turn_end
from intactkv.mtbench.questions import Question
from intactkv.mtbench.sampling import SampleByRow, row_generator
from intactkv.positions import most_positions


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated: tokens of one at most, questions in a batch, the seed, and the system prompt."""

    max_new_tokens: int = 1024
    batch_size: int = 8
    seed: int = 0
    system: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise IntactKVError(f"{name}={getattr(self, name)} is too small; use 1 or more")
        check_unicode(self.system or "", "the system prompt")


@dataclass(eq=False)
class Answerer:
    """One arm: a model with its own prefix, or with `kv` attached, and the tokenizer of the full model.

    `shared` counts prompts by how many of `kv`'s prefix tokens they begin with.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: AnswerSettings
    kv: IntactKV | None = None
    shared: dict[int, int] = field(default_factory=dict)

    def check(self, questions: Sequence[Question]) -> None:
        """Raise `IntactKVError` where questions and answers do not fit the model, or it has a KV attached."""
        check_detached(self.model)
        limit = most_positions(self.model.config)
        fits: dict[int | str, int] = {}
        for question in questions:
            blank = [""] * (len(question.turns) - 1)
            length = len(prompt_ids(self.tokenizer, question.turns, blank, system=self.settings.system))
            if limit is not None:
                fits[question.id] = (limit - length) // len(question.turns)
        tight = min(fits, key=lambda name: fits[name], default=None)
        if tight is not None and fits[tight] < self.settings.max_new_tokens:
            remedy = f"use --max-new-tokens {fits[tight]} or less" if fits[tight] > 0 else "leave that question out"
            raise IntactKVError(
                f"question {tight} and answers of {self.settings.max_new_tokens} tokens do not fit into the model's "
                f"{limit} positions; {remedy}"
            )

    def turns(self, questions: Sequence[Question]) -> list[list[str]]:
        """The answers to every turn of every question of one batch."""
        said: list[list[str]] = [[] for _ in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            rows = [i for i, question in enumerate(questions) if turn < len(question.turns)]
            prompts = [
                prompt_ids(self.tokenizer, questions[i].turns[: turn + 1], said[i], system=self.settings.system)
                for i in rows
            ]
            for i, prompt in zip(rows, prompts, strict=True):
                if self.kv is not None:
                    count = shared_tokens(prompt, self.kv, questions[i])
                    self.shared[count] = self.shared.get(count, 0) + 1
            for i, text in zip(rows, self._generate([questions[i] for i in rows], prompts, turn), strict=True):
                said[i].append(text)
        return said

    def _generate(self, questions: Sequence[Question], prompts: Sequence[list[int]], turn: int) -> list[str]:
        limit = most_positions(self.model.config)
        longest = max(len(prompt) for prompt in prompts)
        if limit is not None and longest + self.settings.max_new_tokens > limit:
            raise IntactKVError(
                f"a prompt of turn {turn + 1} has {longest} tokens, which with {self.settings.max_new_tokens} new ones "
                f"is over the model's {limit} positions; use a smaller --max-new-tokens and another folder"
            )
        ids, mask = _left_padded(prompts, pad=padding(self.tokenizer))
        sample = SampleByRow(
            [question.temperature for question in questions],
            [row_generator(self.settings.seed, question.id, turn) for question in questions],
        )
        end, stop = turn_end(self.tokenizer)
        model: Any = self.model
        device = input_device(model)
        plain = plain_generation(
            model, self.tokenizer, end=end, max_new_tokens=self.settings.max_new_tokens, do_sample=False
        )
        with plain as config, self._intact():
            out = model.generate(
                ids.to(device), attention_mask=mask.to(device), generation_config=config,
                logits_processor=LogitsProcessorList([sample]),
                **({"stop_strings": [stop], "tokenizer": self.tokenizer} if stop else {}),
            )  # fmt: skip
        return [self._text(row, config.eos_token_id, stop) for row in out[:, ids.shape[1] :].tolist()]

    def _text(self, row: list[int], end: Any, stop: str) -> str:
        """What a row says before its turn's end."""
        length = next((i for i, token in enumerate(row) if token in end), len(row))
        text = str(self.tokenizer.decode(row[:length], skip_special_tokens=True))
        return (text.partition(stop)[0] if stop else text).strip()

    @contextmanager
    def _intact(self) -> Iterator[None]:
        """The KV attached, if there is one; `shared` counts what `attach` would warn of."""
        with nullcontext() if self.kv is None else attach(self.model, self.kv), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"row \d+ agrees with only")
            yield


def check_prefix(
    tokenizer: PreTrainedTokenizerBase, kv: IntactKV, questions: Sequence[Question], *, system: str | None
) -> None:
    """Raise `IntactKVError` where a first turn's prompt shares nothing with the intact prefix."""
    for question in questions:
        shared_tokens(prompt_ids(tokenizer, question.turns[:1], [], system=system), kv, question)


def shared_tokens(prompt: list[int], kv: IntactKV, question: Question) -> int:
    """How many tokens of the intact prefix a prompt begins with: those are intact.

    Raises `IntactKVError` where it is none.
    """
    prefix = kv.ids.tolist()
    if not (both := shared([prefix, prompt])):
        raise IntactKVError(
            f"the prompt of question {question.id} begins with the token {prompt[0]}, the intact prefix with "
            f"{prefix[0]}, so nothing would be intact; capture with --prefix chat"
        )
    return len(both)


def answers(
    answerer: Answerer,
    questions: Sequence[Question],
    answered: set[int | str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[tuple[Question, list[str]]]]:
    """Batch after batch, the answers to questions that are not among the `answered`; whole batches are generated."""
    size = answerer.settings.batch_size
    for begin in range(0, len(questions), size):
        batch = questions[begin : begin + size]
        if any(question.id not in answered for question in batch):
            said = answerer.turns(batch)
            yield [(q, turns) for q, turns in zip(batch, said, strict=True) if q.id not in answered]
        if progress is not None:
            progress(begin + len(batch), len(questions))


def _left_padded(prompts: Sequence[list[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask `(row, token)`."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
