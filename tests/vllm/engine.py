"""What the vLLM tests share: an engine in a process of its own, models, and transformers' answers to measure it by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from intactkv import IntactKV, attach, capture
from intactkv.serving.launch import vllm_arguments

WORKER = Path(__file__).parent / "worker.py"
VOCAB = 512


@dataclass(frozen=True)
class Answers:
    """What an engine answered, round by round, how long it took to start, and what its counters say."""

    rounds: list[list[dict[str, Any]]]
    started: float
    rss: list[int]  # bytes after each round
    metrics: dict[str, float]
    log: str

    @property
    def rows(self) -> dict[str, float]:
        """Rows of the intact prefix that were written, by how."""
        return {name.removeprefix("vllm:intactkv_rows_"): n for name, n in self.metrics.items() if "intactkv" in name}


def process(engine: dict[str, Any], rounds: list[list[dict[str, Any]]], out: Path, **env: str) -> Any:
    """The finished process of an engine that got `rounds` of requests one after the other."""
    job = json.dumps({"engine": {name: str(v) if isinstance(v, Path) else v for name, v in engine.items()},
                      "rounds": rounds})  # fmt: skip
    return subprocess.run(
        [sys.executable, str(WORKER), str(out)], input=job, capture_output=True, text=True, timeout=900,
        env={**os.environ, **env},
    )  # fmt: skip


def serve(engine: dict[str, Any], rounds: list[list[dict[str, Any]]], tmp_path: Path, **env: str) -> Answers:
    """The answers of an engine, which must not fail."""
    out = tmp_path / f"answers-{len(list(tmp_path.iterdir()))}.json"
    done = process(engine, rounds, out, **env)
    assert out.exists(), (done.stdout + done.stderr)[-6000:]
    return Answers(**json.loads(out.read_text()), log=done.stdout + done.stderr)


def with_kv(model: Path, kv: Path, *, mode: str = "auto", **engine: Any) -> dict[str, Any]:
    """An engine that serves `model` with `kv`."""
    return {"model": model, **vllm_arguments(model, kv, mode=mode, check=False), **engine}


@dataclass(frozen=True)
class Served:
    """A full model and its 3-bit form on disk, and the intact KV of the full one."""

    full: Path
    model: Path
    kv: Path
    prefix: list[int]

    @classmethod
    def make(cls, folder: Path, length: int, **more: Any) -> Served:
        """A tiny Llama whose weights are large enough that every key and value counts."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.1, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        full = LlamaForCausalLM(config).eval()
        full.save_pretrained(folder / "full")
        prefix = ids(length, seed=5)
        kv = capture(full, prefix, logits=False)
        round_(full, bits=3)
        full.save_pretrained(folder / "w3")
        kv.save(folder / "kv.safetensors")
        return cls(folder / "full", folder / "w3", folder / "kv.safetensors", prefix)

    def engine(self, **settings: Any) -> dict[str, Any]:
        """An engine that serves the 3-bit model with the intact KV."""
        return with_kv(self.model, self.kv, **settings)


def ids(count: int, *, seed: int) -> list[int]:
    """Random token ids."""
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def round_(model: PreTrainedModel, *, bits: int) -> None:
    """Round every Linear's rows but the head's, symmetrically."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = module.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            module.weight.copy_((module.weight / scale).round() * scale)


class Reference:
    """transformers' answers, with the intact KV attached or plain."""

    def __init__(self, model: Path, kv: Path | None, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.kv = None if kv is None else IntactKV.load(kv)

    @torch.no_grad()
    def _log_p(self, tokens: list[int]) -> torch.Tensor:
        """Of each token but the first."""
        batch = torch.tensor([tokens])
        if self.kv is None:
            logits = self.model(batch).logits
        else:
            with attach(self.model, self.kv, check=False), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of prompts that share nothing, or not all, of the prefix
                logits = self.model(batch).logits
        return logits[0].float().log_softmax(-1)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The next tokens."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self._log_p(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def apart(self, request: dict[str, Any], found: dict[str, Any], *, behind: int) -> torch.Tensor:
        """How far the log-probabilities of a scored prompt's tokens behind the first `behind` are apart."""
        ids = request["ids"]
        own = self._log_p(ids)[torch.arange(len(ids) - 1), ids[1:]]
        return (own - torch.tensor(found["prompt"])).abs()[behind:]

    def check(self, request: dict[str, Any], found: dict[str, Any], *, within: float, same: bool = True) -> float:
        """The largest difference of log-probabilities; fails above `within`, or for another greedy token."""
        prompt, tokens = request["ids"], found["tokens"]
        log_p = self._log_p(prompt + tokens[:-1])
        from_prompt = log_p[len(prompt) - 1 :]
        want = from_prompt[torch.arange(len(tokens)), tokens]
        worst = float((want - torch.tensor(found["logprobs"])).abs().max())
        if found["prompt"]:
            own = log_p[torch.arange(len(prompt) - 1), prompt[1:]]
            worst = max(worst, float((own - torch.tensor(found["prompt"])).abs().max()))
        assert worst <= within, f"{worst} for a prompt of {len(prompt)} tokens"
        if same:
            assert tokens == from_prompt.argmax(-1).tolist()
        return worst
