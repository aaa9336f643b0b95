"""The command line: what fails is one sentence and exit code 1.

Each command lies in a file of its own and imports what it needs when it runs, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated

import typer

from intactkv.cli import (
    calibrate,
    capture,
    check,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    harness,
    mtbench,
    quantize,
    serve,
)
from intactkv.cli.options import console, warn
from intactkv.error import IntactKVError, first_line
from intactkv.screen import Screen

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
bench = typer.Typer(help="MT-Bench: let three arms answer, let a judge grade, show the grades.", no_args_is_help=True)

_MORE = {"allow_extra_args": True, "ignore_unknown_options": True}  # what is not known here goes to another program
app.command("capture", context_settings=_MORE)(capture.capture_command)
app.command("quantize")(quantize.quantize_command)
app.command("check")(check.check_command)
app.command("eval")(evaluate.eval_command)
app.add_typer(bench, name="mtbench")
bench.command("answer")(mtbench.mtbench_answer_command)
bench.command("judge")(mtbench.mtbench_judge_command)
bench.command("show")(mtbench.mtbench_show_command)
app.command("calibrate")(calibrate.calibrate_command)
app.command("lm-eval", context_settings={**_MORE, "help_option_names": []}, add_help_option=False)(
    harness.lm_eval_command
)
app.command("tasks")(harness.tasks_command)
app.command("compare")(harness.compare_command)
app.command("generate")(generate.generate_command)
app.command("serve", context_settings=_MORE)(serve.serve_command)
app.command("export")(export.export_command)
app.command("doctor")(doctor.doctor_command)
app.command("demo")(demo.demo_command)


def _show_version(asked: bool) -> None:
    if asked:
        from intactkv import __version__

        console.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Keep a quantized language model's memory of its first tokens in full precision."""


def main() -> None:
    """The entry point: what went wrong is one sentence, never a traceback, and so is what a warning says.

    With INTACTKV_TRACEBACK set, what nobody foresaw is shown with its traceback.
    """
    if isinstance(sys.stdout, TextIOWrapper):  # a name that is no text is printed as its bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *args, **kwargs: warn(str(message))
    try:
        app()
    except Exception as error:
        if not isinstance(error, IntactKVError | OSError) and os.environ.get("INTACTKV_TRACEBACK"):
            raise
        Screen(stderr=True).print(f"error: {said(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def said(error: Exception) -> str:
    """What went wrong, in one sentence."""
    if isinstance(error, IntactKVError | OSError):
        return str(error)
    line = first_line(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        return f"the device's memory does not suffice ({line}); use smaller batches or windows, or --device cpu"
    return f"{type(error).__name__}: {line} (nobody foresaw this: INTACTKV_TRACEBACK=1 shows where it happened)"
