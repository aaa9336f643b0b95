"""The law of laws and its neighbours, on every architecture we name."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    ARCHITECTURES,
    PREFIX,
    Architecture,
    build,
    padded,
    prompts,
    reference_cache,
    reference_logits,
    rounded,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from intactkv import IntactKV, capture
from intactkv import attach as attach_checked

P = len(PREFIX)
attach = partial(attach_checked, check=False)  # rounding random weights to 3 bits is wilder than any real model's
pytestmark = pytest.mark.filterwarnings("ignore:layers .* recurrent:UserWarning")


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda a: a.name)
def trio(request: pytest.FixtureRequest) -> tuple[Architecture, PreTrainedModel, PreTrainedModel, IntactKV]:
    """An architecture, its full model, a rounded copy, and the full model's intact KV."""
    full = build(request.param)
    return request.param, full, rounded(full), capture(full, PREFIX)


def rows() -> list[Tensor]:
    """Rows of different length that begin with the whole prefix."""
    return [row[:length] for row, length in zip(prompts(), (20, 13, 17), strict=True)]


def differ(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN anywhere counts as infinite."""
    gap = (a.double() - b.double()).abs().max().item()
    return gap if gap == gap else float("inf")


def takes_positions(model: PreTrainedModel) -> bool:
    import inspect

    return "position_ids" in inspect.signature(model.forward).parameters


@torch.no_grad()
def test_a_models_own_intact_kv_changes_nothing(trio: Any, figure: Any) -> None:
    architecture, full, _, kv = trio
    for side in ("none", "left", "right"):
        ids, mask, positions = padded([prompts()[0]] if side == "none" else rows(), side)
        given = {"attention_mask": mask}
        if takes_positions(full):
            given["position_ids"] = positions
        for use_cache in (True, False):
            plain = full(ids, **given, use_cache=use_cache).logits
            with attach(full, kv):
                attached = full(ids, **given, use_cache=use_cache).logits
            gap = differ(plain[mask.bool()], attached[mask.bool()])
            assert gap <= architecture.tolerance, (side, use_cache)
            figure(architecture.name, "self", gap)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_prefill_equals_the_eager_one(trio: Any) -> None:
    """Each forward compiled as far as the architecture allows; what is cached is the same too."""
    architecture, _, model, kv = trio
    frames = torch._dynamo.utils.counters["frames"]
    torch._dynamo.reset()
    frames.clear()
    with attach(model, kv):
        compiled = torch.compile(model, backend="aot_eager")
        for use_cache in (True, False):
            got, want = (call(prompts(), use_cache=use_cache) for call in (compiled, model))
            assert differ(got.logits, want.logits) <= architecture.tolerance
            if use_cache:
                layers = zip(got.past_key_values.layers, want.past_key_values.layers, strict=True)
                assert any(isinstance(getattr(one, "keys", None), Tensor) for one in want.past_key_values.layers)
                for ours, other in layers:
                    for name in ("keys", "values"):
                        if isinstance(getattr(other, name, None), Tensor):
                            assert differ(getattr(ours, name), getattr(other, name)) <= architecture.tolerance
    assert frames["ok"] > 0
    torch._dynamo.reset()


@torch.no_grad()
def test_detach_leaves_no_trace(trio: Any) -> None:
    _, _, model, kv = trio
    ids = prompts()
    before, state = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with attach(model, kv):
        model(ids)
        model(ids, use_cache=False)
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_attached_equals_injection_by_hand(trio: Any, figure: Any) -> None:
    architecture, _, model, kv = trio
    if architecture.recurrent:
        pytest.skip("recurrent and convolutional states are computed by the model itself")
    single = [reference_logits(model, kv, row) for row in rows()]
    plain = model(rows()[0][None]).logits[0, P:]
    effect = differ(plain, single[0])
    assert effect > 1000 * architecture.tolerance
    figure(architecture.name, "effect", effect)
    for side in ("left", "right"):
        ids, mask, _ = padded(rows(), side)
        for use_cache in (True, False):
            with attach(model, kv):
                logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
            for i, want in enumerate(single):
                gap = differ(logits[i][mask[i].bool()][P:], want)
                assert gap <= architecture.tolerance, (side, use_cache, i)
                figure(architecture.name, "injection", gap)


@torch.no_grad()
def test_chunks_that_cut_the_prefix_equal_injection(trio: Any, figure: Any) -> None:
    architecture, _, model, kv = trio
    if architecture.recurrent:
        pytest.skip("recurrent and convolutional states are computed by the model itself")
    single = [reference_logits(model, kv, row) for row in rows()]
    ids, mask, positions = padded(rows(), "left")
    cache, parts = DynamicCache(config=model.config), []
    with attach(model, kv):
        for start, stop in ((0, 2), (2, 5), (5, 9), (9, 10), (10, 20)):
            more = {"position_ids": positions[:, start:stop]} if takes_positions(model) else {}
            chunk = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, **more)
            parts.append(chunk.logits)
    logits = torch.cat(parts, 1)
    for i, want in enumerate(single):
        gap = differ(logits[i][mask[i].bool()][P:], want)
        assert gap <= architecture.tolerance, i
        figure(architecture.name, "injection", gap)


def generated(model: PreTrainedModel, ids: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """Greedy new tokens `(row, new)` and their logits `(row, new, vocab)`."""
    out = model.generate(
        ids, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **more
    )
    return out.sequences[:, -6:], torch.stack(out.logits, 1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padded_generation_equals_injection(trio: Any, figure: Any, cache: str) -> None:
    architecture, _, model, kv = trio
    if architecture.recurrent:
        pytest.skip("recurrent and convolutional states are computed by the model itself")
    ids, mask, _ = padded(rows(), "left")
    static = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    try:
        generated(model, ids, attention_mask=mask, **static)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"transformers itself fails without attach: {str(error)[:80]}")
    with attach(model, kv):
        tokens, logits = generated(model, ids, attention_mask=mask, **static)
    for i, row in enumerate(rows()):
        want, want_logits = generated(model, row[None], past_key_values=reference_cache(model, kv))
        assert torch.equal(tokens[i], want[0])
        gap = differ(logits[i], want_logits[0])
        assert gap <= architecture.tolerance
        figure(architecture.name, "generate", gap)


def test_own_intact_kv_leaves_beams_sampling_and_chunked_prefill_as_they_are(trio: Any) -> None:
    architecture, full, _, kv = trio
    ids, mask, _ = padded(rows(), "left")
    ways = {
        "beams": {"num_beams": 3, "do_sample": False},
        "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
        "chunks": {"do_sample": False, "prefill_chunk_size": 2},
        "no cache": {"do_sample": False, "use_cache": False},
    }
    if architecture.name == "mpt":
        del ways["beams"]  # transformers itself fails here
    if architecture.recurrent:
        del ways["chunks"]  # as above: a second chunk does not continue the state exactly
    for name, way in ways.items():
        plain, attached = [], []
        for out in (plain, attached):
            torch.manual_seed(0)
            handle = attach(full, kv) if out is attached else None
            out.append(full.generate(ids, attention_mask=mask, max_new_tokens=5, **way))
            if handle is not None:
                handle.remove()
        assert torch.equal(plain[0], attached[0]), name


@torch.no_grad()
def test_what_the_model_computes_at_prefix_positions_is_read_by_nobody(trio: Any) -> None:
    architecture, _, model, kv = trio
    if architecture.recurrent:
        pytest.skip("recurrent and convolutional layers read the prefix tokens' states")
    if architecture.name == "gemma3n":
        pytest.skip("its blocks carry a stack of hidden states; the poison would hit the wrong axis")
    ids = prompts()
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) >= 3)

    def poison(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[:, :P] = float("nan")
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with attach(model, kv):
        want = model(ids, use_cache=False).logits
        handle = blocks[0].register_forward_hook(poison)
        poisoned = model(ids, use_cache=False).logits
        handle.remove()
    assert torch.isfinite(poisoned).all()
    assert differ(poisoned, want) <= architecture.tolerance


def test_gradient_checkpointing_is_equal_or_refused(trio: Any, figure: Any) -> None:
    architecture, _, model, kv = trio
    ids, grads = prompts(), []
    model.train()
    try:
        for checkpointing in (False, True):
            if checkpointing:
                if not model.supports_gradient_checkpointing:
                    pytest.skip("transformers has no gradient checkpointing for it")
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(0)
            with attach(model, kv):
                loss = model(ids, labels=ids, use_cache=False).loss
                grads.append(torch.autograd.grad(loss, next(model.parameters()))[0])
        assert differ(*grads) <= 10 * architecture.tolerance
        figure(architecture.name, "checkpointing", 1.0)
    except (RuntimeError, ValueError) as error:
        if REFUSES.get(architecture.name, "?") not in str(error):
            raise
        figure(architecture.name, "checkpointing", 0.0)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


REFUSES = {
    "gpt2": "did not pass keys and values through Cache.update",
    "lfm2": "gradient checkpointing replays the recurrent layers",
    "qwen3-next": "gradient checkpointing replays the recurrent layers",
}


@torch.no_grad()
def test_save_and_load_is_bit_identical(trio: Any, tmp_path: Path) -> None:
    _, _, model, kv = trio
    loaded = IntactKV.load(kv.save(tmp_path / "kv.safetensors"))
    assert loaded.tensors.keys() == kv.tensors.keys()
    assert all(torch.equal(t, kv.tensors[name]) for name, t in loaded.tensors.items())
    assert loaded.fingerprint == kv.fingerprint
    assert loaded.provenance == kv.provenance
    with attach(model, kv):
        want = model(prompts()).logits
    with attach(model, loaded):
        assert torch.equal(model(prompts()).logits, want)


@torch.no_grad()
def test_a_prefilled_cache_equals_injection(trio: Any) -> None:
    architecture, _, model, kv = trio
    if architecture.recurrent:
        with pytest.raises(ValueError, match="recurrent layers"):
            kv.cache(model)
        return
    ids = prompts()
    want = torch.stack([reference_logits(model, kv, row) for row in ids])
    for attached in (False, True):
        handle = attach(model, kv) if attached else None
        cache = kv.cache(model, batch_size=3)
        logits = model(ids[:, P:], past_key_values=cache, attention_mask=torch.ones_like(ids)).logits
        tokens = model.generate(ids, past_key_values=kv.cache(model, 3), max_new_tokens=4, do_sample=False)
        if handle is not None:
            handle.remove()
        assert differ(logits, want) <= architecture.tolerance
        assert torch.equal(tokens[:, ids.shape[1]], want[:, -1].argmax(-1))


@torch.no_grad()
def test_float64_equality_is_exact_to_rounding() -> None:
    for name in ("llama-gqa", "gpt2", "qwen3", "phi3", "opt", "granite"):
        architecture = next(a for a in ARCHITECTURES if a.name == name)
        full = build(architecture, dtype=torch.float64)
        model, kv = rounded(full), capture(full, PREFIX)
        ids, mask, _ = padded(rows(), "left")
        with warnings.catch_warnings(), attach(model, kv):
            logits = model(ids, attention_mask=mask).logits
        for i, row in enumerate(rows()):
            assert differ(logits[i][mask[i].bool()][P:], reference_logits(model, kv, row)) <= 1e-12
