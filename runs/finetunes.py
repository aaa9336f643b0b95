"""How far off must another fine-tune be for `basis`, `align` and the door to notice, and what harm is done by then?

What it does: fine-tunes MODEL for some hundred steps of AdamW on the tail of the embedded text (or TEXT), once for each
learning rate; measures what `basis` measures, the change of the input embeddings, and the closest layer at the door,
unrounded and rounded to 3 bits; then the harm: KL to the fine-tune of its 3-bit form with its own prefix and
with the *base's* intact [BOS]. Rounding the base itself to 8…2 bits gives the rows to compare with.
What it gives up: one model, one text, full fine-tuning only; rounding is simulated, to nearest in groups of 128.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from intactkv import IntactKV, IntactKVError, bos, capture
from intactkv.basis.compare import align, basis, embedding_change, own_errors
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.doctor.simulate import rounded_model
from intactkv.evaluating import Arm, evaluate, prefixed_windows
from intactkv.texts import read_text

RATES = (1e-5, 1e-4, 1e-3, 3e-3)
HEADER = (
    "| model | embeddings changed | median K, V unexplained | worst K, V | kinds | align | door K, V "
    "| KL own | KL with the base's KV | closed, % [95 %] |\n|---|---:|---|---|---|---|---|---:|---:|---|"
)


def fine_tuned(base: PreTrainedModel, windows: Tensor, *, rate: float, steps: int) -> PreTrainedModel:
    """A copy of `base` after `steps` steps of AdamW at a constant `rate`, 4 windows each."""
    model, order = copy.deepcopy(base).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        ids = windows[torch.randint(len(windows), (4,), generator=order)]
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main(
    model: Annotated[str, typer.Option(help="The base: a folder or a name on the Hub.")] = str(MODEL),
    text: Annotated[Path | None, typer.Option(help="Fine-tune on this text; by default the embedded 2nd half.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of fine-tuning.")] = 200,
) -> None:
    """Print one markdown table."""
    base, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    prefix, own = bos(tokenizer), read_text(TEXT)
    half = len(own) // 2

    def cut(part: str) -> Any:
        return prefixed_windows(tokenizer(part, add_special_tokens=False).input_ids, prefix=prefix, window=128)

    measure = cut(own[:half])
    learn = cut(own[half:] if text is None else read_text(text)[: 50 * half]).ids
    kv = capture(base, prefix)
    print(f"{steps} steps; {len(learn)} windows to learn from, {len(measure)} to measure on\n\n{HEADER}", flush=True)
    for bits in (8, 4, 3, 2):
        print(_row(f"the base, {bits} bits", base, base, rounded_model(base, bits=bits), kv, measure), flush=True)
    for rate in RATES:
        tuned = fine_tuned(base, learn, rate=rate, steps=steps)
        for bits in (None, 3):
            served = tuned if bits is None else rounded_model(tuned, bits=bits)
            name = f"tuned at {rate:.0e}" + ("" if bits is None else f", {bits} bits")
            print(_row(name, base, tuned, served, kv, measure), flush=True)


def _row(
    name: str, base: PreTrainedModel, tuned: PreTrainedModel, served: PreTrainedModel, kv: IntactKV, measure: Any
) -> str:
    """One line: what is measured between `base` and `served`; the harm is against `tuned`, which `served` should be."""
    change = embedding_change(base, served)
    try:
        relations = basis(base, served)
        parts = {p: torch.tensor([r.residual for r in relations if r.part == p]) for p in ("key", "value")}
        median, worst = (", ".join(f"{f(t):.1e}" for t in parts.values()) for f in (torch.median, torch.max))
        kinds = ", ".join(sorted({r.kind for r in relations}))
        align(kv, relations)
        verdict = "passed"
    except IntactKVError as error:
        verdict = "refused"
        if "embeddings" in str(error):
            median = worst = kinds = "–"
    door = ", ".join(f"{min(by_layer.values()):.2f}" for by_layer in own_errors(served, kv).values())
    if served is tuned:
        return f"| {name} | {change:.1e} | {median} | {worst} | {kinds} | {verdict} | {door} | – | – | – |"
    found = evaluate(tuned, [Arm("own", served), Arm("base's", served, kv)], measure, block_mse=False)
    kl = {row["arm"]: f"{row['kl_mean']:.4f}" for row in found.table()}
    gap = found.gap_closed(own="own", intact="base's")
    closed = f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
    cells = [name, f"{change:.1e}", median, worst, kinds, verdict, door, kl["own"], kl["base's"], closed]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
