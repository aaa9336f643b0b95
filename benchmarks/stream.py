"""Streaming a checkpoint of Llama 3 8B's shape: time and memory against `cat`, against loading it, and its depth.

    python benchmarks/stream.py FOLDER [--layers 8,16,32] [--shape dense|experts] [--gpu|--check] [--remove] [--out F]

With `--gpu`, on one: streamed with and without the next block's upload while this one computes, and loaded onto it by
`from_pretrained(device_map="cuda")` with one forward; keys and values must be the same, bit for bit.
With `--check`, `intactkv check` of a checkpoint rounded to 4 bits against the full one, both streamed and both loaded.
`--ways "cat,stream bfloat16"` measures these alone.

`experts` is Qwen3-30B-A3B's shape: 128 experts a block, 8 for each token; `stream-one` is a prefix of one token.

Every measurement is a process of its own on a cold cache (the files' pages are given back before). Peak memory is that
of the process above what importing takes, sampled every 5 ms. Random weights in bfloat16, two blocks a shard.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

BLOCK = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
PREFIX = list(range(1000, 1034))


EXPERTS = {
    "self_attn.q_proj": (4096, 2048), "self_attn.k_proj": (512, 2048), "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 4096), "mlp.gate": (128, 2048),
    **{
        f"mlp.experts.{i}.{name}": shape for i in range(128)
        for name, shape in (("gate_proj", (768, 2048)), ("up_proj", (768, 2048)), ("down_proj", (2048, 768)))
    },
}  # fmt: skip


def write(folder: Path, shape: str, layers: int) -> None:
    """A checkpoint with so many blocks."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, Qwen3MoeConfig

    if shape == "dense":
        block, vocabulary, hidden, norms = BLOCK, 128256, 4096, {}
        config: Any = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=14336, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
            architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=False,
        )  # fmt: skip
    else:
        block, vocabulary, hidden = EXPERTS, 151936, 2048
        norms = {"self_attn.q_norm": 128, "self_attn.k_norm": 128}
        config = Qwen3MoeConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=6144, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=768, max_position_embeddings=8192, architectures=["Qwen3MoeForCausalLM"],
            dtype="bfloat16", tie_word_embeddings=False,
        )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    draw = {name: (torch.randn(*size, generator=generator) * 0.02).bfloat16() for name, size in block.items()}
    table = (torch.randn(vocabulary, hidden, generator=generator) * 0.02).bfloat16()
    norms |= {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    index: dict[str, str] = {}

    def shard(tensors: dict[str, Any]) -> None:
        name = f"model-{len(set(index.values())):05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    shard({"model.embed_tokens.weight": table})
    for first in range(0, layers, 2):
        tensors = {}
        for i in range(first, min(first + 2, layers)):
            tensors |= {f"model.layers.{i}.{name}.weight": weight.clone() for name, weight in draw.items()}
            for norm, size in norms.items():
                tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        shard(tensors)
    shard({"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16), "lm_head.weight": table.clone()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_packed(full: Path, folder: Path) -> None:
    """Its blocks' matrices rounded to nearest with 4 bits in groups of 128, as compressed-tensors packs them."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from safetensors.torch import load_file, save_file

    args = QuantizationArgs(num_bits=4, group_size=128, strategy="group", symmetric=True)
    scheme, known, index = QuantizationScheme(targets=["Linear"], weights=args), dict[str, Any](), dict[str, str]()
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(full.glob("*.safetensors")):
        tensors: dict[str, Any] = {}
        for name, weight in load_file(file).items():
            kind = name.partition("layers.")[2].partition(".")[2]  # all blocks have the same weights
            if not kind.endswith("proj.weight"):
                tensors[name] = weight
                continue
            if kind not in known:
                groups = weight.float().view(len(weight), -1, 128)
                scale = calculate_qparams(groups.amin(-1), groups.amax(-1), args)[0].bfloat16()
                known[kind] = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
            tensors |= {f"{name.removesuffix('weight')}{part}": each.clone() for part, each in known[kind].items()}
        save_file(tensors, folder / file.name, {"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((full / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump()}},
        "version": version("compressed-tensors"),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, default=str))


def packed(full: Path) -> Path:
    """Where the rounded checkpoint lies."""
    return full.with_name(f"{full.name}-packed")


def forget(folder: Path) -> None:
    """Give the files' pages back."""
    for path in [*folder.iterdir(), *(packed(folder).iterdir() if packed(folder).exists() else ())]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(folder: Path, how: str) -> None:
    """One capture: seconds, and peak memory above importing."""
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    from intactkv.basis.compare import basis, show_noise
    from intactkv.capturing.live import capture
    from intactkv.capturing.record import recorded
    from intactkv.checkpoint import store
    from intactkv.checkpoint.load import load_compared, load_model, load_model_on
    from intactkv.checkpoint.stream import load_streamed

    way, _, kind = how.partition(" ")
    dtype, process, peak = getattr(torch, kind), psutil.Process(), [0]
    if way.startswith("gpu"):
        torch.ones(64, 64, device="cuda").mm(torch.ones(64, 64, device="cuda")).sum().item()  # CUDA and its libraries
    base = process.memory_info().rss

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss - base)
            sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    began, worked, digest = perf_counter(), sum(process.cpu_times()[:2]), None

    def taken() -> dict[str, Any]:
        found = {"seconds": perf_counter() - began, "processor seconds": sum(process.cpu_times()[:2]) - worked}
        gpu = {"GPU MiB": torch.cuda.max_memory_allocated() / 2**20} if way.startswith("gpu") else {}
        return {**found, "MiB": peak[0] / 2**20, **gpu}

    if way == "gpu-loaded":
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cuda").eval()
        recorded(model, torch.tensor([PREFIX]))
        told = taken()
        del model
        # loaded as intactkv does, by way of the CPU: rotary frequencies made on a GPU may have other last bits
        model = load_model_on(folder, "cuda", dtype=dtype)
        digest = kv_digest({i: (k[0], v[0]) for i, (k, v) in recorded(model, torch.tensor([PREFIX])).items()})
    elif way.startswith("gpu"):
        if way == "gpu-plain":
            store._AHEAD = ()
        layers = capture(load_streamed(folder, dtype=dtype, device="cuda"), PREFIX, logits=False).layers
        told = taken()
        digest = kv_digest(layers)
    elif way.startswith("check"):
        streams = way == "check-stream"
        shown = show_noise(load_compared(folder, "cpu", dtype=kind, stream=streams))
        relations = basis(shown, load_compared(packed(folder), "cpu", dtype=kind, stream=streams))
        told = taken()
        figures = [(r.layer, r.part, r.head, r.kind, r.residual, r.as_is) for r in relations]
        digest = hashlib.sha256(repr(figures).encode()).hexdigest()
    elif way == "offload":  # accelerate's disk offload as transformers gives it
        config = json.loads((folder / "config.json").read_text())
        blocks = {f"model.layers.{i}": "disk" for i in range(config["num_hidden_layers"])}
        parts = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={**parts, **blocks}, offload_folder=folder.parent / "offload"
        )
        with torch.no_grad():
            model(torch.tensor([PREFIX]), use_cache=True, logits_to_keep=1)
        told = taken()
    else:
        loaded = load_model(folder, dtype=dtype) if way == "live" else load_streamed(folder, dtype=dtype)
        digest = capture(loaded, PREFIX[:1] if way == "stream-one" else PREFIX, logits=False).digest
        told = taken()
    print(json.dumps({**told, "digest": digest}), flush=True)


def kv_digest(layers: Any) -> str:
    from intactkv.artifact.digest import digests, joined

    return joined({}, digests({f"{i}.{n}": each for i, pair in layers.items() for n, each in enumerate(pair)}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", default="8,16,32")
    parser.add_argument("--shape", choices=["dense", "experts"], default="dense")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--ways")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--remove", action="store_true", help="Delete each checkpoint once it is measured.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        child(given.folder, given.child)
        return
    found: dict[str, Any] = {}
    for turn, layers in enumerate(map(int, given.layers.split(","))):
        folder = given.folder / f"{given.shape}-{layers}"
        if not (folder / "model.safetensors.index.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write(folder, given.shape, layers)
        ways = ["cat", "stream bfloat16"]
        if given.check and not packed(folder).exists():
            write_packed(folder, packed(folder))
        if given.ways:
            ways = given.ways.split(",")
        elif given.check:
            ways = ["cat", "check-stream bfloat16", "check-loaded bfloat16"]
        elif given.gpu:
            kinds = ("bfloat16", "float32")
            ways = ["cat", *(f"gpu-{way} {kind}" for kind in kinds for way in ("ahead", "plain", "loaded"))]
        elif given.shape == "experts":  # accelerate's offload would write them to the disk first
            ways += ["stream-one bfloat16", "live bfloat16"]
        else:
            ways += ["stream float32", *(["offload bfloat16", "live bfloat16", "live float32"] if turn == 0 else [])]
        told: dict[str, list[Any]] = {way: [] for way in ways}
        for number in range(given.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                forget(folder)
                if way == "cat":
                    began = perf_counter()
                    files = f"{folder}/*.safetensors" + (f" {packed(folder)}/*.safetensors" if given.check else "")
                    subprocess.run(f"cat {files} > /dev/null", shell=True, check=True)
                    told[way].append({"seconds": perf_counter() - began})
                    continue
                command = [sys.executable, __file__, str(folder), "--child", way]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{way} ended with {done.returncode}: {done.stderr[-2000:]}")
                told[way].append(json.loads(done.stdout.splitlines()[-1]))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found[str(layers)] = {"bytes": size, **{
            way: {key: median(each[key] for each in runs) if key != "digest" else runs[0][key] for key in runs[0]}
            for way, runs in told.items()
        }}  # fmt: skip
        print(layers, json.dumps(found[str(layers)], indent=1), flush=True)
        for kind in ("bfloat16", "float32"):
            digests = {each["digest"] for way, runs in told.items() if way.endswith(kind) for each in runs} - {None}
            if len(digests) > 1 and given.shape == "dense":
                print(f"NOT THE SAME in {kind}: {digests}", flush=True)
        if given.remove:
            shutil.rmtree(folder)
            shutil.rmtree(packed(folder), ignore_errors=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
