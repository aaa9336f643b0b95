"""Decoding steps of a whole model on a GPU by each cache: checked against PyTorch's own way, then timed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from gpu_clock import CUDA, DEVICE, ROUNDS, allocated, captured, clocked, turns
from gpu_llama import Size, copied, eight_billion, small
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from intactkv import PackedCache, Packing, read_packed
from intactkv.packed import cache as cache_module


def decode_figures(size: Size) -> dict[str, Any]:
    """Decoding of a whole model of eight layers, the caches filled with random numbers: what a user sees."""
    errors = check_steps()
    print("steps in a ring, from a CUDA graph and offloaded against PyTorch's", errors, flush=True)
    model = eight_billion(8 if CUDA else 2)
    pairs = itertools.product(size.contexts[:2], size.contexts_batches)
    rows = [row for context, batch in pairs for row in whole_rows(model, size, batch, context)]
    return {"errors": errors, "rows": rows}


def check_steps() -> dict[str, float]:
    """The largest difference, over the largest logit, that each way of decoding makes against PyTorch's own."""
    packings = {
        "4 bits per token, kept": Packing(bits=4, keep=2, keys="per_token"),
        "2 bits, keys per channel, kept": Packing(bits=2, keys="per_channel", residual=32, keep=2),
        "3 bits, rounded": Packing(bits=3, residual=5, own="rounded", keys="per_token"),
    }
    found = {}
    for (name, packing), pad in itertools.product(packings.items(), (0, 7)):
        want = steps_by(packing, pad, ring=False)
        ways: dict[str, dict[str, bool]] = {"ring": {}, "offloaded": {"offloading": True}, "graph": {"graphs": True}}
        for way, how in ways.items() if CUDA else ():
            if way == "offloaded" and pad:
                continue
            error = float((steps_by(packing, pad, **how) - want).abs().max() / want.abs().max())
            found[f"{name}, {pad} padded, {way}"] = error
            if not error < 1e-4:
                raise SystemExit(f"decoding ({name}, {pad} padded, {way}) is off by {error:.1e}: nothing is timed")
    return found


def steps_by(
    packing: Packing, pad: int, *, ring: bool = True, graphs: bool = False, offloading: bool = False
) -> Tensor:
    """Logits of a prompt of 150 tokens and 80 steps of a small model in float32, its second row padded."""
    model = small()
    ids = torch.randint(0, 97, (2, 230), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits = PackedCache(model.config, packing, offloading=offloading), []
    before = cache_module.on_gpu
    cache_module.on_gpu = before if ring else lambda x: False
    try:
        with read_packed(model, graphs=graphs):
            for begin, end in ((0, 150), *((t, t + 1) for t in range(150, 230))):
                out = model(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                            past_key_values=cache)  # fmt: skip
                logits.append(out.logits[:, -1])
    finally:
        cache_module.on_gpu = before
    return torch.stack(logits, 1)


def whole_rows(model: PreTrainedModel, size: Size, batch: int, context: int) -> list[dict[str, Any]]:
    """Tokens a second by each cache, and what a step allocates."""
    config = model.config
    reading = copied(model)
    kinds: dict[str, tuple[PreTrainedModel, Any]] = {
        "DynamicCache, bf16": (model, DynamicCache(config=config)),
        "packed, 4 bits": (reading, PackedCache(config, Packing(bits=4, keys="per_token"))),
        "packed, 4 bits, 32 newest in full": (
            reading,
            PackedCache(config, Packing(bits=4, residual=32, keys="per_token")),
        ),
        "packed, 4 bits, keys per channel": (reading, PackedCache(config, Packing(bits=4))),
    }
    if CUDA:
        kinds["packed, 4 bits, CUDA graph"] = (copied(model), PackedCache(config, Packing(bits=4, keys="per_token")))
        kinds["packed, 2 bits, CUDA graph"] = (copied(model), PackedCache(config, Packing(bits=2, keys="per_token")))
        kinds["packed, 4 bits, keys per channel, CUDA graph"] = (copied(model), PackedCache(config, Packing(bits=4)))
    for backend, module, axis in (("quanto", "optimum", 0), ("hqq", "hqq", 1)):
        if find_spec(module):
            kinds[backend] = (model, QuantizedCache(backend, config, nbits=4, axis_key=axis, axis_value=axis))
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for _, cache in kinds.values():
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)), layer)
    with contextlib.ExitStack() as reads:
        for name, (which, _) in kinds.items():
            if name.startswith("packed") and not which.config._attn_implementation.startswith("intactkv"):
                reads.enter_context(read_packed(which, graphs="graph" in name))
        ways = {name: decoding(*kind, batch, size.eager_steps // 2) for name, kind in kinds.items()}
        if CUDA:
            ways["StaticCache, bf16, CUDA graph"] = static_decode(model, batch, context, size.eager_steps // 2)
        extra = {name: allocated(way) for name, way in ways.items()}
        seconds = turns(ways, ROUNDS)
    rows = []
    for name, times in seconds.items():
        ratio = median(t / p for t, p in zip(times, seconds["packed, 4 bits"], strict=True))
        graph = median(t / p for t, p in zip(times, seconds.get("packed, 4 bits, CUDA graph", times), strict=True))
        rows.append({"way": name, "batch": batch, "context": context, "tokens_per_s": f"{batch / median(times):.0f}",
                     "ms": f"{1e3 * median(times):.2f}", "time_over_packed": f"{ratio:.2f}",
                     "time_over_graph": f"{graph:.2f}", "extra_MiB": f"{extra[name]:.1f}"})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def decoding(model: PreTrainedModel, cache: Any, batch: int, steps: int) -> Callable[[], float]:
    """Seconds of one step with a cache that goes on from round to round."""
    token = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)

    def run() -> float:
        def decode() -> None:
            for _ in range(steps):
                model(token, past_key_values=cache)

        return clocked(decode) / steps

    return run


def static_decode(model: PreTrainedModel, batch: int, context: int, steps: int) -> Callable[[], float]:
    """Seconds of one step with a static cache of bfloat16, replayed as a CUDA graph."""
    capacity = context + 64
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)
    position, columns = torch.tensor([[context]], device=DEVICE), torch.arange(capacity, device=DEVICE)

    def step() -> None:
        seen = (columns <= position)[None, None].expand(batch, 1, 1, capacity)
        model(token, attention_mask=seen, position_ids=position.expand(batch, 1), past_key_values=cache)

    replay = captured(step)
    return lambda: clocked(lambda: [replay() for _ in range(steps)]) / steps
