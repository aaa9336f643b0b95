"""One layer of the packed cache on a GPU: the kernel checked, timed against SDPA and the copy bandwidth, and tuned.

And one layer's step, storing a token and reading all, against transformers' QuantizedCache.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from gpu_clock import CUDA, DEVICE, ROUNDS, clocked, graphed, turns
from gpu_llama import Size, small
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, QuantizedCache

from intactkv import PackedCache, Packing, read_packed
from intactkv.packed import kernel
from intactkv.packed.attention import Partial
from intactkv.packed.reads import forward
from intactkv.packed.store import Packed, Run, TokenStore

# block, warps, stages, and the least blocks of a share to try with them: see `kernel.py`
CANDIDATES: list[tuple[tuple[int, int, int], tuple[int, ...]]] = [
    ((32, 1, 2), (4,)),
    ((32, 1, 3), (1, 4, 8)),
    ((32, 1, 4), (4,)),
    ((32, 2, 3), (4,)),
    ((64, 1, 3), (1, 4)),
]


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
            found = decode_rows(size, batch, context, bandwidth)
            print(*found, sep="\n", flush=True)
            rows += found
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
    model = small()
    ids = torch.randint(0, 97, (2, 160), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    logits = []
    for way in (read_packed, lambda model: contextlib.nullcontext()):
        cache = PackedCache(model.config, Packing(bits=4, keep=2, keys="per_token"))
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
        for keys, tokens in (("token", 0), ("channel, groups of 32", 32), ("channel, groups of 64", 64)):
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


def tuning(size: Size, bandwidth: float) -> list[dict[str, Any]]:
    """The kernel's time over its sizes, at 16 k tokens."""
    found: list[dict[str, Any]] = []
    own = (kernel.BLOCK, kernel.WARPS, kernel.STAGES), (kernel.LEAST,)
    kinds = itertools.product(((4, 0), (2, 0), (4, 32), (2, 32), (4, 64), (2, 64)), (8, 1) if CUDA else (1,))
    for (bits, group), batch in kinds:
        query, key, value = fresh(batch, 16384 if CUDA else 128, size.head_dim)
        k, v = packed(key, bits, group), packed(value, bits)
        read = sum(t.numel() * t.element_size() for x in (k, v) for t in (x.codes, x.scale, x.low))
        pairs = [(twin(k), twin(v)) for _ in range(copies(size, read))]
        kind = []
        for sizes, leasts in CANDIDATES if CUDA else [own]:
            for least in leasts:
                (kernel.BLOCK, kernel.WARPS, kernel.STAGES), kernel.LEAST = sizes, least
                seconds = median(turns({"it": graphed([packed_way(query, *pair) for pair in pairs])}, 3)["it"])
                kind.append({"bits": bits, "group": group, "batch": batch, "settings": (*sizes, least),
                             "us": round(1e6 * seconds, 1),
                             "of_copy_bandwidth": round(read / seconds / bandwidth, 3)})  # fmt: skip
        found += kind
        print(f"{bits} bits, groups of {group or 1}, batch {batch}, (block, warps, stages, least blocks):", flush=True)
        print(*sorted(kind, key=lambda f: f["us"]), sep="\n", flush=True)
    (kernel.BLOCK, kernel.WARPS, kernel.STAGES), (kernel.LEAST,) = own
    return found


def copy_bandwidth() -> float:
    """Bytes read and written in a second by the better of two large copies: the driver's and a kernel's."""
    source = torch.zeros(2**28 if CUDA else 2**18, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    ways = {"driver": lambda: target.copy_(source), "kernel": lambda: torch.add(source, 1.0, out=target)}
    seconds = turns({name: graphed([way] * 4) for name, way in ways.items()}, ROUNDS)
    return max(2 * source.nbytes / median(times) for times in seconds.values())


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


def twin(x: Packed) -> Packed:
    """A copy of one layer's store."""
    return Packed(x.codes.clone(), x.scale.clone(), x.low.clone(), x.bits, x.token_group)


def copies(size: Size, nbytes: int) -> int:
    """How many layers have to be read in turn for each to be cold."""
    return max(1, min(64, math.ceil(size.cold / nbytes)))


def sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Callable[[], Tensor]:
    """PyTorch's attention; a key head's queries go as tokens, which no kernel has to repeat keys for."""

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)

    return call


def packed_way(query: Tensor, key: Packed, value: Packed) -> Callable[[], Partial]:
    """Attention over a packed layer as a half-precision model asks for it."""
    return lambda: kernel.packed_attention_gpu(query, key, value, exact=False)
