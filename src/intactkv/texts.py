"""Texts as token ids: plain files, or the `text` fields of rows."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from intactkv.error import IntactKVError, first_line
from intactkv.lines import check_unicode, from_json, read_lines, read_utf8

_PER_TOKEN, _MARGIN = 6, 256  # characters that a token takes at first sight; tokens that a cut may change
_ROWS = (".jsonl", ".json", ".parquet")  # files whose rows have a `text` field


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 text file, or the `text` fields of a .jsonl, .json or .parquet file, with blank lines between.

    Raises `IntactKVError` where it cannot be read, has rows without such a field, or is empty.
    """
    path = Path(path)
    text = "\n\n".join(_texts(path)) if path.suffix in _ROWS else read_utf8(path)
    if not text.strip():
        raise IntactKVError(f"{path} is empty; give a text of at least a few hundred words")
    check_unicode(text, path)
    return text


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None) -> list[int]:
    """The first `count` tokens of a text without special tokens, or all where it is None or the text has fewer.

    Reads no more of the text than it takes: what follows a cut can change the last few tokens before it, and so
    `_MARGIN` more are asked for and left out.
    """
    characters = len(text) if count is None else _PER_TOKEN * (count + _MARGIN)
    while characters < len(text):
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False).input_ids
        if count is not None and len(ids) >= count + _MARGIN:
            return ids[:count]
        characters *= 2
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:count]


def _texts(path: Path) -> list[str]:
    """The `text` field of every row of a data file."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import read_table
        except ImportError as error:
            raise IntactKVError(f"{path} is read with pyarrow; pip install pyarrow, or give plain text") from error
        try:
            rows = read_table(path).to_pylist()
        except (OSError, ValueError, ArrowException) as error:
            raise IntactKVError(f"{path} cannot be read as Parquet ({first_line(error)}); get it again") from error
    elif path.suffix == ".jsonl":
        rows = read_lines(path, needed=["text"])
    else:
        try:
            found = from_json(read_utf8(path))
        except ValueError as error:
            raise IntactKVError(f"{path} is no JSON ({error}); give a list of rows with a text field") from error
        rows = found if isinstance(found, list) else [found]
    texts = [row.get("text") if isinstance(row, dict) else None for row in rows]
    wrong = [i for i, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        row = rows[wrong[0]]
        holds = f"the fields {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise IntactKVError(
            f"row {wrong[0]} of {path} has no text under `text`, but {holds}; rename the field, or give plain text"
        )
    return [text for text in texts if isinstance(text, str)]
