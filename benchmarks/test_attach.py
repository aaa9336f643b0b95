"""What an attached intact KV costs: tokens per second, attached over plain, and microseconds per decoding step.

The plain and the attached model share their weights and read the same prompts, which begin with the prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import thread_time
from typing import Any

import pytest
import torch
from interleaved import interleaved, speed_ratios, spread
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from intactkv import attach, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.texts import read_text

TARGETS = {"decode": 0.98, "prefill": 0.97}
LONG = 34  # tokens of the longer prefix: what a short system prompt takes
PROMPT = 16  # tokens before the first decoded one
BATCHES = (1, 8)
SPEED = "Speed, attached ÷ plain"
HOOKS = "Microseconds of processor time that attaching adds to one decoding step"


@dataclass(frozen=True)
class Subject:
    """One model plain and attached, and the token ids `(batch, token)` of its prompts."""

    name: str
    plain: PreTrainedModel
    bos: PreTrainedModel  # with the first token attached
    long: PreTrainedModel  # with the first 34
    prompts: Tensor


@pytest.fixture(scope="module", params=["embedded", "random"])
def subject(request: pytest.FixtureRequest, size: Any) -> Subject:
    if request.param == "embedded":
        model = load_model(MODEL, dtype=torch.float32)
        stream = torch.tensor(load_tokenizer(MODEL)(read_text(TEXT), add_special_tokens=False, verbose=False).input_ids)
    else:
        model = llama(vocab_size=32000, hidden_size=size.hidden, num_hidden_layers=size.layers)
        stream = torch.randint(2, 32000, (4096,), generator=torch.Generator().manual_seed(0))
    start = torch.cat([torch.tensor([model.config.bos_token_id]), stream[: LONG - 1]])
    rows = stream[LONG : LONG + max(BATCHES) * (size.tokens - LONG)].view(max(BATCHES), -1)
    prompts = torch.cat([start.expand(max(BATCHES), -1), rows], dim=1)
    name = f"{request.param}, {model.num_parameters() / 1e6:.0f} M"
    return Subject(name, model, attached_twin(model, start[:1]), attached_twin(model, start), prompts)


def llama(**settings: Any) -> PreTrainedModel:
    """A random Llama in float32."""
    torch.manual_seed(0)
    settings = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2048, **settings}
    config = LlamaConfig(**settings, bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def attached_twin(model: PreTrainedModel, prefix: Tensor) -> PreTrainedModel:
    """A model of the same weights, not copied, with its own intact KV attached."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    attach(twin, capture(model, prefix))
    return twin


@pytest.mark.parametrize("batch", BATCHES)
def test_decode(benchmark: Any, report: Callable[..., None], subject: Subject, batch: int, size: Any) -> None:
    """Greedy `generate` from a short prompt, everything it does included."""
    ids = subject.prompts[:batch, :PROMPT]
    asked = {"max_new_tokens": size.new_tokens, "min_new_tokens": size.new_tokens, "do_sample": False}

    def way(model: PreTrainedModel) -> Callable[[], Any]:
        return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **asked)

    models = {"plain": subject.plain, "bos": subject.bos}
    seconds = interleaved(
        benchmark, {name: way(model) for name, model in models.items()}, rounds=size.rounds, for_seconds=size.seconds
    )
    _report_speed(report, "decode", subject.name, seconds, batch=batch, tokens=batch * size.new_tokens)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no-cache"])
def test_prefill(
    benchmark: Any, report: Callable[..., None], subject: Subject, batch: int, cached: bool, size: Any
) -> None:
    """One forward: as `generate` makes it, with the last logits only, or as an evaluation does, without a cache."""
    ids = subject.prompts[:batch]
    asked: dict[str, Any] = {"logits_to_keep": 1} if cached else {"use_cache": False}

    def way(model: PreTrainedModel) -> Callable[[], Any]:
        return lambda: model(ids, attention_mask=torch.ones_like(ids), **asked)

    models = {"plain": subject.plain, "bos": subject.bos, "long": subject.long}
    seconds = interleaved(
        benchmark, {name: way(model) for name, model in models.items()}, rounds=size.rounds, for_seconds=size.seconds
    )
    work = "prefill" if cached else "prefill, use_cache=False"
    _report_speed(report, work, subject.name, seconds, batch=batch, tokens=ids.numel())


def _report_speed(
    report: Callable[..., None], work: str, model: str, seconds: dict[str, list[float]], *, batch: int, tokens: int
) -> None:
    target = TARGETS[work.split(",")[0]]
    for name, length in (("bos", 1), ("long", LONG)):
        if name in seconds:
            cells = spread(speed_ratios(seconds[name], seconds["plain"]), digits=3)
            report(
                SPEED,
                work=work,
                model=model,
                batch=batch,
                prefix=length,
                plain_tokens_per_s=f"{tokens / median(seconds['plain']):.0f}",
                **cells,
                target=f"≥ {target}",
                met="yes" if float(cells["median"]) >= target else "no",
            )


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_host_cost(benchmark: Any, report: Callable[..., None], padded: bool, size: Any) -> None:
    """Decoding steps of a Llama so small that only Python is left. `padded`: and no position ids are given."""
    model = llama(vocab_size=64, hidden_size=12, intermediate_size=12, num_hidden_layers=1)
    twin = attached_twin(model, torch.tensor([0]))
    ids = torch.randint(2, 64, (2, 8 + size.steps), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :2], mask[1, :1] = torch.tensor([1, 0]), 0
    masks = [mask[:, : 9 + step] if padded else None for step in range(size.steps)]

    def way(model: PreTrainedModel) -> Callable[[], None]:
        def steps() -> None:
            cache = DynamicCache(config=model.config)
            model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
            for step, seen in enumerate(masks):
                model(ids[:, 8 + step : 9 + step], attention_mask=seen, past_key_values=cache)

        return steps

    seconds = interleaved(
        benchmark,
        {"plain": way(model), "attached": way(twin)},
        rounds=size.rounds,
        for_seconds=size.seconds,
        clock=thread_time,
    )
    added = [1e6 * (a - p) / size.steps for p, a in zip(seconds["plain"], seconds["attached"], strict=True)]
    batch = "left-padded, without position_ids" if padded else "unpadded, or with position_ids as in generate"
    report(
        HOOKS, rows=batch, plain_step=f"{1e6 * median(seconds['plain']) / size.steps:.0f}", **spread(added, digits=1)
    )
