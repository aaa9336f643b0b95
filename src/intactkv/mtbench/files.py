"""The files of a run, in FastChat's layout and schema, so that its own judge and pages read them.

DIR/model_answer/MODEL_ID.jsonl, DIR/model_answer/MODEL_ID.json (how the answers were made), and
DIR/model_judgment/JUDGE_single.jsonl.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from intactkv.error import IntactKVError
from intactkv.lines import from_json, read_lines, write_lines
from intactkv.mtbench.questions import Question
from intactkv.provenance import write_json


@dataclass(frozen=True)
class AnswerFile:
    """One arm's answers under `model_id`, and `how` they are made: all that they depend on but the questions."""

    folder: Path
    model_id: str
    how: dict[str, Any]

    @property
    def path(self) -> Path:
        """The JSON Lines file."""
        return self.folder / "model_answer" / f"{self.model_id}.jsonl"

    def open(self, questions: Sequence[Question]) -> dict[int | str, dict[str, Any]]:
        """The answers that are there, by question, once it is certain that the same run made them.

        Raises `IntactKVError` where they were made in another way or to other questions.
        """
        about, texts = self.path.with_suffix(".json"), {str(q.id): _digest(q) for q in questions}
        rows = []
        if self.path.exists():
            rows = read_lines(self.path, needed=("question_id", "choices"), keys=("question_id",))
        if rows:
            how, asked = _made(about)
            differs = [name for name, value in self.how.items() if how.get(name) != value]
            differs += [f"question {name}" for name, text in texts.items() if asked.get(name, text) != text]
            if differs:
                raise IntactKVError(
                    f"{self.path} holds answers that were made otherwise ({', '.join(differs[:5])} differ); name "
                    "another folder, another --name, or remove it"
                )
            texts = {**asked, **texts}
        about.parent.mkdir(parents=True, exist_ok=True)
        write_json(about, {"model_id": self.model_id, "how": self.how, "questions": texts})
        return {row["question_id"]: row for row in rows}

    def add(self, known: dict[int | str, dict[str, Any]], question: Question, turns: Sequence[str]) -> None:
        """Put one question's answers among the `known` ones."""
        name = sha256(json.dumps([self.model_id, question.id, self.how, list(turns)]).encode()).hexdigest()[:22]
        known[question.id] = {
            "question_id": question.id,
            "answer_id": name,
            "model_id": self.model_id,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": time.time(),
        }

    def write(self, known: dict[int | str, dict[str, Any]]) -> None:
        """Write all `known` answers, by question, whole or not at all."""
        write_lines(self.path, [known[name] for name in sorted(known, key=lambda i: (isinstance(i, str), i))])


def read_answers(folder: Path) -> dict[str, dict[int | str, list[str]]]:
    """Every model's answers, by model id and question: the turns of the first choice.

    Raises `IntactKVError` where there is none, and for a file that is not in the schema.
    """
    found: dict[str, dict[int | str, list[str]]] = {}
    for path in sorted((folder / "model_answer").glob("*.jsonl")):
        found[path.stem] = answers_of(path)
    if not found:
        raise IntactKVError(f"{folder} has no model_answer/*.jsonl; write some with `intactkv mtbench answer`")
    return found


def answers_of(path: Path) -> dict[int | str, list[str]]:
    """One file's answers (or reference answers) by question."""
    found = {}
    for row in read_lines(path, needed=("question_id", "choices"), keys=("question_id",)):
        try:
            turns = row["choices"][0]["turns"]
        except (LookupError, TypeError):
            turns = None
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise IntactKVError(
                f"question {row['question_id']} of {path} has no choices[0].turns that are texts; mend or remove it"
            )
        found[row["question_id"]] = turns
    return found


def judgment_path(folder: Path, judge: str) -> Path:
    """Where a judge's single-answer grades are."""
    return folder / "model_judgment" / f"{judge.replace('/', '_')}_single.jsonl"


def _digest(question: Question) -> str:
    return sha256(json.dumps([question.turns, question.temperature]).encode()).hexdigest()[:16]


def _made(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the answers beside `path` were made, and the digests of their questions by id."""
    try:
        found = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntactKVError(
            f"{path}, which says how the answers beside it were made, cannot be read ({error}); name another folder"
        ) from error
    for name in ("how", "questions"):
        part = found.get(name) if isinstance(found, dict) else None
        if not isinstance(part, dict):
            raise IntactKVError(
                f"{path} must say how the answers beside it were made, and its {name} is {part!a:.40}, no object; name "
                "another folder, another --name, or remove both files"
            )
    return found["how"], found["questions"]
