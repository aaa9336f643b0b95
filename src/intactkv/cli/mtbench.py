"""MT-Bench: answer, judge, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import KV, Device, DType, Full, Model, Seed, console, markdown_file
from intactkv.files import check_outputs

Questions = Annotated[Path, typer.Option("--questions", help="FastChat's question.jsonl.", metavar="JSONL")]
Bench = Annotated[Path, typer.Argument(help="The folder that `mtbench answer` wrote to.", metavar="DIR")]


def mtbench_answer_command(
    model: Model,
    full: Full,
    kv: KV,
    questions: Questions,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.", metavar="DIR")],
    arms: Annotated[str, typer.Option(help="Which of full, own and intact answer.")] = "full,own,intact",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of one answer at most.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Questions in one batch.")] = 8,
    seed: Seed = 0,
    system: Annotated[str | None, typer.Option(help="A system prompt before every question.")] = None,
    first: Annotated[int | None, typer.Option(help="Only the first so many questions of each category.", min=1)] = None,
    name: Annotated[str | None, typer.Option(help="MODEL's name in the files; by default its folder's.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Answer both turns of every question with three arms: the full model, MODEL, MODEL with the intact prefix."""
    from intactkv.mtbench import command
    from intactkv.mtbench.answer import AnswerSettings

    command.answer(
        command.Models(model, full, kv, name, device, dtype), questions, out, arms=arms.split(","),
        settings=AnswerSettings(max_new_tokens, batch_size, seed, system), first=first, console=console,
    )  # fmt: skip


def mtbench_judge_command(
    folder: Bench,
    questions: Questions,
    endpoint: Annotated[str, typer.Option(help="The base URL of an OpenAI-compatible server.", metavar="URL")],
    judge: Annotated[str, typer.Option(help="The judging model's name there.", metavar="NAME")],
    references: Annotated[
        Path | None, typer.Option(help="Right answers for math, reasoning and coding, as model answers.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Your own prompts, as FastChat's judge_prompts.jsonl.")] = None,
    parallel: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 4,
    retries: Annotated[int, typer.Option(help="Tries again, with back-off, after 429 or 5xx.", min=0)] = 6,
    asks: Annotated[int, typer.Option(help="Times to ask for a reply that has a rating.", min=1)] = 3,
) -> None:
    """Grade every answer with a judge. The key, if the endpoint wants one, is the environment's OPENAI_API_KEY."""
    from intactkv.mtbench import command
    from intactkv.mtbench.judge import Endpoint

    where = Endpoint(endpoint, judge, parallel, retries, asks)
    command.judge(folder, questions, where, prompts=prompts, references=references, console=console)


def mtbench_show_command(
    folder: Bench,
    questions: Questions,
    judge: Annotated[str, typer.Option(help="Whose grades.", metavar="NAME")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write all figures as JSON.", metavar="JSON")] = None,
    markdown: Annotated[
        str | None, typer.Option(help="Add rows to this Markdown file; `-` prints them.", metavar="FILE")
    ] = None,
) -> None:
    """Mean grades by category, and the differences between arms with paired intervals."""
    from intactkv.mtbench import command

    check_outputs(out, markdown_file(markdown))
    command.show(folder, questions, judge, out=out, markdown=markdown, console=console)
