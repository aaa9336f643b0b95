"""The paper's calibration beside ours, in a process of its own: seconds per step and peak memory beyond the models.

`step` is the median over the steps in which no target is computed for the first time, `first` what computing them cost
before (all at once, or spread over the steps of the first epoch).

`held` is the paper's scheme, written anew from its description: the full model's block outputs of *every* sample are
computed first and held in memory; then the quantized model reads one sample at a time behind a cache that holds the
trainable keys and values, ½·MSE of every block's output at learned tokens, AdamW, gradients accumulated over a step.
The other ways are `intactkv.calibrating`. What this gives up: the quantized model is the full one with noise on its
weights, which costs the same, and both are small, so that what is held beside them is seen.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from intactkv import bos, capture
from intactkv.calibrating import CalibrationConfig, Sample, Samples, Split, spool, text_samples
from intactkv.calibrating.activations import activations_fit
from intactkv.calibrating.spool import Kept
from intactkv.calibrating.step import order, step_, with_tensors
from intactkv.calibrating.targets import Live
from intactkv.calibrating.train import _start
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT

WAYS: dict[str, dict[str, Any]] = {
    "held": {},
    "default": {},
    "spooled": {},
    "least memory": {"checkpoint_blocks": True, "keep_bytes": 0},
}


def main(way: str, samples: int, window: int, steps: int) -> None:
    """Run one way and print its figures as JSON."""
    torch.set_num_threads(1)
    full, tokenizer = load_model(MODEL, dtype=torch.float32), load_tokenizer(MODEL)
    model = load_model(MODEL, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape)
            parameter.requires_grad_(False)
    kv = capture(full, bos(tokenizer))
    rows = _overlapping(text_samples(TEXT, tokenizer, prefix=kv.ids, length=window).rows, len(kv), samples)
    epoch = samples // 8  # steps in which targets are computed, where they are kept for the later ones
    settings = CalibrationConfig(steps=epoch + steps if way == "default" else steps, batch_size=8, **WAYS[way])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if way == "spooled":
            targets: Any = spool(
                full, Split(Samples(rows), Samples(rows[:1]), Samples(rows[:2])), folder, prefix=kv.ids
            )
        before = _memory(reset=True)
        began = perf_counter()
        if way == "held":
            held = _targets(full, model, rows)
            first = perf_counter() - began
            seconds = _held(model, kv, rows, held, settings)
        else:
            if way != "spooled":
                targets = Live(full, kv.ids)
                if settings.keep_bytes:
                    targets = stack.enter_context(closing(Kept(targets, most_bytes=settings.keep_bytes)))
            if settings.checkpoint_blocks is None:
                own = with_tensors(kv, _start(kv, model, settings).tensors)
                fits = activations_fit(own, model, rows[:1], settings.objective, most_bytes=settings.activation_bytes)
                settings = replace(settings, checkpoint_blocks=not fits)
            seconds = _ours(targets, model, kv, rows, settings)
            first = sum(seconds[:-steps]) - (len(seconds) - steps) * median(seconds[-steps:])
        print(json.dumps({"mib": _memory() - before, "first": first, "step": median(seconds[-steps:])}))


def _overlapping(rows: Any, prefix: int, count: int) -> tuple[Sample, ...]:
    """As many different samples as asked for: the text cut again and again, each time some tokens later."""
    text, width = torch.cat([row.ids[prefix:] for row in rows]), len(rows[0].ids) - prefix
    starts = torch.linspace(0, len(text) - width, count).long().tolist()
    head = rows[0].ids[:prefix]
    return tuple(Sample(torch.cat([head, text[i : i + width]]), rows[0].learned) for i in starts)


def _ours(targets: Any, model: Any, kv: Any, rows: Any, settings: CalibrationConfig) -> list[float]:
    """The seconds of every step."""
    state, seconds = _start(kv, model, settings), []
    for step in range(settings.steps):
        began = perf_counter()
        step_(state, kv, model, targets, [rows[i] for i in order(len(rows), step, settings)], settings)
        seconds.append(perf_counter() - began)
    return seconds


def _targets(full: Any, model: Any, rows: Any) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The full model's block outputs of all samples, and the list into which `model` will put its own."""
    held: list[list[Tensor]] = []
    outputs: list[Tensor] = []
    for some in (full, model):
        for block in some.model.layers:
            block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        for row in rows:
            outputs.clear()
            full(row.ids[None], use_cache=False)
            held.append([output[0].clone() for output in outputs])
    return held, outputs


def _held(model: Any, kv: Any, rows: Any, targets: Any, settings: CalibrationConfig) -> list[float]:
    """The paper's scheme; the seconds of every step, the first pass over the full model not counted."""
    held, outputs = targets
    layers = [tuple(t.clone().requires_grad_() for t in pair) for pair in kv.layers.values()]
    optimizer = torch.optim.AdamW([t for pair in layers for t in pair], lr=settings.rate(0), weight_decay=0.0)
    seconds = []
    for step in range(settings.steps):
        began = perf_counter()
        for i in order(len(rows), step, settings):
            cache, learned = DynamicCache(config=model.config), rows[i].learned
            for layer, (key, value) in enumerate(layers):
                cache.update(key[None], value[None], layer)
            outputs.clear()
            model(rows[i].ids[len(kv) :][None], past_key_values=cache)
            pairs = zip(outputs, held[i], strict=True)
            losses = [0.5 * (own[0][learned[len(kv) :]] - want[learned]).square().mean() for own, want in pairs]
            (torch.stack(losses).mean() / settings.batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(perf_counter() - began)
    return seconds


def _memory(*, reset: bool = False) -> float:
    """The process's largest resident size in MiB since the last `reset`, which begins at the present size."""
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
