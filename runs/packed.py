"""Quality of low-bit KV caches: first tokens rounded, kept or intact, at 2, 3 and 4 bits, and transformers' own caches.

What it does: cuts a text into windows that begin with [BOS], gives each window's first tokens as a prompt, decodes the
rest token by token with the text's own tokens through each kind of cache, and compares every next-token distribution
with the full model's. Decoding is real: every token reads the earlier ones as the cache stores them. Two groups of
arms: the full model's weights, and a quantized checkpoint's (by default rounded to 3 bits here), with the model's own
first tokens or the full model's intact [BOS]. What it gives up: short windows, since decoding is one forward a token.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache

from intactkv import IntactKV, PackedCache, Packing, attach, bos, read_packed
from intactkv.checkpoint.load import load_model_on, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import Evaluation, Interval, prefixed_windows
from intactkv.evaluating.metrics import TokenMetrics, full_metrics, token_metrics
from intactkv.quantizing import PREFIX_KV, RTN, quantize
from intactkv.texts import read_text

SCHEMES = {
    "per token": Packing(keys="per_token"),
    "per token, residual 11": Packing(residual=11, keys="per_token"),
    "per token, residual 32": Packing(residual=32, keys="per_token"),
    "per token, Hadamard": Packing(hadamard=True, keys="per_token"),
    "KIVI keys, residual 32": Packing(keys="per_channel", residual=32),
}
SPANS = 6  # of decoded positions, in the table by position
Make = Callable[[PreTrainedModel], Cache]
MadeArm = tuple[str, PreTrainedModel, Make, IntactKV | None]  # name, model, how to make its cache, what to attach


def main(
    model: Annotated[str, typer.Option(help="The full-precision model.")] = str(MODEL),
    quantized: Annotated[Path | None, typer.Option(help="Its checkpoint with a prefix.intactkv of [BOS].")] = None,
    text: Annotated[Path, typer.Option(help="A UTF-8 text to measure on.")] = TEXT,
    out: Annotated[Path | None, typer.Option(help="Write the tables here instead of printing them.")] = None,
    bits: Annotated[str, typer.Option(help="Bits of the cache.")] = "4,3,2",
    windows: Annotated[int, typer.Option(help="How many windows of text.")] = 30,
    window: Annotated[int, typer.Option(help="Tokens in one window, prefix included.")] = 128,
    prompt: Annotated[int, typer.Option(help="How many of them are given at once.")] = 32,
    schemes: Annotated[str, typer.Option(help="Kinds of cache to measure, divided by semicolons; all if empty.")] = "",
    kept: Annotated[str, typer.Option(help="How many first tokens each kind keeps.")] = "0,1,4,16",
    unbiased: Annotated[bool, typer.Option(help="Beside each, one read with `unbiased=True`.")] = False,
    device: Annotated[str, typer.Option(help="Where models run.")] = "cpu",
) -> None:
    """Measure every kind of cache and print three markdown tables."""
    full, tokenizer = load_model_on(model, device, dtype=torch.float32), load_tokenizer(model)
    tokens = tokenizer(read_text(text), add_special_tokens=False, verbose=False).input_ids
    ids = prefixed_windows(tokens, prefix=bos(tokenizer), window=window).ids[:windows].to(full.device)
    with torch.inference_mode():
        reference = full(ids).logits[:, prompt - 1 : -1]
    began, metrics = perf_counter(), {"full": full_metrics(reference, ids[:, prompt:])}
    failures: list[str] = []  # of caches that are not ours
    chosen = [name.strip() for name in schemes.split(";")] if schemes else list(SCHEMES)
    widths, counts = ([int(number) for number in text.split(",")] for text in (bits, kept))
    made = list(arms(full, widths, chosen, counts, unbiased))
    if not schemes:
        with tempfile.TemporaryDirectory() as scratch:
            if quantized is None:
                quantized = quantize(
                    model, Path(scratch) / "w3", method=RTN(3, "auto", symmetric=False), prefix=bos(tokenizer)
                )
            rounded = load_model_on(quantized, device, dtype=torch.float32)
            kv = IntactKV.load(quantized / PREFIX_KV)
        made += [*stock_arms(full, widths), *low_bit_weights_arms(rounded, kv, widths)]
    for name, which, make, intact in made:
        try:
            logits = decoded(which, make, ids, prompt=prompt, kv=intact, unbiased="unbiased" in name)
        except (RuntimeError, ValueError) as error:  # it has no such bits, or not this model's kinds of layers
            if "QuantizedCache" not in name:
                raise
            failures.append(f"{name} (bits first) does not run: {error}\n")
            continue
        metrics[name] = token_metrics(reference, logits, ids[:, prompt:]).map(Tensor.cpu)
        print(f"{name} ({perf_counter() - began:.0f} s)", file=sys.stderr)
    metrics["full"] = metrics["full"].map(Tensor.cpu)
    found = Evaluation(metrics, {}, (), perf_counter() - began)
    head = f"{len(ids)} windows of {window} tokens, the first {prompt} given at once, the others one by one.\n\n"
    tables = [full_weights_table(found, full), *failures, position_table(found, prompt)]
    if not schemes:
        tables.append(low_bit_weights_table(found))
    written = head + "\n".join(tables)
    sys.stdout.write(written) if out is None else out.write_text(written, encoding="utf-8")


def packed(packing: Packing) -> Make:
    """Our cache."""
    return lambda model: PackedCache(model.config, packing)


def arms(full: Any, widths: list[int], schemes: list[str], kept: list[int], unbiased: bool) -> Iterator[MadeArm]:
    """Our caches under the full model's weights."""
    for bits in widths:
        for scheme, also, keep in product(schemes, ("", ", unbiased") if unbiased else ("",), kept):
            packing = replace(SCHEMES[scheme], bits=bits, keep=keep)
            yield f"{bits} {scheme}{also} {keep}", full, packed(packing), None


def stock_arms(full: Any, widths: list[int]) -> Iterator[MadeArm]:
    """transformers' own caches, of backends that are installed."""
    for backend, module, axis, known in (("quanto", "optimum", 0, (4, 2)), ("HQQ", "hqq", 1, (4, 3, 2))):
        for bits in set(known) & set(widths) if find_spec(module) else ():
            yield f"{bits} QuantizedCache {backend}", full, stock(backend, bits, axis), None


def low_bit_weights_arms(rounded: Any, kv: IntactKV, widths: list[int]) -> Iterator[MadeArm]:
    """The checkpoint's weights, with its own prefix or the intact one."""
    yield "w 16 own", rounded, lambda model: DynamicCache(config=model.config), None
    yield "w 16 intact", rounded, lambda model: DynamicCache(config=model.config), kv
    for bits in widths:
        for scheme in ("per token", "KIVI keys, residual 32"):
            packing = replace(SCHEMES[scheme], bits=bits)
            yield f"w {bits} rounded, {scheme}", rounded, packed(packing), None
            yield f"w {bits} own, {scheme}", rounded, packed(replace(packing, keep=1)), None
            yield f"w {bits} intact, {scheme}", rounded, packed(packing), kv


def stock(backend: str, bits: int, axis: int) -> Make:
    """transformers' quantized cache with a residual of 32 tokens, otherwise as it comes.

    It holds 0 to 31 newest tokens in full precision, 15.5 on average; ours with `residual=11` 11 to 21, 16 on average.
    """
    return lambda model: QuantizedCache(
        backend.lower(), model.config, nbits=bits, axis_key=axis, axis_value=axis, residual_length=32
    )


@torch.inference_mode()
def decoded(
    model: PreTrainedModel, make: Make, ids: Tensor, *, prompt: int, kv: IntactKV | None, unbiased: bool = False
) -> Tensor:
    """Logits that predict tokens `prompt` to the end, one forward for the prompt and one for each later token."""
    cache = make(model)
    with ExitStack() as stack:
        if kv is not None:
            stack.enter_context(attach(model, kv))
        if isinstance(cache, PackedCache):
            stack.enter_context(read_packed(model, unbiased=unbiased))
        out = [model(ids[:, :prompt], past_key_values=cache, use_cache=True).logits[:, -1:]]
        for at in range(prompt, ids.shape[1] - 1):
            out.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(out, 1)


def full_weights_table(found: Evaluation, model: PreTrainedModel) -> str:
    """Gain for each kept token against its cost, full-precision weights."""
    config, intervals = model.config, found.intervals()
    bytes_each = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    lines = [
        "Full-precision weights; KL in nats to the full model with a full-precision cache. A kept token costs "
        f"{bytes_each} bytes a row in bfloat16.\n",
        "| bits | cache | kept | KL mean [95 %] | median | 99 % | 99.9 % | first, last quarter | same top-1, % | "
        "KL removed, % [95 %] | a kept token, % |",
        "|---|---|---:|---|---:|---:|---:|---|---:|---|---:|",
    ]
    for name, row in intervals.items():
        if name == "full" or name.startswith("w "):
            continue
        bits, _, scheme = name.partition(" ")
        scheme, _, keep = scheme.rpartition(" ") if scheme[-1].isdigit() else (scheme, "", "–")
        gain = each = "–"
        if scheme.endswith(", unbiased"):  # against the same cache read plainly
            gain = percent(found.gap_closed(own=f"{bits} {scheme.removesuffix(', unbiased')} {keep}", intact=name))
        elif keep not in ("–", "0") and f"{bits} {scheme} 0" in intervals:
            closed = found.gap_closed(own=f"{bits} {scheme} 0", intact=name)
            gain, each = percent(closed), f"{100 * closed.value / int(keep):+.1f}"
        lines.append(f"| {bits} | {scheme} | {keep} | {cells(found.metrics[name], row)} | {gain} | {each} |")
    return "\n".join(lines) + "\n"


def position_table(found: Evaluation, prompt: int) -> str:
    """Mean KL over spans of decoded positions, every arm with none, one or four tokens kept."""
    length = next(iter(found.metrics.values())).kl.shape[1]
    edges = [length * i // SPANS for i in range(SPANS + 1)]
    spans = [f"{prompt + a}–{prompt + b - 1}" for a, b in pairwise(edges)]
    lines = [
        "Mean KL by the predicted token's position, full-precision weights.\n",
        f"| bits, cache, kept | {' | '.join(spans)} |",
        "|---" + "|---:" * SPANS + "|",
    ]
    for name, metrics in found.metrics.items():
        if name != "full" and not name.startswith("w ") and not name.endswith(" 16"):
            lines.append(f"| {name} | {' | '.join(f'{metrics.kl[:, a:b].mean():.4f}' for a, b in pairwise(edges))} |")
    return "\n".join(lines) + "\n"


def low_bit_weights_table(found: Evaluation) -> str:
    """Rounded, own and intact [BOS] under the checkpoint's weights."""
    intervals = found.intervals()
    lines = [
        "The checkpoint's weights; [BOS] rounded with the others, the model's own in full precision, or the full "
        "model's intact.\n",
        "| cache bits | [BOS], cache | KL mean [95 %] | median | 99 % | 99.9 % | first, last quarter | same top-1, % | "
        "KL removed, % [95 %] |",
        "|---|---|---|---:|---:|---:|---|---:|---|",
    ]
    for name, row in intervals.items():
        if name.startswith("w "):
            _, bits, kind = name.split(" ", 2)
            base = "w 16 own" if bits == "16" else f"w {bits} rounded, {kind.partition(', ')[2]}"
            gain = "–" if name == base else percent(found.gap_closed(own=base, intact=name))
            lines.append(f"| {bits} | {kind} | {cells(found.metrics[name], row)} | {gain} |")
    return "\n".join(lines) + "\n"


def cells(metrics: TokenMetrics, row: dict[str, Interval]) -> str:
    """KL with its interval, its tail, its course over the decoded positions, and same-top-1."""
    kl, quarter = row["kl_mean"], metrics.kl.shape[1] // 4
    course = f"{metrics.kl[:, :quarter].mean():.4f}, {metrics.kl[:, -quarter:].mean():.4f}"
    tail = " | ".join(f"{row[name].value:.4f}" for name in ("kl_median", "kl_99", "kl_99_9"))
    mean = f"{kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}]"
    return f"{mean} | {tail} | {course} | {row['same_top1_percent'].value:.1f}"


def percent(part: Interval) -> str:
    """A share with its interval."""
    return f"{100 * part.value:+.1f} [{100 * part.low:+.1f}, {100 * part.high:+.1f}]"


if __name__ == "__main__":
    typer.run(main)
