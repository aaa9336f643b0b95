"""What a packed KV cache holds and how fast a decoding step reads it, against transformers' own caches.

Every way decodes the same tokens after a prompt of the same length whose keys and values are put into its cache
directly (random numbers; speed does not depend on them). A model whose attention does nothing but keep its shapes shows
what the rest takes: no cache can be faster than that, and what a step takes beyond it is the cache's own share: storing
the new token and reading all others. Bytes are what the cache's tensors hold, idle capacity
included, and for our cache also what its formula says. Transient memory is the largest number of bytes that one
decoding step has allocated at a time, read from torch's profiler. transformers' HQQ cache needs `hqq`, which is
measured where it is installed.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import pytest
import torch
from interleaved import interleaved, speed_ratios, spread
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AttentionInterface,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    QuantizedCache,
)

from intactkv import PackedCache, Packing, read_packed
from intactkv.checkpoint.load import load_model
from intactkv.demo import MODEL
from intactkv.packed.packing import expected_bytes

STEPS = 4
REST = "no cache, no attention"
SPEED = "Decoding with a packed cache: tokens per second ÷ DynamicCache's in bfloat16"
MEMORY = "Bytes of a packed cache, and of one decoding step"
PACKINGS = {
    "packed 4 bits": Packing(bits=4, keep=4, keys="per_token"),
    "packed 2 bits": Packing(bits=2, keep=4, keys="per_token"),
    "packed 4 bits, residual 32": Packing(bits=4, keep=4, residual=32, keys="per_token"),
    "packed 4 bits, KIVI keys": Packing(bits=4, keep=4, keys="per_channel", residual=32),
}


@pytest.fixture(scope="module", params=["embedded", "random"])
def model(request: pytest.FixtureRequest, size: Any) -> PreTrainedModel:
    if request.param == "embedded":
        return load_model(MODEL, dtype=torch.bfloat16)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2048, num_hidden_layers=8 if size.rounds > 2 else 2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=128, max_position_embeddings=32768,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def twins(model: PreTrainedModel) -> dict[bool, PreTrainedModel]:
    """The model as it is (False), and one of the same weights, not copied, that reads packed caches (True)."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    read_packed(twin, compile=True)
    return {False: model, True: twin}


def without_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the same weights, not copied, and attention that gives its queries back."""

    def attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("queries", attention)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    twin.set_attn_implementation("queries")
    return twin


def caches(model: PreTrainedModel) -> dict[str, Callable[[], Cache]]:
    """Every kind of cache by its name."""
    made: dict[str, Callable[[], Cache]] = {"DynamicCache": lambda: DynamicCache(config=model.config)}
    for name, packing in PACKINGS.items():
        made[name] = lambda packing=packing: PackedCache(model.config, packing)
    for backend, module, axis in (("quanto", "optimum.quanto", 0), ("HQQ", "hqq", 1)):
        if find_spec(module.split(".")[0]) and find_spec(module):
            made[f"QuantizedCache {backend}, 4 bits"] = lambda backend=backend, axis=axis: QuantizedCache(
                backend.lower(), model.config, nbits=4, axis_key=axis, axis_value=axis
            )
    return made


def filled(cache: Cache, model: PreTrainedModel, batch: int, context: int) -> Cache:
    """`cache` with `context` random tokens in it, put there as one prompt."""
    config, g = model.config, torch.Generator().manual_seed(0)
    if isinstance(cache, PackedCache):
        cache.rows.set_padding(torch.ones(batch, context, dtype=torch.bool), 0)
    for layer in range(config.num_hidden_layers):
        shape = (2, batch, config.num_key_value_heads, context, config.head_dim)
        cache.update(*torch.randn(shape, generator=g).to(torch.bfloat16), layer)
    return cache


def decoding(models: dict[bool, PreTrainedModel], cache: Cache, batch: int, steps: int) -> Callable[[], None]:
    """`steps` decoding steps of the model for such a cache, which grows by as many tokens at each call."""
    token, model = torch.full((batch, 1), 9), models[isinstance(cache, PackedCache)]

    def way() -> None:
        for _ in range(steps):
            model(token, past_key_values=cache, use_cache=True)

    return way


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("context", [1024, 4096, 16384])
def test_decode(
    benchmark: Any, report: Callable[..., None], model: PreTrainedModel, context: int, batch: int, size: Any
) -> None:
    """A few decoding steps at a context's length, all kinds of cache in turns."""
    context = context if size.rounds > 2 else 256
    held = {name: filled(make(), model, batch, context) for name, make in caches(model).items()}
    models = twins(model)
    ways = {name: decoding(models, cache, batch, STEPS) for name, cache in held.items()}
    bare, short = without_attention(model), DynamicCache(config=model.config)
    ways[REST] = decoding({False: bare}, short, batch, STEPS)
    seconds = interleaved(benchmark, ways, rounds=size.rounds)
    rest = seconds[REST]
    own = {name: [a - b for a, b in zip(each, rest, strict=True)] for name, each in seconds.items()}
    for name in ways:
        ratios = speed_ratios(seconds[name], seconds["DynamicCache"])
        ms = f"{1000 * min(seconds[name]) / STEPS:.1f}"
        row = {"model": _name(model), "context": context, "batch": batch, "cache": name, "best_ms_a_step": ms}
        alone = "–" if name == REST else f"{median(speed_ratios(own[name], own['DynamicCache'])):.2f}"
        report(SPEED, **row, **spread(ratios, 2), cache_alone=alone)
    gc.collect()


def test_bytes(benchmark: Any, report: Callable[..., None], model: PreTrainedModel, size: Any) -> None:
    """Bytes a token and what one step allocates at 4096 tokens."""
    batch, context, config = 1, 4096 if size.rounds > 2 else 256, model.config
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    models = twins(model)
    full = 2 * 2 * torch.Size(shape).numel() * config.num_hidden_layers
    settings = {
        **PACKINGS,
        "packed 3 bits": Packing(bits=3, keep=4, keys="per_token"),
        "packed 8 bits": Packing(bits=8, keep=4, keys="per_token"),
    }
    ways: dict[str, Packing | None] = {"DynamicCache": None, **settings}

    def measure() -> None:
        for name, packing in ways.items():
            cache = DynamicCache(config=config) if packing is None else PackedCache(config, packing)
            cache = filled(cache, model, batch, context)
            held = cache.nbytes if isinstance(cache, PackedCache) else full
            formula = full if packing is None else expected_bytes(packing, shape) * config.num_hidden_layers
            row = {"model": _name(model), "cache": name, "bytes_a_token": f"{held / context:.0f}"}
            row |= {"formula": f"{formula / context:.0f}", "÷ bfloat16": f"{held / full:.3f}"}
            report(MEMORY, **row, one_step_MiB=f"{_transient(decoding(models, cache, batch, 1)) / 2**20:.2f}")

    benchmark.pedantic(measure, rounds=1)


def test_bytes_of_a_prompt_meet_their_targets() -> None:
    """At 4 bits at most 0.30 of bfloat16's bytes, at 2 bits at most 0.18, a head of 128 numbers to a scale."""
    for bits, target in ((4, 0.30), (2, 0.18)):
        config = LlamaConfig(num_hidden_layers=1, num_key_value_heads=2, head_dim=128)
        cache = PackedCache(config, replace(Packing(keys="per_token"), bits=bits))
        cache.update(*torch.zeros(2, 1, 2, 4096, 128), 0)
        assert cache.nbytes / (2 * 2 * 2 * 4096 * 128) <= target


def _transient(way: Callable[[], None]) -> int:
    """The most bytes that were allocated at one moment of `way` beyond those at its beginning."""
    way()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        way()
    now = most = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _name(model: PreTrainedModel) -> str:
    return f"{model.config.num_hidden_layers} layers, head {model.config.head_dim}"
