"""What an intact [BOS] gives back to a trained model whose weights are rounded in place: three arms, one row each.

    python arms.py MODEL TEXT [--bits 4 --bits 3] [--windows 200]

For a machine without a quantizer: the rounding is `intactkv.doctor.rounded_model`'s (to nearest, asymmetric, groups of
128, weights of the blocks), and nothing is packed. Prints a table in Markdown.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from intactkv import bos, capture
from intactkv.doctor import rounded_model
from intactkv.evaluating import Arm, Evaluation, evaluate, prefixed_windows

WINDOW = 512


def main() -> None:
    """Round the model at each width, evaluate own and intact prefix against it, and print KL, top-1 and perplexity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=int, action="append", help="widths of the weights; 4 and 3 without it")
    parser.add_argument("--windows", type=int, default=200, help=f"of {WINDOW} tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    prefix = torch.tensor(bos(tokenizer))
    windows = prefixed_windows(tokens[: args.windows * WINDOW], prefix=prefix, window=WINDOW)
    kv = capture(full, prefix)

    print("| bits | arm | KL mean | median | 99.9 % | same top-1, % | perplexity | gap closed, % [95 %] |")
    print("|---:|---|---:|---:|---:|---:|---:|---|")
    for bits in args.bits or (4, 3):
        model = rounded_model(full, bits=bits)
        arms = [Arm("own", model), Arm("intact", model, kv)]
        print_rows(bits, evaluate(full, arms, windows, batch_size=args.batch_size, block_mse=False))


def print_rows(bits: int, evaluation: Evaluation) -> None:
    """One row of the table for each arm, and for the full model."""
    gap = evaluation.gap_closed(own="own", intact="intact")
    for row in evaluation.table():
        cells = [f"{row[name]:.4f}" for name in ("kl_mean", "kl_median", "kl_99_9", "same_top1_percent", "perplexity")]
        closed = f"{100 * gap.value:.1f} [{100 * gap.low:.1f}, {100 * gap.high:.1f}]"
        print("|", " | ".join([str(bits), row["arm"], *cells, closed if row["arm"] == "intact" else ""]), "|")


if __name__ == "__main__":
    main()
