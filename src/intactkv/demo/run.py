"""The whole story in one run, offline: pivots, capture, quantize, attach, measure, generate, write it down.

Everything is measured on the small model inside the package. What it shows is the method at work on that model;
it says nothing about the size of the effect on a large one.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from intactkv.artifact import IntactKV
from intactkv.capturing.live import capture
from intactkv.capturing.prefix import bos
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.checkpoint.source import checkpoint_digest
from intactkv.demo import MODEL, TEXT
from intactkv.error import IntactKVError
from intactkv.evaluating import Arm, Evaluation, evaluate, prefixed_windows
from intactkv.evaluating.plot import plot_kl_by_position
from intactkv.evaluating.words import arms_table, sentences
from intactkv.generate import continuation, encode
from intactkv.lines import from_json
from intactkv.pivots import first_token_pivots, measure
from intactkv.pivots.words import pivot_sentence, pivot_table
from intactkv.provenance import write_json
from intactkv.quantizing import RTN, quantize
from intactkv.screen import working
from intactkv.texts import read_text

BITS = (4, 3)
GROUP_SIZE = 128
WINDOW = 128
WRITTEN = {"bos.intactkv", "demo.json", "kl_by_position.png"}
PROMPT = "The river rises in the mountains and"


def run(out: Path, console: Console) -> None:
    """Run the demo and write `bos.intactkv`, `w4`, `w3`, `demo.json` and `kl_by_position.png` to `out`.

    Raises `IntactKVError` before any work where `out` holds anything but what an earlier demo wrote, and where
    llm-compressor or matplotlib is missing.
    """
    for package in ("llmcompressor", "matplotlib"):
        if find_spec(package) is None:
            raise IntactKVError(f"the demo needs {package}: pip install 'intactkv[demo]'")
    _check_ours(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, full = load_tokenizer(MODEL), load_model(MODEL, dtype=torch.float32)
    tokens = tokenizer(read_text(TEXT), add_special_tokens=False, verbose=False).input_ids
    prefix = bos(tokenizer)
    windows = prefixed_windows(tokens, prefix=torch.tensor(prefix), window=WINDOW)
    console.print(
        f"1. The embedded model: {full.num_parameters() / 1e6:.1f} M parameters, {len(tokens)} tokens of text"
    )
    pivots = first_token_pivots(measure(full, windows.ids[:8]))
    console.print(pivot_table(pivots, WINDOW))
    console.print(f"   {pivot_sentence(pivots, WINDOW)}", highlight=False)

    kv = capture(full, prefix, tokenizer=tokenizer)
    kv.save(out / "bos.intactkv")
    console.print(f"2. Captured from the full model: {kv}")

    quantized = {}
    for bits in BITS:
        with console.status(f"quantizing to {bits} bits"):
            quantized[bits] = _quantized(bits, out / f"w{bits}")
    names = ", ".join(str(out / f"w{bits}") for bits in BITS)
    console.print(f"3. Quantized by llm-compressor, round to nearest, groups of {GROUP_SIZE}: {names}")

    evaluation = _measure(full, quantized, kv, windows, console)
    figures = evaluation.to_dict()
    title = f"4. KL to the full model in nats, {figures['windows']} windows of {WINDOW} tokens"
    console.print(arms_table(figures, title=title))
    said = sentences(evaluation)
    for sentence in said:
        console.print(f"   {sentence}", highlight=False)

    texts = _continuations(full, quantized[3], kv, tokenizer)
    console.print(_texts_table(texts))
    picture = plot_kl_by_position(evaluation, out / "kl_by_position.png")
    written = write_json(
        out / "demo.json",
        {
            "pivots": [vars(p) for p in pivots],
            "provenance": dict(kv.provenance),
            "quantizer": {"method": "rtn", "bits": list(BITS), "group_size": GROUP_SIZE, "symmetric": False},
            "sentences": said,
            "texts": texts,
            "checkpoints": {f"w{bits}": checkpoint_digest(out / f"w{bits}") for bits in BITS},
            **figures,
        },
    )
    console.print(f"6. Written: {written}, {picture}, {out / 'bos.intactkv'}")


def _check_ours(out: Path) -> None:
    """Refuse a folder that holds other files, or checkpoints that are not the ones its `demo.json` tells of."""
    held = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if not held:
        return
    try:
        told = from_json((out / "demo.json").read_text(encoding="utf-8"))["checkpoints"]
        foreign = held - WRITTEN - set(told)
        foreign |= {name for name in held & set(told) if checkpoint_digest(out / name) != told[name]}
    except (OSError, ValueError, KeyError, TypeError, IntactKVError):
        foreign = held
    if foreign:
        raise IntactKVError(
            f"{out} holds {sorted(foreign)[0]}, which no finished demo wrote; the demo replaces only its own files: "
            "give --out another folder, or remove it"
        )


def _quantized(bits: int, folder: Path) -> PreTrainedModel:
    if folder.exists():  # an earlier demo's: `_check_ours`
        shutil.rmtree(folder)
    quantize(MODEL, folder, method=RTN(bits=bits, group_size=GROUP_SIZE, symmetric=False))
    return load_model(folder, dtype=torch.float32)


def _measure(
    full: PreTrainedModel, quantized: dict[int, PreTrainedModel], kv: IntactKV, windows: Any, console: Console
) -> Evaluation:
    arms = []
    for bits, model in quantized.items():
        arms += [Arm(f"{bits}-bit own", model), Arm(f"{bits}-bit intact", model, kv)]
    with working(console, "measuring") as show:
        return evaluate(full, arms, windows, progress=show)


def _continuations(
    full: PreTrainedModel, quantized: PreTrainedModel, kv: IntactKV, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """What each arm writes after the same prompt, greedily."""
    ids = encode(tokenizer, PROMPT, kv=kv)
    return {
        "full": continuation(full, tokenizer, ids, max_new_tokens=24),
        "3-bit own": continuation(quantized, tokenizer, ids, max_new_tokens=24),
        "3-bit intact": continuation(quantized, tokenizer, ids, kv=kv, max_new_tokens=24),
    }


def _texts_table(texts: dict[str, str]) -> Table:
    table = Table(title=f"5. “{PROMPT} …”")
    table.add_column("arm", no_wrap=True)
    table.add_column("goes on")
    for name, text in texts.items():
        table.add_row(name, " ".join(text.split()))
    return table
