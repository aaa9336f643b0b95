"""Two turns through the tokenizer's own chat template: what a turn's prompt is and where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from intactkv.error import IntactKVError

_ANSWER, _NEXT = "An answer of one line", "The next question"


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], answers: Sequence[str], *, system: str | None = None
) -> list[int]:
    """The ids of a prompt that asks for the answer to the last question; `answers` are those to the ones before.

    Raises `IntactKVError` where there is no chat template, where it refuses the messages, and where it loses an answer.
    """
    text = _rendered(tokenizer, questions, answers, system=system)
    for answer in answers:
        kept = answer.rpartition("</think>")[2].strip()  # templates of reasoning models drop earlier thoughts
        if kept not in text:
            raise IntactKVError(
                f"the chat template of {tokenizer.name_or_path} leaves out an earlier answer ({kept[:40]!r}…); a "
                "second turn needs one that keeps it"
            )
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> tuple[set[int], str]:
    """The ids that end an answer, and the text that does: what the template puts between an answer and the next turn.

    A special token there ends it, besides the tokenizer's end of sequence; a template that writes plain text there
    (`Human:` or the like) gives that text, or "" where there is none.
    """
    text = _rendered(tokenizer, ["A question", _NEXT], [_ANSWER], system=None)
    between = text[text.index(_ANSWER) + len(_ANSWER) : text.index(_NEXT)]
    ids = {tokenizer.eos_token_id} - {None}
    tokens = tokenizer(between, add_special_tokens=False, verbose=False).input_ids
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    if tokens and tokens[0] in special:
        return ids | {tokens[0]}, ""
    return ids, between.rstrip() if between.strip() else ""


def _rendered(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], answers: Sequence[str], *, system: str | None
) -> str:
    if tokenizer.chat_template is None:
        raise IntactKVError(
            f"{tokenizer.name_or_path} has no chat template, which MT-Bench's two turns need; use a chat model"
        )
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for i, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        if i < len(answers):
            messages.append({"role": "assistant", "content": answers[i]})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: whatever it raises, it refused these messages
        raise IntactKVError(
            f"the chat template of {tokenizer.name_or_path} refuses these messages ({error}); leave --system out if it "
            "knows no such role"
        ) from error
