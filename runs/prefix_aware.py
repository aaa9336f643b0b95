"""Checkpoints made for their intact prefix beside ordinary ones, on a real model: every method, one table.

What it does: makes each checkpoint of the list by `intactkv quantize`'s own function, the ordinary one and the one made
for its prefix, in the same number of bits and groups from the same calibration windows (WikiText-2 valid), and measures
it on WikiText-2 test and on the C4 sample: with its own prefix, with the intact one, and without a prefix; where asked
for, with a calibrated KV too. Each checkpoint is one JSON file with every window's figures, so that any two arms can be
compared in pairs, and a run goes on where it stopped; several processes share one list. `table` writes Markdown.
What it gives up: 128 windows of 512 tokens to learn from, 150 to measure on; one calibration text but for GPTQ.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from shutil import rmtree
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from intactkv import IntactKV, bos, chat_prefix, text_prefix
from intactkv.artifact.hub import FILE as PREFIX_KV
from intactkv.attaching.plain import made_for_prefix
from intactkv.calibrating import CalibrationConfig, Objective, calibrate, split, text_samples
from intactkv.checkpoint.load import device_named, load_model_on, load_tokenizer
from intactkv.evaluating import Arm, Evaluation, Windows, evaluate, prefixed_windows
from intactkv.evaluating.metrics import summary
from intactkv.files import write_atomically
from intactkv.quantizing import AWQ, GPTQ, RTN, AutoRound, Method, Rotated, SmoothQuant, quantize
from intactkv.texts import read_text

GROUP, LEARN, WINDOW, WINDOWS = 64, 128, 512, 150
HELD_OUT = "held-out"  # of the calibration's text
app = typer.Typer(pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Job:
    """One checkpoint: its name, what makes it, which prefix, which third of the calibration text."""

    name: str
    method: Method
    weight: float | None = None
    prefix: str = "B"
    seed: int = 0
    calibrated: bool = False


def jobs() -> Iterator[Job]:
    """The whole list, the long and the important first."""
    both = ((1.0, "ordinary"), (0.0, "aware"))
    for bits in (3, 4):
        for weight, kind in both:
            yield Job(f"autoround-w{bits}-{kind}", AutoRound(bits, GROUP), weight, calibrated=weight == 0)
    for bits in (3, 4, 2):
        yield Job(f"rtn-w{bits}", RTN(bits, GROUP))
        for weight, kind in both:
            more = weight == 0 and bits > 2
            yield Job(f"gptq-w{bits}-{kind}", GPTQ(bits, GROUP), weight, calibrated=more)
            yield Job(f"gptq-asym-w{bits}-{kind}", GPTQ(bits, GROUP, symmetric=False), weight, calibrated=more)
            yield Job(f"awq-w{bits}-{kind}", AWQ(bits, GROUP), weight, calibrated=more)
    eight: dict[str, Any] = {"group_size": None, "activation_bits": 8}
    yield Job("w8a8-dynamic-rtn", RTN(8, **eight))
    yield Job("w8a8-fp8-dynamic-rtn", RTN(8, **eight, float8=True))
    for weight, kind in both:
        static = {**eight, "static_activations": True}
        yield Job(f"w8a8-static-rtn-{kind}", RTN(8, **static), weight)
        yield Job(f"w8a8-fp8-static-rtn-{kind}", RTN(8, **static, float8=True), weight)
        yield Job(f"w8a8-static-smoothquant-{kind}", SmoothQuant(RTN(8, **static)), weight)
        yield Job(f"w8a8-dynamic-smoothquant-{kind}", SmoothQuant(RTN(8, **eight)), weight)
        w4a8: dict[str, Any] = {"group_size": GROUP, "activation_bits": 8, "static_activations": True}
        yield Job(f"w4a8-static-gptq-{kind}", GPTQ(4, **w4a8), weight)
        yield Job(f"w4a8-static-smoothquant-{kind}", SmoothQuant(GPTQ(4, **w4a8)), weight)
    for weight, kind in both:
        for kv_bits in (None, 4):
            levels = GPTQ(4, GROUP, activation_bits=4, kv_bits=kv_bits)
            yield Job(f"rotated-w4a4kv{kv_bits or 16}-gptq-{kind}", Rotated(levels), weight)
        for bits in (3, 4):
            yield Job(f"P-gptq-w{bits}-{kind}", GPTQ(bits, GROUP), weight, prefix="P", calibrated=weight == 0)
            for seed in (1, 2):
                yield Job(f"seed{seed}-gptq-w{bits}-{kind}", GPTQ(bits, GROUP), weight, seed=seed)
    yield Job("rotated-w4a4kv4-rtn", Rotated(RTN(4, GROUP, activation_bits=4, kv_bits=4)))
    for bits in (3, 4):
        for weight in (1 / 128, 1 / 16, 1 / 4, 1 / 2):
            yield Job(f"weight-{weight:.4f}-gptq-w{bits}", GPTQ(bits, GROUP), weight)
    for weight, kind in both:
        yield Job(f"autoround-w2-{kind}", AutoRound(2, GROUP), weight)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="The full-precision model's folder.")],
    data: Annotated[Path, typer.Argument(help="The folder with calib/ and eval/.")],
    out: Annotated[Path, typer.Argument(help="The folder for the JSON files.")],
    only: Annotated[str, typer.Option(help="Jobs' names or patterns (gptq-w3-*) by commas, in this order.")] = "*",
    learn: Annotated[int, typer.Option(help="Calibration windows.")] = LEARN,
    windows: Annotated[int, typer.Option(help="Windows of each text to measure on.")] = WINDOWS,
    texts: Annotated[
        str, typer.Option(help="Measured on, by commas; settings are chosen on held-out.")
    ] = "C4,WikiText-2",
    calibrated: Annotated[bool, typer.Option(help="Calibrate the KV of jobs that ask for it.")] = True,
    device: Annotated[str, typer.Option(help="Where models run.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Begin no job after so many seconds.")] = 1e9,
) -> None:
    """Do what nobody has done or begun of the list."""
    began = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, data, device, learn, windows)
    for job in (job for pattern in only.split(",") for job in jobs() if fnmatchcase(job.name, pattern)):
        job = replace(job, calibrated=job.calibrated and calibrated)
        if perf_counter() - began > seconds:
            break
        file, claim = out / f"{job.name}.json", out / f"{job.name}.begun"
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        try:
            write_atomically(file, json.dumps(bench.measured(job, out, texts.split(",")), indent=1).encode())
            print(f"{job.name} {perf_counter() - began:.0f} s", flush=True)
        except Exception as error:  # the others go on; a new run tries it again
            (out / f"{job.name}.failed").write_text(traceback.format_exc())
            print(f"{job.name} FAILED {error!r:.300}", flush=True)
            claim.unlink()


class Bench:
    """What all jobs on one model share."""

    def __init__(self, model: str, data: Path, device: str, learn: int, windows: int) -> None:
        self.model, self.device, self.learn, self.windows = model, device_named(device), learn, windows
        self.tokenizer = load_tokenizer(model)
        self.full = load_model_on(model, device, dtype=torch.float32)
        self.at_once = 8 if self.full.config.get_text_config(decoder=True).vocab_size < 100_000 else 2  # windows
        self.calibration = data / "calib" / "wikitext2_valid_tokenised.txt"
        self.learned = self.encoded(read_text(self.calibration))
        self.tokens = {
            "C4": self.encoded(read_text(data / "eval" / "c4_sample_500.jsonl")),
            "WikiText-2": self.encoded(read_text(data / "eval" / "wikitext2_test_raw.txt")),
            HELD_OUT: self.learned[3 * learn * WINDOW :],  # three seeds' windows come first
        }

    def encoded(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def prefix(self, kind: str) -> list[int]:
        """[BOS], or what the chat template begins with; for a base model some words."""
        if kind == "B":
            return bos(self.tokenizer)
        if self.tokenizer.chat_template is None:
            return text_prefix(self.tokenizer, "Here is a text that a careful writer has written for other people:\n")
        return chat_prefix(self.tokenizer)

    def cut(self, tokens: list[int], prefix: list[int], first: int, count: int) -> Windows:
        return prefixed_windows(tokens, prefix=prefix, window=WINDOW)[first : first + count]

    def measured(self, job: Job, out: Path, texts: list[str]) -> dict[str, Any]:
        """Make one checkpoint and measure it; the folder is deleted again."""
        prefix, folder, began = self.prefix(job.prefix), out / f"{job.name}.checkpoint", perf_counter()
        rmtree(folder, ignore_errors=True)
        calibration = self.cut(self.learned, prefix, job.seed * self.learn, self.learn).ids
        quantize(
            self.model, folder, method=job.method, calibration=calibration, prefix=prefix,
            prefix_weight=None if not job.method.needs_calibration else job.weight, device=self.device,
        )  # fmt: skip
        made = perf_counter()
        model, kv = load_model_on(folder, str(self.device), dtype=torch.float32), IntactKV.load(folder / PREFIX_KV)
        about = {"job": job.name, "weight": job.weight, "seed": job.seed, "prefix": prefix, "seconds": made - began}
        about |= {"made_for": made_for_prefix(folder), "windows": self.windows, "learned": self.learn}
        kvs = {"intact": kv}
        if job.calibrated:
            kvs["calibrated"] = self.calibrated(model, kv)
        found = {text: self.arms(model, kvs, self.cut(self.tokens[text], prefix, 0, self.windows)) for text in texts}
        rmtree(folder)
        del model
        return {**about, "texts": found, "all_seconds": perf_counter() - began}

    def calibrated(self, model: Any, kv: IntactKV) -> IntactKV:
        """The KV trained on KL, on the text that the weights were learned from."""
        parts = split(
            text_samples(self.calibration, self.tokenizer, prefix=kv.ids, length=WINDOW, count=168), held_out=40
        )
        settings = CalibrationConfig(objective=Objective(0, 1), steps=96, micro_batch=self.at_once)
        return calibrate(kv, model, self.full, parts, config=settings)

    def arms(self, model: Any, kvs: dict[str, IntactKV], windows: Windows) -> dict[str, Any]:
        arms = [Arm("own", model), Arm("bare", model, None, len(kvs["intact"]))]
        arms += [Arm(name, model, kv) for name, kv in kvs.items()]
        found = evaluate(self.full, arms, windows, block_mse=False, batch_size=self.at_once)
        return {name: by_window(found, name) for name in found.metrics}


def by_window(found: Evaluation, name: str) -> dict[str, Any]:
    """An arm's summary, and its means by window, from which any pair of arms gets its interval."""
    metrics = found.metrics[name]

    def means(values: Tensor) -> list[float]:
        return [round(x, 6) for x in values.double().nanmean(1).tolist()]

    return {**summary(metrics), "kl": means(metrics.kl), "nll": means(metrics.nll)}


@app.command()
def table(
    out: Annotated[Path, typer.Argument(help="The folder with the JSON files.")],
    text: Annotated[str, typer.Option(help="C4 or WikiText-2.")] = "C4",
) -> None:
    """Print every checkpoint's arms as Markdown."""
    print("| checkpoint | KL own | intact | calibrated | bare | PPL own | intact | calibrated | bare | top-1 intact % "
          "| KL 99.9 % intact |\n|---|" + "---:|" * 10)  # fmt: skip
    for job in jobs():
        file = out / f"{job.name}.json"
        if file.exists():
            arms = json.loads(file.read_text())["texts"][text]
            cells = [cell(arms, arm, "kl_mean", 4) for arm in ("own", "intact", "calibrated", "bare")]
            cells += [cell(arms, arm, "perplexity", 2) for arm in ("own", "intact", "calibrated", "bare")]
            cells += [cell(arms, "intact", "same_top1_percent", 2), cell(arms, "intact", "kl_99_9", 2)]
            print(f"| {job.name} | {' | '.join(cells)} |")


def cell(arms: dict[str, Any], arm: str, metric: str, digits: int) -> str:
    if arm not in arms:
        return "–"
    value = arms[arm][metric]
    return f"{value:.{digits}f}" if value < 1e5 else f"{value:.0e}"


@app.command()
def ratios(
    out: Annotated[Path, typer.Argument(help="The folder with the JSON files.")],
    pairs: Annotated[list[str], typer.Argument(help="JOB:ARM/JOB:ARM …")],
    text: Annotated[str, typer.Option(help="C4 or WikiText-2.")] = "C4",
) -> None:
    """Ratios of mean KL with paired 95 % intervals over windows."""
    for pair in pairs:
        above, below = (kl_by_window(out, side, text) for side in pair.split("/"))
        drawn = torch.randint(len(above), (10_000, len(above)), generator=torch.Generator().manual_seed(0))
        ratio = above[drawn].mean(1) / below[drawn].mean(1)
        low, high = ratio.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        print(f"{pair}: {float(above.mean() / below.mean()):.3f} [{low:.3f}, {high:.3f}]")


SHOWN = {  # what the README's picture shows
    "gptq-w3": "3 bits\nGPTQ", "gptq-asym-w3": "3 bits\nGPTQ, asym.", "gptq-w4": "4 bits\nGPTQ",
    "w4a8-static-gptq": "W4A8 static\nGPTQ", "autoround-w3": "3 bits\nAutoRound",
}  # fmt: skip
ARMS = {
    "ordinary checkpoint, own prefix": ("ordinary", "own", "#9aa5b1"),
    "ordinary checkpoint, intact KV": ("ordinary", "intact", "#5b8db8"),
    "made for its intact KV": ("aware", "intact", "#1f5f8b"),
}


@app.command()
def picture(
    outs: Annotated[list[str], typer.Argument(help="TITLE=FOLDER of JSON files, one for each model.")],
    svg: Annotated[Path, typer.Option(help="The picture to write.")],
    text: Annotated[str, typer.Option(help="C4 or WikiText-2.")] = "C4",
) -> None:
    """Draw the arms' KL of some checkpoints side by side."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "intactkv", "font.size": 9, "svg.fonttype": "none"}
    figure, axes = pyplot.subplots(1, len(outs), figsize=(9, 3), layout="constrained")
    for axis, named in zip(axes, outs, strict=True):
        title, _, folder = named.partition("=")
        for i, (label, (kind, arm, color)) in enumerate(ARMS.items()):
            files = [json.loads((Path(folder) / f"{job}-{kind}.json").read_text()) for job in SHOWN]
            heights = [file["texts"][text][arm]["kl_mean"] for file in files]
            axis.bar([x + 0.27 * (i - 1) for x in range(len(SHOWN))], heights, 0.25, color=color, label=label)
        axis.set_xticks(range(len(SHOWN)), SHOWN.values(), fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"KL to the full model, {text}")
    axes[-1].legend(frameon=False, fontsize=7)
    figure.savefig(svg, metadata={"Date": None})


def kl_by_window(out: Path, side: str, text: str) -> Tensor:
    job, arm = side.split(":")
    return torch.tensor(json.loads((out / f"{job}.json").read_text())["texts"][text][arm]["kl"], dtype=torch.float64)


if __name__ == "__main__":
    app()
