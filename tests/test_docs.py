"""The pages tell the truth: file tree, architectures, commands. Their blocks run in test_examples.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from models import ARCHITECTURES

ROOT = Path(__file__).parent.parent
README, GUIDE, HOUSE = ((ROOT / name).read_text() for name in ("README.md", "docs/guide.md", "docs/house.md"))


def test_the_file_tree_names_every_source_file_and_nothing_else() -> None:
    tree = HOUSE[HOUSE.rindex("src/intactkv/") :]
    named = set(re.findall(r"(\w+\.py)\b", tree[: tree.index("tests/")]))
    there = {p.name for p in (ROOT / "src/intactkv").glob("**/*.py")} - {"__init__.py", "__main__.py", "run.py"}
    assert named == there


def test_the_architecture_page_is_of_this_table() -> None:
    page = (ROOT / "docs/architectures.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9-]+) \|", page, re.MULTILINE)
    assert rows[1:] == [a.name for a in ARCHITECTURES]
    assert f"the {len(ARCHITECTURES)} architectures" in GUIDE
    for row in page.splitlines():
        if row.startswith("| ") and not row.startswith("| architecture"):
            figures = [float(f) for f in re.findall(r"\d\.?\d*e-\d+", row)]
            assert all(f <= 1e-4 for f in figures), row


def test_the_readme_has_exactly_two_commands() -> None:
    assert len(re.findall(r"^```sh$", README, re.MULTILINE)) == 2


COMMANDS = [
    "capture",
    "quantize",
    "check",
    "eval",
    "mtbench",
    "calibrate",
    "generate",
    "serve",
    "export",
    "doctor",
    "demo",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_guide_names_every_command(command: str) -> None:
    assert re.search(rf"^intactkv {command}\b", GUIDE, re.MULTILINE)


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *ROOT.glob("runs/*.md")])


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_every_page_of_results_is_in_their_index() -> None:
    index = (ROOT / "docs/results/README.md").read_text()
    assert {p.name for p in (ROOT / "docs/results").glob("*.md")} == {
        "README.md",
        *re.findall(r"\]\(([\w-]+\.md)\)", index),
    }


def test_every_finding_is_in_the_index_with_the_version_it_is_about() -> None:
    index = (ROOT / "docs/findings.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+\.sh)` \| (.*) \|$", index, re.MULTILINE))
    assert set(rows) == {script.name for script in (ROOT / "findings").iterdir()}
    for name, row in rows.items():
        about = (ROOT / "findings" / name).read_text().splitlines()[1]
        for version in re.findall(r"\d+(?:\.\d+)+", row.split(" | ")[0]):
            assert version in about, name


def test_the_version_is_one() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]
    assert re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
