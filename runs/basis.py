"""Does the basis matter? Real AWQ on a multi-head form of one model: own, raw, aligned and in-basis prefix, KL each.

What it does: repeats the key/value heads of MODEL until there are as many as query heads, which computes exactly the
same (checked), so that AWQ scales v_proj against o_proj. Quantizes that by AWQ and measures [BOS] with the quantized
model's own keys and values, with the full model's as they are, with the full model's brought into the quantized
model's basis by what `basis` finds in the checkpoint, and with those that `quantize` captured on the way.
What it gives up: one model, one prefix, one text; the intervals are over windows of that text only.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from intactkv import IntactKV, bos, capture
from intactkv.basis.compare import align, basis, describe
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import Arm, Interval, Windows, evaluate, prefixed_windows
from intactkv.quantizing import AWQ, PREFIX_KV, quantize
from intactkv.texts import read_text

HEADER = "| bits | prefix | KL mean [95 %] | KL closed, % [95 %] | perplexity |\n|---|---|---|---|---:|"


@torch.no_grad()
def multi_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with every key/value head stored once for each query head that reads it."""
    config = copy.deepcopy(model.config)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    config.num_key_value_heads = heads

    def repeated(weight: Tensor) -> Tensor:
        rows = weight.view(shared, len(weight) // shared, -1)
        return rows.repeat_interleave(heads // shared, 0).reshape(-1, *weight.shape[1:])

    weights = {
        name: repeated(t) if ".k_proj." in name or ".v_proj." in name else t for name, t in model.state_dict().items()
    }
    other = AutoModelForCausalLM.from_config(config).to(model.dtype).eval()
    other.load_state_dict(weights)
    return other


def main(
    model: Annotated[str, typer.Option(help="The full-precision model: a folder or a name on the Hub.")] = str(MODEL),
    window: Annotated[int, typer.Option(help="Tokens in one window, prefix included.")] = 128,
) -> None:
    """Calibrate on the first half of the embedded text, measure on the second, print one markdown table."""
    grouped, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    prefix, text = bos(tokenizer), read_text(TEXT)
    middle = text.index(" ", len(text) // 2)

    def cut(part: str) -> Windows:
        return prefixed_windows(tokenizer(part, add_special_tokens=False).input_ids, prefix=prefix, window=window)

    learn, measure = cut(text[:middle]).ids, cut(text[middle:])
    full: Any = multi_head(grouped)
    with torch.no_grad():
        off = (full(measure.ids[:2]).logits - grouped(measure.ids[:2]).logits).abs().max()
    print(f"{len(measure)} windows of {window} tokens; logits of both forms differ by {off:.0e} at most\n\n{HEADER}")
    raw = capture(full, prefix)
    for bits in (4, 3, 2):
        with tempfile.TemporaryDirectory() as scratch:
            folder = quantize(full, Path(scratch) / "q", method=AWQ(bits), calibration=learn, prefix=prefix)
            quantized, within = load_model(folder, dtype=torch.float32), IntactKV.load(folder / PREFIX_KV)
        relations = basis(full, quantized)
        kvs = {"raw": raw, "aligned": align(raw, relations), "captured in its basis": within}
        # The raw one is measured in spite of the door, which may well refuse it: the harm is what is asked for.
        arms = [Arm("own", quantized), *(Arm(name, quantized, kv) for name, kv in kvs.items())]
        found = evaluate(full, arms, measure, block_mse=False)
        rows, intervals = {row["arm"]: row for row in found.table()}, found.intervals()
        for arm in arms:
            gap = "–" if arm.kv is None else _text(found.gap_closed(own="own", intact=arm.name), 100, 1)
            kl, perplexity = _text(intervals[arm.name]["kl_mean"], 1, 4), rows[arm.name]["perplexity"]
            print(f"| {bits} | {arm.name} | {kl} | {gap} | {perplexity:.2f} |", flush=True)
        for part in (0, 1):
            error = {name: max(_off(kv, within, part)) for name, kv in kvs.items()}
            print(f"<!-- {bits} bits, {'KV'[part]}: off the captured by at most {error}; {describe(relations)} -->")


def _off(kv: IntactKV, other: IntactKV, part: int) -> list[float]:
    return [float((kv.layers[i][part] - p[part]).norm() / p[part].norm()) for i, p in other.layers.items()]


def _text(value: Interval, times: float, digits: int) -> str:
    return f"{times * value.value:.{digits}f} [{times * value.low:.{digits}f}, {times * value.high:.{digits}f}]"


if __name__ == "__main__":
    typer.run(main)
