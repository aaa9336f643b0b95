"""lm-eval through `IntactLM`: the model's own likelihoods, the prefix once, local tasks, paired comparison."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from intactkv import IntactKV, IntactKVError, attach, bos, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL
from intactkv.doctor.simulate import rounded_model
from intactkv.harness.command import compare_arms, lm_eval
from intactkv.harness.compare import compare, read_samples, rows
from intactkv.harness.model import IntactLM
from intactkv.harness.tasks import write_tasks

PAIRS = [
    ("The river rises in", " the mountains and"),
    ("She was born in 1931 , and", " died"),
    ("", "An empty context"),
    ("The game was released on the 3rd of", " June"),
    ("One ", "two three"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def full() -> PreTrainedModel:
    return load_model(MODEL, dtype=torch.float32)


def other(kv: IntactKV) -> IntactKV:
    """The same prefix with other values: what an arm that reads it must notice."""
    return replace(kv, layers={i: (k * 0.8, v * 1.3) for i, (k, v) in kv.layers.items()})


def likelihoods(lm: IntactLM, pairs: list[tuple[str, str]] = PAIRS) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def make(full: PreTrainedModel, tokenizer: Any, kv: IntactKV | None, **options: Any) -> IntactLM:
    return IntactLM(full, tokenizer=tokenizer, kv=kv, **options)


@pytest.mark.parametrize("text", [None, "Once upon a time"], ids=["bos", "text"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_models_own_intact_prefix_changes_no_likelihood(
    full: Any, tokenizer: Any, batch_size: int, text: Any
) -> None:
    prefix = bos(tokenizer) + (tokenizer.encode(text, add_special_tokens=False) if text else [])
    kv = capture(full, prefix)
    plain = likelihoods(make(full, tokenizer, kv, attached=False, batch_size=batch_size))
    lm = make(full, tokenizer, kv, batch_size=batch_size)
    attached = likelihoods(lm)
    lm.attachment.remove()
    torch.testing.assert_close(attached, plain, atol=1e-5, rtol=0)
    by_hand = []
    for context, continuation in PAIRS:
        whole = [*prefix, *tokenizer.encode(context + continuation, add_special_tokens=False)]
        start = len(prefix) + len(tokenizer.encode(context.rstrip(), add_special_tokens=False))
        with torch.no_grad():
            scores = full(torch.tensor([whole])).logits[0].log_softmax(-1)
        by_hand.append(float(sum(scores[t - 1, whole[t]] for t in range(start, len(whole)))))
    torch.testing.assert_close(plain, by_hand, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_logits_that_nobody_asks_for_are_left_out(
    full: Any, tokenizer: Any, batch_size: int, attached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a row ends with the token 0, which HFLM pads with, and where one row is split at two places."""
    (start,) = prefix = bos(tokenizer)
    pieces = [
        ([start, 7, 9, 11], [13, 0, 0, 0]), ([start, 7, 9, 11, 13], [0, 0, 5]), ([start, 7, 9], [11, 13]),
        ([start, 7, 9], [11, 14]), ([start, 7, 9, 11], [13]), ([start, *range(20, 60)], [8]), ([start], [8, 9]),
    ]  # fmt: skip
    requests = [((str(i), ""), *piece) for i, piece in enumerate(pieces)]
    kv = other(capture(full, prefix))
    lm = make(full, tokenizer, kv, attached=attached, batch_size=batch_size)
    shapes: list[tuple[int, int]] = []

    def counted(lm: Any, inps: Any, *masks: Any) -> Any:
        out = ours(lm, inps, *masks)
        shapes.append((out.shape[1], inps.shape[1]))
        return out

    ours = IntactLM._model_call
    monkeypatch.setattr(IntactLM, "_model_call", counted)
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    monkeypatch.setattr(IntactLM, "_model_call", HFLM._model_call)
    whole = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    monkeypatch.setattr(IntactLM, "_model_call", ours)
    asked = lm._model_call(torch.tensor([[start, 5, 7]]))  # no request of lm-eval's
    if lm.attachment:
        lm.attachment.remove()
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in whole]
    assert asked.shape[1] == 3
    if batch_size == 1:
        assert shapes == [(1, 41), (4, 7), (2, 4), (2, 2)]  # HFLM makes one of rows that are the same
    if batch_size == 3:
        assert shapes == [(39, 41), (2, 2)]


def test_another_intact_prefix_is_read(full: Any, tokenizer: Any) -> None:
    kv = capture(full, bos(tokenizer))
    plain = likelihoods(make(full, tokenizer, None))
    lm = make(full, tokenizer, other(kv), batch_size=4)
    changed = likelihoods(lm)
    lm.attachment.remove()
    assert all(abs(a - b) > 1e-4 for a, b, (context, _) in zip(plain, changed, PAIRS, strict=True) if context)


def test_rolling_predicts_every_token_once_behind_the_prefix(full: Any, tokenizer: Any) -> None:
    text = "The river rises in the mountains and falls into the sea . " * 6
    ids, prefix = tokenizer.encode(text, add_special_tokens=False), bos(tokenizer)
    lm = make(full, tokenizer, None, max_length=24, batch_size=3)
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    total, at, size = 0.0, 0, 24 - len(prefix)
    while at < len(ids):
        window = ids[at : at + size]
        before = ids[max(0, at + len(window) - size - 1) : at]  # one token, more before the last window
        row = [*prefix, *before, *window]
        with torch.no_grad():
            scores = full(torch.tensor([row])).logits[0].log_softmax(-1)
        total += sum(float(scores[len(row) - len(window) + i - 1, t]) for i, t in enumerate(window))
        at += size
    assert len(ids) > 3 * size
    assert found == pytest.approx(total, abs=1e-3)


def test_generation_is_the_models_own_in_a_padded_batch(full: Any, tokenizer: Any) -> None:
    prompts = ["The river rises in", "She was", "The game was released on the 3rd of June in Europe and"]
    kv = capture(full, bos(tokenizer))
    lm = make(full, tokenizer, kv, batch_size=3)
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    answers = lm.generate_until([Instance("generate_until", {}, (p, settings), i) for i, p in enumerate(prompts)])
    lm.attachment.remove()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*bos(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False)]])
        out = full.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]


def test_the_prefix_comes_once_and_stays_when_contexts_are_cut(full: Any, tokenizer: Any) -> None:
    (start,) = bos(tokenizer)
    lm = make(full, tokenizer, None)
    plain = tokenizer.encode("hello there", add_special_tokens=False)
    assert lm.tok_encode("hello there") == [start, *plain]
    assert lm.tok_encode(tokenizer.bos_token + "hello there") == [start, *plain]
    assert lm.tok_encode("hello there", add_special_tokens=False) == plain
    assert lm.tok_encode("hello there", left_truncate_len=2) == [start, plain[-1]]
    ids, mask = lm.tok_batch_encode(["hello there my friend", "hello"])
    assert ids[1][mask[1].bool()].tolist() == [start, *tokenizer.encode("hello", add_special_tokens=False)]
    assert not mask[1, 0]
    long = "word " * 2000
    assert likelihoods(lm, [(long, " end")])[0] == pytest.approx(
        likelihoods(lm, [(tokenizer.decode(tokenizer.encode(long)[-1000:]), " end")])[0], abs=1.0
    )


def test_what_would_begin_otherwise_is_refused(full: Any, tokenizer: Any) -> None:
    with pytest.raises(IntactKVError, match="add_bos_token=True was given"):
        make(full, tokenizer, None, add_bos_token=True)
    kv = capture(full, [*bos(tokenizer), *tokenizer.encode("User: hello", add_special_tokens=False)])
    lm = make(full, tokenizer, kv, attached=False)
    with pytest.raises(IntactKVError, match="both begin with \\[BOS\\] and then differ"):
        lm.tok_encode(tokenizer.bos_token + "System: no")
    with pytest.raises(IntactKVError, match="leaves no room for the prefix"):
        likelihoods(lm, [("a", "word " * 3000)])
    with pytest.raises(IntactKVError, match="leave no room for the prefix"):
        lm.tok_encode("hello", left_truncate_len=1)
    bare = load_tokenizer(MODEL)
    bare.bos_token = None
    with pytest.raises(IntactKVError, match="BOS"):
        make(full, bare, None)
    with pytest.raises(IntactKVError, match="without its tokenizer"):
        IntactLM(full)
    with attach(full, kv), pytest.raises(IntactKVError, match="already has an intact KV attached"):
        make(full, tokenizer, kv, attached=False)  # or the arm with its own prefix would be the intact one


def test_a_folder_is_a_path_or_its_name(full: PreTrainedModel, tmp_path: Path) -> None:
    kv = capture(full, [0])
    by_path, by_name = IntactLM(MODEL, kv=kv.save(tmp_path / "kv")), IntactLM(str(MODEL), kv=kv, tokenizer=MODEL)
    assert by_path.identity == by_name.identity
    assert by_path.pretrained == str(MODEL)


TASKS = ["arc_easy", "arc_hub", "boolq", "c4_sample", "lambada", "wikitext2_raw", "winogrande"]


def write_data(folder: Path) -> None:
    """A few items of each schema, a text, MMLU, and a file that is no task."""
    choices = ["one", "two", "three", "four"]
    ours = [{"query": f"Question: what is {i}?", "choices": choices, "gold": i % 4} for i in range(4)]
    hub = [
        {"question": f"what is {i}?", "choices": {"text": choices, "label": [*"ABCD"]}, "answerKey": "ABCD"[i % 4]}
        for i in range(4)
    ]
    files: dict[str, list[dict[str, Any]]] = {
        "arc_easy": ours,
        "arc hub": hub,
        "boolq": [{"query": "Passage: red\nQuestion: is it?", "choices": ["no", "yes"], "gold": i} for i in (0, 1)],
        "c4_sample": [{"text": "The river rises in the mountains."}, {"text": "She was born in 1931."}],
        "lambada": [{"context": f"The word is {w} and {w} and", "continuation": w} for w in ("red", "sea", "one")],
        "winogrande": [{"context_options": ["The cat", "The dog"], "continuation": "sat.", "gold": i} for i in (0, 1)],
        "mt_bench": [{"question_id": 81, "turns": ["Write.", "Again."]}],
    }
    for name, items in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "wikitext2-raw.txt").write_text(" = Title = \n\n The river rises in the mountains .\n")
    for split in ("dev", "test"):
        (folder / "mmlu" / split).mkdir(parents=True)
        with (folder / "mmlu" / split / f"marketing_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[f"What, {i}?", "NA", "yes", "no", "maybe", "ABCD"[i % 4]] for i in range(6)])


def test_every_local_task_runs_in_three_arms_and_is_compared(
    full: Any, tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    names = write_tasks(tmp_path / "data", tmp_path / "tasks")
    assert sorted(names) == sorted(f"{name}_local" for name in [*TASKS, "mmlu"])
    assert "mt_bench.jsonl is left out: it has rows with the fields question_id, turns" in caplog.text
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    kv = capture(full, bos(tokenizer))
    arms = {"full": (kv, False), "own": (kv, False), "intact": (other(kv), True)}
    for arm, (artifact, attached) in arms.items():
        lm = make(full, tokenizer, artifact, attached=attached, batch_size=4)
        result = simple_evaluate(lm, tasks=names, task_manager=manager, num_fewshot=0, bootstrap_iters=0)
        if lm.attachment is not None:
            lm.attachment.remove()
        (tmp_path / arm).mkdir()
        for task, samples in result["samples"].items():
            lines = "".join(json.dumps(sample, default=str) + "\n" for sample in samples)
            (tmp_path / arm / f"samples_{task}_2026-11-24T00-00-00.000000.jsonl").write_text(lines)
    assert "NA" in result["samples"]["mmlu_marketing_local"][0]["arguments"][0][0]  # not read as a missing value
    found = {(one.task, one.metric): one for one in compare(tmp_path / "full", tmp_path / "own", tmp_path / "intact")}
    assert {task for task, _ in found} == {f"{name}_local" for name in [*TASKS, "mmlu_marketing"]}
    for one in found.values():
        assert one.full == one.own
        assert one.recovered is None
    assert found["c4_sample_local", "log-likelihood"].gain.value != 0
    compare_arms(
        *(tmp_path / arm for arm in arms), console=Console(), out=tmp_path / "c.json", markdown=tmp_path / "c.md"
    )
    assert len(json.loads((tmp_path / "c.json").read_text())["comparisons"]) == len(found)
    assert len((tmp_path / "c.md").read_text().splitlines()) == len(found) + 2


def test_lm_evals_own_command_line(full: Any, tokenizer: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    write_tasks(tmp_path / "data", tmp_path / "tasks")
    capture(full, bos(tokenizer)).save(tmp_path / "kv.safetensors")
    # key=value,… is cut at every comma, also one in a path
    arguments = json.dumps({"pretrained": str(MODEL), "kv": str(tmp_path / "kv.safetensors"), "dtype": "float32"})
    lm_eval([
        "run", "--model", "intactkv", "--model_args", arguments, "--include_path", str(tmp_path / "tasks"),
        "--tasks", "lambada_local,winogrande_local", "--batch_size", "4", "--device", "cpu", "--log_samples",
        "--output_path", str(tmp_path / "out"), "--limit", "2",
    ])  # fmt: skip
    found = read_samples(tmp_path / "out")
    assert found.keys() == {("lambada_local", "log-likelihood"), ("lambada_local", "acc"), ("winogrande_local", "acc")}
    pairs = [(f"The word is {w} and {w} and", f" {w}") for w in ("red", "sea")]
    plain = likelihoods(make(full, tokenizer, None), pairs)
    assert list(found["lambada_local", "log-likelihood"].values()) == pytest.approx(plain, abs=1e-5)
    assert "lambada_local" in capsys.readouterr().out


def test_arc_in_the_hubs_own_schema_is_read_and_another_is_refused(full: Any, tokenizer: Any, tmp_path: Path) -> None:
    ours = [{"query": f"Question: What is {n}?", "choices": ["red", "a sea", "none"], "gold": n % 3} for n in range(4)]
    hub = [
        {"id": str(n), "question": f"What is {n}?", "choices": {"text": ["red", "a sea", "none"], "label": labels},
         "answerKey": labels[n % 3]}
        for n, labels in enumerate([["A", "B", "C"], ["1", "2", "3"]] * 2)
    ]  # fmt: skip
    scores = []
    for name, items in (("ours", ours), ("hub", hub)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, items)))
        assert write_tasks(tmp_path / name, tmp_path / f"{name}-tasks") == ["arc_easy_local"]
        manager = TaskManager(include_path=str(tmp_path / f"{name}-tasks"), include_defaults=False)
        found = simple_evaluate(
            make(full, tokenizer, None),
            tasks=["arc_easy_local"],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        scores.append([(sample["resps"], sample["target"]) for sample in found["samples"]["arc_easy_local"]])
    assert [str(one[0]) for one in scores[0]] == [str(one[0]) for one in scores[1]]
    assert [int(one[1]) for one in scores[0]] == [int(one[1]) for one in scores[1]]
    (tmp_path / "hub" / "boolq.jsonl").write_text('{"text": "x"}\n{"question": "x", "passage": "y", "answer": true}')
    with pytest.raises(IntactKVError, match=r"boolq\.jsonl has a row with the fields question, passage, answer"):
        write_tasks(tmp_path / "hub", tmp_path / "tasks")
    (tmp_path / "none").mkdir()
    with pytest.raises(IntactKVError, match="holds no task"):
        write_tasks(tmp_path / "none", tmp_path / "tasks")


def test_one_response_cache_serves_every_arm_its_own_answers(
    full: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, quantized = capture(full, bos(tokenizer)), rounded_model(full, bits=3)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]

    def cached(model: Any, attached: bool) -> list[float]:
        lm = make(model, tokenizer, kv, attached=attached)
        answers = [value for value, _ in CachingLM(lm, str(tmp_path / "answers.db")).loglikelihood(requests)]
        if lm.attachment is not None:
            lm.attachment.remove()
        return answers

    own, intact, plain = cached(quantized, False), cached(quantized, True), cached(full, False)
    assert own != intact
    assert plain not in (own, intact)
    measured = "_loglikelihood_tokens"
    monkeypatch.setattr(IntactLM, measured, lambda *args, **kwargs: pytest.fail("not read from the cache"))
    assert (cached(quantized, False), cached(quantized, True), cached(full, False)) == (own, intact, plain)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attach": False}, "attach=False is no argument of --model intactkv; did you mean attached?"),
        ({"colour": "red"}, "colour='red' is no argument of --model intactkv; known are pretrained, kv, attached"),
        ({"trust_remote_code": True}, "trust_remote_code=True is an argument of lm-eval's hf model that has no effect"),
        ({"parallelize": True}, "has no effect here"),
        ({"load_in_4bit": True}, "load_in_4bit=True is no argument"),
        ({"peft": "adapter"}, "leave it out"),
        ({"attached": "no"}, "attached='no' is neither True nor False"),
    ],
)
def test_arguments_that_would_be_swallowed_are_refused(
    full: Any, tokenizer: Any, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(IntactKVError, match=re.escape(message)):
        make(full, tokenizer, None, **option)


def test_arguments_of_hflm_that_do_something_are_passed_on(full: Any, tokenizer: Any) -> None:
    lm = make(full, tokenizer, None, max_length=64, batch_size=3, trust_remote_code=False, softmax_dtype="float32")
    assert (lm.max_length, lm.batch_size, lm.softmax_dtype) == (64, 3, torch.float32)


def samples(folder: Path, values: list[float], *, task: str = "t", metric: str = "acc") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"doc_id": i, "doc_hash": f"h{i}", "filter": "none", "metrics": [metric], metric: value})
        for i, value in enumerate(values)
    ]
    (folder / f"samples_{task}_2026-01-01T00-00-00.000000.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_flips_mcnemar_and_recovery(tmp_path: Path) -> None:
    own = [0] * 10 + [1] * 10
    intact = [1] * 7 + [0] * 3 + [0] * 1 + [1] * 9  # seven mended, one broken
    full = [1] * 18 + [0] * 2
    (one,) = compare(samples(tmp_path / "f", full), samples(tmp_path / "o", own), samples(tmp_path / "i", intact))
    assert (one.mended, one.broken, one.items) == (7, 1, 20)
    assert one.p == pytest.approx(2 * (1 + 8) / 2**8)  # two-sided binomial of 1 in 8
    assert one.gain.value == pytest.approx(0.3)
    assert one.gain.low < 0.3 < one.gain.high
    assert one.recovered is not None
    assert one.recovered.value == pytest.approx(0.3 / 0.4)
    for arm, values in (("f", full), ("o", own), ("i", intact)):
        for task in ("mmlu_a", "mmlu_b"):
            samples(tmp_path / f"{arm}2", values, task=task)
    both = compare(tmp_path / "f2", tmp_path / "o2", tmp_path / "i2")
    assert [(each.task, each.items, each.mended) for each in both] == [
        ("mmlu", 40, 14), ("mmlu_a", 20, 7), ("mmlu_b", 20, 7),
    ]  # fmt: skip
    assert [row["task"] for row in rows(both)] == ["mmlu"]
    assert [row["task"] for row in rows([one])] == ["t"]
    samples(tmp_path / "short", own[:-1])
    with pytest.raises(IntactKVError, match="different items"):
        compare(tmp_path / "f", tmp_path / "short", tmp_path / "i")
    samples(tmp_path / "else", own, task="u")
    with pytest.raises(IntactKVError, match="do not both have t acc"):
        compare(tmp_path / "f", tmp_path / "else", tmp_path / "i")
    (tmp_path / "o" / "samples_t_2026-02-02T00-00-00.000000.jsonl").write_text(
        next((tmp_path / "o").glob("*.jsonl")).read_text()
    )
    with pytest.raises(IntactKVError, match="several runs of t"):
        compare(tmp_path / "f", tmp_path / "o", tmp_path / "i")
    with pytest.raises(IntactKVError, match=r"no samples_\*\.jsonl"):
        read_samples(tmp_path / "nothing")


def test_no_known_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match="holds no task; give a folder with mmlu"):
        write_tasks(tmp_path, tmp_path / "out")
