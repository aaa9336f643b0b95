"""Conversation files become samples: what the assistant says is learned, nothing else; bad rows are named."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from intactkv import IntactKVError, bos, chat_prefix
from intactkv.calibrating import conversation_samples, split, text_samples
from intactkv.calibrating.conversations import tokenized
from intactkv.checkpoint.load import load_tokenizer
from intactkv.demo import MODEL, TEXT

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where does the river rise?"},
    {"role": "assistant", "content": " In the northern mountains. "},
    {"role": "user", "content": "And where does it end?"},
    {"role": "assistant", "content": "In the sea."},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def said(tokenizer: Any, ids: list[int], learned: list[bool]) -> str:
    return tokenizer.decode([i for i, on in zip(ids, learned, strict=True) if on])


def test_the_mask_is_what_the_template_marks(tokenizer: Any) -> None:
    ids, learned = tokenized(tokenizer, TALK)
    assert ids == tokenizer.apply_chat_template(TALK)["input_ids"]
    assert said(tokenizer, ids, learned) == " In the northern mountains.</s> In the sea.</s>"


def test_without_marks_the_mask_is_the_same_as_with_them(tokenizer: Any) -> None:
    bare = with_template(tokenizer, re.sub(r"\{%-? *(end)?generation *-?%\}", "", tokenizer.chat_template))
    assert "generation %}" not in bare.chat_template.replace("add_generation", "")
    assert tokenized(bare, TALK) == tokenized(tokenizer, TALK)


def test_without_marks_a_chatml_mask_holds_the_answers_and_their_ends(tokenizer: Any) -> None:
    ids, learned = tokenized(with_template(tokenizer, CHATML), TALK)
    text = said(tokenizer, ids, learned)
    assert text.replace(" ", "") == "Inthenorthernmountains.<|im_end|>Inthesea.<|im_end|>"
    assert "river" not in text


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(rows: Any, name: str = "talks.json") -> Path:
        path = tmp_path / name
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8")
        return path

    return write


def sharegpt(talk: list[dict[str, str]]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"id": "x", "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in talk]}


def test_every_schema_gives_the_same_samples(tokenizer: Any, file: Any) -> None:
    want = None
    for rows, name in (
        ([sharegpt(TALK)], "a.json"),
        ([{"messages": TALK}], "b.json"),
        ([TALK], "c.json"),
        ([{"messages": TALK}], "d.jsonl"),
    ):
        found = conversation_samples(file(rows, name), tokenizer, prefix=bos(tokenizer))
        want = want or found.digest
        assert found.digest == want
        assert found.skipped == {}


def test_bad_rows_are_counted_and_named_and_the_rest_is_used(tokenizer: Any, file: Any) -> None:
    rows = [
        {"messages": TALK},
        {"text": "no messages"},
        {"messages": [{"role": "user", "content": "Hello?"}]},
        {"messages": [*TALK[1:3], {"role": "poet", "content": "Oh!"}]},
        {"messages": [TALK[1], {"role": "assistant", "content": ""}]},
        {"conversations": ["not a dictionary"]},
        7,
        {"messages": [{"role": "user", "content": "long " * 60}, TALK[2]]},
    ]
    found = conversation_samples(file(rows), tokenizer, prefix=bos(tokenizer), length=48)
    assert len(found) == 1
    assert {reason: sorted(names) for reason, names in found.skipped.items()} == {
        "no list of messages under `conversations` or `messages`": ["row 1", "row 6"],
        "no message of the assistant": ["row 2"],
        "a message of the role 'poet'": ["row 3"],
        "a message without text": ["row 4"],
        "a message that is no dictionary": ["row 5"],
        "fewer than two tokens of the assistant within 48": ["row 7"],
    }


def test_broken_lines_are_named_and_a_broken_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n{broken\n" + json.dumps(sharegpt(TALK)))
    found = conversation_samples(path, tokenizer, prefix=bos(tokenizer))
    assert len(found) == 2
    assert found.skipped == {"no JSON": ["line 2"]}
    path.write_text("no JSON at all")
    with pytest.raises(IntactKVError, match="is no JSON"):
        conversation_samples(path, tokenizer, prefix=bos(tokenizer))
    with pytest.raises(IntactKVError, match="cannot be read"):
        conversation_samples(tmp_path / "none.json", tokenizer, prefix=bos(tokenizer))


def test_templates_that_refuse_or_rewrite_turns_leave_rows_out_by_name(tokenizer: Any, file: Any) -> None:
    path = file([{"messages": TALK}, {"messages": TALK[1:3]}])
    refusing = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    found = conversation_samples(path, with_template(tokenizer, refusing), prefix=[])
    assert (len(found), found.skipped) == (1, {"messages that the chat template refuses": ["row 0"]})
    forgetting = CHATML.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '…')")
    found = conversation_samples(path, with_template(tokenizer, forgetting), prefix=[])
    reason = "turns that the chat template renders differently once others follow"
    assert (len(found), found.skipped) == (1, {reason: ["row 0"]})


def test_rows_must_begin_with_the_prefix_and_a_system_prompt_can_be_given(tokenizer: Any, file: Any) -> None:
    path = file([{"messages": TALK}, {"messages": TALK[1:3]}])
    prefix = chat_prefix(tokenizer, system="Be brief.")
    found = conversation_samples(path, tokenizer, prefix=prefix)
    assert (len(found), found.skipped) == (1, {"tokens that do not begin with the prefix": ["row 1"]})
    assert len(conversation_samples(path, tokenizer, prefix=prefix, system="Be brief.")) == 2
    with pytest.raises(IntactKVError, match="2 × tokens that do not begin with the prefix"):
        conversation_samples(path, tokenizer, prefix=[5, 6])


def test_length_count_and_seed(tokenizer: Any, file: Any) -> None:
    path = file([{"messages": [TALK[1], {"role": "assistant", "content": f"Number {i} of them."}]} for i in range(20)])
    few = [conversation_samples(path, tokenizer, prefix=[0], count=5, seed=seed) for seed in (0, 0, 1)]
    assert [len(found) for found in few] == [5, 5, 5]
    assert few[0].digest == few[1].digest != few[2].digest
    short = conversation_samples(path, tokenizer, prefix=[0], length=20)
    assert {len(row.ids) for row in short.rows} == {20}


@pytest.mark.parametrize(("length", "count"), [(-5, 2), (0, 2), (32, 0), (32, -1)])
def test_a_length_and_a_count_that_cannot_be_are_refused(tokenizer: Any, file: Any, length: int, count: int) -> None:
    with pytest.raises(IntactKVError, match=f"length={length} and count={count} must be at least 1"):
        conversation_samples(file([TALK, TALK]), tokenizer, prefix=[0], length=length, count=count)


def test_text_is_cut_into_pieces_and_split_without_overlap(tokenizer: Any) -> None:
    found = text_samples(TEXT, tokenizer, prefix=[0, 5], length=64, count=20)
    assert {tuple(row.ids[:2].tolist()) for row in found.rows} == {(0, 5)}
    assert {int(row.learned.sum()) for row in found.rows} == {62}
    parts = split(found, held_out=7)
    digests = [{row.digest for row in part.rows} for part in (parts.train, parts.choose, parts.judge)]
    assert [len(d) for d in digests] == [13, 3, 4]
    assert len(set.union(*digests)) == 20
    for held_out in (0, 2, 20):
        with pytest.raises(IntactKVError, match=f"held_out={held_out}"):
            split(found, held_out=held_out)


def test_a_tokenizer_without_template_is_refused(tokenizer: Any, file: Any) -> None:
    bare = with_template(tokenizer, "")
    bare.chat_template = None
    with pytest.raises(IntactKVError, match="has no chat template"):
        conversation_samples(file([TALK]), bare, prefix=[0])
