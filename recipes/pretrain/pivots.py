"""How strong a model's pivots are: massive hidden states and attention sinks, layer by layer.

    python pivots.py MODEL TEXT [--windows 16] [--context 512]

`ratio` is max |h| of a block's output at a token over the same of the median token. `mass` is the share of
attention that a token draws, averaged over queries, heads and windows; `best_head` is the head that gives it
most. The first query is left out: it sees nothing but itself. Uniform attention over 512 tokens would give
[BOS] 0.011. Under sigmoid attention the weights of a query need not sum to one, and `mass` is their mean as it is.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from attention import RETURNS_WEIGHTS, register_attentions
from corpus import text_windows, with_bos
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PUNCTUATION = ".,;:!?\"'()-\n"


def punctuation_ids(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that are one punctuation mark, with or without a space before it."""
    marks = {*PUNCTUATION, *(" " + mark for mark in PUNCTUATION)}
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    return {i: text for i, text in texts.items() if text in marks}


@contextmanager
def _attention_weights_returned(model: PreTrainedModel) -> Iterator[None]:
    """Switch to the attention that returns its weights, and back."""
    before = model.config._attn_implementation
    model.set_attn_implementation(RETURNS_WEIGHTS.get(before, before))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _block_outputs(model: PreTrainedModel, into: list[Tensor]) -> Iterator[None]:
    """Collect every block's output: `output_hidden_states` gives the last one after the final norm only."""
    layers = model.model.layers
    hooks = [layer.register_forward_hook(lambda _m, _i, output: into.append(output)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure(model: PreTrainedModel, windows: Tensor, punctuation: dict[int, str]) -> dict[str, list | dict]:
    """Return the pivot strength of [BOS] and of every punctuation token in the windows, as lists over layers.

    `windows` (window, token) come without [BOS]; it is put in front here, as in training. Of a punctuation
    mark the strongest occurrence gives the ratio, because a pivot is often only the first of its kind; all
    occurrences together give the mass.
    """
    ids = with_bos(windows, model.config.bos_token_id)
    counts = ids.flatten().bincount(minlength=model.config.vocab_size)
    marks = {i: text for i, text in punctuation.items() if counts[i]}
    which = torch.tensor(list(marks), dtype=torch.int64, device=ids.device)
    blocks: list[Tensor] = []
    table: dict[str, list | dict] = {"ratio": [], "mass": [], "best_head": []}
    mark_ratios, mark_masses = [], []
    with _attention_weights_returned(model), _block_outputs(model, blocks):
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    for block, attention in zip(blocks, attentions, strict=True):
        largest = block.float().abs().amax(-1)  # (window, token)
        ratio = largest / largest[:, 1:].median()
        mass = attention[:, :, 1:].float().mean(2)  # (window, head, token), over queries
        by_head = mass[:, :, 0].mean(0)
        table["ratio"].append(float(ratio[:, 0].mean()))
        table["mass"].append(float(by_head.mean()))
        table["best_head"].append(float(by_head.max()))
        of_vocab = torch.zeros(model.config.vocab_size, device=ids.device)
        mark_ratios.append(of_vocab.scatter_reduce(0, ids.flatten(), ratio.flatten(), "amax")[which].tolist())
        mass_by_id = of_vocab.index_add(0, ids.flatten(), mass.mean(1).flatten()) / len(ids)
        mark_masses.append(mass_by_id[which].tolist())
    table["punctuation"] = {
        text: {
            "count": int(counts[i]),
            "ratio": [ratios[n] for ratios in mark_ratios],
            "mass": [masses[n] for masses in mark_masses],
        }
        for n, (i, text) in enumerate(marks.items())
    }
    return table


def print_table(table: dict[str, list | dict]) -> None:
    """Print the [BOS] columns and, of the punctuation marks, the one with the most massive hidden state."""
    marks = table["punctuation"]
    print("| layer | ratio at [BOS] | mass on [BOS] | best head | largest punctuation ratio | its mass |")
    print("|---|---|---|---|---|---|")
    columns = zip(table["ratio"], table["mass"], table["best_head"], strict=True)
    for i, (ratio, mass, best) in enumerate(columns):
        top = max(marks, key=lambda text: marks[text]["ratio"][i])
        mark = f"{marks[top]['ratio'][i]:.1f} `{top!r}` | {marks[top]['mass'][i]:.3f}"
        print(f"| {i + 1} | {ratio:.1f} | {mass:.3f} | {best:.3f} | {mark} |")


def main() -> None:
    """Print a model's pivot table on a text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--attention", default="sdpa", help="sigmoid for a control model")
    args = parser.parse_args()
    register_attentions()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    load = AutoModelForCausalLM.from_pretrained
    model = load(args.model, attn_implementation=args.attention, dtype=torch.float32)
    windows, _ = text_windows(args.text.read_text(encoding="utf-8"), tokenizer, args.context)
    print_table(measure(model, windows[: args.windows], punctuation_ids(tokenizer)))


if __name__ == "__main__":
    main()
