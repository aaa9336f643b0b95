"""What attach costs on a GPU: prefill and decoding of a random model with and without its own intact KV."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from gpu_clock import CUDA, DEVICE, ROUNDS, captured, clocked, turns
from gpu_llama import Size, copied
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

from intactkv import IntactKV, attach
from intactkv.artifact.fingerprint import fingerprint
from intactkv.capturing.record import recorded

PREFIX = 34  # tokens: what a short system prompt takes


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
