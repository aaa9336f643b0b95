"""Whatever a file holds, it is read as it was, or refused with our one error: edits of good files, and made-up ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_model import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import PREFIX, build, by_name
from safetensors.torch import save_file

from intactkv import IntactKV, IntactKVError, capture
from intactkv.artifact import served
from intactkv.attaching.plain import sentence
from intactkv.calibrating import conversation_samples, text_samples
from intactkv.calibrating.state import State, load_state_, save_state
from intactkv.capturing.partial import Partial
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.checkpoint.shards import INDEX, Folder, weight_map
from intactkv.checkpoint.stream import load_streamed, streamed
from intactkv.demo import MODEL
from intactkv.harness.compare import compare
from intactkv.harness.compare import rows as rows_of_comparison
from intactkv.harness.tasks import write_tasks
from intactkv.mtbench.files import answers_of
from intactkv.mtbench.questions import Question, read_questions
from intactkv.mtbench.scores import read_grades
from intactkv.serving.gguf import check_gguf, opened
from intactkv.serving.llama_cpp import SavedState, is_state, state
from intactkv.texts import read_text

fuzz = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def edits(good: bytes, *, head: int = 600) -> st.SearchStrategy[bytes]:
    """`good` with one to three flips, cuts, insertions and replacements, half of them in its first `head` bytes."""
    place = st.integers(0, len(good)) | st.integers(0, min(head, len(good)))
    cut = st.tuples(place, st.sampled_from([0, 1, 1, 4, 8, 50, len(good)]))
    put = st.binary(max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"[" * 2000, b"../", b"\\ud800", b"1e999"])

    def edited(changes: list[tuple[tuple[int, int], bytes]]) -> bytes:
        found = bytearray(good)
        for (at, length), new in changes:
            found[at : at + length] = new
        return bytes(found)

    return st.lists(st.tuples(cut, put), min_size=1, max_size=3).map(edited)


def or_refused(read: Callable[[], Any]) -> Any:
    """What was read, or None where it was refused as we refuse: in one line."""
    try:
        return read()
    except IntactKVError as error:
        said = str(error)
    assert said.strip()
    assert "\n" not in said, said
    return None


# ------------------------------------------------------------------------------------------------ checkpoints


@dataclass
class Checkpoint:
    """A folder of two shards and an index."""

    folder: Path
    index: bytes
    shard: bytes
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    folder.mkdir()
    tensors = {f"t{i}": torch.arange(6.0).reshape(3, 2) + i for i in range(4)}
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(files.values())):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    index = json.dumps({"metadata": {"total_size": 96}, "weight_map": files}).encode()
    (folder / INDEX).write_bytes(index)
    (folder.parent / "elsewhere.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes())
    return Checkpoint(folder, index, (folder / "model-0.safetensors").read_bytes(), tensors)


def read_whole(folder: Path) -> Folder:
    found = Folder(folder)
    assert {Path(entry.file).name for entry in found.entries.values()} == {e.file for e in found.entries.values()}
    for name, entry in found.entries.items():
        assert (folder / entry.file).resolve().parent == folder.resolve()
        tensor = found.read(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape)
        if tensor.ndim and len(tensor):
            found.read(name, slice(0, 1))
    assert found.identity
    return found


@fuzz
@given(data=st.data())
def test_an_index_of_any_bytes(checkpoint: Checkpoint, data: st.DataObject) -> None:
    (checkpoint.folder / "model-0.safetensors").write_bytes(checkpoint.shard)
    (checkpoint.folder / INDEX).write_bytes(data.draw(edits(checkpoint.index)))
    or_refused(lambda: read_whole(checkpoint.folder))


@fuzz
@given(data=st.data())
def test_a_shard_of_any_bytes(checkpoint: Checkpoint, data: st.DataObject) -> None:
    (checkpoint.folder / INDEX).write_bytes(checkpoint.index)
    (checkpoint.folder / "model-0.safetensors").write_bytes(data.draw(edits(checkpoint.shard)))
    or_refused(lambda: read_whole(checkpoint.folder))


names = st.text(st.characters(codec=None), max_size=12)
places = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "../", "/", "./", "a/", "..\\", "\0", "x" * 300]),
    names | st.just("elsewhere"),
    st.sampled_from([".safetensors", "", ".bin", "/.safetensors"]),
)


@fuzz
@given(said=st.dictionaries(names, places | json_values, max_size=3) | json_values, outer=st.booleans())
def test_an_index_names_files_beside_it_only(checkpoint: Checkpoint, said: Any, outer: bool) -> None:
    content = json.dumps({"weight_map": said} if outer else said).encode()
    found = or_refused(lambda: weight_map(content, "index"))
    for file in (found or {}).values():
        assert "/" not in file
        assert file not in ("..", ".")
    (checkpoint.folder / INDEX).write_bytes(content)
    or_refused(lambda: read_whole(checkpoint.folder))


# ------------------------------------------------------------------------------------- a capture that was killed


class Killed(BaseException):
    """As if the process had ended."""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, bytes]:
    """A streamed model, and the file that a capture of it left behind two blocks."""
    folder = tmp_path_factory.mktemp("begun")
    build(by_name("llama-gqa")).save_pretrained(folder / "m", max_shard_size="40KB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("intactkv.checkpoint.store._SLICE", 64)
        model, plain = load_streamed(folder / "m", dtype=torch.float32), Folder.read

        def read(self: Folder, part: str, rows: slice | None = None) -> torch.Tensor:
            if ".layers.2." in part:
                raise Killed
            return plain(self, part, rows)

        patch.setattr(Folder, "read", read)
        with pytest.raises(Killed):
            capture(model, PREFIX, resume=folder / "partial")
        streamed(model).later(lambda: None).result()  # type: ignore[union-attr]
        return model, (folder / "partial").read_bytes()


@settings(fuzz, max_examples=150)
@given(data=st.data())
def test_a_spoilt_partial_file_is_begun_again(begun: tuple[Any, bytes], data: st.DataObject, tmp_path: Path) -> None:
    model, good = begun
    path, store = tmp_path / "partial", streamed(model)
    assert store is not None

    def state_of(content: bytes) -> Any:
        path.write_bytes(content)
        store.begin(head=True)
        found = Partial(path, model, store, torch.tensor(PREFIX))
        kept = found._output if isinstance(found._output, torch.Tensor) else found._output[0]
        return found.done, {i: [t.tolist() for t in pair] for i, pair in found.layers.items()}, kept.tolist(), (
            store.digests())  # fmt: skip

    whole = state_of(good)
    assert whole[0] == 2
    path.write_bytes(data.draw(edits(good, head=3000)))
    store.begin(head=True)
    found = Partial(path, model, store, torch.tensor(PREFIX))
    if found.done:
        assert state_of(path.read_bytes()) == whole


# ------------------------------------------------------------------------------------------------ GGUF, llama.cpp


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, IntactKV]:
    pytest.importorskip("gguf")
    model = build(by_name("llama-gqa"), head_dim=16)
    path = write_gguf(model, tmp_path_factory.mktemp("gguf") / "model.gguf", vocabulary=True)
    return path.read_bytes(), capture(model, PREFIX)


@settings(fuzz, max_examples=150)
@given(data=st.data())
def test_a_gguf_of_any_bytes(gguf: tuple[bytes, IntactKV], data: st.DataObject, tmp_path: Path) -> None:
    good, kv = gguf
    path = tmp_path / "model.gguf"
    path.write_bytes(data.draw(edits(good, head=6000)))
    or_refused(lambda: check_gguf(kv, opened(path)))


@settings(fuzz, max_examples=25)
@given(data=st.data())
def test_a_model_in_a_gguf_of_any_bytes(gguf: tuple[bytes, IntactKV], data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data.draw(edits(gguf[0], head=6000)))
    or_refused(lambda: load_model(path))


@pytest.mark.parametrize("count", [2**16, 2**32, 2**63, 2**64 - 1])
def test_counts_of_a_gguf_are_held_against_its_size(count: int, tmp_path: Path) -> None:
    """Each count that a header has, larger than what follows it."""
    number, string = struct.pack("<Q", count), struct.pack("<Q", 1) + b"x"
    for name, content in {
        "tensors": number + struct.pack("<Q", 0),
        "fields": struct.pack("<Q", 0) + number,
        "length of a name": struct.pack("<QQ", 0, 1) + number,
        "numbers": struct.pack("<QQ", 0, 1) + string + struct.pack("<II", 9, 4) + number,
        "strings": struct.pack("<QQ", 0, 1) + string + struct.pack("<II", 9, 8) + number,
        "arrays": struct.pack("<QQ", 0, 1) + string + struct.pack("<II", 9, 9) + number,
        "dims": struct.pack("<QQ", 1, 0) + string + struct.pack("<I", count % 2**32 or 5) + number,
    }.items():
        (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + content + b"\0" * 64)
        for read in (opened, load_model, load_tokenizer):
            with pytest.raises(IntactKVError, match="is no readable GGUF"):
                read(tmp_path / "x.gguf")
            assert name


@fuzz
@given(data=st.data(), count=st.integers(0, 4))
def test_a_saved_state_of_any_bytes(gguf: tuple[bytes, IntactKV], data: st.DataObject, count: int,
                                    tmp_path: Path) -> None:  # fmt: skip
    good, path = state(gguf[1], "llama"), tmp_path / "state"
    path.write_bytes(data.draw(edits(good, head=40)))
    found = or_refused(lambda: SavedState(path))
    assert found is None or (found.ids and min(found.ids) >= 0)
    assert found is None or (is_state(path) and next(found.candidates(1))(0) == path.read_bytes())
    path.write_bytes(good[:12] + data.draw(st.binary(min_size=4 * count, max_size=4 * count)) + good[12 + 4 * count :])
    found = or_refused(lambda: SavedState(path))
    assert found is None or min(found.ids) >= 0


# ------------------------------------------------------------------------------------------------ texts and rows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


halves = st.sampled_from(["A river\ud800 rises. " * 4, "\udcff", "\0 x"])
contents = st.text(st.characters(codec=None), max_size=30) | halves
messages = st.fixed_dictionaries(
    {}, optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | json_values,
        "from": st.sampled_from(["human", "gpt"]), "content": contents | json_values, "value": contents,
    },
)  # fmt: skip
conversations = st.lists(messages | json_values, max_size=4)
rows = st.fixed_dictionaries(
    {}, optional={
        "conversations": conversations | json_values, "messages": conversations, "text": contents | json_values,
        "question_id": st.integers() | json_values, "category": st.just("math") | json_values,
        "turns": st.lists(contents, max_size=3) | json_values, "reference": json_values,
        "required_temperature": st.floats() | json_values, "context": contents, "continuation": json_values,
        "query": contents, "choices": json_values, "gold": json_values, "context_options": json_values,
    },
)  # fmt: skip
files = st.one_of(
    st.lists(rows, max_size=4).map(lambda found: json.dumps(found).encode()),
    st.lists(rows | json_values, max_size=4).map(lambda found: "\n".join(map(json.dumps, found)).encode()),
    st.lists(rows, min_size=1, max_size=2).map(json.dumps).flatmap(lambda text: edits(text.encode(), head=80)),
    st.binary(max_size=60),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b'{"text": 1' + b"0" * 5000 + b"}", b"\xef\xbb\xbf{}"]),
)


@settings(fuzz, max_examples=200)
@given(content=files, kind=st.sampled_from([".json", ".jsonl", ".txt", ".parquet"]), system=st.none() | contents)
def test_data_of_any_bytes(tokenizer: Any, content: bytes, kind: str, system: str | None, tmp_path: Path) -> None:
    path = tmp_path / f"data{kind}"
    path.write_bytes(content)
    if (text := or_refused(lambda: read_text(path))) is not None:
        assert text.strip()
    or_refused(lambda: text_samples(path, tokenizer, prefix=[tokenizer.bos_token_id], length=8, count=4))
    found = or_refused(lambda: conversation_samples(path, tokenizer, prefix=[tokenizer.bos_token_id], system=system))
    assert found is None or all(row.learned.sum() >= 2 for row in found.rows)
    questions = or_refused(lambda: read_questions(path))
    assert questions is None or (questions and all(0 <= q.temperature < 10 for q in questions))


@fuzz
@given(
    found=st.dictionaries(st.sampled_from(["a.jsonl", "a-b.jsonl", "a_b.jsonl", "c.txt", "mmlu.tar.xz"]), files,
                          max_size=3)
)  # fmt: skip
def test_a_folder_of_any_files_is_tasks_or_none(found: dict[str, bytes], tmp_path_factory: Any) -> None:
    pytest.importorskip("lm_eval")
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    for name, content in found.items():
        (data / name).write_bytes(content)
    names = or_refused(lambda: write_tasks(data, out))
    if names is None:
        assert not list(out.iterdir())
    else:
        assert len(set(names)) == len(names)
        assert {path.stem for path in out.glob("*.yaml")} == set(names)


# ------------------------------------------------------------------------------------------- what we write ourselves


recipes = st.fixed_dictionaries(
    {}, optional={
        "prefix": json_values, "architectures": json_values, "quantization_config": json_values,
        "prefix_aware": json_values
        | st.builds(lambda a, b: {"perplexity": {"with_kv": a, "without_kv": b}}, json_values, json_values),
    },
)  # fmt: skip


@settings(fuzz, max_examples=100)
@given(recipe=recipes | json_values, config=recipes | json_values)
def test_what_a_folder_says_of_its_prefix(gguf: tuple[bytes, IntactKV], recipe: Any, config: Any,
                                          tmp_path: Path) -> None:  # fmt: skip
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    for name, content in (("intactkv.json", recipe), ("config.json", config)):
        (tmp_path / name).write_text(json.dumps(content))
    kv = gguf[1]
    about = or_refused(lambda: served.made_for_prefix(tmp_path))
    if about is not None:
        assert or_refused(lambda: sentence(about, "folder"))
    or_refused(lambda: served.served_architectures(tmp_path))
    or_refused(lambda: served.refuse_unchecked(kv, tmp_path, "folder"))


@fuzz
@given(data=st.data())
def test_a_calibrations_state_of_any_bytes(data: st.DataObject, tmp_path: Path) -> None:
    """As it was, or refused; a byte of a moment that is another goes unseen, and so only what is read is looked at."""
    tensors = {"layers.0.key": torch.ones(1, 2, 3, requires_grad=True)}
    state = State(
        tensors, torch.optim.AdamW(tensors.values()), {name: t.detach().clone() for name, t in tensors.items()}
    )
    tensors["layers.0.key"].sum().backward()
    state.optimizer.step()
    state.readings, state.losses, state.step = [(0, 0.5)], [0.25], 1
    save_state(state, tmp_path / "state", job="this")
    good = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(data.draw(edits(good)))
    if or_refused(lambda: load_state_(state, tmp_path / "state", job="this") or True):
        assert state.step >= 0
        assert state.readings


@settings(fuzz, max_examples=150)
@given(body=json_values | rows | st.fixed_dictionaries({"prompt": json_values}, optional={"n": json_values}),
       junk=st.none() | st.binary(max_size=20) | st.just(b"[" * 100_000))  # fmt: skip
def test_a_request_of_any_bytes(body: Any, junk: bytes | None) -> None:
    pytest.importorskip("aiohttp")
    from intactkv.serving.llama_proxy import check_body
    from intactkv.serving.llama_server import Refusal

    try:
        found = check_body(json.dumps(body).encode() if junk is None else junk)
    except Refusal as refusal:
        found = {"said": str(refusal)}
    assert found or body == {}


logged = st.fixed_dictionaries(
    {
        "question_id": st.integers(1, 3) | json_values, "doc_id": st.integers(0, 2) | json_values,
        "model": st.just("m") | json_values, "turn": st.integers(1, 2) | json_values, "score": st.just(5) | json_values,
        "choices": json_values | st.just([{"turns": ["a"]}]), "metrics": st.just(["acc"]) | json_values,
        "acc": st.just(1.0) | json_values, "word_perplexity": json_values,
    },
    optional={"filter": json_values, "doc_hash": json_values},
)  # fmt: skip


@settings(fuzz, max_examples=150)
@given(found=st.lists(logged | json_values, max_size=3))
def test_answers_grades_and_logs_of_any_rows(found: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "samples_a_1.jsonl"
    path.write_text("\n".join(map(json.dumps, found)))
    asked = [Question(i, "math", ("x",), 0.0) for i in (1, 2)]
    or_refused(lambda: answers_of(path))
    or_refused(lambda: read_grades(path, asked))
    or_refused(lambda: rows_of_comparison(compare(path, path, path, resamples=10)))
