"""What the connector costs in vLLM: two engines, with it and without, take turns; ratios of medians over rounds.

    .venv-vllm/bin/python benchmarks/serve_vllm.py --model MODEL --kv KV --out FILE.json [--engine '{"dtype": …}']

Throughput is of batches of prompts that all begin with the prefix, time to first token of one such prompt alone, the
engines in turns prompt by prompt. On a GPU the host's synchronizations and copies in decoding steps are counted as
well, by torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the profiler sees the engine's own process


def engine(settings: dict[str, Any]) -> None:
    """One engine: a line of JSON in, one out."""
    from vllm import LLM, SamplingParams

    began = perf_counter()
    llm = LLM(**settings)
    print("\n" + json.dumps({"started": perf_counter() - began}), flush=True)  # between lines of vLLM's log
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        prompts: Any = [{"prompt_token_ids": each} for each in asked["prompts"]]
        if asked.get("profile"):
            told = _profiled(llm, prompts, sampling)
        else:
            began = perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            told = {"seconds": perf_counter() - began}
        print("\n" + json.dumps(told), flush=True)


def _profiled(llm: Any, prompts: Any, sampling: Any) -> dict[str, int]:
    """How often the host waits for the device, and copies to it, in decoding steps."""
    from torch.profiler import ProfilerActivity, profile

    core = llm.llm_engine
    for i, prompt in enumerate(prompts):
        core.add_request(str(i), prompt, sampling)
    for _ in range(4):  # the prompts, and what is compiled or captured late
        core.step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(16):
            core.step()
    while core.has_unfinished_requests():
        core.step()
    names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync",
             "cudaLaunchKernel", "cudaGraphLaunch")  # fmt: skip
    counts = {event.key: event.count for event in seen.key_averages()}
    return {name: counts.get(name, 0) for name in names}


def shaped(length: int) -> tuple[str, str]:
    """A folder with Llama 3 8B's configuration, and an artifact of random rows for it."""
    from tempfile import mkdtemp

    import torch
    from transformers import LlamaConfig

    from intactkv import IntactKV
    from intactkv.artifact.fingerprint import fingerprint

    folder = Path(mkdtemp())
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    layers = {i: (torch.randn(8, length, 128), torch.randn(8, length, 128)) for i in range(32)}
    kv = IntactKV(torch.arange(3, 3 + length), layers, None, fingerprint(config))
    return str(folder), str(kv.save(folder / "random.intactkv"))


class Child:
    """An engine in a process of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.started = self._read()["started"]

    def ask(self, **asked: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("the engine ended")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child")
    parser.add_argument("--model")
    parser.add_argument("--kv")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--alone", type=int, default=20, help="prompts in a round whose first token is timed")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--engine", default="{}")
    parser.add_argument("--starts", type=int, default=3, help="how often each engine is started")
    parser.add_argument("--shape", type=int, metavar="P", help="an 8B's shape with random weights, and so many tokens")
    given = parser.parse_args()
    if given.child:
        engine(json.loads(given.child))
        return
    from intactkv import IntactKV
    from intactkv.serving.launch import vllm_arguments

    if given.shape:
        given.model, given.kv = shaped(given.shape)
    prefix = IntactKV.load(given.kv).ids.tolist()
    settings = {
        "model": given.model, "skip_tokenizer_init": True, "max_model_len": 1024, "seed": 0,
        "enable_prefix_caching": False, **({"load_format": "dummy"} if given.shape else {}), **json.loads(given.engine),
    }  # fmt: skip
    told = vllm_arguments(given.model, given.kv, mode=given.mode, check=False)
    overrides = {"hf_overrides": told["hf_overrides"]} if "hf_overrides" in told else {}
    arms = {"without": {**settings, **overrides}, "with": {**settings, **told}}
    children: dict[str, Child] = {}
    started: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(given.starts):  # starting is timed alone, in turns
        for name in arms if turn % 2 == 0 else reversed(arms):
            if name in children:
                children.pop(name).close()
            child = Child(arms[name])
            started[name].append(child.started)
            if turn < given.starts - 1:
                child.close()
            else:
                children[name] = child
    rng = random.Random(0)

    def prompts(count: int) -> list[list[int]]:
        return [prefix + [rng.randrange(3, 400) for _ in range(given.prompt)] for _ in range(count)]

    ratios: dict[str, list[float]] = {"throughput": [], "time to first token": []}
    firsts: list[dict[str, float]] = []
    for turn in range(given.rounds + 1):
        batch = prompts(given.batch)
        order = list(children) if turn % 2 == 0 else list(reversed(children))
        seconds = {name: children[name].ask(prompts=batch, tokens=given.tokens)["seconds"] for name in order}
        if turn:  # the first round warms up
            ratios["throughput"].append(seconds["without"] / seconds["with"])
        for _ in range(given.alone):  # prompt by prompt, since a host's clock wanders within a round
            one, order = prompts(1), order[::-1]
            first = {name: children[name].ask(prompts=one, tokens=1)["seconds"] for name in order}
            if turn:
                firsts.append(first)
                ratios["time to first token"].append(first["with"] / first["without"])
        print(f"round {turn}:", {name: round(median(of), 3) for name, of in ratios.items() if of}, flush=True)
    import torch

    counts = None
    if torch.cuda.is_available():
        counts = {n: c.ask(prompts=prompts(8), tokens=40, profile=True) for n, c in children.items()}
    for child in children.values():
        child.close()
    found = {
        **{name: {"median": median(of), "quartiles": quantiles(of)[::2], "low": min(of), "high": max(of), "of": len(of)}
           for name, of in ratios.items()},
        "start-up, s more": median(started["with"]) - median(started["without"]),
        "milliseconds to the first token": {
            name: 1000 * median(each[name] for each in firsts) for name in arms
        },
        "started, s": started, "counts": counts, "tokens/s": given.batch * given.tokens / seconds["with"],
        "arguments": {name: value for name, value in vars(given).items() if name not in ("child", "out")},
    }  # fmt: skip
    found["arguments"] = {k: str(v) for k, v in found["arguments"].items()}
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
