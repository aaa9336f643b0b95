"""Single-answer grading by any OpenAI-compatible endpoint: a grade is a number the judge gave, or there is none.

A reply without exactly one rating from 1 to 10 is malformed: it is asked for again, then left out and named, never
counted as any number. Every grade is written when it is known; run again, only what lacks is asked for.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from intactkv.error import IntactKVError
from intactkv.lines import read_lines, write_lines
from intactkv.mtbench.files import judgment_path, read_answers
from intactkv.mtbench.prompts import REFERENCE_CATEGORIES, Prompt, ask
from intactkv.mtbench.questions import Question

_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """Who judges and how: base URL and model, requests at a time, retries of a failed one, asks for a malformed one.

    `max_tokens` bound the judge's reply, `timeout` is in seconds.
    """

    url: str
    model: str
    parallel: int = 4
    retries: int = 6
    asks: int = 3
    max_tokens: int = 2048
    timeout: float = 120.0

    def __post_init__(self) -> None:
        for name, least in (("parallel", 1), ("retries", 0), ("asks", 1)):
            if getattr(self, name) < least:
                raise IntactKVError(f"{name}={getattr(self, name)} is too few; use {least} or more")


@dataclass(frozen=True)
class Task:
    """One answer to grade."""

    question: Question
    model: str
    turn: int
    prompt: Prompt
    text: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What one grade is of."""
        return self.question.id, self.model, self.turn

    @property
    def name(self) -> str:
        """The answer in words."""
        return f"{self.model} on question {self.question.id}, turn {self.turn}"


@dataclass(eq=False)
class Outcome:
    """What judging came to: grades asked for and found, malformed ones by name, answers without a reference."""

    graded: int = 0
    there: int = 0
    stale: int = 0
    malformed: list[str] = field(default_factory=list)
    without_reference: list[str] = field(default_factory=list)


def rating(reply: str) -> float | None:
    """The one number from 1 to 10 that a reply gives in double brackets; None where there is none, or several.

    >>> rating("Good. [[8]]"), rating("[[11]]"), rating("[[3]] or [[4]]"), rating("Rating: 8")
    (8.0, None, None, None)
    """
    found = {float(number) for number in _RATING.findall(reply)}
    return found.pop() if len(found) == 1 and 1 <= max(found) <= 10 else None


def is_grade(score: Any) -> bool:
    """Whether a file's score is one that a judge gave; FastChat writes -1 where it gave none."""
    return isinstance(score, int | float) and not isinstance(score, bool) and 1 <= score <= 10


def tasks(
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[int | str, list[str]]],
    *,
    prompts: Mapping[str, Prompt],
    references: Mapping[int | str, list[str]],
) -> tuple[list[Task], list[str]]:
    """Every answer to the first two turns, and the names of those that should have had a reference and have none."""
    found, bare = [], []
    for model, of in answers.items():
        for question in questions:
            turns = of.get(question.id, [])
            reference: Sequence[str] = ()
            if question.category in REFERENCE_CATEGORIES:
                reference = references.get(question.id, question.reference)
                reference = reference if len(reference) >= min(2, len(question.turns)) else ()
                if not reference and str(question.id) not in bare:
                    bare.append(str(question.id))
            for turn in range(1, min(2, len(turns), len(question.turns)) + 1):
                prompt, text = ask(prompts, question, turn, turns, reference)
                found.append(Task(question, model, turn, prompt, text))
    return found, bare


def judge(
    folder: Path,
    endpoint: Endpoint,
    questions: Sequence[Question],
    *,
    prompts: Mapping[str, Prompt],
    references: Mapping[int | str, list[str]],
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Grade every answer in `folder` that has no grade of this judge for this very prompt, and write each grade.

    Raises `IntactKVError` where the endpoint refuses or stays away after all retries; what was graded is kept.
    """
    path = judgment_path(folder, endpoint.model)
    wanted, bare = tasks(questions, read_answers(folder), prompts=prompts, references=references)
    kept = {}
    if path.exists():
        key = ("question_id", "model", "turn")
        for row in read_lines(path, needed=(*key, "user_prompt", "score"), keys=key):
            kept[row["question_id"], row["model"], row["turn"]] = row
    outcome = Outcome(without_reference=bare)
    missing = []
    for task in wanted:
        there = kept.get(task.key)
        if there is not None and there["user_prompt"] == task.text and is_grade(there["score"]):
            outcome.there += 1
        else:
            outcome.stale += there is not None
            missing.append(task)
    client = _client(endpoint)
    grades = _as_they_come(partial(_grade, client, endpoint), missing, endpoint.parallel)
    for done, (task, grade) in enumerate(grades, start=1):
        if grade is None:
            kept.pop(task.key, None)
            outcome.malformed.append(task.name)
        else:
            kept[task.key] = grade
            outcome.graded += 1
        write_lines(path, [kept[key] for key in sorted(kept, key=in_order)])
        if progress is not None:
            progress(outcome.there + done, len(wanted))
    outcome.malformed.sort()
    return outcome


def _as_they_come(
    work: Callable[[Task], dict[str, Any] | None], tasks: Sequence[Task], threads: int
) -> Iterator[tuple[Task, dict[str, Any] | None]]:
    """Each task with its result, the first one done first; what `work` raises is raised here.

    Threads that are waiting for a reply when this is left, by an error or Ctrl-C, do not keep the process alive, as
    those of an executor would; nothing new is begun.
    """
    todo: SimpleQueue[Task] = SimpleQueue()
    done: SimpleQueue[tuple[Task, dict[str, Any] | None, BaseException | None]] = SimpleQueue()
    left = threading.Event()
    for task in tasks:
        todo.put(task)

    def run() -> None:
        while not left.is_set():
            try:
                task = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((task, work(task), None))
            except BaseException as error:
                left.set()
                done.put((task, None, error))

    for _ in range(min(threads, len(tasks))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in tasks:
            task, result, error = done.get()
            if error is not None:
                raise error
            yield task, result
    finally:
        left.set()


def in_order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """What grades are sorted by: questions with numbers first, by number."""
    return isinstance(key[0], str), *key


def _client(endpoint: Endpoint) -> Any:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise IntactKVError("judging needs the openai client: pip install 'intactkv[judge]'") from error
    key = os.environ.get(KEY) or "none"  # a local server asks for none; another one will say so
    return OpenAI(base_url=endpoint.url, api_key=key, max_retries=endpoint.retries, timeout=endpoint.timeout)


def _grade(client: Any, endpoint: Endpoint, task: Task) -> dict[str, Any] | None:
    """A judgment in FastChat's schema, or None where every reply was malformed."""
    for _ in range(endpoint.asks):
        reply = _reply(client, endpoint, task)
        score = rating(reply)
        if score is not None:
            return {
                "question_id": task.question.id,
                "model": task.model,
                "judge": [endpoint.model, task.prompt.name],
                "user_prompt": task.text,
                "judgment": reply,
                "score": int(score) if score == int(score) else score,
                "turn": task.turn,
                "tstamp": time.time(),
            }
    return None


def _reply(client: Any, endpoint: Endpoint, task: Task) -> str:
    """What the judge says; "" where its answer has no text. The client waits and tries again on 408, 409, 429, 5xx."""
    from openai import APIConnectionError, APIError, APIStatusError

    system = [{"role": "system", "content": task.prompt.system}] if task.prompt.system else []
    try:
        answer = client.chat.completions.create(
            model=endpoint.model, messages=[*system, {"role": "user", "content": task.text}], temperature=0,
            max_tokens=endpoint.max_tokens,
        )  # fmt: skip
        return str(answer.choices[0].message.content or "")
    except (AttributeError, LookupError, TypeError, ValueError):
        return ""  # no chat completion at all: as malformed as one without a rating
    except APIStatusError as error:
        remedy = f"set {KEY}" if error.status_code in (401, 403) else "run the same command again to go on"
        said = f"{endpoint.url} answers {error.status_code} ({str(error.message)[:200]})"
        raise IntactKVError(f"{said} to {task.name}; what is graded is kept: {remedy}") from error
    except APIConnectionError as error:
        raise IntactKVError(
            f"{endpoint.url} cannot be reached ({error}); what is graded is kept: run the same command again to go on"
        ) from error
    except APIError as error:
        raise IntactKVError(f"{endpoint.url} gives no usable answer ({error}); is it OpenAI-compatible?") from error
