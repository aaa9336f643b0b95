"""The cache's bits against KL and perplexity, for any quantized model: its own pivots rounded, or intact.

What it does: windows that begin with the artifact's prefix; a prompt at once, then the text's own tokens one by one
through a packed cache of each number of bits, so that every token reads the earlier ones as the cache stores them.
Arms of each number: the model's own prefix, rounded like every token, and the intact one. What it gives up: short
windows, since decoding is one forward a token.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from packed import decoded
from transformers import DynamicCache

from intactkv import IntactKV, PackedCache, Packing
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.evaluating import Evaluation, full_metrics, prefixed_windows, token_metrics
from intactkv.texts import read_text


def main(
    model: Annotated[str, typer.Argument(help="The quantized model.")],
    full: Annotated[str, typer.Option(help="The full-precision model it was quantized from.")],
    kv: Annotated[Path, typer.Option(help="The intact KV.")],
    data: Annotated[Path, typer.Option(help="A UTF-8 text to measure on.")],
    bits: Annotated[str, typer.Option(help="Bits of the cache.")] = "8,4,3,2",
    windows: Annotated[int, typer.Option(help="How many windows of text.")] = 30,
    window: Annotated[int, typer.Option(help="Tokens in one window, prefix included.")] = 128,
    prompt: Annotated[int, typer.Option(help="How many of them are given at once.")] = 48,
    device: Annotated[str, typer.Option(help="Where models run.")] = "cpu",
) -> None:
    """Measure own and intact prefix at each number of bits and print a markdown table."""
    artifact = IntactKV.load(kv)
    tokens = load_tokenizer(full)(read_text(data), add_special_tokens=False, verbose=False).input_ids
    ids = prefixed_windows(tokens, prefix=artifact.ids, window=window).ids[:windows].to(device)
    with torch.inference_mode():
        reference = load_model(full).to(device)(ids).logits[:, prompt - 1 : -1].float()
    quantized, labels, began = load_model(model).to(device), ids[:, prompt:], perf_counter()
    metrics = {"full": full_metrics(reference, labels)}
    pairs = []
    for width in ("16", *bits.split(",")):
        for arm, given in (("own", None), ("intact", artifact)):

            def make(m, width=width):
                return (
                    DynamicCache(config=m.config)
                    if width == "16"
                    else PackedCache(m.config, Packing(int(width), keys="per_token"))
                )

            logits = decoded(quantized, make, ids, prompt=prompt, kv=given)
            metrics[f"{width} {arm}"] = token_metrics(reference, logits.float(), labels)
        pairs.append((f"{width} own", f"{width} intact"))
        print(f"{width} bits ({perf_counter() - began:.0f} s)", file=sys.stderr)
    print_table(Evaluation(metrics, {}, tuple(pairs), perf_counter() - began))


def print_table(found: Evaluation) -> None:
    """One row for each number of bits and arm."""
    print("| cache bits | prefix | KL mean [95 %] | 99.9 % | same top-1, % | perplexity | KL removed, % [95 %] |")
    print("|---:|---|---|---:|---:|---:|---|")
    intervals = found.intervals()
    print(f"| – | full model | 0 | 0 | 100 | {intervals['full']['perplexity'].value:.3f} | |")
    for own, intact in found.pairs:
        for name in (own, intact):
            row, (width, arm) = intervals[name], name.split()
            gap = found.gap_closed(own=own, intact=intact)
            closed = f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]" if name == intact else ""
            kl = row["kl_mean"]
            print(
                f"| {width} | {arm} | {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}] | {row['kl_99_9'].value:.3f} "
                f"| {row['same_top1_percent'].value:.1f} | {row['perplexity'].value:.3f} | {closed} |"
            )


if __name__ == "__main__":
    typer.run(main)
