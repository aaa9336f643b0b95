"""Where the host's time of an eager decoding step goes: microseconds a layer and part, by each cache.

    python benchmarks/gpu_profile.py --out DIR       # a table, and DIR/gpu_profile.json

Each part is a function that is timed from its call to its return, what it calls included; the card is not waited for
within a step. Beside that, what torch's profiler says of the same steps: how long the card works in one, and which
operations take the host longest. Without a GPU the same code runs at toy size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_clock import CUDA, DEVICE, clocked, where
from gpu_llama import copied, eight_billion
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama import modeling_llama as llama

from intactkv import PackedCache, Packing, read_packed
from intactkv.packed import cache as packed_cache
from intactkv.packed import reads
from intactkv.packed.launch import Kept
from intactkv.packed.steady import Steady

STEPS = 40 if CUDA else 2
PARTS: dict[str, tuple[Any, str]] = {  # from the whole to its parts
    "a decoder layer": (llama.LlamaDecoderLayer, "forward"),
    "its attention": (llama.LlamaAttention, "forward"),
    "its MLP": (llama.LlamaMLP, "forward"),
    "its norms": (llama.LlamaRMSNorm, "forward"),
    "rotating queries and keys": (llama, "apply_rotary_pos_emb"),
    "Cache.update": (Cache, "update"),
    "DynamicLayer.update": (DynamicLayer, "update"),
    "PackedLayer.update": (packed_cache.PackedLayer, "update"),
    "Steady.store": (Steady, "store"),
    "two lazy states": (packed_cache, "LazyStates"),
    "packed attention function": (reads, "_forward"),
    "Steady.attend": (Steady, "attend"),
    "kept launches": (Kept, "__call__"),
}
SDPA = "SDPA attention function"


def main() -> None:
    """Profile both caches and print their parts side by side."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, default=Path("gpu"), help="the folder for gpu_profile.json")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--context", type=int, default=4096 if CUDA else 64)
    asked = options.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    model = eight_billion(8 if CUDA else 2)  # the one that `gpu.py --only decode` steps
    figures: dict[str, Any] = {"where": where(), "batch": asked.batch, "context": asked.context}
    for name, cache in caches(model).items():
        fill(cache, model, asked.batch, asked.context)
        reading = copied(model)
        with read_packed(reading) if name.startswith("packed") else nullcontext():
            figures[name] = profiled(reading, cache, asked.batch)
        print(f"{name}: {figures[name]['step_ms']:.2f} ms a step, of which the card works {figures[name]['card_ms']}")
        print(figures[name].pop("operations"), flush=True)
    (asked.out / "gpu_profile.json").write_text(json.dumps(figures, indent=1))
    names = [name for name in figures if isinstance(figures[name], dict) and "parts" in figures[name]]
    print("host microseconds a layer", *names, sep=" | ")
    for part in (*PARTS, SDPA):
        print(part, *(f"{figures[name]['parts'].get(part, 0):.1f}" for name in names), sep=" | ")


def caches(model: PreTrainedModel) -> dict[str, Any]:
    """A cache of each kind."""
    return {
        "DynamicCache": DynamicCache(config=model.config),
        "packed, per token": PackedCache(model.config, Packing(bits=4, keys="per_token")),
        "packed, per channel": PackedCache(model.config, Packing(bits=4, keys="per_channel")),
    }


def fill(cache: Any, model: PreTrainedModel, batch: int, context: int) -> None:
    """Random keys and values in every layer."""
    shape = (batch, model.config.num_key_value_heads, context, model.config.head_dim)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)), layer)


def profiled(model: PreTrainedModel, cache: Any, batch: int) -> dict[str, Any]:
    """Milliseconds of a step with nothing timed inside, then its parts, then what torch's profiler sees."""
    token, layers = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE), model.config.num_hidden_layers

    def steps() -> None:
        for _ in range(STEPS):
            model(token, past_key_values=cache)

    steps()
    seconds = min(clocked(steps) for _ in range(3)) / STEPS
    with timed() as spent:
        clocked(steps)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=kinds) as seen:
        clocked(steps)
    averages = seen.key_averages()
    card = sum(event.self_device_time_total for event in averages) / STEPS / 1e3
    return {
        "step_ms": 1e3 * seconds,
        "card_ms": f"{card:.2f} ms" if CUDA else "not at all",
        "parts": {name: 1e6 * each / STEPS / layers for name, each in spent.items()},
        "operations": averages.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=48),
    }


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds that each of `PARTS`, and the attention function of SDPA, takes while this is open."""
    spent: dict[str, float] = defaultdict(float)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    before = {name: getattr(owner, attribute) for name, (owner, attribute) in PARTS.items()}
    try:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, watched(name, before[name]))
        AttentionInterface.register("sdpa", watched(SDPA, reads.sdpa_attention_forward))
        yield spent
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, before[name])
        AttentionInterface.register("sdpa", reads.sdpa_attention_forward)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
