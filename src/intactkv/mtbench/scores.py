"""Grades by category and turn for every model, and the differences between models on the same questions.

A question counts for a model when all of its turns have a grade; a difference is over the questions that count for
both. Intervals are percentile bootstraps that draw questions, since the turns of a question are one conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from intactkv.error import IntactKVError
from intactkv.evaluating.bootstrap import bootstrap
from intactkv.lines import read_lines
from intactkv.mtbench.questions import Question

Grades = Mapping[str, Mapping[Any, tuple[float, ...]]]  # by model and question: the grades of its turns


def read_grades(path: Path, questions: Sequence[Question]) -> Grades:
    """Every model's questions of which each of the first two turns has a grade from 1 to 10.

    Grades outside that, such as FastChat's -1 for a judge that gave none, count as not there. Raises `IntactKVError`
    for a file that is not in FastChat's single-answer schema, and where no model has a complete question.
    """
    found: dict[str, dict[Any, dict[int, float]]] = {}
    for row in read_lines(path, needed=("question_id", "model", "turn", "score"), keys=("question_id",)):
        score, turn = row["score"], row["turn"]
        if isinstance(score, bool) or not isinstance(score, (int, float)) or turn not in (1, 2):
            raise IntactKVError(f"{path} has the score {score!r} of turn {turn!r}; give numbers, of turns 1 and 2")
        of = found.setdefault(str(row["model"]), {}).setdefault(row["question_id"], {})
        if 1 <= score <= 10:
            of[turn] = float(score)
    grades: dict[str, dict[Any, tuple[float, ...]]] = {}
    for model, of_model in found.items():
        grades[model] = {}
        for question in questions:
            turns, got = range(1, min(2, len(question.turns)) + 1), of_model.get(question.id, {})
            if all(turn in got for turn in turns):
                grades[model][question.id] = tuple(got[turn] for turn in turns)
    if not any(grades.values()):
        raise IntactKVError(f"{path} has no question of this file with all its turns graded; judge first")
    return grades


def rows_of(questions: Sequence[Question]) -> list[str]:
    """The rows of a summary: every category, each turn, and all."""
    turns = max(min(2, len(question.turns)) for question in questions)
    return [*dict.fromkeys(q.category for q in questions), *(f"turn {i + 1}" for i in range(turns)), "all"]


def summarize(grades: Grades, questions: Sequence[Question], *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Mean grades and paired differences by category, by turn and over all, as plain data for JSON.

    `models[m][row]` is {mean, questions}; `pairs` holds for every two models the second's grades minus the first's
    as {value, low, high, questions}, None where a row has no question, low and high None where it has one.
    `ungraded[m]` names the questions that do not count for a model. The mean over all is FastChat's: of all turns.
    """
    rows = rows_of(questions)
    models: dict[str, Any] = {}
    for model, of in grades.items():
        values = {row: _values(of, questions, row) for row in rows}
        models[model] = {
            row: {"mean": float(v.mean()) if len(v) else None, "questions": len(v)} for row, v in values.items()
        }
    pairs = []
    for a, b in combinations(sorted(grades, key=_place), 2):
        both = [q for q in questions if q.id in grades[a] and q.id in grades[b]]
        differences = {}
        for row in rows:
            less, more = (_values(grades[m], both, row) for m in (a, b))
            differences[row] = _difference(more - less, resamples=resamples, seed=seed)
        pairs.append({"first": a, "second": b, "difference": differences})
    ungraded = {m: [q.id for q in questions if q.id not in of] for m, of in grades.items()}
    return {
        "models": models, "pairs": pairs, "ungraded": ungraded, "questions": len(questions),
        "bootstrap": {"resamples": resamples, "seed": seed, "drawn": "questions"},
    }  # fmt: skip


def _difference(values: Float[Tensor, "question"], *, resamples: int, seed: int) -> dict[str, Any] | None:
    if not len(values):
        return None
    generator = torch.Generator().manual_seed(seed)
    mean = bootstrap(
        lambda counts: {"mean": counts.double() @ values / len(values)},
        len(values), generator=generator, resamples=resamples,
    )["mean"]  # fmt: skip
    alone = len(values) < 2
    return {
        "value": mean.value, "low": None if alone else mean.low, "high": None if alone else mean.high,
        "questions": len(values),
    }  # fmt: skip


def _values(of: Mapping[Any, tuple[float, ...]], questions: Sequence[Question], row: str) -> Float[Tensor, "question"]:
    """Each question's grade in one row: the mean of its turns, or one turn's."""
    graded = [q for q in questions if q.id in of]
    if row.startswith("turn "):
        turn = int(row.removeprefix("turn "))
        found = [of[q.id][turn - 1] for q in graded if len(of[q.id]) >= turn]
    else:
        found = [sum(of[q.id]) / len(of[q.id]) for q in graded if row in ("all", q.category)]
    return torch.tensor(found, dtype=torch.float64)


def _place(model: str) -> tuple[bool, str, bool]:
    """Full models first, then each quantized one with its own prefix before the intact one."""
    arm = model.rpartition("-")[2]
    return arm in ("own", "intact"), model.removesuffix(f"-{arm}"), arm == "intact"
