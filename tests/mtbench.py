"""MT-Bench's files in the schema, with questions of our own, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "writing", "turns": ["Describe a river in spring.", "Now shorten that."]},
    {"question_id": 2, "category": "math", "turns": ["What is 3 + 4?", "And twice that?"], "reference": ["7", "14"]},
    {"question_id": 3, "category": "coding", "turns": ["Write a loop in C.", "Explain it."]},
    {"question_id": 4, "category": "stem", "turns": ["Why is the sky blue, and why does it turn red?", "Why?"]},
    {"question_id": 5, "category": "writing", "turns": ["Write one line about rain.", "Make it rhyme."]},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(model: str, said: str = "said by", rows: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Two-turn answers of one model to all questions, in FastChat's schema."""
    return [
        {
            "question_id": row["question_id"], "answer_id": f"{model}{row['question_id']}", "model_id": model,
            "choices": [{"index": 0, "turns": [f"{t} {said} {model} to {row['question_id']}" for t in ("one", "two")]}],
            "tstamp": 1.0,
        }
        for row in rows or QUESTIONS
    ]  # fmt: skip
