"""Every example runs: those of docstrings, and each block of code in the pages, in a folder where its names exist.

Commands run in this process, on the embedded model under the page's own names. A block that takes more than a CPU and
the test environment stands under `<!-- run elsewhere: PATH takes … -->`, and PATH is there.
"""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from command import intactkv
from torch._tensor_str import printoptions
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from intactkv import quantize
from intactkv.cli.app import app
from intactkv.demo import MODEL, TEXT
from intactkv.quantizing import RTN

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^( *)(?:<!-- run elsewhere: (\S+) takes [^>]+ -->\n *)?```(\S*)\n(.*?)^ *```$", re.M | re.S)
KINDS = {"python", "pycon", "bash", "sh", "console", "synopsis", "text", ""}

# The names under which the pages speak of a full model, a quantized form of it, and texts.
FULL = ("MODEL", "meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
QUANTIZED = ("MODEL-Q", "some/Llama-3.1-8B-Instruct-INT3")


@dataclass(frozen=True)
class Block:
    """One fenced block: what it is written in, and the path of what runs its like elsewhere."""

    kind: str
    text: str
    elsewhere: str


def blocks(page: Path) -> list[Block]:
    return [Block(kind, text, elsewhere) for _, elsewhere, kind, text in BLOCK.findall(page.read_text("utf-8"))]


def commands(block: Block) -> Iterator[list[str]]:
    """A block's commands as words; in a console's, the lines behind a dollar sign."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    if block.kind == "console":
        text = "\n".join(re.findall(r"^\$ (.*)$", text, re.MULTILINE))
    for line in text.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


RUN = [page for page in PAGES if any(b.kind not in ("", "text", "synopsis") and not b.elsewhere for b in blocks(page))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The first four blocks of the embedded model, enough for its pivot, and a checkpoint of it made elsewhere."""
    folder = tmp_path_factory.mktemp("models")
    full, quantized = folder / "full", folder / "quantized"
    AutoModelForCausalLM.from_pretrained(MODEL, num_hidden_layers=4).save_pretrained(full)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(full)
    quantize(full, quantized, method=RTN(bits=3, group_size=64))
    return {**dict.fromkeys(FULL, full), **dict.fromkeys(QUANTIZED, quantized)}


@pytest.fixture
def place(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a page's blocks run, with what they name in it."""
    for each, folder in models.items():
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).symlink_to(folder)
    text = TEXT.read_text(encoding="utf-8")
    (tmp_path / "TEXT").write_text(text[:8_000], encoding="utf-8")
    (tmp_path / "OTHER-TEXT").write_text(text[8_000:], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


LONG = {ROOT / "docs/how-to.md", ROOT / "docs/start.md"}  # half a minute each


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in LONG else []) for page in RUN], ids=name
)
def test_the_blocks_of_a_page_run_in_turn(page: Path, place: Path) -> None:
    pytest.importorskip("llmcompressor")
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.elsewhere:
            continue
        if block.kind == "pycon":
            example = doctest.DocTestParser().get_doctest(block.text, names, name(page), None, 0)
            runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            told: list[str] = []
            runner.run(example, out=told.append, clear_globs=False)
            assert not runner.failures, "".join(told)
            names = example.globs
        elif block.kind == "python":
            exec(compile(block.text, name(page), "exec"), names)
            shorten(place)
        elif block.kind in ("bash", "sh", "console"):
            for words in commands(block):
                assert words[0] == "intactkv", f"{words}: only our own commands run here"
                more = ["--print"] if words[1] == "serve" and "--print" not in words else []
                done = intactkv(*words[1:], *more)
                assert done.returncode == 0, f"{words}: {done.stderr}"


EXAMPLES = [path for path in sorted((ROOT / "src").rglob("*.py")) if ">>> " in path.read_text("utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_the_examples_in_docstrings_run(path: Path) -> None:
    with printoptions(profile="default"):  # which libraries set that other tests run
        found = doctest.testmod(import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts)))
    assert found.attempted
    assert not found.failed


def shorten(place: Path) -> None:
    """Long texts that a page wrote itself would take the small model long."""
    for text in place.glob("*.txt"):
        text.write_text(text.read_text(encoding="utf-8")[:6_000], encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_block_is_forgotten(page: Path) -> None:
    assert page.read_text("utf-8").count("```") == 2 * len(blocks(page))
    for block in blocks(page):
        assert block.kind in KINDS, block
        assert not block.elsewhere or (ROOT / block.elsewhere).exists(), block.elsewhere
        if block.kind in ("", "text"):
            assert not re.search(r"^(\$ |intactkv [a-z]|pip |python3? )", block.text, re.MULTILINE), block


def test_the_synopsis_names_options_that_exist() -> None:
    root: Any = get_command(app)
    known = {**root.commands, **root.commands["mtbench"].commands}
    (synopsis,) = (block for block in blocks(ROOT / "docs/guide.md") if block.kind == "synopsis")
    for line in synopsis.text.splitlines():
        command = None
        for part in line.removeprefix("intactkv ").split(";  "):
            for word in part.split()[:2]:
                command = known.get(word, command)
            assert command is not None, line
            options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            if command.name != "lm-eval":  # whose options are another program's
                assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", part)) <= options, part
