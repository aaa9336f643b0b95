"""Is rounding ever taken for a change of basis? What `basis` says of every method's checkpoint of one model.

What it does: quantizes MODEL by each of llm-compressor's methods at 8, 4, 3 and 2 bits and counts heads by relation.
Only the rotated rows should say "rotation", of values; as AWQ scales no values of grouped heads, nothing says "scale".
What it gives up: one model, and one setting of each method; AutoRound takes 10 steps a block.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer

from intactkv import bos
from intactkv.basis.compare import basis
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import prefixed_windows
from intactkv.quantizing import AWQ, GPTQ, RTN, AutoRound, Rotated, SmoothQuant, quantize
from intactkv.texts import read_text


def main(
    model: Annotated[str, typer.Option(help="The full-precision model: a folder or a name on the Hub.")] = str(MODEL),
) -> None:
    """Calibrate on the first half of the embedded text, print one markdown table."""
    full, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    prefix, text = bos(tokenizer), read_text(TEXT)
    ids = tokenizer(text[: len(text) // 2], add_special_tokens=False).input_ids
    learn = prefixed_windows(ids, prefix=prefix, window=128).ids
    print("| method | weights | keys | values | most left unexplained |\n|---|---|---|---|---:|")
    for bits in (8, 4, 3, 2):
        methods = {
            "RTN": RTN(bits),
            "RTN, asymmetric": RTN(bits, symmetric=False),
            "RTN, 4-bit activations": RTN(bits, activation_bits=4),
            "GPTQ": GPTQ(bits),
            "AWQ": AWQ(bits, grid=5),
            "SmoothQuant + RTN": SmoothQuant(RTN(bits)),
            "AutoRound": AutoRound(bits, iterations=10),
            "R1 R2 R4 + RTN": Rotated(RTN(bits)),
        }
        if bits == 8:
            del methods["AutoRound"]  # half a minute for what no other 8-bit row would tell
        for name, method in methods.items():
            with tempfile.TemporaryDirectory() as scratch:
                folder = quantize(full, Path(scratch) / "q", method=method, calibration=learn, prefix=prefix)
                found = basis(full, load_model(folder, dtype=torch.float32))
            kinds = [
                ", ".join(f"{n} {kind}" for kind, n in Counter(r.kind for r in found if r.part == part).items())
                for part in ("key", "value")
            ]
            print(f"| {name} | {bits} | {' | '.join(kinds)} | {max(r.residual for r in found):.1e} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
