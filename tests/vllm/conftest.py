"""The vLLM tests: `tests/vllm/setup.sh`, then `.venv-vllm/bin/python -m pytest -m vllm tests/vllm`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from intactkv import IntactKV

collect_ignore_glob = [] if find_spec("vllm") is not None else ["test_*.py"]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A prefix of 34 tokens, longer than a block of 32."""
    from engine import Served

    return Served.make(tmp_path_factory.mktemp("chat"), 34)


@pytest.fixture(scope="session")
def bos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A prefix of one token."""
    from engine import Served

    return Served.make(tmp_path_factory.mktemp("bos"), 1)


@pytest.fixture(scope="session")
def own(chat: Any) -> IntactKV:
    return IntactKV.load(chat.kv)
