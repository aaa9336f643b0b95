"""Which tokens to keep intact: [BOS], the fixed head of a chat template, or any text.

A prefix only helps prompts that begin with exactly its tokens. Tokens at the seam may merge with what follows, so a
text's prefix is what stays the same over many different continuations: some of every kind of character, and those
that the vocabulary itself says could merge.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from intactkv.error import IntactKVError
from intactkv.lines import check_unicode

# Continuations that begin with different characters and classes of characters, so that a token that depends on what
# follows does not survive in their longest common prefix.
PROBES = ("Hello", "why?", "42", "(x)", "été", "中文", "_", "\n\nThen", " a", ".", "'s", "🙂", "Ω", '"q"')


def bos(tokenizer: PreTrainedTokenizerBase, *, token: str | None = None) -> list[int]:
    """The beginning-of-sequence token alone: one id.

    For a tokenizer without [BOS] (Qwen and others) there is no right default: the pivot is whatever token comes
    first, so name the token your prompts begin with as `token`. Raises `IntactKVError` where there is neither, and
    where `token` is not one token of the vocabulary.
    """
    if token is not None:
        index = tokenizer.get_vocab().get(token)
        if index is None:
            raise IntactKVError(f"{token!r} is not one token of {_name(tokenizer)}; name one of its vocabulary")
        return [index]
    if tokenizer.bos_token_id is None:
        raise IntactKVError(
            f"{_name(tokenizer)} has no BOS token; name the token your prompts begin with, "
            "bos(tokenizer, token='<|im_start|>'), or use chat_prefix(tokenizer)"
        )
    return [tokenizer.bos_token_id]


def chat_prefix(tokenizer: PreTrainedTokenizerBase, *, system: str | None = None) -> list[int]:
    """The tokens that every conversation under this chat template and system prompt begins with.

    The longest common token prefix of the rendered template over different first user messages, for any Hugging Face
    chat template. A template that prints today's date gives a prefix for today. A template that puts the system
    prompt into the last user message, as Mistral's do, gives the prefix of one-turn conversations.
    Raises `IntactKVError` where there is no template, where it refuses or ignores `system`, and where nothing is
    common.
    """
    if tokenizer.chat_template is None:
        raise IntactKVError(
            f"{_name(tokenizer)} has no chat template; use bos(tokenizer), text_prefix(tokenizer, …) or explicit ids"
        )
    check_unicode(system or "", "the system prompt")

    def render(user: str, system: str | None) -> str:
        head = [] if system is None else [{"role": "system", "content": system}]
        messages = [*head, {"role": "user", "content": user}]
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program: whatever it raises, it refused these messages
            remedy = (
                "use text_prefix(tokenizer, …)" if system is None else "leave `system` out if it knows no such role"
            )
            raise IntactKVError(
                f"the chat template of {_name(tokenizer)} refuses these messages ({error}); {remedy}"
            ) from error

    if system is not None and render(PROBES[0], system) == render(PROBES[0], system + "!"):
        raise IntactKVError(f"the chat template of {_name(tokenizer)} ignores the system prompt; leave `system` out")
    return _common(lambda rest: render(rest, system), tokenizer, special=False)


def text_prefix(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens that every prompt beginning with `text` begins with, special tokens as the tokenizer adds them.

    A last token that would merge with what follows is left out. Raises `IntactKVError` where nothing is left.
    """
    check_unicode(text, "the prefix")
    return _common(lambda rest: text + rest, tokenizer, special=True)


def _common(write: Callable[[str], str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[int]:
    """The longest common token prefix of `write(rest)` over all continuations that could make a difference."""
    head = shared([write(rest) for rest in PROBES])
    texts = [write(rest) for rest in (*PROBES, *_merging(tokenizer, head))]
    rows = [tokenizer(text, add_special_tokens=special).input_ids for text in texts]
    common = shared(rows)
    if not common:
        raise IntactKVError(
            f"prompts of {_name(tokenizer)} have no first token in common; choose explicit ids for the prefix"
        )
    return list(common)


def shared(rows: Sequence[Sequence[Any]]) -> Any:
    """The longest common beginning of lists, or of texts."""
    shortest = min(rows, key=len)
    differs = (i for i, item in enumerate(shortest) if any(row[i] != item for row in rows))
    return shortest[: next(differs, len(shortest))]


def _merging(tokenizer: PreTrainedTokenizerBase, head: str, most: int = 32) -> list[str]:
    """Continuations that could merge with the end of `head`: what follows its end in any vocabulary entry.

    At most `most` for each end of `head`, common tokens first: one that merges is enough. With them goes a mark that
    Unicode composes with the last character, for tokenizers that normalize.
    """
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    longest = max(len(token) for token, _ in vocab)
    spelled = "".join(tokenizer.tokenize(head))  # as the vocabulary writes bytes and blanks; added tokens as in `head`
    ends = {text[-size:] for text in (spelled, head) for size in range(1, min(longest, len(text)) + 1)}
    rests: dict[str, list[str]] = {end: [] for end in ends}
    for token, _ in vocab:
        for cut in range(1, len(token)):
            if token[:cut] in ends and len(rests[token[:cut]]) < most:
                part, whole = (
                    tokenizer.convert_tokens_to_string(t) for t in ([token[:cut]], [token[:cut], token[cut:]])
                )
                rests[token[:cut]].append(whole[len(part) :])  # not alone: decoders drop a blank at a text's beginning
    composes = (m for m in map(chr, range(0x300, 0x370)) if len(unicodedata.normalize("NFC", head[-1] + m)) == 1)
    mark = next(composes, "") if head else ""
    return [rest for rest in (*chain(*rests.values()), mark) if rest]


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)
