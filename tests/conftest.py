"""The architecture table of docs/architectures.md: collected while the laws run, written with --regenerate."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before torch or anything else imports triton

import pytest
import torch
import transformers

if find_spec("hypothesis"):  # the engines' environments have none
    from hypothesis import settings

    # the same examples every time; --hypothesis-profile=default draws others
    settings.register_profile("suite", derandomize=True)
    settings.load_profile("suite")

DOCS = Path(__file__).parent.parent / "docs"
FIGURES: dict[str, dict[str, float]] = defaultdict(dict)

torch.set_num_threads(1)


def offline(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: whoever looks for a machine beside this one does not find it."""
    if event == "socket.connect":
        host = args[1][0] if isinstance(args[1], tuple) else None  # a socket of this machine's files
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else host
    if name and name not in ("localhost", "::1", "0.0.0.0") and not name.startswith("127."):
        raise ConnectionRefusedError(f"tests have no network, and {name} was asked for")


sys.addaudithook(offline)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--regenerate", action="store_true", help="write the generated pages under docs/ from this run")


def pytest_configure(config: Any) -> None:
    if config.getoption("--regenerate") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--regenerate collects figures in one process; leave -n out")


def pytest_collection_finish() -> None:
    """Take what is imported by now, half a million objects, out of every later search for garbage: it stays anyway."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any) -> Any:
    """Note what passed in which engine, for docs/engines.md (runs/engines.py), where INTACTKV_ENGINES names a file."""
    report = (yield).get_result()
    marker, out = item.get_closest_marker("engine"), os.environ.get("INTACTKV_ENGINES")
    if marker is None or out is None or report.when != "call" or not report.passed:
        return
    params = getattr(item, "callspec", None)
    told = {name: str(of).format(**(params.params if params else {})) for name, of in marker.kwargs.items()}
    package = told.pop("package")
    try:
        told["version"] = metadata.version(package)
    except metadata.PackageNotFoundError:  # on the path, not installed
        told["version"] = sys.modules[package].__version__
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(told) + "\n")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Triton's interpreter in half of its time.

    It puts its functions in the place of the language's for a launch, and in every call of a device function inside
    looks through the whole language again for any that are left, and finds none: here it looks once a launch.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch, launch, seen = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()

    def once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in seen:
            return None
        seen.add(module)
        return patch(function)

    def launched(self: Any, *args: Any, **settings: Any) -> None:
        seen.clear()
        launch(self, *args, **settings)

    with pytest.MonkeyPatch.context() as each:
        each.setattr(interpreter, "_patch_lang", once)
        each.setattr(interpreter.GridExecutor, "__call__", launched)
        yield


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Any:
    """Record a measured difference for one architecture under a column's name."""

    def record(architecture: str, column: str, value: float) -> None:
        FIGURES[architecture][column] = max(value, FIGURES[architecture].get(column, 0.0))

    return record


def architectures_page() -> str:
    from models import ARCHITECTURES

    lines = [
        "# Architectures",
        "",
        "Made by `pytest tests/test_laws.py --regenerate`; do not edit. Tiny random models in float32, a prefix of "
        "three tokens. Figures are the largest absolute difference of any logit.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}.",
        "",
        "- *self*: the full model with its own intact KV attached, against itself plain (unpadded, left- and "
        "right-padded, with and without cache).",
        "- *injection*: the rounded model attached, against a cache filled by hand at batch 1 (unpadded, left- and "
        "right-padded batches, with and without cache, in chunks).",
        "- *generate*: logits of greedy generation from a left-padded batch, dynamic and static cache, against a cache "
        "filled by hand.",
        "- *effect*: what attaching changes on the rounded model: how much there was to get wrong.",
        "- *checkpointing*: gradients with gradient checkpointing on equal those without; `refused` means a clear "
        "error.",
        "",
        "| architecture | self | injection | generate | effect | checkpointing | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for a in ARCHITECTURES:
        f = FIGURES[a.name]
        cells = [f"{f[c]:.0e}" if c in f else "–" for c in ("self", "injection", "generate")]
        effect = f"{f['effect']:.2f}" if "effect" in f else "–"
        checkpointing = {0.0: "refused", 1.0: "equal"}.get(f.get("checkpointing", -1.0), "–")
        note = ("attention layers only; " if a.recurrent else "") + a.note
        lines.append(f"| {a.name} | {' | '.join(cells)} | {effect} | {checkpointing} | {note} |")
    return "\n".join(lines) + "\n"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--regenerate") and exitstatus == 0 and FIGURES:
        (DOCS / "architectures.md").write_text(architectures_page())
