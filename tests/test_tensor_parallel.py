"""Tensor-parallel models: several processes with their heads of an intact KV compute what one does with all of them.

The processes run this file as their script: each loads its part of the models and goes through the laws, and the first
writes what it found. Where there are GPUs each process is on one, and they speak through NCCL; more processes than GPUs
are left out there.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import PREFIX, build, by_name, padded, prompts, rounded
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM, PreTrainedModel

from intactkv import IntactKV, IntactKVError, PackedCache, Packing, attach, capture, read_packed
from intactkv.artifact.digest import weights_digest
from intactkv.calibrating import calibrate
from intactkv.evaluating import Arm, Windows, evaluate
from intactkv.heads import heads_of

VOCABULARY = 100  # transformers gathers logits only from equal parts
# By transformers 5.17's plans: each process caches its heads; or all, gathered for a norm or a cut, MLA's latents, or
# because nothing is split at all.
SPLIT = [
    "llama-mha", "llama-gqa", "mistral-sliding", "qwen2", "qwen3", "qwen3-moe", "mixtral", "gemma2", "gemma3",
    "gpt-neox", "cohere", "cohere2", "granite", "smollm3", "glm4", "starcoder2", "llama4", "gemma3n", "gemma4",
    "qwen3-next",
]  # fmt: skip
WHOLE = ["olmo2", "phi3", "deepseek-v3", "gpt-oss", "gpt2", "gpt-j"]
QUICK = ["llama-gqa", "qwen3", "gemma3", "olmo2", "deepseek-v3"]
FOUR = ["llama-mha", "gpt-neox", "deepseek-v3", "olmo2"]
EVERYTHING = "llama-gqa"  # over two processes: beams, packed caches, gradients, and FSDP besides
REFUSED = "llama-gqa"  # over four processes: it has two key heads


def random_model(name: str, seed: int = 0) -> PreTrainedModel:
    by_layer = {"vocab_size_per_layer_input": VOCABULARY} if name in ("gemma3n", "gemma4") else {}
    place: Any = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    return build(by_name(name), seed, vocab_size=VOCABULARY, **by_layer).to(place)


def loaded(folder: Path, **sizes: int) -> PreTrainedModel:
    from transformers.distributed import DistributedConfig

    how = DistributedConfig(**sizes)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=how)
    return model.eval()


def saved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """What this process holds of `model` after the first one has saved it."""
    if distributed.get_rank() == 0:
        model.save_pretrained(folder)
    distributed.barrier()
    return loaded(folder, tp_size=distributed.get_world_size())


def differ(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    return float((a.cpu() - b.cpu()).abs().max())


@torch.no_grad()
def calls(model: PreTrainedModel, kv: IntactKV | None) -> dict[str, Tensor]:
    """Logits of every kind of call, at real tokens behind the prefix."""
    ids, size = prompts().to(model.device), len(PREFIX)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    found = {}
    for side in ("left", "right"):
        together, mask, positions = (x.to(ids.device) for x in padded([ids[0], ids[1, :13], ids[2, :9]], side))
        given = {"position_ids": positions} if takes_positions else {}
        out = model(together, attention_mask=mask, **given).logits
        behind = (mask.cumsum(1) > size) & mask.bool()
        found[side] = out[behind]
    found["plain"] = model(ids).logits[:, size:]
    found["without cache"] = model(ids, use_cache=False).logits[:, size:]
    together, mask, _ = (x.to(ids.device) for x in padded([ids[0], ids[1, :13], ids[2, :9]], "left"))
    for name, more in (("generate", {}), ("static", {"cache_implementation": "static"})):
        if name == "static" and model.config.model_type == "llama4_text":
            continue  # transformers 5.17 itself fails
        out = model.generate(
            together, attention_mask=mask, max_new_tokens=3, do_sample=False, output_logits=True,
            return_dict_in_generate=True, disable_compile=True, **more,
        )  # fmt: skip
        found[name] = torch.stack(out.logits, 1)
    if kv is not None:
        whole = torch.ones_like(ids)
        cache = kv.cache(model, len(ids), check=False)
        found["filled cache"] = model(ids[:, size:], past_key_values=cache, attention_mask=whole).logits
    return found


@torch.no_grad()
def more_calls(model: PreTrainedModel, kv: IntactKV) -> dict[str, Tensor]:
    """Logits of generating with beams, in chunks, and with a packed cache, read packed and not."""
    ids, mask, _ = (x.to(model.device) for x in padded([prompts()[0], prompts()[1, :13]], "left"))

    def logits(**more: Any) -> Tensor:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **more,
        )  # fmt: skip
        return torch.stack(out.logits, 1)

    with attach(model, kv, check=False):
        found = {"beams": logits(num_beams=3), "chunks": logits(prefill_chunk_size=2)}
        found["packed"] = logits(past_key_values=PackedCache(model.config, Packing(bits=8)))
        with read_packed(model):
            found["read packed"] = logits(past_key_values=PackedCache(model.config, Packing(bits=8)))
    return found


def gradient(model: PreTrainedModel, kv: IntactKV) -> Tensor:
    """Of a sum of logits, by the artifact's keys and values; each process has those of its heads."""
    learned = copy.deepcopy(kv)
    leaves = [tensor.requires_grad_() for pair in learned.layers.values() for tensor in pair]
    with attach(model, learned, check=False):
        model(prompts().to(model.device)).logits[:, len(kv) :].sum().backward()
    found = torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None]).to(model.device)
    if heads_of(model) is not None:
        distributed.all_reduce(found)
    return found


def farthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(differ(a[name], b[name]) for name in b)


def refused(call: Any) -> str:
    try:
        call()
    except IntactKVError as error:
        return str(error)
    return ""


def laws(name: str, folder: Path) -> dict[str, Any]:
    """How far several processes are from one, by law, for one architecture; what is said where it cannot be split."""
    full = random_model(name)
    if name == REFUSED and distributed.get_world_size() == 4:
        many = saved(full, folder)
        kv = capture(full, PREFIX)
        return {"refused": [refused(lambda: capture(many, PREFIX)), refused(lambda: attach(many, kv, check=False))]}
    one, kv = rounded(full), capture(full, PREFIX)
    many, many_full = saved(one, folder / "rounded"), saved(full, folder / "full")
    own, plain = calls(one, None), calls(many, None)
    found: dict[str, Any] = {"own": farthest(plain, own)}
    with attach(one, kv, check=False):
        want = calls(one, kv if not by_name(name).recurrent else None)
    with attach(many, kv, check=False):
        found["attached"] = farthest(calls(many, None if by_name(name).recurrent else kv), want)
    found["effect"] = farthest(want, own)
    found["left behind"] = farthest(calls(many, None), plain)
    captured = capture(many_full, PREFIX)
    for part, tensor in kv.tensors.items():
        found["captured"] = max(found.get("captured", 0.0), differ(captured.tensors[part].float(), tensor.float()))
    before = calls(many_full, None)
    with attach(many_full, captured):
        found["to itself"] = farthest(calls(many_full, None), before)
    found["digest"] = captured.provenance["weights"] == weights_digest(full)
    heads = heads_of(many)
    found["split"] = heads is not None and heads.split
    other = capture(random_model(name, seed=7), PREFIX)
    found["foreign"] = refused(lambda: attach(many, other))
    if name == EVERYTHING and distributed.get_world_size() == 2:
        found["more"] = farthest(more_calls(many, kv), more_calls(one, kv))
        found["gradient"] = differ(gradient(many, kv), gradient(one, kv)) / float(gradient(one, kv).abs().max())
        by_layer = loaded(folder / "rounded", fsdp_size=2)  # weights are split, heads are not
        with attach(by_layer, kv, check=False):
            found["sharded weights"] = farthest(calls(by_layer, kv), want)
    nothing: Any = None
    windows = Windows(prompts(), torch.arange(20).expand(3, -1) > len(PREFIX))
    found["calibrate"] = refused(lambda: calibrate(kv, many, full, nothing))
    found["eval"] = refused(lambda: evaluate(full, [Arm("own", many)], windows, shared=True))
    return found


def process(rank: int, size: int, folder: Path, names: list[str]) -> None:
    """One of `size` processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    store = folder / f"store{size}"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, init_method=store.as_uri(), rank=rank, world_size=size)
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = laws(name, folder / f"{name} over {size}")
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    everyone: list[Any] = [None] * size
    distributed.all_gather_object(everyone, found)
    if rank == 0:
        (folder / f"found{size}.json").write_text(json.dumps(everyone))
    distributed.destroy_process_group()


def main(folder: Path, jobs: dict[str, list[str]]) -> None:
    """Processes are forked where everything is imported and nothing has run."""
    torch.set_num_threads(1)
    for size, names in jobs.items():
        arguments = (int(size), folder, names)
        torch.multiprocessing.start_processes(process, arguments, int(size), start_method="fork")


def check(folder: Path, jobs: dict[int, list[str]]) -> None:
    if torch.cuda.is_available():
        jobs = {size: names for size, names in jobs.items() if size <= torch.cuda.device_count()}
    if not jobs:
        pytest.skip("more processes than GPUs")
    command = [sys.executable, str(Path(__file__)), str(folder), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for size, names in jobs.items():
        everyone = json.loads((folder / f"found{size}.json").read_text())
        for name in names:
            at, found, tolerance = f"{name} over {size}", everyone[0][name], max(1e-5, by_name(name).tolerance)
            assert "error" not in found, (at, found)
            assert len({each[name].get("foreign") for each in everyone}) == 1, at  # all raise, or the others would wait
            if name == REFUSED and size == 4:
                assert all("cannot split 2 key heads over 4" in said for said in found["refused"]), at
                continue
            assert found["own"] <= tolerance, (at, found)
            assert found["attached"] <= tolerance, (at, found)
            assert found["to itself"] <= tolerance, (at, found)
            assert found["captured"] <= 1e-5, (at, found)
            assert found["effect"] > 1000 * tolerance, (at, found)
            assert found["left behind"] == 0, (at, found)
            assert found["digest"], (at, found)
            assert found["split"] == (name in SPLIT), (at, found)
            assert "another basis or model" in found["foreign"], (at, found)
            assert found.get("more", 0) <= tolerance, (at, found)
            assert found.get("gradient", 0) <= 1e-5, (at, found)
            assert found.get("sharded weights", 0) <= tolerance, (at, found)
            assert "calibrating shares the samples over processes" in found["calibrate"], (at, found)
            assert "need all windows each, and here they are shared" in found["eval"], (at, found)


def test_several_processes_compute_what_one_computes(tmp_path: Path) -> None:
    check(tmp_path, {2: QUICK, 4: [REFUSED, "llama-mha"]})


@pytest.mark.slow
def test_on_every_architecture_that_transformers_can_split(tmp_path: Path) -> None:
    check(tmp_path, {2: [name for name in SPLIT + WHOLE if name not in QUICK], 4: FOUR})


def test_models_that_are_split_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(by_name("llama-gqa"))
    kv = capture(model, PREFIX)
    model._tp_size = 2
    for call in (lambda: capture(model, PREFIX), lambda: attach(model, kv, check=False), lambda: kv.cache(model)):
        with pytest.raises(IntactKVError, match="split over 2 processes, which are not all there are"):
            call()
    model._tp_size = None
    monkeypatch.setattr(model.config, "distributed_config", SimpleNamespace(pp_size=2), raising=False)
    with pytest.raises(IntactKVError, match="each process of a pipeline-parallel model holds some of the layers"):
        attach(model, kv)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
