"""`intactkv serve MLX_FOLDER` with a real mlx_lm.server: every answer is the intact model's, or an error."""

from __future__ import annotations

import random
import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mlx_lm")
pytest.importorskip("openai")

import mlx.core as mx
import mlx_lm.server
import numpy as np
import openai
import torch
from command import intactkv, serving
from mlx_lm import convert, load
from models import build, by_name, greedy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from intactkv import IntactKV, IntactKVError, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.serving.layout import common_prefix
from intactkv.serving.mlx import rows_for
from intactkv.serving.mlx_server import Generator, PromptCache, options

HEAD = "The Danube is the second longest river in Europe after the Volga."


@dataclass
class Pair:
    """A model as mlx-lm rounds it to 3 bits, the same numbers in transformers, and the full model's rows."""

    mlx: Path
    torch: PreTrainedModel
    kv: IntactKV
    file: Path
    tokenizer: PreTrainedTokenizerBase

    def greedy(self, ids: list[int], count: int, *, intact: bool = True) -> str:
        """The text, by transformers."""
        found = greedy(self.torch, self.kv if intact else None, ids, count)
        return self.tokenizer.decode([each for each in found if each != self.tokenizer.eos_token_id]).strip()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """By architecture and windows: the embedded model, and random Gemma 3 models whose windows prompts outgrow."""
    tokenizer, folder = load_tokenizer(MODEL), tmp_path_factory.mktemp("mlx")
    found = {"llama": _pair(MODEL, tokenizer, folder / "llama", 64)}
    for name, window in (("gemma3, prompts beyond its windows", 24), ("gemma3, windows shorter than the prefix", 12)):
        random_ = build(
            by_name("gemma3"), vocab_size=len(tokenizer), max_position_embeddings=1024, sliding_window=window,
            num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, intermediate_size=128,
            head_dim=32, query_pre_attn_scalar=32, tie_word_embeddings=False, sliding_window_pattern=2,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for part in (random_, tokenizer):
            part.save_pretrained(folder / str(window))
        found[name] = _pair(folder / str(window), tokenizer, folder / f"{window} in MLX", 32)
    return found


def _pair(source: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, group_size: int) -> Pair:
    full = load_model(source, dtype="float32")
    kv = capture(full, tokenizer.encode(HEAD), logits=False)
    convert(str(source), mlx_path=str(folder / "q3"), dtype="float32", quantize=True, q_bits=3, q_group_size=group_size)
    state = full.state_dict()
    for name, each in load(str(folder / "q3"))[0].named_modules():
        if hasattr(each, "scales"):
            dense = mx.dequantize(each.weight, each.scales, each.biases, group_size=each.group_size, bits=each.bits)
            state[f"{name}.weight"].copy_(torch.from_numpy(np.array(dense)))
    return Pair(folder / "q3", full, kv, kv.save(folder / "kv.intactkv"), tokenizer)


@pytest.fixture
def pair(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


@contextmanager
def client_of(*args: str | Path) -> Iterator[tuple[openai.OpenAI, subprocess.Popen[str]]]:
    """A client of the command that serves, and its process."""
    with serving(*args) as (url, process):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120), process


def prompts(pair: Pair, count: int) -> list[str]:
    """Most with the prefix, some with a part of it, some with [BOS] alone, some that end inside it."""
    rng, words, found = random.Random(0), TEXT.read_text(encoding="utf-8").split(), []
    for i in range(count):
        at = rng.randrange(len(words) - 40)
        rest = " ".join(words[at : at + rng.randrange(4, 30)])
        head = {0: "", 1: "The Danube is the second "}.get(i % 6, f"{HEAD} ")
        found.append(head + rest)
    return [*found, HEAD, HEAD[:30], *found[:3], f"{HEAD} {pair.greedy(pair.tokenizer.encode(HEAD), 6)}", HEAD]


@pytest.mark.engine(
    engine="MLX-LM server",
    package="mlx-lm",
    architecture="{architecture}",
    cache="as computed",
    how="serve: 87 mixed requests, completions and chats; weights q3{windows}",
)
@pytest.mark.parametrize(
    ("architecture", "windows"),
    [("llama", ""), ("gemma3", ", prompts beyond its windows"), ("gemma3", ", windows shorter than the prefix")],
)
def test_mixed_requests(pairs: dict[str, Pair], architecture: str, windows: str) -> None:
    """8 at once, streamed or not, batched or (with a seed) alone; ten conversations are kept, 60 are had."""
    pair = pairs[architecture + windows]
    asked = prompts(pair, 60)
    ids = [pair.tokenizer.encode(each) for each in asked]
    chats = [[{"role": "user", "content": each[-60:]}] for each in asked[:20]]
    with_prefix = [i for i, each in enumerate(ids) if common_prefix(each, pair.kv.ids.tolist()) == len(pair.kv)]
    want = [pair.greedy(each, 8) for each in ids]
    assert sum(want[i] != pair.greedy(ids[i], 8, intact=False) for i in with_prefix[:30]) > 10, "nothing to get wrong"
    with client_of(pair.mlx, "--kv", pair.file) as (client, _):

        def ask(i: int) -> tuple[str, int]:
            given: dict[str, Any] = {"model": "default_model", "prompt": asked[i], "max_tokens": 8, "temperature": 0}
            given |= {"seed": 0} if i % 7 == 0 else {}
            if i % 2:
                chunks = list(client.completions.create(**given, stream=True, stream_options={"include_usage": True}))
                text = "".join(each.choices[0].text for each in chunks if each.choices)
                return text, chunks[-1].usage.prompt_tokens_details.cached_tokens
            told = client.completions.create(**given)
            return told.choices[0].text, told.usage.prompt_tokens_details.cached_tokens

        def chat(i: int) -> str:
            bare = {"chat_template_kwargs": {"bos_token": ""}} if i % 2 else {}
            told = client.chat.completions.create(
                model=str(pair.mlx), messages=chats[i], max_tokens=8, temperature=0, extra_body=bare
            )
            return told.choices[0].message.content or ""

        with ThreadPoolExecutor(8) as pool:
            answers, chatted = list(pool.map(ask, range(len(asked)))), list(pool.map(chat, range(len(chats))))
        for i, (text, rows) in enumerate(answers):
            assert text.strip() == want[i], (i, asked[i])
            assert rows >= min(common_prefix(ids[i], pair.kv.ids.tolist()), len(ids[i]) - 1)
        for i, text in enumerate(chatted):
            rendered = pair.tokenizer.apply_chat_template(chats[i], add_generation_prompt=True, tokenize=False)
            plain = rendered.removeprefix(pair.tokenizer.bos_token) if i % 2 else rendered
            assert text.strip() == pair.greedy(pair.tokenizer.encode(plain, add_special_tokens=False), 8), (i, plain)


def test_requests_that_cannot_be_right(pair: Pair) -> None:
    """Other models, adapters and drafts are refused with a sentence, and the next answer is right."""
    with client_of(pair.mlx, "--kv", pair.file, "--max-tokens", "4") as (client, process):
        for given, sentence in (
            ({"model": "another/model"}, "model='another/model' has no intact rows here"),
            ({"extra_body": {"adapters": "somewhere"}}, "adapters and draft models have no intact rows"),
            ({"extra_body": {"draft_model": "another"}}, "adapters and draft models have no intact rows"),
        ):
            with pytest.raises(openai.NotFoundError) as refused:
                client.completions.create(**{"model": "default_model", "prompt": f"{HEAD} It", **given})
            assert sentence in refused.value.response.json()["error"]
        told = client.completions.create(model=str(pair.mlx), prompt=f"{HEAD} It")
        assert told.choices[0].text.strip() == pair.greedy(pair.tokenizer.encode(f"{HEAD} It"), 4)
        process.terminate()
        assert process.wait(60) in (0, -6)  # mlx 0.32.4 on Linux aborts at exit now and then, mlx-lm's own server too


def test_what_serve_refuses_before_it_starts(pair: Pair, tmp_path: Path) -> None:
    """Options that would round or replace the rows, unknown ones, another model's artifact, a taken port."""
    torch.manual_seed(0)
    foreign = {i: (torch.randn_like(k), torch.randn_like(v)) for i, (k, v) in pair.kv.layers.items()}
    other = replace(pair.kv, layers=foreign).save(tmp_path / "other.intactkv")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for args, sentence in (
            (["--kv", pair.file, "--kv-bits", "8"], "--kv-bits cannot be given to mlx_lm.server here (it rounds"),
            (["--kv", pair.file, "--draft-model=x"], "--draft-model=x cannot be given to mlx_lm.server here"),
            (["--kv", pair.file, "--typo"], "unrecognized arguments: --typo; see mlx_lm.server --help"),
            (["--kv", pair.file, "--port", "x"], "invalid int value: 'x'"),
            (["--kv", pair.file, "--print"], "--mode and --print are for vLLM; leave them out for MLX"),
            (["--kv", other], "differ from the intact ones by"),
            (["--kv", pair.file, "--port", str(taken.getsockname()[1])], "cannot listen on 127.0.0.1"),
        ):
            done = intactkv("serve", pair.mlx, *args)
            assert done.returncode == 1, args
            assert sentence in " ".join(done.stderr.split()), (args, done.stderr)


@pytest.mark.parametrize("name", ["llama", "gemma3, prompts beyond its windows"])
def test_the_cache_forgets_no_intact_row(pairs: dict[str, Pair], name: str) -> None:
    """Whatever is kept, dropped or poisoned, a prompt is given its intact rows, and a token to compute."""
    pair = pairs[name]
    model, ids = load(str(pair.mlx))[0], pair.kv.ids.tolist()
    rows, cache = rows_for(pair.kv, model, "m"), PromptCache(ids, 2)
    cache.begin_with(rows, model)

    def taken(tokens: list[int]) -> list[Any]:
        held, rest = cache.fetch_nearest_cache("m", tokens)
        due = min(common_prefix(tokens, ids), len(tokens) - 1)
        assert rest
        if not due:
            return []
        assert held is not None
        assert held[0].offset == len(tokens) - len(rest) >= due
        for each, (key, value) in zip(held, rows, strict=True):
            assert mx.array_equal(each.keys[:, :, :due], key[:, :, :due])
            assert mx.array_equal(each.values[:, :, :due], value[:, :, :due])
        model(mx.array([rest]), cache=held)
        return held

    assert taken([ids[0]]) == taken([9]) == taken([9, 10]) == []
    for tokens in ([*ids, 9], ids, ids[:5], [*ids[:5], 9, 10]):
        held = taken(tokens)
        cache.insert_cache("m", tokens, held)
        assert taken(tokens)  # mlx-lm itself leaves nothing to compute here
    assert len(cache) == 2
    plain: list[Any] = cache.fetch_nearest_cache("m", [9, *ids])[0] or []
    assert plain == []
    poisoned = taken(ids[:5])
    model(mx.array([ids[5:]]), cache=poisoned)  # its fifth token was computed, and then the prefix's own came
    cache.insert_cache("m", ids, poisoned)
    taken([*ids, 9])


def test_an_answer_without_its_rows_is_none(pair: Pair) -> None:
    """Of an mlx-lm that goes past the cache."""
    generator = object.__new__(Generator)
    generator._due = PromptCache(pair.kv.ids.tolist(), 10).due
    context = SimpleNamespace(prompt=[*pair.kv.ids.tolist(), 9], prompt_cache_count=3)
    with pytest.raises(IntactKVError, match="mlx-lm took 3 tokens from its cache, of 17 intact ones; not served"):
        next(generator._seen(context, iter(["token"])))
    context.prompt_cache_count = 17
    assert list(generator._seen(context, iter(["token"]))) == ["token"]


def test_a_prompt_without_a_token_is_refused() -> None:
    """mlx-lm itself would end at it, of a tokenizer that puts no [BOS] there."""
    generator = object.__new__(Generator)
    generator.model_provider = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text: []))
    with pytest.raises(IntactKVError, match="the prompt has no tokens; send a text"):
        generator.generate(SimpleNamespace(request_type="text", prompt=""), None)


def test_options_are_mlx_lms_own() -> None:
    """Each that mlx-lm reads is there, with its default."""
    given = options("m", ["--temp", "0.5"])
    assert (given.model, given.temp, given.max_tokens, given.chat_template_args) == ("m", 0.5, 512, {})
    read = set(re.findall(r"cli_args\.(\w+)", Path(mlx_lm.server.__file__).read_text(encoding="utf-8")))
    assert read <= set(vars(given))
