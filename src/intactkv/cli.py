"""The command line: capture, quantize, check, eval, mtbench, calibrate, generate, doctor, demo.

What fails is one sentence and exit code 1. Each command imports what it needs when it runs, so that `--help` does not
wait for torch.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from intactkv.error import IntactKVError
from intactkv.files import check_folder, check_outputs
from intactkv.screen import Screen, working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Screen()

Model = Annotated[str, typer.Argument(help="The model: a folder or a name on the Hub.", metavar="MODEL")]
Full = Annotated[str, typer.Option("--full", help="The full-precision model it was quantized from.", metavar="MODEL")]
Device = Annotated[str, typer.Option(help="Where models run: auto (the accelerator if there is one), cpu, cuda, …")]
DType = Annotated[
    str,
    typer.Option(help="auto (as stored, float32 where that is slow), float32, bfloat16 or float16.", metavar="TYPE"),
]
KV = Annotated[Path, typer.Option("--kv", help="The intact KV, written by `intactkv capture`.", metavar="KV")]


@app.command("capture")
def capture_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", metavar="KV")],
    prefix: Annotated[
        str | None,
        typer.Option(
            help="`bos` (the default), `chat` (what the chat template begins with), `auto` (the shortest that leaves "
            "no pivot outside), or the text that prompts begin with."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt, with `--prefix chat`.")] = None,
    ids: Annotated[str | None, typer.Option(help="Explicit token ids instead, such as `1,887,526`.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="With `--prefix auto`, a UTF-8 text to look for pivots in.", metavar="TEXT")
    ] = None,
    allow_quantized: Annotated[
        bool, typer.Option("--allow-quantized", help="Take a MODEL that is quantized, and say so in the file.")
    ] = False,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Let the full-precision MODEL compute the keys and values of a prefix, and save them."""
    from intactkv.capturing.live import capture
    from intactkv.checkpoint.load import device_named, load_model_on, load_tokenizer
    from intactkv.checkpoint.source import refuse_quantized
    from intactkv.demo import TEXT
    from intactkv.pivots import without_pivot
    from intactkv.pivots.discover import behind
    from intactkv.texts import first_tokens, read_text

    check_outputs(out)
    tokenizer = load_tokenizer(model)
    auto = prefix == "auto"
    if data is not None and not auto:
        raise IntactKVError(f"--data {data} goes with --prefix auto; add it")
    text = read_text(data or TEXT)
    chosen = [] if auto and ids is None else _prefix(tokenizer, prefix, system, ids)
    if dtype == "auto" and device_named(device).type == "cpu":
        dtype = "float32"  # so few tokens take no time, and bfloat16 costs a value up to 0.4 % of itself
    with console.status(f"loading {model}"):
        full = load_model_on(model, device, dtype=dtype)
    if not allow_quantized:
        refuse_quantized(full.config)
    if auto:
        from intactkv.pivots import discover

        with console.status("looking for pivots"):
            chosen = discover(full, tokenizer, text)
    with console.status(f"capturing {len(chosen)} tokens"):
        kv = capture(full, chosen, tokenizer=tokenizer, allow_quantized=allow_quantized)
        tokens = first_tokens(tokenizer, text, 4096)
        idle = without_pivot(full, behind(chosen, tokens), size=len(chosen))
        kv.save(out)
    console.print(f"{out}: {kv}")
    console.print(f"prefix {chosen} = {tokenizer.decode(chosen)!r}", markup=False)
    if idle is not None:
        warn(idle)


@app.command("quantize")
def quantize_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", metavar="DIR")],
    method: Annotated[str, typer.Option(help="rtn, gptq, awq, autoround, smoothquant or rotated.")] = "rtn",
    bits: Annotated[int, typer.Option(help="Bits of a weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        str, typer.Option(help="Weights that share a scale; 0 is one row, auto the largest up to 128 that fits.")
    ] = "128",
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="By default as the method has it.")
    ] = None,
    activation_bits: Annotated[
        int | None, typer.Option(help="Round the inputs of layers too, to so many bits.")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="One scale for all tokens' inputs, from calibration, instead of one each.")
    ] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Eight bits are floating-point numbers, not integers.")] = False,
    kv_bits: Annotated[int | None, typer.Option(help="Round keys and values in the cache, to so many bits.")] = None,
    rounding: Annotated[str | None, typer.Option(help="rtn or gptq, after smoothquant or rotated.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to calibrate on; only rtn needs none.", metavar="TEXT")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="`bos` (the default), `chat`, or the text that prompts begin with: what stays intact."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt, with `--prefix chat`.")] = None,
    ids: Annotated[str | None, typer.Option(help="Explicit token ids instead, such as `1,887,526`.")] = None,
    prefix_weight: Annotated[
        float | None,
        typer.Option(
            help="How much prefix tokens count while the method learns, from 0, not at all, to 1, in full; 1/16 by "
            "default, 0 for methods that know no part."
        ),
    ] = None,
    plain_prefix: Annotated[
        bool, typer.Option("--plain-prefix", help="The ordinary checkpoint: prefix tokens count as others do.")
    ] = False,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Quantize MODEL into a checkpoint that transformers and vLLM load, and write the intact KV that fits beside it.

    A method that learns from text makes a checkpoint for that KV, which should not be used without it.
    """
    from intactkv.attaching.plain import made_for_prefix
    from intactkv.checkpoint.load import device_named, dtype_named, load_tokenizer
    from intactkv.quantizing import PREFIX_KV, chosen, quantize
    from intactkv.texts import read_text

    settings = chosen(
        method, bits=bits, group_size=_group_size(group_size), activation_bits=activation_bits, kv_bits=kv_bits,
        symmetric=symmetric, rounding=rounding, static_activations=static, float8=fp8,
    )  # fmt: skip
    if settings.needs_calibration and data is None:
        raise IntactKVError(f"--method {method} learns from text; add --data TEXT, or use --method rtn")
    if plain_prefix and prefix_weight not in (None, 1):
        raise IntactKVError(f"--plain-prefix is --prefix-weight 1, and {prefix_weight} was given; leave one out")
    where = device_named(device)
    text = None if data is None else read_text(data)
    chosen_ids = _prefix(load_tokenizer(model), prefix, system, ids)
    screen = Screen(file=sys.stderr)  # the one the user sees, while llm-compressor's output is silenced
    with working(screen, f"{method}, {bits} bits", above=False) as show:
        quantize(
            model, out, method=settings, calibration=text, prefix=chosen_ids, device=where,
            prefix_weight=1.0 if plain_prefix else prefix_weight, dtype=dtype_named(dtype, model, where),
            progress=show,
        )  # fmt: skip
    console.print(f"{out}: {method}, {bits} bits; attach {out / PREFIX_KV} to it", highlight=False)
    made_for = made_for_prefix(out)
    if made_for is not None:
        perplexity = made_for["perplexity"]
        console.print(
            f"made for that prefix: on {perplexity['windows']} windows of its text the perplexity is "
            f"{perplexity['full']:.4g} in full precision, {perplexity['with_kv']:.4g} with the KV attached and "
            f"{perplexity['without_kv']:.4g} without; --plain-prefix makes the ordinary checkpoint",
            highlight=False,
        )


@app.command("check")
def check_command(
    model: Model,
    full: Full,
    kv: KV,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the intact KV in MODEL's basis here.", metavar="KV")
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Are MODEL's keys and values the full model's, rescaled or rotated ones, or another's? Refuses the last."""
    from intactkv.artifact import IntactKV
    from intactkv.basis.compare import align, basis, describe, show_noise
    from intactkv.basis.words import basis_table
    from intactkv.checkpoint.load import load_model_on

    check_outputs(out)
    artifact = IntactKV.from_pretrained(kv)
    with console.status("reading the full model"):
        shown = show_noise(load_model_on(full, device, dtype=dtype))  # and drop it: one model is in memory at a time
    with console.status("comparing every layer and head"):
        relations = basis(shown, load_model_on(model, device, dtype=dtype))
    console.print(basis_table(relations))
    aligned = align(artifact, relations)
    changed = aligned is not artifact
    console.print(f"basis: {describe(relations)}", highlight=False)
    if out is not None:
        aligned.save(out)
        console.print(f"written: {out}")
    elif changed:
        console.print(f"{kv} does harm as it is: write the aligned one with -o KV and attach that", style="yellow")


@app.command("eval")
def eval_command(
    models: Annotated[
        list[str], typer.Argument(help="One or more quantized models: folders or names on the Hub.", metavar="MODEL…")
    ],
    full: Full,
    kv: Annotated[
        list[Path], typer.Option("--kv", help="The intact KV; with several models one for all, or one each.")
    ],
    data: Annotated[Path, typer.Option(help="A UTF-8 text file to measure on.", metavar="TEXT")],
    window: Annotated[int, typer.Option(help="Tokens in one window, prefix included.")] = 512,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's protocol: each window's first token overwritten by BOS.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward.", min=1)] = 8,
    windows: Annotated[int | None, typer.Option(help="Use only the first so many windows.", min=2)] = None,
    bare: Annotated[
        bool | None,
        typer.Option(
            "--bare/--no-bare", help="Measure prompts without the prefix too; by default if a model was made for it."
        ),
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Keep what the full model says of each token, and every batch's figures, in this folder: one pass "
            "over the full model serves many commands, a stopped one goes on, one model is in memory at a time.",
            metavar="DIR",
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(help="Keep only so many likeliest tokens of each distribution: every KL is then a lower bound."),
    ] = None,
    cache_bytes: Annotated[int, typer.Option(help="The most bytes of distributions in the cache.", min=0)] = 50 * 2**30,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write all figures as JSON.", metavar="JSON")] = None,
    markdown: Annotated[
        str | None, typer.Option(help="Add a row for each model to this Markdown file; `-` prints it.", metavar="FILE")
    ] = None,
) -> None:
    """Compare three arms on a text: the full model, MODEL with its own prefix, MODEL with the intact prefix."""
    from intactkv.evaluating import command as evaluation

    check_outputs(out, _markdown_file(markdown))
    if top is not None and cache is None:
        raise IntactKVError(f"--top {top} says what a cache keeps; add --cache DIR, or leave it out")
    evaluation.run(
        models, full, kv,
        protocol=evaluation.Protocol(data, window, paper, windows, batch_size, device, dtype, bare),
        cache=None if cache is None else evaluation.Cache(cache, top, cache_bytes),
        outputs=evaluation.Outputs(out, markdown), console=console,
    )  # fmt: skip


bench = typer.Typer(help="MT-Bench: let three arms answer, let a judge grade, show the grades.", no_args_is_help=True)
app.add_typer(bench, name="mtbench")
Questions = Annotated[Path, typer.Option("--questions", help="FastChat's question.jsonl.", metavar="JSONL")]
Bench = Annotated[Path, typer.Argument(help="The folder that `mtbench answer` wrote to.", metavar="DIR")]


@bench.command("answer")
def mtbench_answer_command(
    model: Model,
    full: Full,
    kv: KV,
    questions: Questions,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.", metavar="DIR")],
    arms: Annotated[str, typer.Option(help="Which of full, own and intact answer.")] = "full,own,intact",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of one answer at most.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Questions in one batch.")] = 8,
    seed: Annotated[int, typer.Option(help="The seed of sampling, where a category is sampled.")] = 0,
    system: Annotated[str | None, typer.Option(help="A system prompt before every question.")] = None,
    first: Annotated[int | None, typer.Option(help="Only the first so many questions of each category.", min=1)] = None,
    name: Annotated[str | None, typer.Option(help="MODEL's name in the files; by default its folder's.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Answer both turns of every question with three arms: the full model, MODEL, MODEL with the intact prefix."""
    from intactkv.mtbench import command
    from intactkv.mtbench.answer import Settings

    command.answer(
        command.Models(model, full, kv, name, device, dtype), questions, out, arms=arms.split(","),
        settings=Settings(max_new_tokens, batch_size, seed, system), first=first, console=console,
    )  # fmt: skip


@bench.command("judge")
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


@bench.command("show")
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

    check_outputs(out, _markdown_file(markdown))
    command.show(folder, questions, judge, out=out, markdown=markdown, console=console)


@app.command("calibrate")
def calibrate_command(
    model: Model,
    full: Full,
    kv: KV,
    data: Annotated[Path, typer.Option(help="Conversations (.json, .jsonl) or a UTF-8 text.", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", metavar="KV2")],
    objective: Annotated[str, typer.Option(help="`blocks` (the paper's), `kl`, or `both`.")] = "blocks",
    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW's; by default the paper's 2e-4, with KL 0.01 that falls to 0.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 160,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 16,
    samples: Annotated[int, typer.Option(help="Samples to learn from.", min=1)] = 128,
    held_out: Annotated[int, typer.Option(help="Samples that choose the step and judge it.", min=3)] = 40,
    length: Annotated[int, typer.Option(help="Tokens of a sample, prefix included.")] = 1024,
    values_only: Annotated[bool, typer.Option("--values-only", help="Train the values, keep the keys.")] = False,
    checkpoint_blocks: Annotated[
        bool | None, typer.Option(help="Compute blocks twice to save memory; by default if a graph takes above 2 GiB.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt of conversations that have none.")] = None,
    spool: Annotated[
        Path | None, typer.Option(help="Keep the full model's targets in this folder, and only one model in memory.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A file to resume from after a stop.", metavar="FILE")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Draw curves for TensorBoard.", metavar="DIR")] = None,
    seed: Annotated[int, typer.Option(help="The seed of the order of samples.")] = 0,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Train the intact KV to absorb what is left of MODEL's quantization error; keep it only if that helps."""
    from intactkv.artifact import IntactKV
    from intactkv.calibrating import Settings
    from intactkv.calibrating import command as calibration
    from intactkv.calibrating.processes import is_main
    from intactkv.capturing.live import check_tokenizer
    from intactkv.checkpoint.load import load_tokenizer

    check_outputs(out, checkpoint)
    for folder in (spool, tensorboard):
        if folder is not None:
            check_folder(folder)
    if objective not in calibration.OBJECTIVES:
        raise IntactKVError(f"--objective {objective!r} is not known; use {', '.join(calibration.OBJECTIVES)}")
    artifact = IntactKV.from_pretrained(kv)
    check_tokenizer(artifact, load_tokenizer(full), full)
    found = calibration.run(
        model, full, artifact,
        data=calibration.Data(data, samples, held_out, length, seed, system),
        settings=Settings(
            objective=calibration.OBJECTIVES[objective], learning_rate=learning_rate, steps=steps, seed=seed,
            batch_size=batch_size, checkpoint_blocks=checkpoint_blocks,
            parts=("value",) if values_only else ("key", "value"),
        ),
        places=calibration.Places(spool, checkpoint, tensorboard, device, dtype), console=console,
    )  # fmt: skip
    if is_main():
        found.save(out)
        console.print(f"written: {out}")


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def lm_eval_command(context: typer.Context) -> None:
    """lm-eval's own command line with `--model intactkv` in it; all arguments are lm-eval's.

    Arms: --model_args pretrained=MODEL,kv=KV (intact), with attached=False (MODEL's own prefix, or the full model).
    """
    from intactkv.harness.command import lm_eval

    lm_eval(context.args)


@app.command("tasks")
def tasks_command(
    data: Annotated[Path, typer.Argument(help="A folder with test sets as files.", metavar="DATA")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the task files.", metavar="DIR")],
) -> None:
    """Write lm-eval tasks that read the files in DATA: LAMBADA, ARC, MMLU, WikiText-2, …"""
    from intactkv.harness.command import tasks

    tasks(data, out, console)


@app.command("compare")
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


@app.command("generate")
def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    kv: Annotated[Path | None, typer.Option("--kv", help="An intact KV to attach.", metavar="KV")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to generate.", min=1)] = 50,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template as the user's message.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="0 chooses the likeliest token; above, tokens are sampled.", min=0.0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="The seed of sampling.")] = 0,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Continue a prompt with MODEL, with an intact KV attached if one is given; tokens are shown as they come."""
    import torch
    from transformers import TextStreamer

    from intactkv.artifact import IntactKV
    from intactkv.checkpoint.load import load_model_on, load_tokenizer
    from intactkv.generate import continuation, encode

    tokenizer = load_tokenizer(model)
    artifact = None if kv is None else IntactKV.from_pretrained(kv)
    with console.status(f"loading {model}"):
        loaded = load_model_on(model, device, dtype=dtype)
    ids = encode(tokenizer, prompt, chat=chat, kv=artifact)
    torch.manual_seed(seed)
    shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    continuation(
        loaded, tokenizer, ids, kv=artifact, max_new_tokens=max_new_tokens, temperature=temperature, streamer=shown
    )


@app.command("doctor")
def doctor_command(
    model: Annotated[
        str | None, typer.Argument(help="The full model: a folder or a Hub name; without it, the embedded one.")
    ] = None,
    quantized: Annotated[
        str | None, typer.Option(help="Its quantized form; without it, rounding to 4 and 3 bits is simulated.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to measure on; without it, the embedded one.", metavar="TEXT")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens in one window.", min=64)] = 128,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write; figures go beside it as JSON.")] = Path(
        "intactkv-doctor.html"
    ),
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Does an intact prefix help MODEL? Finds its pivots and says: worth it, marginal, no effect or harmful."""
    from intactkv.doctor.run import run as run_doctor

    run_doctor(model, out, console, quantized=quantized, data=data, window=window, device=device, dtype=dtype)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("intactkv-demo"),
) -> None:
    """Show the whole story offline, on the small model inside this package: the main job in one command."""
    from intactkv.demo.run import run

    check_folder(out)
    run(out, console)


def warn(sentence: str) -> None:
    """Say what the user should know before relying on a result."""
    Screen(stderr=True).print(f"warning: {sentence}", style="yellow", markup=False, highlight=False, soft_wrap=True)


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
    warnings.showwarning = lambda message, *args, **kwargs: warn(str(message))
    try:
        app()
    except Exception as error:
        if not isinstance(error, IntactKVError | OSError) and os.environ.get("INTACTKV_TRACEBACK"):
            raise
        Screen(stderr=True).print(f"error: {_told(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _told(error: Exception) -> str:
    """What went wrong, in one sentence."""
    if isinstance(error, IntactKVError | OSError):
        return str(error)
    said = (str(error).strip().splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        return f"the device's memory does not suffice ({said}); use smaller batches or windows, or --device cpu"
    return f"{type(error).__name__}: {said} (nobody foresaw this: INTACTKV_TRACEBACK=1 shows where it happened)"


def _prefix(
    tokenizer: PreTrainedTokenizerBase, prefix: str | None, system: str | None, ids: str | None = None
) -> list[int]:
    """The ids that --prefix with --system names, or --ids gives."""
    from intactkv.capturing.prefix import bos, chat_prefix, text_prefix

    if ids is not None:
        if prefix is not None or system is not None:
            raise IntactKVError(f"--ids {ids} is the whole prefix; leave --prefix and --system out, or --ids")
        return _ids(ids)
    prefix = "bos" if prefix is None else prefix
    if prefix == "auto":
        raise IntactKVError("--prefix auto goes with `intactkv capture`, which shows the prefix it finds; name one")
    if system is not None and prefix != "chat":
        raise IntactKVError(f"--system goes with --prefix chat, not with --prefix {prefix!r}; add --prefix chat")
    if prefix == "bos":
        return bos(tokenizer)
    return chat_prefix(tokenizer, system=system) if prefix == "chat" else text_prefix(tokenizer, prefix)


def _group_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise IntactKVError(f"--group-size {text} is no number; use 128, 64, …, 0 for a whole row, or auto") from None


def _markdown_file(name: str | None) -> Path | None:
    """The file that --markdown names, where it does not ask for printing."""
    return None if name in (None, "-") else Path(str(name))


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise IntactKVError(f"--ids {text!r} is no list of numbers; write it like 1,887,526") from None


if __name__ == "__main__":
    main()
