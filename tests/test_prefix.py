"""Laws of prefixes: what prompts of every kind of tokenizer and chat template really begin with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import takewhile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from intactkv import bos, chat_prefix, text_prefix
from intactkv.error import IntactKVError

SYSTEM = "You are a helpful assistant. Answer in 2 or 3 sentences"

# Few lines, often repeated, so that merges run over whole words, runs of blanks and of digits.
LINES = [
    SYSTEM,
    "You are helpful assistants, Hello! Today the assistant's answers: 1234567 and 42.\n\n\n    indented\n\ttab\n\n",
    "user system model assistant\n\n[INST] <<SYS>>\n<</SYS>>\n\n [/INST]user\nHello\nassistant\nSure! café été naïve",
    "Hello, why? the theory of a thing thinks 10 20 300 ... ''' \"quoted\" 's 're __init__(self) == x\n\t\tnext",
    "中文 你好 Ω 🙂 über éé  two  blanks   three    four",
]
CORPUS = LINES * 40
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]
LLAMA3_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)


def fast(core: Tokenizer, *, adds_bos: bool = False, **more: str) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer around `core`, with all special tokens, adding `<s>` on its own or not."""
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if adds_bos:
        single = ("<s>", core.token_to_id("<s>"))
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[single])
    return PreTrainedTokenizerFast(tokenizer_object=core, **more)


def byte_level(split: str | None = None, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Byte-level BPE, as GPT-2 splits words, or by another pattern."""
    core = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    core.decoder = decoders.ByteLevel()
    if normalizer:
        core.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def sentencepiece_bpe() -> Tokenizer:
    """BPE over the whole text with blanks spelled ▁ and bytes to fall back on, as Llama 2's."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", *byte_tokens], show_progress=False, max_token_length=12
    )
    core.train_from_iterator([" ".join(LINES[i:] + LINES[:i]) for i in range(len(LINES))] * 10, trainer)
    return core


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One tokenizer of every family that chat models come with."""
    if kind == "gpt2":  # has a BOS that it does not add
        return fast(byte_level(), bos_token="<s>", eos_token="<s>")
    if kind == "qwen":  # has none
        return fast(byte_level(LLAMA3_SPLIT, normalizers.NFC()), eos_token="<|im_end|>")
    if kind == "llama3":  # adds it
        return fast(byte_level(LLAMA3_SPLIT), adds_bos=True, bos_token="<s>", eos_token="<|eot_id|>")
    return fast(sentencepiece_bpe(), adds_bos=True, bos_token="<s>", eos_token="</s>")


KINDS = ["gpt2", "qwen", "llama3", "llama2"]
every_kind = pytest.mark.parametrize("kind", KINDS)

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.first and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m['role'] == 'user' %}[INST] {{ (system if loop.last else '') + m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
IGNORES = (
    "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
UPPER = "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}<|im_end|>{% endfor %}"
USER_FIRST = "{{ messages[-1]['content'] }}<|im_end|>"
NEEDS_TOOLS = "{{ raise_exception('this model needs tools') }}"
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "ignores": IGNORES,
    "upper": UPPER,
    "user first": USER_FIRST,
    "needs tools": NEEDS_TOOLS,
}
# templates that take a system prompt, each with the tokenizer of its family and one of another
PAIRS = [("chatml", "qwen"), ("chatml", "gpt2"), ("llama3", "llama3"), ("llama3", "gpt2")]
PAIRS += [("llama2", "llama2"), ("llama2", "llama3"), ("mistral", "llama2"), ("mistral", "qwen")]
WITHOUT_SYSTEM = [("gemma", "llama2"), ("gemma", "llama3"), ("ignores", "qwen")]
CHATS = [(chat, kind, system) for chat, kind in PAIRS for system in (None, SYSTEM)]
CHATS += [(chat, kind, None) for chat, kind in WITHOUT_SYSTEM]
every_chat = pytest.mark.parametrize(
    ("chat", "kind", "system"), CHATS, ids=[f"{c}-{k}-{'system' if s else 'none'}" for c, k, s in CHATS]
)


@functools.cache
def talker(chat: str, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `kind` with a chat template."""
    plain = tokenizer(kind)
    own = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, **plain.special_tokens_map)
    if own.bos_token is None and "bos_token" in TEMPLATES[chat]:
        own.bos_token = "<s>"
    own.chat_template = TEMPLATES[chat]
    return own


@functools.cache
def text_of(kind: str, text: str) -> tuple[int, ...]:
    """The prefix of `text`, empty where there is none."""
    try:
        return tuple(text_prefix(tokenizer(kind), text))
    except IntactKVError:
        return ()


@functools.cache
def chat_of(chat: str, kind: str, system: str | None) -> tuple[int, ...]:
    return tuple(chat_prefix(talker(chat, kind), system=system))


def conversation(own: PreTrainedTokenizerFast, system: str | None, *turns: str) -> tuple[int, ...]:
    """Token ids by transformers' own path, not ours, of user and assistant taking turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return tuple(own.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False))


def shared(rows: set[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest common beginning: of all rows in order, the first and the last differ first."""
    pairs = zip(min(rows), max(rows), strict=False)
    return tuple(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


# What people write, and what only a tester writes: any script, blanks, digits, ends of words, special tokens.
PIECES = ["s", "he", " the", "tant", "ants", "\n", "\n\n", "\t", " ", "  ", "4", "56", "'s", "'", '"', "!", "?!"]
PIECES += [
    "\u0301",
    "é",
    "e\u0301",
    "中",
    "🙂",
    "_init",
    "[/INST]",
    "<",
    "<|im_end|>",
    "<s>",
    "SYS>>",
    "\u00a0",
    "\u200d",
]
anything = st.text(max_size=12) | st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
attack = settings(deadline=None, max_examples=40)

TEXTS = [
    "Hello",
    "Hel",
    "You are a helpful assistant",
    "You are a helpful assistant.",
    SYSTEM,
    "the answers: ",
    "x == 1",
]
TEXTS += ["12", "1234", "Hello\n", "Hello\n\n", "Hello  ", "a\n\t", "café", "cafe", "中", "'", "<|im_", "<|im_start|>"]
TEXTS += ["<|im_start|>user\n", "user\n    ", "Hello <s>", "tow", "__", "🙂", "!", "", " "]


@functools.cache
def continuations(kind: str) -> list[str]:
    """Every end of every vocabulary entry: whatever can merge with a text, one of these does."""
    own = tokenizer(kind)
    words = {own.convert_tokens_to_string([token]) for token in own.get_vocab()} | set(PIECES)
    return sorted({word[i:] for word in words for i in range(len(word))})


@every_kind
@example(text="!", more=" ")
@attack
@given(text=st.sampled_from(TEXTS), more=anything)
def test_whatever_follows_a_text_it_begins_with_the_text_prefix(kind: str, text: str, more: str) -> None:
    prefix = text_of(kind, text)
    assert tuple(tokenizer(kind)(text + more).input_ids[: len(prefix)]) == prefix


@every_kind
@pytest.mark.parametrize(
    "text", ["You are a helpful assistant", "Hel", "12", "Hello\n\n", "cafe", "<|im_", "user\n    "]
)
def test_the_text_prefix_is_as_long_as_it_can_be(kind: str, text: str) -> None:
    rows = {tuple(tokenizer(kind)(text + more).input_ids) for more in continuations(kind)}
    assert text_of(kind, text) == shared(rows)


def test_a_word_that_can_go_on_is_left_out_and_one_that_has_ended_is_kept() -> None:
    own = tokenizer("gpt2")
    assert own.tokenize(" assistants") == ["Ġassistants"]
    assert own.decode(text_of("gpt2", "a helpful assistant")) == "a helpful"
    assert own.decode(text_of("gpt2", "a helpful assistant.")) == "a helpful assistant"


@every_kind
def test_a_text_prefix_begins_with_the_special_tokens_that_the_tokenizer_adds(kind: str) -> None:
    starts = [own.bos_token_id] if (own := tokenizer(kind))("x").input_ids[0] == own.bos_token_id else []
    assert bool(starts) == (kind in ("llama2", "llama3"))
    assert list(text_of(kind, "")) == starts
    prefix = text_prefix(own, "You are a helpful assistant.")
    assert isinstance(prefix, list)
    assert prefix[: len(starts)] == starts
    assert own.decode(prefix[len(starts) :]).startswith("You are a helpfu")


@every_chat
@attack
@given(user=anything)
def test_every_conversation_begins_with_the_chat_prefix(chat: str, kind: str, system: str | None, user: str) -> None:
    prefix = chat_of(chat, kind, system)
    assert conversation(talker(chat, kind), system, user)[: len(prefix)] == prefix


@every_chat
def test_the_chat_prefix_is_as_long_as_it_can_be(chat: str, kind: str, system: str | None) -> None:
    rows = {conversation(talker(chat, kind), system, user) for user in continuations(kind)}
    assert chat_of(chat, kind, system) == shared(rows)


@every_chat
@attack
@given(turns=st.lists(anything, min_size=3, max_size=5).filter(lambda turns: len(turns) % 2))
def test_later_turns_do_not_matter(chat: str, kind: str, system: str | None, turns: list[str]) -> None:
    prefix, ids = chat_of(chat, kind, system), conversation(talker(chat, kind), system, *turns)
    if chat == "mistral" and system:  # its system prompt stands in the last user message
        prefix = chat_of(chat, kind, None)
    assert ids[: len(prefix)] == prefix


@pytest.mark.parametrize(("chat", "kind"), PAIRS)
def test_the_chat_prefix_holds_the_system_prompt(chat: str, kind: str) -> None:
    own = talker(chat, kind)
    text = own.decode(chat_of(chat, kind, SYSTEM))
    assert SYSTEM in text
    assert text.count("<s>") == ("bos_token" in TEMPLATES[chat])  # once, where the template writes it
    other = chat_of(chat, kind, SYSTEM.replace("3", "30"))
    assert other != chat_of(chat, kind, SYSTEM)


def test_a_system_prompt_that_the_template_rewrites_or_repeats_is_not_ignored() -> None:
    upper = talker("upper", "qwen")
    assert upper.decode(chat_prefix(upper, system="Sure")) == "<|im_start|>SURE<|im_end|><|im_start|>"
    chatml = talker("chatml", "qwen")
    assert chat_prefix(chatml, system="You are Qwen.") == chat_prefix(chatml)  # the template's own default


def test_bos_is_one_token_and_never_a_guess() -> None:
    assert bos(tokenizer("llama3")) == [tokenizer("llama3").convert_tokens_to_ids("<s>")]
    assert bos(tokenizer("gpt2")) == tokenizer("gpt2").convert_tokens_to_ids(["<s>"])  # though it is not added
    for kind in KINDS:
        start = bos(tokenizer(kind), token="<|im_start|>")
        assert tokenizer(kind)("<|im_start|>", add_special_tokens=False).input_ids == start


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bos(tokenizer("qwen")), r"has no BOS token; name the token .* token='<\|im_start\|>'"),
        (
            lambda: bos(tokenizer("llama3"), token="Hello!"),
            "'Hello!' is not one token of .*; name one of its vocabulary",
        ),
        (lambda: bos(tokenizer("llama3"), token=""), "'' is not one token of .*; name one of its vocabulary"),
        (lambda: chat_prefix(tokenizer("llama3")), r"has no chat template; use bos\(tokenizer\), text_prefix"),
        (lambda: chat_prefix(talker("gemma", "llama3"), system="Be brief."), "not supported.*; leave `system` out"),
        (
            lambda: chat_prefix(talker("ignores", "qwen"), system="Be brief."),
            "ignores the system prompt; leave `system`",
        ),
        (
            lambda: chat_prefix(talker("ignores", "qwen"), system="user"),
            "ignores the system prompt; leave `system` out",
        ),
        (lambda: chat_prefix(talker("ignores", "qwen"), system=""), "ignores the system prompt; leave `system` out"),
        (lambda: chat_prefix(talker("needs tools", "qwen")), "this model needs tools.*; use text_prefix"),
        (lambda: chat_prefix(talker("user first", "qwen")), "no first token in common; choose explicit ids"),
        (lambda: text_prefix(tokenizer("gpt2"), ""), "no first token in common; choose explicit ids"),
        (lambda: text_prefix(tokenizer("qwen"), "Hel"), "no first token in common; choose explicit ids"),
    ],
)
def test_refusals_are_one_sentence(make: Callable[[], list[int]], message: str) -> None:
    with pytest.raises(IntactKVError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
