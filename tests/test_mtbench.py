"""Two-turn answers: what each turn sees, whose randomness it is, where it ends, and what a stop leaves behind."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mtbench
import pytest
import torch
from models import rounded
from test_cli import intactkv
from test_conversations import CHATML, with_template

from intactkv import IntactKV, IntactKVError, attach, bos, capture, chat_prefix
from intactkv.attaching.handle import is_attached
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL
from intactkv.mtbench.answer import Answerer, AnswerSettings, answers, check_prefix
from intactkv.mtbench.chat import prompt_ids, turn_end
from intactkv.mtbench.files import AnswerFile, answers_of, read_answers
from intactkv.mtbench.questions import Question, read_questions
from intactkv.mtbench.sampling import SampleByRow, row_generator

SETTINGS = AnswerSettings(max_new_tokens=6, batch_size=2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def full() -> Any:
    return load_model(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(full: Any) -> Any:
    return rounded(full)


@pytest.fixture(scope="module")
def kv(full: Any, tokenizer: Any) -> IntactKV:
    return capture(full, chat_prefix(tokenizer), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    return read_questions(mtbench.write(tmp_path_factory.mktemp("q") / "question.jsonl", mtbench.QUESTIONS))


def said(answerer: Answerer, questions: list[Question], answered: set[int | str] | None = None) -> dict[Any, list[str]]:
    return {q.id: turns for batch in answers(answerer, questions, answered or set()) for q, turns in batch}


def test_temperatures_are_fastchats_and_a_questions_own_goes_first(tmp_path: Path) -> None:
    rows = [
        {"question_id": i, "category": c, "turns": ["x"], **more}
        for i, (c, more) in enumerate(
            [("writing", {}), ("roleplay", {}), ("extraction", {}), ("math", {}), ("coding", {}), ("reasoning", {}),
             ("stem", {}), ("humanities", {}), ("other", {}), ("math", {"required_temperature": 0.3})]
        )
    ]  # fmt: skip
    found = read_questions(mtbench.write(tmp_path / "q", rows))
    assert [q.temperature for q in found] == [0.7, 0.7, 0, 0, 0, 0, 0.1, 0.1, 0.7, 0.3]
    assert [q.id for q in read_questions(tmp_path / "q", first=1)] == list(range(9))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"category": "math", "turns": ["x"]}, "line 1 of .* lacks question_id"),
        ([1], "lacks everything"),
        ({"question_id": 1, "category": "math", "turns": []}, "has the turns"),
        ({"question_id": 1, "category": "math", "turns": "x"}, "has the turns"),
        ({"question_id": 1, "category": 3, "turns": ["x"]}, "of category 3"),
        ({"question_id": 1, "category": "math", "turns": ["x"], "reference": [1]}, "has the reference"),
        ({"question_id": 1, "category": "math", "turns": ["x"], "required_temperature": -1}, "the temperature -1"),
    ],
)
def test_questions_that_are_not_in_the_schema_are_refused(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match=message):
        read_questions(mtbench.write(tmp_path / "q", [row]))


def test_other_bad_question_files(tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match="cannot be read"):
        read_questions(tmp_path / "absent")
    with pytest.raises(IntactKVError, match="the question 1 twice"):
        read_questions(mtbench.write(tmp_path / "q", [mtbench.QUESTIONS[0], mtbench.QUESTIONS[0]]))
    (tmp_path / "q").write_text('{"question_id": 1,\n')
    with pytest.raises(IntactKVError, match=r"line 1 of .* is no JSON"):
        read_questions(tmp_path / "q")
    (tmp_path / "q").write_text("\n")
    with pytest.raises(IntactKVError, match="has no question"):
        read_questions(tmp_path / "q")


def test_noise_makes_the_largest_logit_a_sample_of_the_softmax() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    generator = row_generator(0, 1, 0)
    sample, drawn = SampleByRow([0.7], [generator]), torch.zeros(4)
    for _ in range(4000):
        drawn[sample(torch.zeros(1, 1, dtype=torch.int64), logits).argmax()] += 1
    torch.testing.assert_close(drawn / 4000, (logits[0] / 0.7).softmax(-1), atol=0.025, rtol=0)


def test_a_row_of_temperature_zero_is_left_as_it_is_and_rows_do_not_share_noise() -> None:
    logits, ids = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 1, dtype=torch.int64)
    names = (("a", 0.0), ("b", 1.0), ("c", 0.5))
    together = SampleByRow([t for _, t in names], [row_generator(3, n, 0) for n, _ in names])(ids, logits)
    assert torch.equal(together[0], logits[0])
    for i, (name, temperature) in enumerate(names):
        alone = SampleByRow([temperature], [row_generator(3, name, 0)])(ids[:1], logits[i : i + 1])
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(
        torch.rand(5, generator=row_generator(3, "b", 0)), torch.rand(5, generator=row_generator(3, "b", 1))
    )


def test_the_second_turn_sees_the_first_answer_through_the_template(tokenizer: Any) -> None:
    ids = prompt_ids(tokenizer, ["Why?", "And then?"], ["Because."], system="Be brief.")
    assert tokenizer.decode(ids) == (
        "<s>System: Be brief.\nUser: Why?\nAssistant: Because.</s>\nUser: And then?\nAssistant:"
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    forgetful = with_template(tokenizer, "{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(IntactKVError, match="leaves out an earlier answer"):
        prompt_ids(forgetful, ["Why?", "And then?"], ["Because."])
    thinking = with_template(
        tokenizer, "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    )  # fmt: skip
    prompt_ids(thinking, ["Why?", "And then?"], ["<think>long</think>\n\nBecause."])
    with pytest.raises(IntactKVError, match="has no chat template"):
        prompt_ids(with_template(tokenizer, None), ["Why?"], [])  # type: ignore[arg-type]
    with pytest.raises(IntactKVError, match="refuses these messages"):
        prompt_ids(with_template(tokenizer, "{{ raise_exception('no') }}"), ["Why?"], [])


def test_where_a_turn_ends(tokenizer: Any) -> None:
    assert turn_end(tokenizer) == ({tokenizer.eos_token_id}, "")
    marked = with_template(copy.deepcopy(tokenizer), CHATML)
    marked.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = marked.convert_tokens_to_ids("<|im_end|>")
    assert turn_end(marked) == ({tokenizer.eos_token_id, end}, "")
    plain = with_template(tokenizer, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}")
    assert turn_end(plain) == ({tokenizer.eos_token_id}, "\n\nuser:")


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, kv: IntactKV | None, question: Question, settings: AnswerSettings) -> list[str]:
    """Both turns of one question, one token at a time, without cache or batch."""
    done: list[str] = []
    for turn in range(len(question.turns)):
        messages = []
        for i, text in enumerate(question.turns[: turn + 1]):
            messages.append({"role": "user", "content": text})
            messages += [{"role": "assistant", "content": done[i]}] if i < turn else []
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt, generator = tokenizer(text, add_special_tokens=False).input_ids, row_generator(0, question.id, turn)
        new: list[int] = []
        while len(new) < settings.max_new_tokens and tokenizer.eos_token_id not in new:
            handle = None if kv is None else attach(model, kv)
            logits = model(torch.tensor([prompt + new]), use_cache=False).logits[0, -1]
            if handle is not None:
                handle.remove()
            if question.temperature:
                noise = -torch.empty_like(logits).exponential_(generator=generator).log()
                logits = logits / question.temperature + noise
            new.append(int(logits.argmax()))
        done.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return done


def test_answers_equal_a_loop_over_single_tokens(
    full: Any, model: Any, tokenizer: Any, kv: IntactKV, questions: list[Question]
) -> None:
    found = {}
    for name, which, artifact in (("full", full, None), ("own", model, None), ("intact", model, kv)):
        found[name] = said(Answerer(which, tokenizer, SETTINGS, artifact), questions)
        for question in questions[:2]:
            assert found[name][question.id] == by_hand(which, tokenizer, artifact, question, SETTINGS), name
    assert found["full"] != found["own"] != found["intact"]
    assert not is_attached(model)


def test_answers_do_not_depend_on_the_batch_and_the_seed_counts_where_it_is_sampled(
    full: Any, tokenizer: Any, questions: list[Question]
) -> None:
    state = torch.get_rng_state()
    whole = said(Answerer(full, tokenizer, SETTINGS), questions)
    assert torch.equal(torch.get_rng_state(), state)
    for size in (1, 5):
        assert said(Answerer(full, tokenizer, AnswerSettings(6, size)), questions) == whole
    other = said(Answerer(full, tokenizer, AnswerSettings(6, 5, seed=1)), questions)
    assert other[1] != whole[1]
    assert other[2] == whole[2]


def test_nothing_of_the_checkpoints_sampling_creeps_in_and_its_config_comes_back(
    full: Any, tokenizer: Any, questions: list[Question]
) -> None:
    whole = said(Answerer(full, tokenizer, SETTINGS), questions)
    kept = full.generation_config
    changed = copy.deepcopy(kept)
    changed.update(do_sample=True, temperature=3.0, top_k=2, repetition_penalty=1.9, max_length=7, min_new_tokens=6)
    full.generation_config = changed
    try:
        assert said(Answerer(full, tokenizer, SETTINGS), questions) == whole
        assert full.generation_config is changed
    finally:
        full.generation_config = kept


def test_an_answer_stops_at_the_turns_end(full: Any, tokenizer: Any, questions: list[Question]) -> None:
    long = said(Answerer(full, tokenizer, AnswerSettings(12, 5)), questions)
    text = long[2][0]
    word = text.split()[3]
    plain = with_template(
        tokenizer,
        "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] | trim }}"
        "{% if m['role'] == 'assistant' %} " + word + "{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
    )
    assert turn_end(plain)[1].startswith(f" {word}")
    stop = tokenizer(f" {word}", add_special_tokens=False).input_ids[0]
    kept = full.generation_config
    full.generation_config = copy.deepcopy(kept)
    full.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    try:
        short = said(Answerer(full, tokenizer, AnswerSettings(12, 5)), questions)[2][0]
    finally:
        full.generation_config = kept
    assert len(short) < len(text)
    assert text.startswith(short)


def test_an_answer_stops_at_a_turns_end_that_is_plain_text(full: Any, tokenizer: Any) -> None:
    plain = with_template(
        tokenizer,
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} the {% endif %}"
        "{% endfor %}",
    )
    assert turn_end(plain)[1] == " the"
    openings = ("The river rises in", "In the year of", "The city lies at", "He went to")
    questions = [Question(i, "math", (text,), 0.0) for i, text in enumerate(openings)]
    settings = AnswerSettings(12, 4)
    whole = {q.id: by_hand(full, plain, None, q, settings)[0] for q in questions}
    assert any(" the" in f" {text}" for text in whole.values())
    for name, (text,) in said(Answerer(full, plain, settings), questions).items():
        assert text == f" {whole[name]}".partition(" the")[0].strip()


def test_prompts_that_do_not_begin_with_the_prefix(
    full: Any, model: Any, tokenizer: Any, questions: list[Question]
) -> None:
    foreign = capture(full, [9, 10])
    for attempt in (
        lambda: check_prefix(tokenizer, foreign, questions, system=None),
        lambda: said(Answerer(model, tokenizer, SETTINGS, foreign), questions),
    ):
        with pytest.raises(IntactKVError, match="so nothing would be intact; capture with --prefix chat"):
            attempt()
    longer = [*chat_prefix(tokenizer), *tokenizer(" Describe", add_special_tokens=False).input_ids]
    partly = Answerer(model, tokenizer, SETTINGS, capture(full, longer))
    check_prefix(tokenizer, capture(full, longer), questions, system=None)
    said(partly, questions)
    assert partly.shared == {len(longer): 2, len(chat_prefix(tokenizer)): 8}
    alone = Answerer(model, tokenizer, SETTINGS, capture(full, bos(tokenizer)))
    said(alone, questions)
    assert alone.shared == {1: 10}


def test_questions_that_do_not_fit_are_refused_at_the_door(
    full: Any, tokenizer: Any, questions: list[Question]
) -> None:
    with pytest.raises(IntactKVError, match=r"use --max-new-tokens (\d+) or less") as found:
        Answerer(full, tokenizer, AnswerSettings(600)).check(questions)
    fits = int(str(found.value).split("--max-new-tokens ")[1].split()[0])
    Answerer(full, tokenizer, AnswerSettings(fits)).check(questions)
    with pytest.raises(IntactKVError, match="do not fit"):
        Answerer(full, tokenizer, AnswerSettings(fits + 1)).check(questions)
    huge = Question(9, "math", ("word " * 2000,), 0.0)
    with pytest.raises(IntactKVError, match=r"question 9 .* leave that question out"):
        Answerer(full, tokenizer, SETTINGS).check([*questions, huge])
    for settings in ({"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(IntactKVError, match="=0 is too small"):
            AnswerSettings(**settings)


@pytest.mark.parametrize("answered", [{1}, {2, 4}, {1, 2, 5}])
def test_what_is_answered_is_skipped_and_the_rest_is_the_same(
    full: Any, tokenizer: Any, questions: list[Question], answered: set[int | str]
) -> None:
    whole = said(Answerer(full, tokenizer, SETTINGS), questions)
    rest = said(Answerer(full, tokenizer, SETTINGS), questions, answered)
    assert rest == {name: turns for name, turns in whole.items() if name not in answered}


def change_seed(file: AnswerFile, questions: list[Question]) -> tuple[AnswerFile, list[Question]]:
    return AnswerFile(file.folder, file.model_id, {**file.how, "seed": 1}), questions


def change_question(file: AnswerFile, questions: list[Question]) -> tuple[AnswerFile, list[Question]]:
    return file, [Question(1, "writing", ("Something else?",), 0.7), *questions[1:]]


@pytest.mark.parametrize(("change", "named"), [(change_seed, "seed"), (change_question, "question 1")])
def test_answers_of_another_run_are_not_mixed(
    change: Callable[..., Any], named: str, questions: list[Question], tmp_path: Path
) -> None:
    file = AnswerFile(tmp_path, "m", {"seed": 0})
    known = file.open(questions[:1])
    file.add(known, questions[0], ["a", "b"])
    file.write(known)
    assert file.open(questions)[1]["choices"] == [{"index": 0, "turns": ["a", "b"]}]
    assert read_answers(tmp_path) == {"m": {1: ["a", "b"]}}
    other, asked = change(file, questions)
    with pytest.raises(IntactKVError, match=f"made otherwise \\({named} differ\\)"):
        other.open(asked)
    file.path.with_suffix(".json").unlink()
    with pytest.raises(IntactKVError, match="says how the answers beside it were made"):
        file.open(questions)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([], "its how is None"),
        ({"questions": {}}, "its how is None"),
        ({"how": ["seed", 0]}, r"its how is \['seed', 0\]"),
        ({"how": {"seed": 0}, "questions": 3}, "its questions is 3"),
    ],
)
def test_a_file_that_does_not_say_how_answers_were_made_is_refused(
    said: Any, why: str, questions: list[Question], tmp_path: Path
) -> None:
    file = AnswerFile(tmp_path, "m", {"seed": 0})
    known = file.open(questions)
    file.add(known, questions[0], ["a", "b"])
    file.write(known)
    file.path.with_suffix(".json").write_text(json.dumps(said))
    with pytest.raises(IntactKVError, match=f"m.json must say how the answers beside it were made, and {why}"):
        file.open(questions)
    assert json.loads(file.path.with_suffix(".json").read_text()) == said


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/b", ".", ".."])
def test_a_name_does_not_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    path = mtbench.write(tmp_path / "question.jsonl", mtbench.QUESTIONS)
    words = ["mtbench", "answer", MODEL, "--full", MODEL, "--kv", "kv", "--questions", path, "-o", tmp_path / "out"]
    done = intactkv(*words, "--name", name)
    assert done.returncode == 1
    assert f"--name {name} is no name of a file in" in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_answer_files_that_are_not_in_the_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match="no model_answer"):
        read_answers(tmp_path)
    path = mtbench.write(tmp_path / "model_answer/m.jsonl", [{"question_id": 1, "choices": []}])
    with pytest.raises(IntactKVError, match=r"no choices\[0\].turns"):
        answers_of(path)


def test_the_command_writes_three_arms_and_goes_on_after_a_stop(
    model: Any, kv: IntactKV, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "w3")
    kv.save(tmp_path / "kv")
    file = mtbench.write(tmp_path / "question.jsonl", mtbench.QUESTIONS)
    command: list[Any] = [
        "mtbench", "answer", tmp_path / "w3", "--full", MODEL, "--kv", tmp_path / "kv", "--questions", file,
        "--max-new-tokens", "5", "--batch-size", "2",
    ]  # fmt: skip
    done = intactkv(*command, "-o", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    whole = {p.stem: mtbench.read(p) for p in (tmp_path / "whole/model_answer").glob("*.jsonl")}
    assert sorted(whole) == ["model", "w3-intact", "w3-own"]
    for name, rows in whole.items():
        assert [row["question_id"] for row in rows] == [1, 2, 3, 4, 5]
        assert set(rows[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert {row["model_id"] for row in rows} == {name}
        assert all(len(row["choices"][0]["turns"]) == 2 for row in rows)
        about = json.loads((tmp_path / f"whole/model_answer/{name}.json").read_text())
        assert about["how"]["seed"] == 0
        assert (about["how"]["kv"] is not None) == (name == "w3-intact")

    turns, calls = Answerer.turns, []

    def stopping(self: Answerer, questions: list[Question]) -> list[list[str]]:
        calls.append(len(questions))
        if len(calls) == 5:
            raise IntactKVError("stopped")
        return turns(self, questions)

    monkeypatch.setattr(Answerer, "turns", stopping)
    assert intactkv(*command, "-o", tmp_path / "parts").returncode == 1
    assert len(mtbench.read(tmp_path / "parts/model_answer/w3-own.jsonl")) == 2
    done = intactkv(*command, "-o", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    assert "all 5 questions are answered" in done.stdout
    assert calls == [2, 2, 1, 2, 2, 2, 1, 2, 2, 1]
    for name, rows in whole.items():
        again = mtbench.read(tmp_path / f"parts/model_answer/{name}.jsonl")
        assert [{**row, "tstamp": 0} for row in again] == [{**row, "tstamp": 0} for row in rows]
    done = intactkv(*command, "-o", tmp_path / "parts", "--seed", "1")
    assert done.returncode == 1
    assert "made otherwise (seed differ)" in " ".join(done.stderr.split())
    done = intactkv(*command, "-o", tmp_path / "elsewhere", "--device", "nowhere")
    assert done.returncode == 1
    assert "cannot be put on --device nowhere" in " ".join(done.stderr.split())
    capture(load_model(MODEL), [9]).save(tmp_path / "foreign")
    done = intactkv(*command, "-o", tmp_path / "elsewhere", "--kv", tmp_path / "foreign")
    assert done.returncode == 1
    assert "so nothing would be intact" in " ".join(done.stderr.split())
    assert not (tmp_path / "elsewhere/model_answer/model.jsonl").exists()
    done = intactkv(*command, "-o", tmp_path / "parts", "--arms", "full,best")
    assert done.returncode == 1
    assert "--arms names 'best'" in done.stderr
