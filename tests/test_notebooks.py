"""The notebooks run on the embedded model; what is stored in them is a real model's, and of no machine."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="no Jupyter here (pip install '.[dev]')")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("llmcompressor")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs/notebooks").glob("*.ipynb"))
KILOBYTES = 300
# The text is Python's own manual, of which a few windows do; it is cut before the first cell.
SHORTER = """
from pydoc_data import topics
found = dict(sorted(topics.topics.items()))
while sum(map(len, found.values())) > 16_000:
    found.popitem()
topics.topics = found
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_on_the_embedded_model(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(path, as_version=4)
    stored = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    book.cells.insert(0, nbformat.v4.new_code_cell(SHORTER))
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    made = [cell.outputs for cell in book.cells[1:] if cell.cell_type == "code"]
    assert [kinds(outputs) for outputs in made] == [kinds(outputs) for outputs in stored]


def kinds(outputs: list[dict[str, object]]) -> set[str]:
    """Of what kind a cell's outputs are: text, pictures; that of an error, or of a warning, is one too."""
    return {f"{each['output_type']} {each.get('name', '')} {sorted(each.get('data', ()))}" for each in outputs}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_whole_small_and_of_no_machine(path: Path) -> None:
    assert path.stat().st_size < KILOBYTES * 1000
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    told = "".join(str(cell.outputs) for cell in cells)
    assert "image/png" in told
    assert not re.search(r"stderr|Traceback|/(home|root|tmp|work|Users)/", told)
