"""What `intactkv lm-eval`, `intactkv tasks` and `intactkv compare` do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from intactkv.error import IntactKVError
from intactkv.files import check_folder, write_atomically
from intactkv.provenance import write_json


def lm_eval(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, which finds no models but its own, with `--model intactkv` made known to it."""
    _need_lm_eval()
    import datasets
    from lm_eval.__main__ import cli_evaluate

    import intactkv.harness.model  # noqa: F401  (registers the model type)

    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    counts, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        cli_evaluate()  # whose `datasets` would tell a server of every load, of local files too
    finally:
        sys.argv = before
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def tasks(data: Path, out: Path, console: Console) -> None:
    """Write the task files and say how to use them."""
    _need_lm_eval()
    from intactkv.harness.tasks import write_tasks

    check_folder(out)
    names = write_tasks(data, out)
    console.print(f"written to {out}: {', '.join(names)}", highlight=False)
    console.print(f"intactkv lm-eval --include_path {out} --tasks {','.join(names)} …", highlight=False, soft_wrap=True)


def compare_arms(
    full: Path, own: Path, intact: Path, *, console: Console, out: Path | None, markdown: Path | None
) -> None:
    """Print the paired comparison; write it as JSON and as Markdown rows where asked for."""
    _need_lm_eval()
    from intactkv.evaluating.markdown import head_lines, line
    from intactkv.harness.compare import compare, rows, to_dict

    found = compare(full, own, intact)
    cells = rows(found)
    table = Table(title="Three arms, item by item")
    for name in cells[0]:
        table.add_column(name)
    for row in cells:
        table.add_row(*row.values())
    console.print(table)
    if out is not None:
        write_json(out, {"full": str(full), "own": str(own), "intact": str(intact), "comparisons": to_dict(found)})
        console.print(f"written: {out}")
    if markdown is not None:
        lines = [*head_lines(cells[0]), *(line(row.values()) for row in cells)]
        write_atomically(markdown, ("\n".join(lines) + "\n").encode())
        console.print(f"written: {markdown}")


def _need_lm_eval() -> None:
    if find_spec("lm_eval") is None:
        raise IntactKVError("this command needs lm-eval: pip install 'intactkv[eval]'")
