"""What `runs/` prepares."""

from __future__ import annotations

import lzma
import runpy
from pathlib import Path

import pytest

FORM = Path(__file__).parents[1] / "runs" / "wikitext_form.py"


@pytest.mark.parametrize("name", ["plain.txt", "packed.txt.xz"])
def test_text_in_the_form_of_wikitext(name: str, tmp_path: Path) -> None:
    documents = ["Skipped\n\nNot this one.", 'A-Title\n\n1,234.5 of (his) friend\'s "men", all ran.\n\nMr. X. left.']
    content = "".join(f"{document}\n<|endoftext|>\n" for document in documents * 2)
    source, out = tmp_path / name, tmp_path / "out.txt"
    source.write_bytes(lzma.compress(content.encode()) if name.endswith(".xz") else content.encode())
    form = runpy.run_path(str(FORM))["main"]
    form(source, out, every=2, characters=10)  # one document: it is more than 10 characters
    want = [
        "",
        "= A @-@ Title =",
        '1 @,@ 234 @.@ 5 of ( his ) friend \'s " men " , all ran .',
        "Mr . X . left .",
    ]
    assert [line.strip() for line in out.read_text(encoding="utf-8").splitlines()] == want
    form(source, out, every=2, characters=10_000)
    assert out.read_text(encoding="utf-8").count("= A @-@ Title =") == 2
