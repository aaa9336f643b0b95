"""Whatever a user types, a command does its work or says in one sentence what is wrong; nothing is left half done."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import intactkv
from world import write_world

pytest.importorskip("gguf")
pytest.importorskip("lm_eval")

NUMBERS = ["-1", "0", "1", "2", "3", "7", "64", "4096", "9" * 20, "-" + "9" * 20, "1e3", "", "٣", "0x10", " 5 "]
REALS = ["nan", "inf", "-inf", "-0.0", "0", "1e-320", "1e308", "-1", "0.5", "x"]
TEXTS = [
    "", " ", "-", "--", "a,b", "1,887", "1,,2", "1,99999999", "9" * 25, "🙂", "\udcff", "[red]", "[/]", "auto", "bos",
    "chat", "full,own", "own,own", "__class__", "half", "float8_e4m3fn", "meta", "cuda:99", "cpu:7", "x" * 5000,
]  # fmt: skip
PATHS = ["no", "no/file", ".", "folder", "empty", "kv", "text", "noise", "rows.jsonl", "[/]", "\udcff", "x" * 300,
         "model", "w3", "model.gguf", "-"]  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """A command that works, and what its options take."""

    words: list[str]
    numbers: str = ""
    reals: str = ""
    texts: str = ""
    paths: str = ""
    flags: str = ""

    def strategy(self) -> st.SearchStrategy[list[str]]:
        kinds = ((self.numbers, NUMBERS), (self.reals, REALS), (self.texts, TEXTS), (self.paths, PATHS))
        options = [
            st.tuples(st.sampled_from(names.split()), st.sampled_from(pool)).map(list) for names, pool in kinds if names
        ]
        if self.flags:
            options.append(st.sampled_from(self.flags.split()).map(lambda flag: [flag]))
        more = st.lists(st.one_of(options), min_size=1, max_size=2).map(lambda found: [*chain(*found)])
        words = st.lists(st.tuples(st.integers(0, 12), st.sampled_from(PATHS + TEXTS)), max_size=1).map(self._with)
        return st.tuples(words, more).map(lambda found: found[0] + found[1])

    def _with(self, changes: list[tuple[int, str]]) -> list[str]:
        """Sometimes one of the words is another."""
        words = list(self.words)
        for at, word in changes:
            if 0 < at < len(words) and not words[at].startswith("-"):
                words[at] = word
        return words


RUN = "--device --dtype"
VERBS = [
    Verb(["capture", "model", "-o", "out"], texts=f"--prefix --system --ids --engine {RUN}",
         paths="--data --gguf -o", flags="--no-logits --stream --no-stream --allow-quantized --nonsense"),
    Verb(["quantize", "model", "-o", "out", "--group-size", "32"],
         numbers="--bits --group-size --activation-bits --kv-bits", reals="--prefix-weight",
         texts=f"--method --rounding --prefix --system --ids {RUN}", paths="--data -o",
         flags="--static --fp8 --plain-prefix --symmetric --asymmetric"),
    Verb(["check", "w3", "--full", "model", "--kv", "kv"], texts=RUN, paths="-o --kv --full"),
    Verb(["eval", "w3", "--full", "model", "--kv", "kv", "--data", "text", "--window", "16", "--windows", "2"],
         numbers="--window --windows --batch-size --top --cache-bytes", texts=RUN,
         paths="--cache -o --markdown --data --kv", flags="--paper --bare --no-bare"),
    Verb(["calibrate", "w3", "--full", "model", "--kv", "kv", "--data", "text", "-o", "out", "--steps", "1",
          "--samples", "2", "--held-out", "3", "--length", "16", "--batch-size", "2"],
         numbers="--batch-size --micro-batch --samples --held-out --length --seed", reals="--learning-rate",
         texts=f"--objective --system {RUN}", paths="--data --spool --checkpoint --tensorboard -o",
         flags="--values-only --checkpoint-blocks"),
    Verb(["generate", "w3", "The river", "--kv", "kv", "--max-new-tokens", "2"], numbers="--max-new-tokens --seed",
         reals="--temperature", texts=RUN, paths="--kv", flags="--chat"),
    Verb(["export", "kv", "--to", "llama.cpp", "--gguf", "model.gguf", "-o", "out"],
         numbers="--state-version --streams --stream", texts="--to --cache-type", paths="--gguf --model -o",
         flags="--unchecked --no-flash-attention"),
    Verb(["mtbench", "answer", "w3", "--full", "model", "--kv", "kv", "--questions", "rows.jsonl", "-o", "answers",
          "--max-new-tokens", "1"], numbers="--max-new-tokens --batch-size --seed --first",
         texts=f"--arms --system {RUN}", paths="--name --questions --kv -o"),
    Verb(["mtbench", "show", "answers", "--questions", "rows.jsonl", "--judge", "j"], texts="--judge",
         paths="--questions -o --markdown"),
    Verb(["tasks", "folder", "-o", "out"], paths="-o"),
    Verb(["compare", "--full", "folder", "--own", "folder", "--intact", "folder"], paths="--full --own -o --markdown"),
    Verb(["serve", "w3", "--kv", "kv", "--print"], texts="--mode --port", paths="--kv", flags="--unchecked"),
    Verb(["doctor", "no", "-o", "out.html"], numbers="--window", texts=RUN, paths="--data --quantized -o",
         flags="--stream --no-stream"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", autouse=True)
def no_patience() -> Iterator[None]:
    """The Hub, which tests do not reach, is asked six times all the same, but not for 23 seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        yield


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: "-".join(verb.words[: 1 + (verb.words[0] == "mtbench")]))
@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_typed(verb: Verb, data: st.DataObject, world: Path, tmp_path_factory: pytest.TempPathFactory,
                           ) -> None:  # fmt: skip
    words = data.draw(verb.strategy())
    here = tmp_path_factory.mktemp("here")
    shutil.copytree(world, here, dirs_exist_ok=True, copy_function=_linked)
    before = files(world)
    try:
        done = intactkv(*words, cwd=here)
        assert done.returncode in (0, 1, 2), words
        for sign in ("Traceback", "nobody foresaw"):
            assert sign not in done.stderr, (words, done.stderr)
        if done.returncode == 1:
            assert "error: " in done.stderr, (words, done.stdout, done.stderr)
        left = [p.name for p in here.rglob(".*")]
        assert left == [], (words, left)
        assert files(world) == before, words
    finally:
        shutil.rmtree(here)


def _linked(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
