"""Which range of static int8 activation scales loses least, on held-out text of the calibration.

What it does: makes W8A8 checkpoints with one static scale for each layer's input, ordinary ones and ones made for their
intact [BOS], each with other settings of llm-compressor's observer, and measures KL to the full model on calibration
text that they were not made from. `intactkv.quantizing` has the settings of the lowest line.
What it gives up: one calibration text, round to nearest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from prefix_aware import HELD_OUT, LEARN, WINDOWS, Bench, Job

from intactkv.quantizing import RTN, methods


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the settings of each observer."""
    yield "largest input", {"observer": "static_minmax"}
    yield "llm-compressor's mse", {"observer": "mse"}
    for norm in (2.0, 2.4, 3.0):
        for shrink in (0.5, 0.8, 0.9, 0.98):
            searched = {"norm": norm, "maxshrink": shrink, "patience": 20, "averaging_constant": 0.1}
            yield f"norm {norm}, down to {1 - shrink:.2f}", {"observer": "mse", "observer_kwargs": searched}


def main(
    model: Annotated[str, typer.Argument(help="The full-precision model's folder.")],
    data: Annotated[Path, typer.Argument(help="The folder with calib/ and eval/.")],
    out: Annotated[Path, typer.Argument(help="The folder for the JSON file and the checkpoints in between.")],
    part: Annotated[str, typer.Option(help="I/N: every N-th setting, from the I-th on, for N processes.")] = "0/1",
    learn: Annotated[int, typer.Option(help="Calibration windows.")] = LEARN,
    windows: Annotated[int, typer.Option(help="Windows to measure on.")] = WINDOWS // 3,
    device: Annotated[str, typer.Option(help="Where models run.")] = "auto",
) -> None:
    """Print mean KL of each range's ordinary checkpoint with its own prefix, and of the other with the intact one."""
    first, every = map(int, part.split("/"))
    out = out / f"static-range-{first}"
    out.mkdir(parents=True, exist_ok=True)
    bench, found = Bench(model, data, device, learn, windows), {}
    print("| range | ordinary, own prefix | made for [BOS], intact |\n|---|---:|---:|", flush=True)
    for name, observer in list(settings())[first::every]:
        methods._LEAST_SQUARES = observer  # what is chosen here
        found[name] = []
        for weight, arm in ((1.0, "own"), (0.0, "intact")):
            job = Job("range", RTN(8, None, activation_bits=8, static_activations=True), weight)
            found[name].append(bench.measured(job, out, [HELD_OUT])["texts"][HELD_OUT][arm]["kl_mean"])
        print(f"| {name} | {' | '.join(f'{kl:.4f}' for kl in found[name])} |", flush=True)
        (out / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
