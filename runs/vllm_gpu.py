"""The connector's core rows on a GPU, where attention and caches have half the precision: each row against two floors.

    python runs/vllm_gpu.py --out rows.json [--checkpoint FOLDER by `intactkv quantize`] [--two]   (--two: two cards)

Of the prompts' tokens behind the prefix, how far vLLM's log-probabilities are from transformers' in float32, mean over
tokens: with the KV from the intact model's (`intact`), without it from the plain model's (`floor`: what bfloat16, fp8
and other kernels cost), and with the KV from the plain model's (`effect`: what there is to get wrong). Then every
prompt is served again, without scores: greedy tokens that are the intact model's, and how many rows were written how.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "vllm"))

from engine import Reference, Served, ids, process, round_, with_kv

from intactkv import IntactKV, bos, capture, chat_prefix
from intactkv.artifact.hub import FILE
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT

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


def row(name: str, settings: dict[str, Any], served: Served, folder: Path) -> dict[str, Any]:
    """One engine's figures."""
    asked, settings = requests(served.prefix), {"dtype": "bfloat16", "block_size": 16, "max_model_len": 512, **settings}
    mode = settings.pop("mode", "auto")
    found: dict[str, Any] = {"row": name, "prefix": len(served.prefix)}
    scored = asked if mode != "external" else [asked[1], asked[1], asked[2]]
    answers = {}
    for arm, engine in (("with", with_kv(served.model, served.kv, mode=mode, **settings)),
                        ("without", {"model": served.model, **settings})):  # fmt: skip
        out = folder / f"{len(list(folder.iterdir()))}.json"
        done = process({**engine, "gpu_memory_utilization": 0.3}, scored, out, VLLM_USE_FLASHINFER_SAMPLER="0")
        if not out.exists():
            return {**found, "error": (done.stdout + done.stderr)[-1500:]}
        answers[arm] = json.loads(out.read_text())
    length = len(served.prefix)
    if mode != "external":
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
    parser.add_argument("--two", action="store_true")
    parser.add_argument("--only", help="rows whose names hold this")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = {prefix: made(Path(scratch), prefix) for prefix in ("bos", "chat")}
        jobs = [(name, of, models[p]) for p in models for name, of in {**ROWS, **(TWO if given.two else {})}.items()]
        if given.checkpoint is not None:
            kv = IntactKV.load(given.checkpoint / FILE)
            own = Served(MODEL, given.checkpoint, given.checkpoint / FILE, kv.ids.tolist())
            jobs.append(("int4 made for its prefix, graphs", GRAPHS, own))
        for i, (name, settings, served) in enumerate(jobs):
            if given.only and given.only not in name:
                continue
            folder = Path(scratch) / str(i)
            folder.mkdir()
            rows.append(row(name, settings, served, folder))
            print(json.dumps(rows[-1]), flush=True)
            given.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
