"""Several cards against one: a shared evaluation and a shared calibration step, as `torchrun … intactkv` makes them.

    python benchmarks/gpu_cards.py --out DIR        # starts torchrun with one process, with two, and with four

Every process builds the same random models and takes its share, through NCCL. Loading is not counted. On a machine
without GPUs two processes on the CPU do the same at toy size; more processes than GPUs are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from intactkv import capture
from intactkv.calibrating import CalibrationConfig, Sample
from intactkv.calibrating.backward import frozen
from intactkv.calibrating.step import order, step_
from intactkv.calibrating.targets import Live
from intactkv.calibrating.train import _start
from intactkv.doctor.simulate import rounded_model
from intactkv.evaluating import Arm, evaluate, prefixed_windows
from intactkv.processes import is_main, join, wait

CUDA = torch.cuda.is_available()
TARGETS = {"eval": 1.8, "calibrate": 1.7}  # of two cards
# SmolLM2-135M's shape, and four layers of Llama-3-8B's: a model that the host is waited for, and one that the card is
SHAPES: dict[str, dict[str, int]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
             "num_attention_heads": 9, "num_key_value_heads": 3},
    "4 layers of an 8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "vocab_size": 32000,
                          "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97,
        "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
WINDOWS, WINDOW, SAMPLES, STEPS = (160, 512, 16, 4) if CUDA else (8, 24, 4, 1)


def main() -> None:
    """Run one process, two and four, and print ratios."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, default=Path("gpu"), help="the folder for gpu_cards.json")
    asked = options.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        process()
        return
    figures: dict[str, Any] = {}
    counts = [count for count in (1, 2, 4) if count <= (torch.cuda.device_count() if CUDA else 2)]
    for count in counts:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        done = subprocess.run([*torchrun, __file__], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        figures[str(count)] = json.loads(done.stdout.splitlines()[-1])
        print(count, figures[str(count)], flush=True)
    for shape, works in figures["1"].items():
        for work, seconds in works.items():
            ratios = ", ".join(f"{count}: {seconds / figures[str(count)][shape][work]:.2f}" for count in counts[1:])
            print(f"{shape}, {work}, times one card by cards: {ratios}; target of two {TARGETS[work]}")
    (asked.out / "gpu_cards.json").write_text(json.dumps(figures, indent=1))


def process() -> None:
    """One process of the group, alone or not: seconds of each work, which the first one prints."""
    place = join() or ("cuda" if CUDA else "cpu")
    found = {shape: {"eval": 0.0, "calibrate": 0.0} for shape in (SHAPES if CUDA else ["tiny"])}
    for shape, seconds in found.items():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES.get(shape, TINY), bos_token_id=1)
        full = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(place).eval()
        model = rounded_model(full, bits=4)
        seconds["eval"], seconds["calibrate"] = evaluating(full, model), calibrating(full, model)
    if is_main():
        print(json.dumps(found))


def evaluating(full: PreTrainedModel, model: PreTrainedModel) -> float:
    """Seconds of a three-arm evaluation that all processes share."""
    kv = capture(full, [1])
    ids = torch.randint(2, model.config.vocab_size, (WINDOWS * (WINDOW - 1),)).tolist()
    windows = prefixed_windows(ids, prefix=kv.ids, window=WINDOW)
    arms = [Arm("own", model), Arm("intact", model, kv)]
    found = []
    for _ in range(3):
        wait()
        found.append(evaluate(full, arms, windows, block_mse=False, shared=True).seconds)
    return min(found)


def calibrating(full: PreTrainedModel, model: PreTrainedModel) -> float:
    """Seconds of one step that all processes share."""
    from time import perf_counter

    kv = capture(full, [1])
    ids = torch.randint(2, model.config.vocab_size, (SAMPLES, WINDOW))
    ids[:, 0] = 1
    samples = [Sample(row.clone(), torch.arange(WINDOW) >= 1) for row in ids]
    config = CalibrationConfig(batch_size=SAMPLES, checkpoint_blocks=False)
    targets, state, found = Live(full, kv.ids.cpu()), _start(kv, model, config), []
    with frozen(model):
        for _ in range(STEPS + 1):
            wait()
            began = perf_counter()
            step_(state, kv, model, targets, [samples[i] for i in order(SAMPLES, state.step, config)], config)
            state.step += 1
            found.append(perf_counter() - began)  # the loss was read: the card is done
    return median(found[1:])


if __name__ == "__main__":
    main()
