"""Plain text brought into the form of WikiText's raw files, to calibrate on the form that will be read.

What it does: reads TEXT (plain or .xz, documents end with a line `<|endoftext|>`, their first line is the title), takes
every EVERY-th document until CHARACTERS are written, sets punctuation apart, writes `@-@`, `@,@` and `@.@` inside words
and numbers and ` = title = `. What it gives up: a few regular expressions, not the Moses tokenizer; no subheadings.
On wikipedia_100mb.txt.xz its defaults give the second text that `runs/calibrate.py` learned from.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

RULES = (
    (r"(?<=\w)-(?=\w)", " @-@ "),
    (r"(?<=\d),(?=\d)", " @,@ "),
    (r"(?<=\d)\.(?=\d)", " @.@ "),
    (r"([;:!?()\[\]\"]|(?<!@),(?!@))", r" \1 "),
    (r"(?<=[^.@ ])\.(?=\s|$|\")", " ."),
    (r"(?<=\w)'s\b", " 's"),
    (r" +", " "),
)


def main(
    text: Annotated[Path, typer.Option(help="The text, plain or .xz.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    every: Annotated[int, typer.Option(help="Take one document of so many.")] = 31,
    characters: Annotated[int, typer.Option(help="About how many to write.")] = 1_600_000,
) -> None:
    """Write documents of TEXT to OUT in the other form."""
    written = 0
    with out.open("w", encoding="utf-8") as file:
        for document in islice(_documents(text), every - 1, None, every):
            if written >= characters:
                break
            written += file.write(_formed(document))


def _documents(path: Path) -> Iterator[list[str]]:
    lines: list[str] = []
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip() == "<|endoftext|>":
                yield lines
                lines = []
            elif line.strip():
                lines.append(line.strip())


def _formed(document: list[str]) -> str:
    for pattern, form in RULES:
        document = [re.sub(pattern, form, line) for line in document]
    title, *rest = [line.strip() for line in document]
    return "".join(f" {line} \n" for line in ("", f"= {title} =", *rest))


if __name__ == "__main__":
    typer.run(main)
