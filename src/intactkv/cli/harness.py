"""lm-eval's command line, tasks over local files, and the comparison of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import console
from intactkv.files import check_outputs


def lm_eval_command(context: typer.Context) -> None:
    """lm-eval's own command line with `--model intactkv` in it; all arguments are lm-eval's.

    Arms: --model_args pretrained=MODEL,kv=KV (intact), with attached=False (MODEL's own prefix, or the full model).
    """
    from intactkv.harness.command import lm_eval

    lm_eval(context.args)


def tasks_command(
    data: Annotated[Path, typer.Argument(help="A folder with test sets as files.", metavar="DATA")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the task files.", metavar="DIR")],
) -> None:
    """Write lm-eval tasks that read the files in DATA: each .txt, .jsonl of a known schema, and mmlu."""
    from intactkv.harness.command import tasks

    tasks(data, out, console)


def compare_command(
    full: Annotated[Path, typer.Option(help="What lm-eval logged of the full model.", metavar="DIR")],
    own: Annotated[Path, typer.Option(help="… of the quantized model with its own prefix.", metavar="DIR")],
    intact: Annotated[Path, typer.Option(help="… of the quantized model with the intact prefix.", metavar="DIR")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write all figures as JSON.", metavar="JSON")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown.", metavar="FILE")] = None,
) -> None:
    """Compare three lm-eval runs (with --log_samples) item by item: flips, McNemar, intervals, recovery."""
    from intactkv.harness.command import compare_arms

    check_outputs(out, markdown)
    compare_arms(full, own, intact, console=console, out=out, markdown=markdown)
