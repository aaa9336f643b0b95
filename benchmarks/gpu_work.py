"""Evaluating, calibrating and how costs grow on a GPU: each piece under two minutes.

    python benchmarks/gpu_work.py --out DIR                    # eval, harness, calibrate, growth
    python benchmarks/gpu_work.py --only eval --model FOLDER   # a checkpoint in place of a random one

Without `--model` the model is a random one of SmolLM2-135M's shape in bfloat16, and the quantized one is it rounded to
4 bits: what a forward costs does not hang on the numbers. All figures go to DIR/gpu_work.json, from which
`growth_plot.py` makes tables and plots. Without a GPU the same code runs at toy size.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_attach import intact, prefill
from gpu_clock import CUDA, DEVICE, allocated, clocked, turns, where
from gpu_decode import decoding
from gpu_llama import copied, eight_billion
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from intactkv import PackedCache, Packing, attach, capture, read_packed
from intactkv.calibrating import CalibrationConfig, Objective, Sample
from intactkv.calibrating.step import order, step_, with_tensors
from intactkv.calibrating.targets import Live
from intactkv.calibrating.train import _start, sized
from intactkv.checkpoint.load import load_model_on, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.doctor.simulate import rounded_model
from intactkv.evaluating import Windows, compare, prefixed_windows, three_arms
from intactkv.texts import read_text

BOS = 1
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
WINDOWS, WINDOW = (150, 512) if CUDA else (4, 32)
STEPS, SAMPLES = (4, 16) if CUDA else (1, 4)
WAYS: dict[str, dict[str, Any]] = {  # of one calibration step
    "one sample in a forward": {"micro_batch": 1},
    "as many as fit into 2 GiB": {"activation_bytes": 2 * 2**30},
    "as many as fit into half of the card": {},
    "all samples, blocks computed twice": {"micro_batch": SAMPLES, "checkpoint_blocks": True},
}
# How costs grow: one of these varies, the others are as in the first of each
Axes = dict[str, tuple[int, ...]]
AXES: Axes = {
    "context": (1024, 4096, 16384, 65536) if CUDA else (64, 128),
    "batch": (1, 8, 32) if CUDA else (1, 2),
    "prefix": (1, 34, 512) if CUDA else (1, 8),
    "layers": (8, 16, 32) if CUDA else (2, 3),
}
CPU_AXES: Axes = {"context": (1024, 4096, 16384), "batch": (1, 8, 32), "prefix": (1, 34, 512), "layers": (4, 8, 16, 32)}
STAGES = {"forwards": "forward", "metrics": "token_metrics", "the full model's": "full_metrics",
          "to the CPU": "at_labels", "block errors": "_block_squares", "attaching": "attach"}  # fmt: skip


def main() -> None:
    """Run the pieces asked for and write all figures after each."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, default=Path("gpu"), help="the folder for gpu_work.json")
    options.add_argument("--only", choices=("eval", "harness", "calibrate", "growth"), help="one piece")
    options.add_argument("--model", type=Path, help="a checkpoint in place of a random model of SmolLM2's shape")
    options.add_argument("--cpu", action="store_true", help="growth of layers of SmolLM2's shape on a CPU, no toy")
    asked = options.parse_args()
    if asked.cpu and CUDA:
        options.error("--cpu times a machine without a GPU; hide this one's by CUDA_VISIBLE_DEVICES=")
    asked.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"where": where()}
    pieces: dict[str, Callable[[], Any]] = {
        "eval": lambda: eval_figures(*pair(asked.model)),
        "harness": lambda: harness_figures(*pair(asked.model)),
        "calibrate": lambda: calibrate_figures(*pair(asked.model)),
        "growth": lambda: growth_figures(*(smol, CPU_AXES) if asked.cpu else (eight_billion, AXES)),
    }
    for name, piece in pieces.items():
        if asked.only in (None, name):
            began = time.perf_counter()
            figures[name] = piece()
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            (asked.out / "gpu_work.json").write_text(json.dumps(figures, indent=1))


def pair(folder: Path | None) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A full model and the same one rounded to 4 bits."""
    torch.manual_seed(0)
    if folder is not None:
        full = load_model_on(folder, device=str(DEVICE), dtype=torch.bfloat16)
    else:
        few = SMOL if CUDA else {**SMOL, "num_hidden_layers": 2, "hidden_size": 72, "intermediate_size": 96}
        config = LlamaConfig(**few, bos_token_id=BOS, max_position_embeddings=8192)
        with DEVICE:
            full = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return full, rounded_model(full, bits=4)


def stream(tokens: int) -> list[int]:
    """So many ids of the demo's text, by the demo's tokenizer: smaller than any model's vocabulary."""
    ids = load_tokenizer(MODEL)(read_text(TEXT), add_special_tokens=False, verbose=False).input_ids
    return (ids * (tokens // len(ids) + 1))[:tokens]


# Evaluating


def eval_figures(full: PreTrainedModel, model: PreTrainedModel) -> dict[str, Any]:
    """Seconds of a three-arm evaluation, with block errors and without, and where they go."""
    kv = capture(full, [BOS])
    windows = prefixed_windows(stream(WINDOWS * (WINDOW - 1)), prefix=kv.ids, window=WINDOW)
    rows = []
    for batch in (8, 32) if CUDA else (2,):
        for blocks in (True, False):

            def once(batch: int = batch, blocks: bool = blocks) -> Any:
                return three_arms(full, model, kv, windows, batch_size=batch, block_mse=blocks)

            once()
            seconds = [clocked(once) for _ in range(3)]
            with stages() as spent:
                once()
            rows.append({"batch": batch, "block_errors": blocks, "seconds": round(median(seconds), 2),
                         "stages": {name: round(each, 2) for name, each in spent.items()}})  # fmt: skip
            print(rows[-1], flush=True)
    began = time.perf_counter()
    once().to_dict()
    return {"windows": len(windows.ids), "rows": rows, "with_figures": time.perf_counter() - began}


@contextmanager
def stages() -> Iterator[dict[str, float]]:
    """Seconds of each stage while this is open, the card waited for before and after it."""
    spent: dict[str, float] = defaultdict(float)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found: list[Any] = []
            spent[name] += clocked(lambda: found.append(function(*args, **kwargs)))
            return found[0]

        return call

    before = {name: getattr(compare, function) for name, function in STAGES.items()}
    try:
        for name, function in STAGES.items():
            setattr(compare, function, watched(name, before[name]))
        yield spent
    finally:
        for name, function in STAGES.items():
            setattr(compare, function, before[name])


def harness_figures(full: PreTrainedModel, model: PreTrainedModel) -> dict[str, Any]:
    """One three-arm pass against three of lm-eval's rolling perplexities of the same tokens."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from intactkv.harness.model import IntactLM

    kv, tokenizer = capture(full, [BOS]), load_tokenizer(MODEL)
    ids = stream(WINDOWS * (WINDOW - 1))
    windows = prefixed_windows(ids, prefix=kv.ids, window=WINDOW)
    request = [Instance("loglikelihood_rolling", {}, (tokenizer.decode(ids),), 0)]
    rows = []
    for batch in (8, 32) if CUDA else (2,):
        settings: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": batch, "max_length": WINDOW}
        plain = [HFLM(pretrained=one, device=str(DEVICE), **settings) for one in (full, model)]

        def theirs(plain: Any = plain, settings: Any = settings) -> None:
            for lm in plain:
                lm.loglikelihood_rolling(request, disable_tqdm=True)
            ours = IntactLM(model, kv=kv, **settings)
            ours.loglikelihood_rolling(request, disable_tqdm=True)
            ours.attachment.remove()

        def ours(batch: int = batch) -> None:
            three_arms(full, model, kv, windows, batch_size=batch, block_mse=False)

        ways = {"ours": lambda o=ours: clocked(o), "lm-eval": lambda t=theirs: clocked(t)}
        seconds = turns(ways, 3)
        ratio = median(t / o for t, o in zip(seconds["lm-eval"], seconds["ours"], strict=True))
        rows.append({"batch": batch, **{name: round(median(each), 2) for name, each in seconds.items()},
                     "times": round(ratio, 2)})  # fmt: skip
        print(rows[-1], flush=True)
    return {"rows": rows}


# Calibrating


def calibrate_figures(full: PreTrainedModel, model: PreTrainedModel) -> dict[str, Any]:
    """Seconds and peak memory of a step of 16 samples by each way."""
    kv = capture(full, [BOS])
    ids = prefixed_windows(stream(2 * SAMPLES * (WINDOW - 1)), prefix=kv.ids, window=WINDOW).ids
    samples = [Sample(row.clone(), torch.arange(WINDOW) >= 1) for row in ids]
    rows = []
    for goal, objective in {"blocks": Objective(), "KL": Objective(0, 1)}.items():
        for name, settings in WAYS.items():
            config = CalibrationConfig(objective=objective, batch_size=SAMPLES, **settings)
            rows.append({"objective": goal, "way": name, **calibrate_row(full, model, kv, samples, config)})
            print(rows[-1], flush=True)
            gc.collect()
    return {"rows": rows}


def calibrate_row(
    full: PreTrainedModel, model: PreTrainedModel, kv: Any, samples: list[Sample], config: CalibrationConfig
) -> dict[str, Any]:
    """One way's figures; the first loss says that all ways compute the same."""
    from intactkv.calibrating.backward import frozen

    targets = Live(full, kv.ids.cpu())
    with torch.enable_grad(), frozen(model):
        state = _start(kv, model, config)
        own = with_tensors(kv, state.tensors)
        config = sized(own, model, samples, config)

        def one() -> None:
            chosen = [samples[i] for i in order(len(samples), state.step, config)]
            state.losses.append(step_(state, kv, model, targets, chosen, config))
            state.step += 1

        one()
        extra = allocated(lambda: clocked(one))
        seconds = median(clocked(one) for _ in range(STEPS))
    return {"step_s": round(seconds, 3), "160_steps_s": round(160 * seconds), "peak_MiB": round(extra),
            "micro_batch": config.micro_batch, "checkpointed": config.checkpoint_blocks,
            "first_loss": state.losses[0]}  # fmt: skip


# How costs grow


def growth_figures(build: Callable[[int], PreTrainedModel], axes: Axes) -> dict[str, Any]:
    """Milliseconds of each piece of work as one of `axes` grows, on the model that `build` makes of so many layers."""
    rows: list[dict[str, Any]] = []
    first = {name: values[0] for name, values in axes.items()}
    for layers in axes["layers"]:
        model = build(layers)
        for axis, values in axes.items():
            for value in values if axis != "layers" else (layers,):
                if (layers != first["layers"] and axis != "layers") or (axis != "layers" and value == first[axis]):
                    continue  # the first of each is the row of the fewest layers
                at = {**first, "layers": layers, axis: value}
                for work, measure in WORKS.items():
                    if axis in VARIES[work]:
                        found = {way: round(1e3 * s, 3) for way, s in measure(model, at).items()}
                        rows.append({"work": work, "axis": axis, **at, "ms": found})
                        print(rows[-1], flush=True)
        del model
        gc.collect()
    return {"rows": rows}


def smol(layers: int) -> PreTrainedModel:
    """So many layers of SmolLM2's shape in float32, for a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMOL, "num_hidden_layers": layers, "vocab_size": 8192}, max_position_embeddings=32768)
    return AutoModelForCausalLM.from_config(config).eval()


def prompt(model: PreTrainedModel, batch: int, tokens: int, prefix: torch.Tensor) -> torch.Tensor:
    """Random prompts behind the prefix."""
    ids = torch.randint(2, model.config.vocab_size, (batch, tokens))
    ids[:, : len(prefix)] = prefix
    return ids.to(DEVICE)


def beginning(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """A prefix of so many tokens."""
    return torch.cat([torch.tensor([BOS]), torch.randint(2, model.config.vocab_size, (tokens - 1,))])


def attach_work(model: PreTrainedModel, at: dict[str, int]) -> dict[str, float]:
    """Seconds of a prefill, plain and attached."""
    kv = intact(model, beginning(model, at["prefix"]))
    ids, attached = prompt(model, at["batch"], at["context"], kv.ids), copied(model)
    with attach(attached, kv, check=False):
        found = turns({"plain": prefill(model, ids), "attached": prefill(attached, ids)}, 3)
    return {way: median(each) for way, each in found.items()}


def packed_work(model: PreTrainedModel, at: dict[str, int]) -> dict[str, float]:
    """Seconds of a decoding step: DynamicCache, packed caches that keep the prefix, also from a graph or compiled."""
    packing = Packing(bits=4, keep=at["prefix"])
    ways: dict[str, Callable[[], float]] = {}
    reading = {name: copied(model) for name in ("packed", "packed, CUDA graph" if CUDA else "packed, compiled")}
    caches: dict[str, Any] = {"DynamicCache": DynamicCache(config=model.config)}
    caches |= {name: PackedCache(model.config, packing) for name in reading}
    shape = (at["batch"], model.config.num_key_value_heads, at["context"], model.config.head_dim)
    handles = [read_packed(one, graphs="graph" in name, compile="compiled" in name) for name, one in reading.items()]
    for name, cache in caches.items():
        if name.startswith("packed"):
            cache.rows.set_padding(torch.ones(at["batch"], at["context"], dtype=torch.bool, device=DEVICE), 0)
        for layer in range(model.config.num_hidden_layers):
            cache.update(*(torch.randn(shape, device=DEVICE, dtype=model.dtype) for _ in range(2)), layer)
        ways[name] = decoding(reading.get(name, model), cache, at["batch"], 8 if CUDA else 2)
    found = turns(ways, 3)
    for handle in handles:
        handle.remove()
    return {way: median(each) for way, each in found.items()}


def capture_work(model: PreTrainedModel, at: dict[str, int]) -> dict[str, float]:
    """Seconds of a capture, and of the forward in it: the rest is the digest of the weights."""
    ids = beginning(model, at["prefix"])
    return {"capture": clocked(lambda: capture(model, ids)), "forward": clocked(lambda: model(ids[None].to(DEVICE)))}


def eval_work(model: PreTrainedModel, at: dict[str, int]) -> dict[str, float]:
    """Seconds of a three-arm evaluation of a batch of windows as long as the context; the arms share one model."""
    kv = intact(model, beginning(model, at["prefix"]))
    ids = prompt(model, at["batch"], at["context"], kv.ids).cpu()
    windows = Windows(ids, (torch.arange(at["context"]) > at["prefix"]).expand_as(ids).clone())
    three = clocked(lambda: three_arms(model, model, kv, windows, batch_size=at["batch"], block_mse=False))
    return {"three arms": three, "a forward": clocked(lambda: model(ids.to(DEVICE), use_cache=False))}


WORKS: dict[str, Callable[[PreTrainedModel, dict[str, int]], dict[str, float]]] = {
    "attach": attach_work, "packed cache": packed_work, "capture": capture_work, "eval": eval_work,
}  # fmt: skip
VARIES = {"attach": AXES, "packed cache": AXES, "capture": ("prefix", "layers"), "eval": AXES}


if __name__ == "__main__":
    with torch.no_grad():
        main()
