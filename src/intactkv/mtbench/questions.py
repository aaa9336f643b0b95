"""MT-Bench's questions, as FastChat's question.jsonl has them: the file is the user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intactkv.error import IntactKVError
from intactkv.lines import check_unicode, read_lines

# FastChat's, by category; others are sampled at its default.
_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
_OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Question:
    """A question of one or more turns; `reference` are the right answers to its turns, if the file has any."""

    id: int | str
    category: str
    turns: tuple[str, ...]
    temperature: float
    reference: tuple[str, ...] = ()


def read_questions(path: Path, *, first: int | None = None) -> list[Question]:
    """The questions of a file, or the `first` so many of each category, in the file's order.

    A question's `required_temperature` goes before its category's temperature.

    Raises `IntactKVError` for a file that is not in the schema, repeated ids, and where there is no question.

    Source: FastChat, fastchat/llm_judge, `temperature_config`.
    """
    questions = [_question(row, path) for row in read_lines(path, needed=("question_id", "category", "turns"))]
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        raise IntactKVError(f"{path} has the question {max(ids, key=ids.count)} twice; every id must be its own")
    if not questions:
        raise IntactKVError(f"{path} has no question; give a file such as FastChat's question.jsonl")
    seen: dict[str, int] = {}
    chosen = []
    for question in questions:
        seen[question.category] = seen.get(question.category, 0) + 1
        if first is None or seen[question.category] <= first:
            chosen.append(question)
    return chosen


def _question(row: dict[str, Any], path: Path) -> Question:
    name, category, turns = row["question_id"], row["category"], row["turns"]
    temperature = row.get("required_temperature", _TEMPERATURES.get(str(category), _OTHER_TEMPERATURE))
    if isinstance(name, bool) or not isinstance(name, (int, str)) or not isinstance(category, str):
        raise IntactKVError(f"{path} has the question {name!r} of category {category!r}; give a number and a word")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise IntactKVError(f"question {name} of {path} has the turns {turns!r}; give a list of texts")
    for turn in turns:
        check_unicode(turn, f"question {name!a} of {path}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature < 10:
        raise IntactKVError(f"question {name} of {path} requires the temperature {temperature!r}; give 0 or more")
    reference = row.get("reference") or []
    if not isinstance(reference, list) or not all(isinstance(text, str) for text in reference):
        raise IntactKVError(f"question {name} of {path} has the reference {reference!r}; give a list of texts")
    return Question(name, category, tuple(turns), float(temperature), tuple(reference))
