"""Grading against a server on this machine: what is asked, what is a grade, what is tried again, what is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mtbench
import pytest
from test_cli import intactkv

from intactkv import IntactKVError
from intactkv.mtbench.files import judgment_path
from intactkv.mtbench.judge import Endpoint, judge, rating
from intactkv.mtbench.prompts import KINDS, OURS, read_prompts
from intactkv.mtbench.questions import Question, read_questions
from intactkv.mtbench.scores import read_grades, rows_of, summarize

pytest.importorskip("openai")

Reply = Callable[[str, int], tuple[int, Any]]  # (the prompt, how often it was asked before) to (status, text or body)


class Stub:
    """An OpenAI-compatible server on this machine that answers as `reply` says and remembers what it was asked."""

    def __init__(self) -> None:
        self.reply: Reply = lambda prompt, before: (200, "Fine. [[7]]")
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with lock:
                    before = sum(b["messages"][-1]["content"] == prompt for b in stub.asked)
                    stub.asked.append({**body, "path": self.path})
                    stub.keys.add(self.headers["Authorization"])
                status, said = stub.reply(prompt, before)
                if isinstance(said, str):
                    said = {
                        "id": "1", "object": "chat.completion", "created": 1, "model": "judge",
                        "choices": [
                            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                        ],
                    }  # fmt: skip
                content = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("retry-after-ms", "1")  # what a server may say; without it the client waits longer
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client may go away
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Stub()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return mtbench.write(tmp_path / "question.jsonl", mtbench.QUESTIONS)


@pytest.fixture
def questions(file: Path) -> list[Question]:
    return read_questions(file)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    for model in ("base", "w3-own", "w3-intact"):
        mtbench.write(tmp_path / f"model_answer/{model}.jsonl", mtbench.answers(model))
    return tmp_path


def run(bench: Path, stub: Stub, questions: list[Question], **more: Any) -> Any:
    references, prompts = more.pop("references", {}), more.pop("prompts", OURS)
    endpoint = Endpoint(stub.url, "judge", **{"retries": 2, **more})
    return judge(bench, endpoint, questions, prompts=prompts, references=references)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("[[1]]", 1), ("x [[10]] y", 10), ("[[ 7.5 ]]", 7.5), ("[[6]] … so [[6]]", 6), ("", None), ("[[0]]", None),
        ("[[11]]", None), ("Rating: [5]", None), ("[[seven]]", None), ("[[-3]]", None), ("[[4]] no, [[5]]", None),
    ],
)  # fmt: skip
def test_a_rating_is_one_number_from_1_to_10(reply: str, expected: float | None) -> None:
    assert rating(reply) == expected


def test_every_answer_is_graded_once_in_fastchats_schema(bench: Path, stub: Stub, questions: list[Question]) -> None:
    done = run(bench, stub, questions)
    assert (done.graded, done.there, done.malformed, done.without_reference) == (30, 0, [], ["3"])
    rows = mtbench.read(judgment_path(bench, "judge"))
    assert len(rows) == len(stub.asked) == 30
    assert {(row["question_id"], row["model"], row["turn"]) for row in rows} == {
        (q.id, model, turn) for q in questions for model in ("base", "w3-own", "w3-intact") for turn in (1, 2)
    }
    for row in rows:
        assert set(row) == {
            "question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"
        }  # fmt: skip
        assert (row["score"], row["judgment"], row["judge"][0]) == (7, "Fine. [[7]]", "judge")
        question = next(q for q in questions if q.id == row["question_id"])
        shown = row["user_prompt"]
        assert question.turns[row["turn"] - 1] in shown
        assert f"{'two' if row['turn'] == 2 else 'one'} said by {row['model']} to {question.id}" in shown
        assert (f"two said by {row['model']}" in shown) == (row["turn"] == 2)
        assert ("<reference" in shown) == (question.category == "math")
        assert "[[5]]" in shown
    for body in stub.asked:
        assert (body["path"], body["model"], body["temperature"]) == ("/v1/chat/completions", "judge", 0)
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert [row["question_id"] for row in rows] == sorted(row["question_id"] for row in rows)


def test_the_key_comes_from_the_environment_and_stays_out_of_the_files(
    bench: Path, stub: Stub, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    run(bench, stub, questions)
    assert stub.keys == {"Bearer sk-secret-1234"}
    for path in bench.rglob("*"):
        assert path.is_dir() or b"sk-secret-1234" not in path.read_bytes()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(bench: Path, stub: Stub, questions: list[Question], status: int) -> None:
    stub.reply = lambda prompt, before: (status, {"error": "busy"}) if before < 2 else (200, "[[4]]")
    done = run(bench, stub, questions)
    assert done.graded == 30
    assert len(stub.asked) == 90
    assert {row["score"] for row in mtbench.read(judgment_path(bench, "judge"))} == {4}


@pytest.mark.parametrize(
    ("status", "message"),
    [(429, "answers 429 .*run the same command again"), (500, "answers 500"), (401, "set OPENAI_API_KEY"),
     (404, "answers 404")],
)  # fmt: skip
def test_a_server_that_refuses_ends_the_run_and_what_is_graded_is_kept(
    bench: Path, stub: Stub, questions: list[Question], status: int, message: str
) -> None:
    stub.reply = lambda prompt, _: (status, {"error": "no"}) if "w3-own" in prompt else (200, "[[6]]")
    with pytest.raises(IntactKVError, match=message):
        run(bench, stub, questions, parallel=1)
    kept = mtbench.read(judgment_path(bench, "judge"))
    assert len(kept) == 20 - 10 or {row["model"] for row in kept} <= {"base", "w3-intact"}
    assert kept
    asked = len(stub.asked)
    stub.reply = lambda prompt, _: (200, "[[6]]")
    done = run(bench, stub, questions)
    assert (done.there, done.graded) == (len(kept), 30 - len(kept))
    assert len(stub.asked) - asked == 30 - len(kept)
    assert mtbench.read(judgment_path(bench, "judge"))[0]["tstamp"] == kept[0]["tstamp"]


def test_nobody_there_is_one_sentence(bench: Path, questions: list[Question]) -> None:
    endpoint = Endpoint("http://127.0.0.1:9/v1", "judge", retries=0)
    with pytest.raises(IntactKVError, match="cannot be reached"):
        judge(bench, endpoint, questions, prompts=OURS, references={})


MALFORMED: list[Any] = [
    "No number at all.", "[[0]]", "[[3]] or [[8]]", {"choices": []}, {"nothing": 1},
    {"id": "1", "object": "chat.completion", "created": 1, "model": "m",
     "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": None}}]},
]  # fmt: skip


@pytest.mark.parametrize("said", MALFORMED)
def test_malformed_replies_are_asked_again_then_left_out_by_name_and_never_scored(
    bench: Path, stub: Stub, questions: list[Question], said: Any
) -> None:
    stub.reply = lambda prompt, before: (200, said if "by w3-own to 4" in prompt or before == 0 else "[[9]]")
    done = run(bench, stub, questions)
    assert done.malformed == ["w3-own on question 4, turn 1", "w3-own on question 4, turn 2"]
    assert done.graded == 28
    assert len(stub.asked) == 28 * 2 + 2 * 3
    rows = mtbench.read(judgment_path(bench, "judge"))
    assert {row["score"] for row in rows} == {9}
    grades = read_grades(judgment_path(bench, "judge"), questions)
    assert 4 not in grades["w3-own"]
    assert summarize(grades, questions)["ungraded"] == {"base": [], "w3-own": [4], "w3-intact": []}

    stub.reply = lambda prompt, before: (200, "[[2]]")  # a judge that has come to its senses
    done = run(bench, stub, questions)
    assert (done.graded, done.there, done.malformed) == (2, 28, [])


def test_a_changed_answer_is_graded_anew(bench: Path, stub: Stub, questions: list[Question]) -> None:
    run(bench, stub, questions)
    mtbench.write(bench / "model_answer/base.jsonl", mtbench.answers("base", said="otherwise said by"))
    done = run(bench, stub, questions)
    assert (done.graded, done.there, done.stale) == (10, 20, 10)
    assert len(mtbench.read(judgment_path(bench, "judge"))) == 30


@pytest.mark.parametrize("name", ["parallel", "asks", "retries"])
def test_an_endpoint_that_would_never_be_asked_is_refused(name: str) -> None:
    with pytest.raises(IntactKVError, match=rf"{name}=-1 is too few; use [01] or more"):
        Endpoint("http://127.0.0.1", "judge", **{name: -1})


@pytest.mark.parametrize("score", ["no rating", "8", None, -1])
def test_a_grade_that_show_would_not_count_is_asked_for_again(
    bench: Path, stub: Stub, questions: list[Question], score: Any
) -> None:
    run(bench, stub, questions)
    path = judgment_path(bench, "judge")
    first, *others = mtbench.read(path)
    mtbench.write(path, [{**first, "score": score}, *others])
    done = run(bench, stub, questions)
    assert (done.graded, done.there, done.stale) == (1, 29, 1)
    assert all(isinstance(row["score"], int | float) for row in mtbench.read(path))


def test_references_are_shown_where_answers_are_right_or_wrong(
    bench: Path, stub: Stub, questions: list[Question]
) -> None:
    references = {i: [f"reference one of {i}", f"reference two of {i}"] for i in (1, 2, 3)}
    done = run(bench, stub, questions, references=references)
    assert done.without_reference == []
    for row in mtbench.read(judgment_path(bench, "judge")):
        shown, expected = row["user_prompt"], row["question_id"] in (2, 3)  # math and coding, not writing
        assert ("reference one of" in shown) == expected
        assert ("reference two of" in shown) == (expected and row["turn"] == 2)
        assert row["judge"][1].startswith("intactkv-reference" if expected else "intactkv-single")


def test_the_users_own_prompts_in_fastchats_schema(
    bench: Path, stub: Stub, questions: list[Question], tmp_path: Path
) -> None:
    rows = [
        {"name": kind, "type": "single", "system_prompt": f"S {kind}", "output_format": "[[rating]]",
         "prompt_template": f"mine {kind} " + ("{question_2} {answer_2}" if "multi" in kind else "{question} {answer}")
         + (" {ref_answer_1}" if "math" in kind else "")}
        for kind in KINDS
    ]  # fmt: skip
    prompts = read_prompts(mtbench.write(tmp_path / "p", [*rows, {**rows[0], "name": "pair-v2"}]))
    run(bench, stub, questions, prompts=prompts)
    for body in stub.asked:
        kind = body["messages"][1]["content"].split()[1]
        assert body["messages"][0]["content"] == f"S {kind}"
    with pytest.raises(IntactKVError, match="lacks the prompt single-math-v1-multi-turn"):
        read_prompts(mtbench.write(tmp_path / "p", rows[:3]))
    with pytest.raises(IntactKVError, match=r"asks for '\[\[A\]\]'"):
        read_prompts(mtbench.write(tmp_path / "p", [{**rows[0], "output_format": "[[A]]"}]))
    broken = read_prompts(mtbench.write(tmp_path / "p", [{**rows[0], "prompt_template": "{nonsense}"}, *rows[1:]]))
    with pytest.raises(IntactKVError, match="the names in braces may be question, answer"):
        run(bench, stub, questions, prompts=broken)


def graded(scores: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    return [
        {"question_id": i, "model": model, "turn": turn, "score": score, "judge": ["j", "p"], "user_prompt": "",
         "judgment": "", "tstamp": 0.0}
        for model, pairs in scores.items()
        for i, pair in enumerate(pairs, start=1)
        for turn, score in enumerate(pair, start=1)
    ]  # fmt: skip


SCORES: dict[str, list[tuple[float, float]]] = {
    "base": [(9, 8), (7, 7), (10, 9), (8, 6), (9, 9)],
    "w3-intact": [(7, 6), (5, 3), (6, 6), (7, 5), (8, 8)],
    "w3-own": [(6, 6), (5, 1), (6, 4), (7, 5), (6, 5)],
}


def test_means_and_paired_differences_are_those_by_hand(questions: list[Question], tmp_path: Path) -> None:
    path = mtbench.write(tmp_path / "j", graded(SCORES))
    found = summarize(read_grades(path, questions), questions)
    assert rows_of(questions) == ["writing", "math", "coding", "stem", "turn 1", "turn 2", "all"]
    own = found["models"]["w3-own"]
    assert own["writing"] == {"mean": pytest.approx((6 + 6 + 6 + 5) / 4), "questions": 2}
    assert own["turn 2"]["mean"] == pytest.approx((6 + 1 + 4 + 5 + 5) / 5)
    assert own["all"]["mean"] == pytest.approx(sum(sum(pair) for pair in SCORES["w3-own"]) / 10)
    order = [(pair["first"], pair["second"]) for pair in found["pairs"]]
    assert order == [("base", "w3-own"), ("base", "w3-intact"), ("w3-own", "w3-intact")]
    difference = found["pairs"][2]["difference"]
    assert difference["all"]["value"] == pytest.approx((0.5 + 1 + 1 + 0 + 2.5) / 5)
    assert difference["all"]["low"] < difference["all"]["value"] < difference["all"]["high"]
    assert difference["math"] == {"value": pytest.approx(1), "low": None, "high": None, "questions": 1}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_only_questions_that_both_have_whole_are_compared(questions: list[Question], tmp_path: Path) -> None:
    rows = graded(SCORES)
    rows = [row for row in rows if (row["model"], row["question_id"], row["turn"]) != ("w3-own", 5, 2)]
    for row in rows:
        if (row["model"], row["question_id"]) == ("w3-intact", 2):
            row["score"] = -1  # what FastChat writes where its judge gave no rating
    found = summarize(read_grades(mtbench.write(tmp_path / "j", rows), questions), questions)
    assert found["ungraded"] == {"base": [], "w3-intact": [2], "w3-own": [5]}
    assert found["pairs"][2]["difference"]["all"]["questions"] == 3
    assert found["pairs"][2]["difference"]["math"] is None
    assert found["models"]["w3-own"]["all"]["questions"] == 4
    with pytest.raises(IntactKVError, match="judge first"):
        read_grades(mtbench.write(tmp_path / "j", rows[:1]), questions)
    with pytest.raises(IntactKVError, match="has the score 'x'"):
        read_grades(mtbench.write(tmp_path / "j", [{**rows[0], "score": "x"}]), questions)


def test_intervals_of_the_bootstrap_cover_as_often_as_they_say() -> None:
    import torch

    generator, inside = torch.Generator().manual_seed(0), 0
    asked = [Question(i, "writing", ("?",), 0.7) for i in range(80)]
    for trial in range(200):
        values = torch.randn(80, generator=generator, dtype=torch.float64) + 1
        grades = {"a": dict.fromkeys(range(80), (0.0,)), "b": {i: (float(v),) for i, v in enumerate(values)}}
        found = summarize(grades, asked, resamples=400, seed=trial)["pairs"][0]["difference"]["all"]
        inside += found["low"] <= 1 <= found["high"]
    assert 0.90 <= inside / 200 <= 0.99


def test_the_commands_judge_and_show(bench: Path, stub: Stub, file: Path, tmp_path: Path) -> None:
    stub.reply = lambda prompt, before: (
        200, "no" if "by base to 1" in prompt else "[[3]]" if "by w3-own" in prompt else "[[8]]"
    )  # fmt: skip
    command = ["mtbench", "judge", bench, "--questions", file, "--endpoint", stub.url, "--judge", "org/judge"]
    done = intactkv(*command, "--asks", "2")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "28 answers graded, 0 were there" in said
    assert "left out, for 2 replies without one rating: 2 answers (base on question 1, turn 1; base on" in said
    assert "graded without a reference, as none was given: questions 3" in said
    assert (bench / "model_judgment/org_judge_single.jsonl").is_file()

    done = intactkv(
        "mtbench", "show", bench, "--questions", file, "--judge", "org/judge", "-o", tmp_path / "show.json",
        "--markdown", tmp_path / "page.md",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "base: 1 questions do not count, a grade is missing: 1" in " ".join(done.stdout.split())
    data = json.loads((tmp_path / "show.json").read_text())
    assert data["models"]["w3-intact"]["all"]["mean"] == 8
    assert data["pairs"][2]["difference"]["all"] == {"value": 5, "low": 5, "high": 5, "questions": 5}
    assert len(data["digests"]["judgments"]) == 64
    page = (tmp_path / "page.md").read_text().splitlines()
    assert page[0].startswith("| judge | model | writing | math |")
    assert any("| w3-intact − w3-own |" in line and "+5.00 [+5.00, +5.00]" in line for line in page)

    done = intactkv("mtbench", "show", bench, "--questions", file, "--judge", "absent")
    assert done.returncode == 1
    assert "cannot be read" in done.stderr


def test_without_the_client_the_remedy_is_named(
    bench: Path, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(IntactKVError, match=r"pip install 'intactkv\[judge\]'"):
        judge(bench, Endpoint("http://127.0.0.1:9", "j"), questions, prompts=OURS, references={})


def test_ctrl_c_stops_at_once_and_what_was_graded_is_kept(bench: Path, stub: Stub, file: Path) -> None:
    asked, hold = threading.Event(), threading.Event()

    def reply(prompt: str, before: int) -> tuple[int, str]:
        if len(stub.asked) > 3:
            asked.set()
            hold.wait(60)
        return 200, "[[8]]"

    stub.reply = reply
    command = [sys.executable, "-m", "intactkv.cli", "mtbench", "judge", bench, "--endpoint", stub.url]
    command += ["--judge", "judge", "--questions", file]
    running = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which shells ignore in the background
    )  # fmt: skip
    assert asked.wait(60)
    time.sleep(0.5)
    began = time.monotonic()
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)
    hold.set()
    assert running.returncode != 0
    assert time.monotonic() - began < 5
    assert len(judgment_path(bench, "judge").read_text().splitlines()) == 3
