"""Models spread over devices by accelerate: what is computed is what one device computes, bit for bit.

Without GPUs the devices are the CPU, the disk, and memory from which each weight is fetched when it is used; two cards
are fake ones, whose tensors have devices and no numbers. Where there are two real ones they are used too.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PREFIX, build, by_name, padded, prompts, rounded
from planted import BOS, damaged, planted
from test_calibrate import BOTH, QUICK, seen
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from intactkv import IntactKV, IntactKVError, PackedCache, Packing, attach, capture, read_packed
from intactkv.artifact.digest import weights_digest
from intactkv.attaching.tensors import IntactTensors
from intactkv.basis.compare import basis
from intactkv.calibrating import calibrate
from intactkv.doctor import examine, rounded_model
from intactkv.doctor.examine import to_dict
from intactkv.evaluating import Arm, evaluate, prefixed_windows

accelerate = pytest.importorskip("accelerate")

EVERYTHING, BLOCK, EMBEDDINGS = "everything", "a block", "embeddings"
WAYS = [EVERYTHING, BLOCK, EMBEDDINGS, "memory"]


def spread(model: PreTrainedModel, folder: Path, way: str) -> PreTrainedModel:
    """The same model with weights on the disk, or fetched from memory by hooks."""
    model.save_pretrained(folder)
    if way == "memory":
        return accelerate.cpu_offload(AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval(), "cpu")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "cpu" for i in range(model.config.num_hidden_layers)}
    if way == BLOCK:
        places["model.layers.1"] = "disk"
    if way == EMBEDDINGS:
        places["model.embed_tokens"] = places["lm_head"] = "disk"
    if way == EVERYTHING:
        places = dict.fromkeys(places, "disk") | {"model.rotary_emb": "cpu"}
    found: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, device_map=places, offload_folder=folder / "offloaded"
    )
    assert any(parameter.device.type == "meta" for parameter in found.parameters())
    return found.eval()


@pytest.fixture(scope="module", params=["llama-gqa", "gemma3"])
def trio(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel, IntactKV]:
    """A full model, with tied embeddings the second time, a rounded copy, and the intact KV."""
    full = build(by_name(request.param))
    return full, rounded(full), capture(full, PREFIX)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_attach_and_capture(trio: Any, way: str, tmp_path: Path) -> None:
    full, whole, kv = trio
    model = spread(whole, tmp_path / "model", way)
    ids, mask, _ = padded([prompts()[0], prompts()[1, :13]], "left")
    found = []
    for each in (whole, model):
        with attach(each, kv, check=False):
            logits = each(ids, attention_mask=mask).logits
            made = each.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        cache = kv.cache(each, 3, check=False)
        found.append((logits, made, each(prompts()[:, len(kv) :], past_key_values=cache).logits))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    spread_full = spread(full, tmp_path / "full", way)
    captured = capture(spread_full, PREFIX)
    assert captured.digest == kv.digest
    assert captured.provenance["weights"] == kv.provenance["weights"] == weights_digest(full)
    with attach(spread_full, kv):  # and its door
        pass
    relations, others = basis(full, whole), basis(spread_full, model)
    assert [(r.kind, r.residual) for r in relations] == [(r.kind, r.residual) for r in others]


@pytest.mark.parametrize("way", WAYS)
def test_eval_and_calibrate(trio: Any, way: str, tmp_path: Path) -> None:
    full, whole, kv = trio
    model, spread_full = spread(whole, tmp_path / "model", way), spread(full, tmp_path / "full", way)
    windows = prefixed_windows(prompts(1, 200)[0, 3:].tolist(), prefix=kv.ids, window=24)
    pairs = ((full, whole), (spread_full, model))
    one, other = (evaluate(a, [Arm("own", b), Arm("intact", b, kv)], windows).to_dict() for a, b in pairs)
    for name in ("seconds", "tokens_per_second"):
        del one[name], other[name]
    assert one == other
    config = replace(QUICK, objective=BOTH, steps=3)
    trained, again = (calibrate(kv, b, a, seen(), config=config) for a, b in pairs)
    assert trained.provenance["calibration"]["adopted"]
    assert again.digest == trained.digest
    assert again.provenance["calibration"]["full_weights"] == weights_digest(full)


def test_the_doctor(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tokens = torch.randint(8, 97, (900,), generator=torch.Generator().manual_seed(5)).tolist()
    full = planted()
    whole = damaged(full, "bos")
    spread_full, model = spread(full, tmp_path / "full", EVERYTHING), spread(whole, tmp_path / "model", EVERYTHING)
    one, other = (
        to_dict(examine(a, {"bos": b}, tokens, start=BOS, window=64)) for a, b in ((full, whole), (spread_full, model))
    )
    for name in ("seconds", "tokens_per_second"):
        del one[name], other[name]
    assert one == other
    with pytest.raises(IntactKVError, match="not simulated on a model with offloaded weights"):
        rounded_model(spread_full, bits=4)


def test_quantize(tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    from safetensors.torch import load_file

    from intactkv.quantizing import RTN, quantize

    full = build(by_name("llama-gqa"))
    found = [
        quantize(model, tmp_path / name, method=RTN(4, 32), prefix=PREFIX)
        for name, model in (("whole", full), ("spread", spread(full, tmp_path / "full", EVERYTHING)))
    ]
    one, other = (load_file(folder / "model.safetensors") for folder in found)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert len({IntactKV.from_pretrained(folder).digest for folder in found}) == 1


class Counting(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_decoding_step_costs_nothing_more(tmp_path: Path) -> None:
    """Behind the prefix, an attached model spread over devices computes and copies what the plain one does."""
    full = build(by_name("llama-gqa"))
    model, kv = spread(full, tmp_path, BLOCK), capture(full, PREFIX)

    def step() -> Counter[str]:
        cache = model(prompts(1)).past_key_values
        with Counting() as counting:
            model(torch.tensor([[9]]), past_key_values=cache)
        return counting.calls

    plain = step()
    with attach(model, kv):
        assert step() == plain


def test_each_layers_tensors_are_on_that_layers_card_and_moved_there_once() -> None:
    intact = IntactTensors(capture(build(by_name("llama-gqa")), PREFIX))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for layer in intact.kv.layers:
            card = torch.device("cuda", layer % 2)
            given = torch.empty(1, 2, 9, 16, dtype=torch.bfloat16, device=card)
            key, value = intact.like(layer, given, given)
            assert {(x.device, x.dtype) for x in (key, value)} == {(card, torch.bfloat16)}
            assert intact.like(layer, given, given)[0] is key
        assert intact.ids(card).device == intact.logits(card, torch.bfloat16).device == card


TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")


def on_two_cards(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The same model with its layers on two cards in turn."""
    model.save_pretrained(folder)
    places: dict[str, int] = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0)
    places |= {f"model.layers.{i}": i % 2 for i in range(model.config.num_hidden_layers)}
    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, device_map=places)
    return found.eval()


@TWO_CARDS
def test_two_cards_compute_what_one_computes(trio: Any, tmp_path: Path) -> None:
    full, whole = (copy.deepcopy(model).to("cuda:0") for model in trio[:2])
    kv = capture(full, PREFIX)
    model, spread_full = on_two_cards(whole, tmp_path / "model"), on_two_cards(full, tmp_path / "full")
    assert {p.device.index for p in model.parameters()} == {0, 1}
    ids, mask, _ = (x.to("cuda:0") for x in padded([prompts()[0], prompts()[1, :13]], "left"))
    found = []
    with torch.no_grad():
        for each in (whole, model):
            with attach(each, kv, check=False):
                logits = each(ids, attention_mask=mask).logits
                made = each.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
            cache = kv.cache(each, 3, check=False)
            behind = prompts()[:, len(kv) :].to("cuda:0")
            found.append([x.cpu() for x in (logits, made, each(behind, past_key_values=cache).logits)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert capture(spread_full, PREFIX).digest == kv.digest
    windows = prefixed_windows(prompts(1, 200)[0, 3:].tolist(), prefix=kv.ids, window=24)
    pairs = ((full, whole), (spread_full, model))
    one, other = (evaluate(a, [Arm("own", b), Arm("intact", b, kv)], windows) for a, b in pairs)
    assert torch.equal(one.metrics["intact"].nll.nan_to_num(), other.metrics["intact"].nll.nan_to_num())
    config = replace(QUICK, objective=BOTH, steps=3)
    trained, again = (calibrate(kv, b, a, seen(), config=config) for a, b in pairs)
    for name, tensor in trained.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, atol=1e-5, rtol=1e-4)


@TWO_CARDS
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="set TRITON_INTERPRET=0 for kernels on a GPU")
@torch.no_grad()
def test_two_cards_read_packed_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=256, intermediate_size=64, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    whole: Any = AutoModelForCausalLM.from_config(config).to("cuda:1").eval()  # not the current card
    model = on_two_cards(whole, tmp_path)
    ids, logits = torch.randint(0, 97, (2, 90)), []
    for each, place in ((whole, "cuda:1"), (model, "cuda:0")):
        cache = PackedCache(config, Packing(bits=4))
        with read_packed(each):
            steps = [each(ids[:, :60].to(place), past_key_values=cache).logits[:, -1:]]
            steps += [each(ids[:, t : t + 1].to(place), past_key_values=cache).logits for t in range(60, 90)]
        assert all(layer.steady is not None for layer in cache.layers)  # type: ignore[union-attr]
        logits.append(torch.cat(steps, 1).cpu())
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
