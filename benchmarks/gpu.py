"""What attach and the packed cache cost on a GPU: builds, checks and times in one call of under ten minutes.

    python benchmarks/gpu.py --out DIR          # one table at the end, all figures in DIR/gpu.json
    python benchmarks/gpu.py --only packed --tune

It needs torch, triton, transformers and this project's source. Without a GPU it runs the same code at toy size, the
kernel under Triton's interpreter (set TRITON_INTERPRET=1): that shows that it works, and nothing else. Ways that are
compared take turns; a ratio is taken within a round, and the median over the rounds is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, QuantizedCache, StaticCache

from intactkv import IntactKV, PackedCache, Packing, attach, read_packed
from intactkv.artifact.fingerprint import fingerprint
from intactkv.capturing.record import recorded
from intactkv.packed import cache as cache_module
from intactkv.packed import kernel
from intactkv.packed.attention import Partial
from intactkv.packed.reads import forward
from intactkv.packed.store import Packed, Run, TokenStore

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for every length of a growing cache: 8 ms a layer
PREFIX = 34  # tokens: what a short system prompt takes
ROUNDS = 7
# block, warps, stages, and the waves to try with them: what fits in registers, see `kernel.py`
CANDIDATES: list[tuple[tuple[int, int, int], tuple[int, ...]]] = [
    ((64, 1, 2), (8, 16)),
    ((64, 1, 3), (8, 16)),
    ((64, 1, 4), (8,)),
    ((32, 1, 2), (8, 12, 16)),
    ((32, 1, 3), (8, 12, 16)),
    ((32, 1, 4), (8, 12)),
    ((32, 2, 3), (6, 8)),
    ((128, 2, 3), (4, 8)),
]


@dataclass(frozen=True)
class Size:
    """How much work a run does."""

    model: Mapping[str, int]
    prompt: int
    steps: int
    eager_steps: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    contexts_batches: tuple[int, ...]
    head_dim: int
    cold: int  # bytes that the layers which are read in turn must have together, to be no second-level cache's


FULL = Size(
    {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
     "num_attention_heads": 32, "num_key_value_heads": 8},
    512, 128, 32, (1, 8, 32), (4096, 16384, 65536), (1, 8), 128, 400_000_000,
)  # fmt: skip
TOY = Size(
    {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64,
     "num_attention_heads": 4, "num_key_value_heads": 2},
    40, 4, 2, (1, 2), (128,), (1,), 64, 1,
)  # fmt: skip


def main() -> None:
    """Run the parts asked for, write all figures, and print a short table last."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, default=Path("gpu"), help="the folder for gpu.json")
    options.add_argument("--only", choices=("attach", "prefill", "packed", "stock", "decode"), help="one part")
    options.add_argument("--tune", action="store_true", help="try the kernel's sizes first")
    asked, size = options.parse_args(), FULL if CUDA else TOY
    asked.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"where": where()}
    parts: dict[str, Callable[[], Any]] = {
        "packed": lambda: packed_figures(size, asked.tune),
        "stock": lambda: stock_figures(size),
        "decode": lambda: decode_figures(size),
        "attach": lambda: attach_figures(size),
        "prefill": lambda: prefill_figures(size),
    }
    for name, part in parts.items():
        if asked.only == name or (asked.only is None and name != "prefill"):  # which is a part of attach
            began = time.perf_counter()
            figures[name] = part()
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            (asked.out / "gpu.json").write_text(json.dumps(figures, indent=1))
    for name in parts:
        for row in figures.get(name, {}).get("rows", []):
            print(" | ".join(str(cell) for cell in row.values()))


def where() -> dict[str, Any]:
    """Machine and versions."""
    card = torch.cuda.get_device_name() if CUDA else f"no GPU, {platform.processor() or platform.machine()}"
    triton = sys.modules["triton"].__version__
    return {"card": card, "torch": torch.__version__, "triton": triton, "transformers": transformers.__version__}


# The packed cache


def packed_figures(size: Size, tune: bool) -> dict[str, Any]:
    """Check the kernel, then time one decoding step's attention of one layer against SDPA over bfloat16."""
    errors = {f"{bits} bits, {keys}": check(bits, keys, size) for bits in (2, 3, 4, 8) for keys in ("token", "channel")}
    print("errors against float64", errors, flush=True)
    errors["a model's logits"] = check_model()
    print("a model that reads packed tokens against one that reads dense ones", errors["a model's logits"], flush=True)
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
    tuned = tuning(size, bandwidth) if tune else []
    rows = []
    for context in size.contexts:
        for batch in size.contexts_batches:
            rows += decode_rows(size, batch, context, bandwidth)
            for row in rows[-3:]:
                print(row, flush=True)
    return {"errors": errors, "bandwidth": bandwidth, "tuned": tuned, "rows": rows}


def check(bits: int, keys: str, size: Size) -> dict[str, float]:
    """The kernel's largest error on fresh random data, `exact` and not, over the largest number of the answer."""
    query, key, value = fresh(2, 1000 if CUDA else 100, size.head_dim)
    tokens = 32 if keys == "channel" else 0
    usable = key.shape[2] // 32 * 32
    k = packed(key[:, :, :usable].float(), bits, tokens)
    v = packed(value[:, :, :usable].float(), bits)
    begin = torch.tensor([0, 33], device=DEVICE)
    weights = query.double() @ k.dense(torch.float64).transpose(2, 3)
    hidden = torch.arange(usable, device=DEVICE) < begin[:, None, None, None]
    want = weights.masked_fill(hidden, -math.inf).softmax(-1) @ v.dense(torch.float64)
    errors = {}
    for exact, limit in ((True, 1e-5), (False, 5e-3)):
        part = kernel.packed_attention_gpu(query, k, v, begin=begin, exact=exact)
        error = float(((part.acc / part.total).double() - want).abs().max() / want.abs().max())
        errors["exact" if exact else "half"] = error
        if not error < limit:
            raise SystemExit(
                f"the kernel is off by {error:.1e} at {bits} bits, {keys}, exact={exact}: nothing is timed"
            )
    return errors


def check_model() -> float:
    """The largest difference, over the largest logit, that reading packed tokens makes in a padded batch's decoding."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=256, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    ids = torch.randint(0, 97, (2, 160), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    logits = []
    for way in (read_packed, lambda model: contextlib.nullcontext()):
        cache = PackedCache(config, Packing(bits=4, keep=2, keys="per_token"))
        with read_packed(model):
            model(ids[:, :150], attention_mask=mask[:, :150], past_key_values=cache)
        with way(model):
            steps = [
                model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
                for t in range(150, 160)
            ]
        logits.append(torch.cat(steps, 1))
    error = float((logits[0] - logits[1]).abs().max() / logits[1].abs().max())
    if not error < 1e-4:
        raise SystemExit(f"a model that reads packed tokens is off by {error:.1e}: nothing is timed")
    return error


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
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=256, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    ids = torch.randint(0, 97, (2, 230), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits = PackedCache(config, packing, offloading=offloading), []
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


def decode_figures(size: Size) -> dict[str, Any]:
    """Decoding of a whole model of eight layers, the caches filled with random numbers: what a user sees."""
    errors = check_steps()
    print("steps in a ring, from a CUDA graph and offloaded against PyTorch's", errors, flush=True)
    torch.manual_seed(0)
    few = {"num_hidden_layers": 8 if CUDA else 2, "vocab_size": 32000 if CUDA else 64}
    config = LlamaConfig(**{**size.model, **few}, max_position_embeddings=131072)
    if not CUDA:
        config.head_dim = size.head_dim
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    pairs = itertools.product(size.contexts[:2], size.contexts_batches)
    rows = [row for context, batch in pairs for row in whole_rows(model, size, batch, context)]
    return {"errors": errors, "rows": rows}


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


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """The same parameters in another model."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


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


def allocated(way: Callable[[], Any]) -> float:
    """MiB that a few steps allocate at their peak beyond what was there, growth of the cache included."""
    way()
    if not CUDA:
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def fresh(batch: int, tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """A scaled query of four heads a key head, keys and values in bfloat16."""
    shape = (batch, 8 if CUDA else 2, tokens, dim)
    key, value = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return torch.randn(*shape[:2], 4, dim, device=DEVICE) * dim**-0.5, key, value


def packed(x: Tensor, bits: int, token_group: int = 0) -> Packed:
    """`x` as the cache stores it."""
    store = TokenStore(x, bits=bits, group_size=None, tokens=token_group)
    store.append(x, None)
    return store.view(Run(0, 0, x.shape[2]))


def decode_rows(size: Size, batch: int, context: int, bandwidth: float) -> list[dict[str, Any]]:
    """One row for each way of storing: microseconds a layer, share of the copy bandwidth, times of bfloat16."""
    query, key, value = fresh(batch, context, size.head_dim)
    ways: dict[str, tuple[int, list[Callable[[], Any]]]] = {}
    dense = 2 * key.numel() * 2
    layers = [(key.clone(), value.clone()) for _ in range(copies(size, dense))]
    half = query.to(torch.bfloat16)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if CUDA else (SDPBackend.MATH,):
        ways[f"bf16 {backend.name.split('_')[0].lower()}"] = (dense, [sdpa(half, *kv, backend) for kv in layers])
    for bits in (4, 2):
        for keys, tokens in (("token", 0), ("channel", 32)):
            one = packed(key, bits, tokens), packed(value, bits)
            read = sum(t.numel() * t.element_size() for x in one for t in (x.codes, x.scale, x.low))
            pairs = [tuple(twin(x) for x in one) for _ in range(copies(size, read))]
            ways[f"{bits} bits per {keys}"] = (read, [packed_way(query, *pair) for pair in pairs])
    seconds = turns({name: graphed(calls) for name, (_, calls) in ways.items()}, ROUNDS)
    base = [min(times) for times in zip(*(seconds[name] for name in ways if name.startswith("bf16")), strict=True)]
    return [
        {
            "way": name,
            "batch": batch,
            "context": context,
            "us": f"{1e6 * median(seconds[name]):.1f}",
            "of_copy_bandwidth": f"{read / median(seconds[name]) / bandwidth:.2f}",
            "bf16_time_over_this": f"{median(b / s for b, s in zip(base, seconds[name], strict=True)):.2f}",
            "bytes_over_bf16": f"{read / dense:.3f}",
        }
        for name, (read, _) in ways.items()
    ]


def stock_figures(size: Size) -> dict[str, Any]:
    """The comparison with transformers' QuantizedCache, for the backends that are installed."""
    pairs = itertools.product(size.contexts[:2], size.contexts_batches)
    return {"rows": [row for context, batch in pairs for row in stock_rows(size, batch, context)]}


def stock_rows(size: Size, batch: int, context: int) -> list[dict[str, Any]]:
    """One layer's step, storing a token and reading all, by QuantizedCache and by ours, launched eagerly.

    Each way has its own cache and goes on from step to step.
    """
    query, key, value = fresh(batch, context, size.head_dim)
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4 * key.shape[1], num_key_value_heads=key.shape[1],
                         hidden_size=4 * key.shape[1] * size.head_dim)  # fmt: skip
    caches: dict[str, Any] = {"packed": PackedCache(config, Packing(bits=4, keys="per_token"))}
    for backend, module, axis in (("quanto", "optimum", 0), ("hqq", "hqq", 1)):
        if find_spec(module):
            caches[backend] = QuantizedCache(backend, config, nbits=4, axis_key=axis, axis_value=axis)
    for cache in caches.values():
        cache.update(key, value, 0)
    token, half = (key[:, :, :1], value[:, :, :1]), query.to(torch.bfloat16)

    def stock(cache: Any) -> Callable[[], float]:
        def step() -> None:
            sdpa(half, *cache.update(*token, 0), SDPBackend.FLASH_ATTENTION if CUDA else SDPBackend.MATH)()

        return lambda: clocked(step)

    heads = half.flatten(1, 2)[:, :, None]  # (batch, head, token, dim)

    def ours() -> float:
        return clocked(
            lambda: forward(torch.nn.Identity(), heads, *caches["packed"].update(*token, 0), None, scaling=1.0)
        )

    ways = {name: ours if name == "packed" else stock(cache) for name, cache in caches.items()}
    for way in ways.values():
        way()
    seconds = turns(ways, ROUNDS)
    rows = []
    for name, times in seconds.items():
        ratio = median(t / p for t, p in zip(times, seconds["packed"], strict=True))
        rows.append({"way": f"{name}, a step", "batch": batch, "context": context,
                     "us": f"{1e6 * median(times):.0f}", "time_over_packed": f"{ratio:.2f}"})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def copies(size: Size, nbytes: int) -> int:
    """How many layers have to be read in turn for each to be cold."""
    return max(1, min(64, math.ceil(size.cold / nbytes)))


def twin(x: Packed) -> Packed:
    """A copy of one layer's store."""
    return Packed(x.codes.clone(), x.scale.clone(), x.low.clone(), x.bits, x.token_group)


def sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Callable[[], Tensor]:
    """PyTorch's attention; a key head's queries go as tokens, which no kernel has to repeat keys for."""

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)

    return call


def packed_way(query: Tensor, key: Packed, value: Packed) -> Callable[[], Partial]:
    """Attention over a packed layer as a half-precision model asks for it."""
    return lambda: kernel.packed_attention_gpu(query, key, value, exact=False)


def tuning(size: Size, bandwidth: float) -> list[dict[str, Any]]:
    """The kernel's time over its sizes, at 16 k tokens; the best for 4 bits per token stay."""
    found: list[dict[str, Any]] = []
    batch, context = (8, 16384) if CUDA else (1, 128)
    query, key, value = fresh(batch, context, size.head_dim)
    own = (kernel.BLOCK, kernel.WARPS, kernel.STAGES), (kernel.WAVES,)
    for bits, group in ((4, 0), (2, 0), (4, 32), (2, 32), (4, 64), (2, 64)):
        k, v = packed(key, bits, group), packed(value, bits)
        read = sum(t.numel() * t.element_size() for x in (k, v) for t in (x.codes, x.scale, x.low))
        pairs = [(twin(k), twin(v)) for _ in range(copies(size, read))]
        kind = []
        for sizes, waves in CANDIDATES if CUDA else [own]:
            if CUDA and not (sizes[0] == group if group else sizes[0] >= 64):
                continue  # a block lies within one group, and larger ones were better throughout
            for wave in waves:
                (kernel.BLOCK, kernel.WARPS, kernel.STAGES), kernel.WAVES = sizes, wave
                seconds = median(turns({"it": graphed([packed_way(query, *pair) for pair in pairs])}, 3)["it"])
                kind.append({"bits": bits, "group": group, "settings": (*sizes, wave), "us": round(1e6 * seconds, 1),
                             "of_copy_bandwidth": round(read / seconds / bandwidth, 3)})  # fmt: skip
        found += kind
        print(f"{bits} bits, groups of {group or 1}, (block, warps, stages, waves):", flush=True)
        print(*sorted(kind, key=lambda f: f["us"]), sep="\n", flush=True)
    chosen = min((f for f in found if (f["bits"], f["group"]) == (4, 0)), key=lambda f: f["us"])["settings"]
    kernel.BLOCK, kernel.WARPS, kernel.STAGES, kernel.WAVES = chosen
    print("block, warps, stages, waves:", chosen, flush=True)
    return found


def copy_bandwidth() -> float:
    """Bytes read and written in a second by the better of two large copies: the driver's and a kernel's."""
    source = torch.zeros(2**28 if CUDA else 2**18, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    ways = {"driver": lambda: target.copy_(source), "kernel": lambda: torch.add(source, 1.0, out=target)}
    seconds = turns({name: graphed([way] * 4) for name, way in ways.items()}, ROUNDS)
    return max(2 * source.nbytes / median(times) for times in seconds.values())


def graphed(calls: list[Callable[[], Any]]) -> Callable[[], float]:
    """Runs all calls and gives the seconds of one; on a GPU as one CUDA graph, so that launches cost nothing."""
    for call in calls[:2]:
        call()
    if not CUDA:
        return lambda: clocked(lambda: [call() for call in calls]) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return lambda: clocked(graph.replay) / len(calls)


# Attach


def attach_figures(size: Size) -> dict[str, Any]:
    """Prefill and decoding with and without an intact KV of 34 tokens, on a random model in bfloat16."""
    models, kv = attach_models(size)
    rows, syncs = [], {}
    for batch in size.batches:
        ids = prompts(size, kv, batch)
        works = {
            "prefill": {name: prefill(model, ids) for name, model in models.items()},
            "decode": {name: eager_decode(model, ids, size.eager_steps) for name, model in models.items()},
        }
        if CUDA:
            works["decode, CUDA graph"] = {name: graph_decode(model, ids, size.steps) for name, model in models.items()}
        rows += [attach_row(work, batch, ways) for work, ways in works.items()]
        if CUDA and batch == size.batches[0]:
            syncs = {name: host_syncs(model, ids) for name, model in models.items()}
            print("host syncs", syncs, flush=True)
    differs = difference(models, ids)
    rows.append(compiled_row(models["plain"], kv, ids[: size.batches[0]]))
    return {"rows": rows, "syncs": syncs, "differs": differs}


def prefill_figures(size: Size) -> dict[str, Any]:
    """Prefill alone, at the smallest batch: the one case where the host is waited for."""
    models, kv = attach_models(size)
    ids = prompts(size, kv, size.batches[0])
    eager = attach_row("prefill", len(ids), {name: prefill(model, ids) for name, model in models.items()})
    return {"rows": [eager, compiled_row(models["plain"], kv, ids)]}


def attach_models(size: Size) -> tuple[dict[str, PreTrainedModel], IntactKV]:
    """A random model, the same one with its own intact KV attached, and that KV."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **size.model, bos_token_id=0, eos_token_id=1, max_position_embeddings=8192, rope_theta=500000.0
    )
    with DEVICE:
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    print(f"{plain.num_parameters() / 1e9:.2f} B parameters", flush=True)
    kv = intact(plain, torch.cat([torch.tensor([0]), torch.randint(2, config.vocab_size, (PREFIX - 1,))]))
    attached = copied(plain)
    attach(attached, kv)
    return {"plain": plain, "attached": attached}, kv


def prompts(size: Size, kv: IntactKV, batch: int) -> Tensor:
    """Random prompts that begin with the prefix, `(batch, token)`."""
    ids = torch.randint(2, size.model["vocab_size"], (batch, size.prompt))
    ids[:, : len(kv)] = kv.ids
    return ids.to(DEVICE)


def compiled_row(model: PreTrainedModel, kv: IntactKV, ids: Tensor) -> dict[str, Any]:
    """The row of two compiled copies' prefill."""
    ways = {name: prefill(one, ids) for name, one in compiled(model, kv).items()}
    return attach_row("prefill, torch.compile", len(ids), ways)


def attach_row(work: str, batch: int, ways: Mapping[str, Callable[[], float]]) -> dict[str, Any]:
    """The plain way's milliseconds and how fast the attached one is against it."""
    seconds = turns(ways, ROUNDS)
    ratio = median(p / a for p, a in zip(seconds["plain"], seconds["attached"], strict=True))
    target = 0.98 if work.startswith("prefill") else 0.99
    row = {"work": work, "batch": batch, "plain_ms": f"{1e3 * median(seconds['plain']):.3f}",
           "attached_over_plain_speed": f"{ratio:.3f}", "target": target, "met": ratio >= target}  # fmt: skip
    print(row, flush=True)
    return row


def compiled(model: PreTrainedModel, kv: IntactKV) -> dict[str, PreTrainedModel]:
    """Two compiled copies of the model, one with `kv` attached."""
    found = {"plain": copied(model), "attached": copied(model)}
    attach(found["attached"], kv)
    for one in found.values():
        one.compile(dynamic=False)
    return found


def intact(model: PreTrainedModel, prefix: Tensor) -> IntactKV:
    """What `capture` gives, without the digest of sixteen gigabytes."""
    with torch.no_grad():
        layers = {i: (k[0].cpu(), v[0].cpu()) for i, (k, v) in recorded(model, prefix[None]).items()}
        logits = model(prefix[None].to(DEVICE)).logits[0].cpu()
    return IntactKV(prefix, layers, logits, fingerprint(model.config))


def prefill(model: PreTrainedModel, ids: Tensor) -> Callable[[], float]:
    """Seconds of one forward over the prompts, as `generate` makes it."""
    mask = torch.ones_like(ids)
    return lambda: clocked(lambda: model(input_ids=ids, attention_mask=mask, logits_to_keep=1))


def eager_decode(model: PreTrainedModel, ids: Tensor, steps: int) -> Callable[[], float]:
    """Seconds of one step with a growing cache."""

    def run() -> float:
        cache = DynamicCache(config=model.config)
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

        def decode() -> None:
            nonlocal token
            for _ in range(steps):
                token = model(token, past_key_values=cache).logits.argmax(-1)

        return clocked(decode) / steps

    return run


def graph_decode(model: PreTrainedModel, ids: Tensor, steps: int) -> Callable[[], float]:
    """Seconds of one step with a static cache, replayed as a CUDA graph."""
    batch, length = ids.shape
    capacity = length + steps + 8
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    token = torch.empty(batch, 1, dtype=torch.int64, device=DEVICE)
    position, columns = torch.tensor([[length]], device=DEVICE), torch.arange(capacity, device=DEVICE)

    def step() -> None:
        seen = (columns <= position)[None, None].expand(batch, 1, 1, capacity)
        where = position.expand(batch, 1)
        logits = model(token, attention_mask=seen, position_ids=where, past_key_values=cache).logits
        token.copy_(logits.argmax(-1))
        position.add_(1)

    def begin() -> None:
        cache.reset()
        position.fill_(length)
        token.copy_(model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1))

    begin()
    replay = captured(step)

    def run() -> float:
        begin()
        return clocked(lambda: [replay() for _ in range(steps)]) / steps

    return run


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """Replays `step` from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        assert step  # what it reads must live as long as the graph
        graph.replay()

    return replay


def host_syncs(model: PreTrainedModel, ids: Tensor) -> dict[str, int]:
    """How often the host waits for the card, in one prefill and in one decoding step."""
    cache, mask = DynamicCache(config=model.config), torch.ones_like(ids)
    calls = {
        "prefill": lambda: model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1),
        "decode": lambda: model(ids[:, :1], past_key_values=cache),
    }
    counted = {}
    for name, call in calls.items():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            call()
            torch.cuda.set_sync_debug_mode("default")
        counted[name] = sum("synchroniz" in str(w.message) for w in seen)
    return counted


def difference(models: Mapping[str, PreTrainedModel], ids: Tensor) -> float:
    """The largest difference that a model's own intact KV makes, over the largest logit."""
    plain, attached = (models[name](ids, logits_to_keep=8).logits.float() for name in ("plain", "attached"))
    return float((plain - attached).abs().max() / plain.abs().max())


def turns(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds that every way gives in every round, after one that does not count; each round begins elsewhere."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for name in order:
        ways[name]()
    for _ in range(rounds):
        for name in order:
            seconds[name].append(ways[name]())
        order.append(order.pop(0))
    return seconds


def clocked(work: Callable[[], Any]) -> float:
    """Seconds from an idle card to an idle card."""
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    with torch.inference_mode():
        main()
