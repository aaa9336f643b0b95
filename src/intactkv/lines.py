"""JSON Lines files: read with every line checked, written whole or not at all.

A line ends where JSON Lines says, at a line feed: `str.splitlines` would also cut at characters such as U+2028, which
may stand in a JSON text as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from intactkv.error import IntactKVError
from intactkv.files import json_data, write_atomically, writing


def read_utf8(path: Path) -> str:
    """A UTF-8 file's text, without the mark that some programs put before it. Raises `IntactKVError` for others."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise IntactKVError(f"{path} cannot be read as UTF-8 text ({error}); give a file that is one") from error


def check_unicode(text: str, what: object) -> None:
    """Raise `IntactKVError` for a text that no encoding holds: half of a surrogate pair, as broken escapes make it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise IntactKVError(f"{what} holds {found}, half of a character; mend or remove it") from error


def from_json(text: str | bytes) -> Any:
    """As `json.loads`; a text that is nested deeper than Python goes is a `ValueError` too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_lines(path: Path, *, needed: Sequence[str], keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every row of a JSON Lines file; `keys` are the needed fields that rows are told apart by.

    Raises `IntactKVError` for a file that cannot be read, and for a line that is no JSON object, lacks a field or has
    a key that is neither a text nor a number.
    """
    rows = []
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = from_json(line)
        except ValueError as error:
            raise IntactKVError(f"line {number} of {path} is no JSON ({error}); mend or remove it") from error
        if not isinstance(row, dict) or (missing := [name for name in needed if name not in row]):
            lacks = ", ".join(missing) if isinstance(row, dict) else "everything"
            raise IntactKVError(f"line {number} of {path} lacks {lacks}; every line must have {', '.join(needed)}")
        for name in keys:
            if not isinstance(row[name], str | int | float):
                raise IntactKVError(f"line {number} of {path} has {name}={row[name]!a}; give a text or a number")
        rows.append(row)
    return rows


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON Lines: after a crash a reader finds the old file or the new one."""
    text = "".join(json.dumps(json_data(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))
