"""Turn text files into what training reads: a tokenizer folder and one long stream of token ids.

    python prepare.py --out DIR [--vocab 8192] TEXT [TEXT ...]

A text file is `.txt` or `.txt.xz`; a line `<|endoftext|>` ends a document. The tokenizer is a byte-level BPE
learned from the very texts it will encode, so that every byte string has a spelling and `<unk>` never occurs.
The stream is every document followed by `</s>`, as little-endian uint16.
"""

import argparse
import lzma
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNK = "<s>", "</s>", "<unk>"  # ids 0, 1, 2
SEPARATOR = "<|endoftext|>"

# Roles are plain words, because the model has seen no others; `generation` marks what calibration scores.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def documents(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the documents of the text files in order, without their separators."""
    for path in paths:
        opener = lzma.open if path.suffix == ".xz" else open
        lines: list[str] = []
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            for line in file:
                if line.rstrip("\n") == SEPARATOR:
                    yield "".join(lines)
                    lines = []
                else:
                    lines.append(line)
        if lines:
            yield "".join(lines)


def train_tokenizer(texts: Iterable[str], *, vocab: int, context: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE that puts `<s>` in front of what it encodes, as Llama's tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return the texts' ids as one stream of uint16, every text followed by `</s>`."""
    texts, pieces = iter(texts), []
    while some := list(islice(texts, 64)):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(np.array([*ids, tokenizer.eos_token_id], dtype="<u2"))
    return np.concatenate(pieces)


def main() -> None:
    """Write `tokenizer/` and `tokens.u16` under --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024, help="the longest input the tokenizer names")
    args = parser.parse_args()
    if args.vocab > 1 << 16:
        parser.error(f"--vocab {args.vocab} does not fit uint16 tokens; use at most {1 << 16}")

    tokenizer = train_tokenizer(documents(args.texts), vocab=args.vocab, context=args.context)
    tokens = encode(documents(args.texts), tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out / "tokenizer")
    tokens.tofile(args.out / "tokens.u16")
    print(f"{len(tokenizer)} tokens in the vocabulary, {len(tokens):,} in the stream")


if __name__ == "__main__":
    main()
