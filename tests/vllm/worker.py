"""One vLLM engine in a process of its own: a job as JSON on stdin, the answers as JSON in a file.

python tests/vllm/worker.py OUT < JOB
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def answer(output: Any, probabilities: bool) -> dict[str, Any]:
    """A request's tokens with their log-probabilities, and those of its prompt where they were asked for."""
    one = output.outputs[0]
    chosen = [of[token].logprob for token, of in zip(one.token_ids, one.logprobs, strict=True)]
    prompt = None
    if probabilities:
        ids = output.prompt_token_ids
        prompt = [of[token].logprob for token, of in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
    return {"tokens": list(one.token_ids), "logprobs": chosen, "prompt": prompt, "cached": output.num_cached_tokens}


def main() -> None:
    job = json.load(sys.stdin)
    if "tensor_parallel_size" not in job["engine"] and "pipeline_parallel_size" not in job["engine"]:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    began = perf_counter()
    engine = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 512, "seed": 0}
    llm = LLM(skip_tokenizer_init=True, disable_log_stats=False, **{**engine, **job["engine"]})
    started, rounds, rss = perf_counter() - began, [], []
    for requests in job["rounds"]:
        settings = [
            SamplingParams(
                temperature=0, max_tokens=each.get("max_tokens", 8), logprobs=0, ignore_eos=True, detokenize=False,
                prompt_logprobs=0 if each.get("prompt") else None,
            )
            for each in requests
        ]  # fmt: skip
        adapters = [LoRARequest("a", 1, each["lora"]) if "lora" in each else None for each in requests]
        prompts: Any = [{"prompt_token_ids": each["ids"]} for each in requests]
        more = {"lora_request": adapters} if any(adapters) else {}
        outputs = llm.generate(prompts, settings, use_tqdm=False, **more)
        rounds.append([answer(o, bool(each.get("prompt"))) for o, each in zip(outputs, requests, strict=True)])
        rss.append(psutil.Process().memory_info().rss)
    found = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    metrics = {name: value for name, value in found.items() if "intactkv" in name or "preemption" in name}
    Path(sys.argv[1]).write_text(json.dumps({"rounds": rounds, "started": started, "rss": rss, "metrics": metrics}))


if __name__ == "__main__":
    main()
