"""Which tokens to keep intact: [BOS], the fixed head of a chat template, or any text.

A prefix only helps prompts that begin with exactly its tokens. Tokens at the seam may merge with what follows, so a
text's prefix is what stays the same over many different continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from intactkv.kv import IntactKVError

# Continuations that begin with different characters and classes of characters, so that no token that depends on
# what follows can survive in their longest common prefix.
_PROBES = ("Hello", "why?", "42", "(x)", "été", "中文", "_", "\n\nThen", " a", ".", "'s", "🙂", "Ω", '"q"')


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

    The longest common token prefix of the rendered template over different user messages, generation prompt
    included, for any Hugging Face chat template. A template that prints today's date gives a prefix for today.
    Raises `IntactKVError` where there is no template, where it refuses or ignores `system`, and where nothing is
    common.
    """
    if tokenizer.chat_template is None:
        raise IntactKVError(
            f"{_name(tokenizer)} has no chat template; use bos(tokenizer), text_prefix(tokenizer, …) or explicit ids"
        )
    head = [] if system is None else [{"role": "system", "content": system}]

    def render(user: str) -> str:
        messages = [*head, {"role": "user", "content": user}]
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program: whatever it raises, it refused these messages
            raise IntactKVError(
                f"the chat template of {_name(tokenizer)} refuses these messages ({error}); "
                "leave out `system` if it knows no system role"
            ) from error

    if system is not None and system.strip() not in render(_PROBES[0]):
        raise IntactKVError(f"the chat template of {_name(tokenizer)} ignores the system prompt; leave `system` out")
    return _common(lambda probe: tokenizer(render(probe), add_special_tokens=False).input_ids, tokenizer)


def text_prefix(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens that every prompt beginning with `text` begins with, special tokens as the tokenizer adds them.

    A last token that would merge with what follows is left out. Raises `IntactKVError` where nothing is left.
    """
    return _common(lambda probe: tokenizer(text + probe).input_ids, tokenizer)


def _common(encode: Callable[[str], Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    rows = [list(encode(probe)) for probe in _PROBES]
    shortest = min(rows, key=len)
    length = next((i for i, token in enumerate(shortest) if any(row[i] != token for row in rows)), len(shortest))
    if length == 0:
        raise IntactKVError(
            f"prompts of {_name(tokenizer)} have no first token in common; choose explicit ids for the prefix"
        )
    return shortest[:length]


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)
