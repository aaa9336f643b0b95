"""The documentation site is built without a warning, and a page of it asks nobody else for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import intactkv

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="no mkdocs here (pip install '.[docs]')")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser fetches for a page: everything but the targets of links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "a":
            self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    pages = sorted(site.glob("**/*.html"))
    assert len(pages) > 30
    for page in pages:
        html = Fetched()
        html.feed(page.read_text(encoding="utf-8"))
        assert not [each for each in html.found if re.match(r"(\w+:)?//", each)], page
    for style in site.glob("**/*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(\w+:)?//", style.read_text(encoding="utf-8")), style


def test_formulas_are_mathml_and_none_is_left(site: Path) -> None:
    page = (site / "method/index.html").read_text(encoding="utf-8")
    assert page.count("<math ") > 30
    assert "arithmatex" not in page
    assert not re.search(r"<m\w+[^>]*>\\\w", page), "a word of LaTeX that latex2mathml does not know"


def test_the_reference_has_every_public_name(site: Path) -> None:
    page = (site / "api/index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'<h3 id="intactkv\.(?:[\w.]+\.)?(\w+)"', page)) == set(intactkv.__all__)
