"""What the site needs beside `mkdocs.yml`: pages that lie outside docs/, notebooks, and formulas as MathML."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "src/intactkv/demo/model/README.md": "embedded-model.md",
}
_LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s#]+)")
_LIST = re.compile(r"^(?![-\s|>#])(.+)\n(?=- )", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that GitHub shows elsewhere in the repository."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for notebook in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        page = f"notebooks/{notebook.stem}"
        body, told = MarkdownExporter().from_filename(notebook, resources={"unique_key": notebook.stem})
        files.append(File.generated(config, f"{page}.md", content=body))
        for picture, content in told["outputs"].items():
            files.append(File.generated(config, f"notebooks/{picture}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """As GitHub reads it: links are those of the repository, and a list may follow a paragraph without a blank line."""
    on_site = page.file.src_uri
    at = next((source for source, name in OUTSIDE.items() if name == on_site), f"docs/{on_site}")

    def moved(link: re.Match[str]) -> str:
        there = posixpath.normpath(posixpath.join(posixpath.dirname(at), link[2]))
        target = OUTSIDE.get(there, there.removeprefix("docs/")).replace(".ipynb", ".md")
        return link[1] + posixpath.relpath(target, posixpath.dirname(on_site) or ".")

    return _LIST.sub(r"\1\n\n", _LINK.sub(moved, markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Formulas in LaTeX, as GitHub shows them, become MathML, which browsers show themselves."""
    return _FORMULA.sub(
        lambda formula: convert(html.unescape(formula[3]), display="block" if formula[2] == "[" else "inline"), content
    )
