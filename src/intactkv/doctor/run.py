"""`intactkv doctor`: load, examine, say it on one screen, and write the page and its figures."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from intactkv.checkpoint.load import load_compared, load_full, load_tokenizer
from intactkv.checkpoint.source import refuse_quantized
from intactkv.checkpoint.stream import check_at_hand, larger_than_memory, load_streamed, streamed
from intactkv.demo import MODEL, TEXT
from intactkv.doctor.examine import Examination, examine, to_dict
from intactkv.doctor.html import page
from intactkv.doctor.simulate import GROUP_SIZE, round_streamed_, rounded_model
from intactkv.doctor.words import (
    Names,
    budget_sentence,
    forecast_sentence,
    layer_sentence,
    pivot_sentences,
    prefix_sentence,
    verdict_sentences,
)
from intactkv.error import IntactKVError
from intactkv.evaluating.verdict import RULE
from intactkv.evaluating.words import arms_table
from intactkv.files import check_outputs, write_atomically
from intactkv.pivots.discover import first_of_chat, opening
from intactkv.provenance import made_by, write_json
from intactkv.texts import first_tokens, read_text

BITS = (4, 3)
MOST_TOKENS = 200_000  # of the text, of which 70 % are held out: many times what is measured on


def run(
    model: str | None,
    out: Path,
    console: Console,
    *,
    quantized: str | None,
    data: Path | None,
    window: int,
    stream: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Examination:
    """Examine `model` (None: the embedded one), print a summary and write `out` and its figures beside it as JSON.

    Without `quantized`, two models are simulated, "4-bit" and "3-bit". All are streamed where `stream` says so, by
    default where one takes more than a quarter of the free memory. Raises `IntactKVError` before any work where `out`
    cannot be written or matplotlib is missing.
    """
    _check_out(out)
    source = MODEL if model is None else model
    tokenizer = load_tokenizer(source)
    if stream is None:
        stream = larger_than_memory(source) or (quantized is not None and larger_than_memory(quantized))
    for each in (source, quantized) if stream else ():
        if each is not None:
            check_at_hand(each, "the doctor")
    with console.status(f"loading {source}"):
        full = load_full(source, device, dtype=torch.float32 if model is None else dtype, stream=stream)
        refuse_quantized(full.config)
        models = _models(full, source, quantized)
    tokens = first_tokens(tokenizer, read_text(data or TEXT), MOST_TOKENS)
    with console.status("examining") as status:
        begin = {"start": opening(tokenizer), "chat": first_of_chat(tokenizer)}
        found = examine(full, models, tokens, **begin, window=window, step=status.update)
        status.update("drawing")
        name = names(tokenizer)
        shown = "the embedded model" if model is None else model
        how = quantized or f"simulated by rounding to nearest, groups of {GROUP_SIZE}"
        html = page(found, title=f"intactkv doctor: {shown}", name=name, made_by={"quantized": how, **made_by()})
    write_atomically(out, html.encode())
    written = write_json(out.with_suffix(".json"), {"model": str(shown), "quantized": how, **to_dict(found)})
    figures = found.evaluation.to_dict()
    title = f"{figures['windows']} held-out windows of {figures['window']} tokens, {figures['scored_tokens']} scored"
    console.print(arms_table(figures, title=title))
    console.print(f"Quantized: {how}.", highlight=False, markup=False)
    said = [*pivot_sentences(found, name), prefix_sentence(found, name), budget_sentence(found), layer_sentence(found)]
    said += [forecast_sentence(found)] if found.forecast else []
    for sentence in [*said, *found.missing]:
        console.print(sentence, highlight=False, markup=False)
    for sentence in verdict_sentences(found):
        console.print(sentence, style="bold", highlight=False, markup=False)
    console.print(RULE, style="dim", highlight=False)
    console.print(f"Written: {out}, {written}", highlight=False)
    return found


def names(tokenizer: PreTrainedTokenizerBase) -> Names:
    """Writes a token id as its text in quotes, special tokens bare."""
    special = set(tokenizer.all_special_ids)

    def name(token: int) -> str:
        text = str(tokenizer.decode([token]))
        return text if token in special else repr(text)

    return name


def _models(full: PreTrainedModel, source: str | Path, quantized: str | None) -> dict[str, PreTrainedModel]:
    store = streamed(full)
    device = full.device if store is None else store.device
    if quantized is not None:
        return {"quantized": load_compared(quantized, str(device), dtype=full.dtype, stream=store is not None)}
    if store is None:
        return {f"{bits}-bit": rounded_model(full, bits=bits) for bits in BITS}
    models = {bits: load_streamed(source, dtype=full.dtype, device=device) for bits in BITS}
    for bits, model in models.items():
        round_streamed_(model, bits=bits)
    return {f"{bits}-bit": model for bits, model in models.items()}


def _check_out(out: Path) -> None:
    check_outputs(out)  # first: "." has no name that could get another suffix
    check_outputs(out.with_suffix(".json"))
    if out.suffix not in (".html", ".htm"):
        raise IntactKVError(f"{out} is no name for a page; let it end in .html")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise IntactKVError("the doctor draws with matplotlib; pip install 'intactkv[doctor]'") from error
