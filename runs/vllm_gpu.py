"""The connector's core rows on a GPU, where attention and caches have half the precision: each row against two floors.

    python runs/vllm_gpu.py --out rows.json [--checkpoint FOLDER by `intactkv quantize`] [--cards 2]

Of the prompts' tokens behind the prefix, how far vLLM's log-probabilities are from transformers' in float32, mean over
tokens: with the KV from the intact model's (`intact`), without it from the plain model's (`floor`: what bfloat16, fp8
and other kernels cost), and with the KV from the plain model's (`effect`: what there is to get wrong). Then every
prompt is served again, without scores: greedy tokens that are the intact model's, and how many rows were written how.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "vllm"))

from engine import Reference, Served, ids, process, round_, with_kv

from intactkv import IntactKV, bos, capture, chat_prefix
from intactkv.artifact.hub import FILE
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.serving.launch import vllm_arguments

GRAPHS = {"enforce_eager": False}
ROWS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled, full and piecewise graphs": GRAPHS,
    "…, overwrite": {**GRAPHS, "mode": "overwrite"},
    "…, external": {**GRAPHS, "mode": "external"},
    "piecewise graphs": {**GRAPHS, "compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "full graphs, fp8 cache": {**GRAPHS, "kv_cache_dtype": "fp8"},
    "chunks of 16": {**GRAPHS, "max_num_batched_tokens": 16, "max_num_seqs": 8},
}
TWO = {"tensor parallel, 2 cards": {**GRAPHS, "tensor_parallel_size": 2}}


def made(folder: Path, prefix: str) -> Served:
    """The embedded model rounded to 3 bits, and its intact KV."""
    full, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)
    ids_ = bos(tokenizer) if prefix == "bos" else chat_prefix(tokenizer, system="You are a helpful assistant.")
    kv = capture(full, ids_, logits=False).save(folder / f"{prefix}.intactkv")
    round_(full, bits=3)
    full.save_pretrained(folder / "w3")
    tokenizer.save_pretrained(folder / "w3")
    return Served(MODEL, folder / "w3", kv, ids_)


def requests(prefix: list[int]) -> list[list[dict[str, Any]]]:
    """Prompts of the embedded text behind the prefix, and some without: scored, served, and served again."""
    text = load_tokenizer(MODEL)(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    prompts = [prefix + text[100 * i : 100 * i + 90] for i in range(12)] + [text[:60], ids(40, seed=1)]
    scored = [{"ids": each, "prompt": True, "max_tokens": 1} for each in prompts]
    served = [{"ids": each, "max_tokens": 12} for each in prompts]
    short = [{"ids": prefix, "max_tokens": 8}, {"ids": prefix + text[:1], "max_tokens": 8}]
    return [scored, served, served + short]


def apart(model: Path, kv: Path | None, asked: Any, told: Any, behind: int) -> float:
    """The mean difference of log-probabilities behind the prefix, over prompts that have it."""
    reference = Reference(model, kv)
    pairs = [(r, a) for r, a in zip(asked[0], told[0], strict=True)][:12]
    return float(torch.cat([reference.apart(r, a, behind=behind) for r, a in pairs]).mean())


class Engines:
    """What engines answered, each asked once: rows that differ in the connector's mode share the engine without it."""

    def __init__(self, folder: Path, cards: int) -> None:
        self._folder, self._known, self._lock, self._taking = folder, dict[str, Any](), Lock(), Lock()
        self._locks: dict[str, Lock] = {}
        self._cards: Queue[int] = Queue()
        self.compared = Lock()
        for card in range(cards):
            self._cards.put(card)

    def ask(self, engine: dict[str, Any], rounds: Any) -> Any:
        """The answers, or what the engine said before it died."""
        key = json.dumps([engine, rounds], default=str)
        with self._lock:
            lock = self._locks.setdefault(key, Lock())
        with lock:
            if key not in self._known:
                out = self._folder / f"{len(self._locks)}-{id(lock)}.json"
                env = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
                needed = engine.get("tensor_parallel_size", 1)
                with self._taking:  # or two that need several would each wait for the other's
                    cards = [self._cards.get() for _ in range(needed)]  # one engine on a card at a time
                if torch.cuda.is_available():
                    env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, cards))
                done = process(engine, rounds, out, **env)
                for card in cards:
                    self._cards.put(card)
                said = json.loads(out.read_text()) if out.exists() else (done.stdout + done.stderr)[-1500:]
                self._known[key] = said
            return self._known[key]


def row(name: str, settings: dict[str, Any], served: Served, engines: Engines) -> dict[str, Any]:
    """One engine's figures."""
    asked, settings = requests(served.prefix), {"dtype": "bfloat16", "block_size": 32, "max_model_len": 512, **settings}
    mode = settings.pop("mode", "auto")
    found: dict[str, Any] = {"row": name, "prefix": len(served.prefix)}
    overrides = vllm_arguments(served.model, served.kv, check=False)
    plain = {"model": served.model, **settings, **{k: v for k, v in overrides.items() if k == "hf_overrides"}}
    answers = {
        "with": engines.ask(with_kv(served.model, served.kv, mode=mode, **settings), asked),
        "without": engines.ask(plain, asked),
    }
    for arm, said in answers.items():
        if isinstance(said, str):
            return {**found, "error": f"{arm}: {said}"}
    with engines.compared:  # transformers loads one model at a time: two threads' loads end in one another's
        return {**found, **compared(asked, answers, served, mode)}


def compared(asked: Any, answers: dict[str, Any], served: Served, mode: str) -> dict[str, Any]:
    """The answers against transformers'."""
    found: dict[str, Any] = {}
    length = len(served.prefix)
    if mode != "external":  # by which scored prompts are not served
        told = answers["with"]["rounds"]
        found["intact"] = apart(served.model, served.kv, asked, told, length)
        found["effect"] = apart(served.model, None, asked, told, length)
        found["floor"] = apart(served.model, None, asked, answers["without"]["rounds"], length)
    intact = Reference(served.model, served.kv)
    want = [intact.greedy(each["ids"], 12) for each in asked[1][:12]]
    for arm, said in answers.items():
        same = [a == b for turn in said["rounds"][1:] for w, t in zip(want, turn, strict=False)
                for a, b in zip(w, t["tokens"], strict=True)]  # fmt: skip
        found[f"greedy tokens of the intact model, {arm}"] = sum(same) / len(same)
    found["rows"] = {k.removeprefix("vllm:intactkv_rows_"): v for k, v in answers["with"]["metrics"].items()}
    found["started, s"] = {arm: said["started"] for arm, said in answers.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--only", default="", help="rows in whose names this regular expression is found")
    parser.add_argument("--cards", type=int, default=1, help="engines that run at the same time, each on a card")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = {prefix: made(Path(scratch), prefix) for prefix in ("bos", "chat")}
        jobs = [(name, of, models["chat"]) for name, of in {**ROWS, **(TWO if given.cards > 1 else {})}.items()]
        jobs += [
            (f"[B], {name}", ROWS[name], models["bos"])
            for name in ("compiled, full and piecewise graphs", "full graphs, fp8 cache")
        ]
        if given.checkpoint is not None:
            kv = IntactKV.load(given.checkpoint / FILE)
            own = Served(MODEL, given.checkpoint, given.checkpoint / FILE, kv.ids.tolist())
            jobs.append(("int4 made for its prefix, graphs", GRAPHS, own))
        jobs, engines = [job for job in jobs if re.search(given.only, job[0])], Engines(Path(scratch), given.cards)
        with ThreadPoolExecutor(given.cards) as pool:
            for found in as_completed([pool.submit(row, *job, engines) for job in jobs]):
                rows.append(found.result())
                print(json.dumps(rows[-1]), flush=True)
                given.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
