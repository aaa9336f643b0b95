"""`intactkv generate`: the likeliest tokens whatever the checkpoint says of sampling, shown as they come."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_cli import intactkv
from transformers import GenerationConfig

import intactkv as ik
from intactkv import IntactKVError
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL
from intactkv.generate import continuation, encode

PROMPT = "The river rises in the mountains and"


@pytest.mark.parametrize(
    "own", [{"repetition_penalty": 5.0}, {"do_sample": True, "top_k": 5}, {"no_repeat_ngram_size": 1}]
)
def test_temperature_0_is_the_likeliest_token_whatever_the_checkpoint_says(own: dict[str, float]) -> None:
    model, tokenizer = load_model(MODEL, dtype=torch.float32), load_tokenizer(MODEL)
    ids = encode(tokenizer, PROMPT)
    want = ids
    with torch.no_grad():
        for _ in range(12):
            want = torch.cat([want, model(want).logits[:, -1:].argmax(-1)], 1)
    model.generation_config = kept = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, **own)
    said = continuation(model, tokenizer, ids, max_new_tokens=12)
    assert said == tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)
    assert model.generation_config is kept
    if "repetition_penalty" in own:
        config = GenerationConfig(max_new_tokens=12, do_sample=False)
        plain = model.generate(ids, generation_config=config)
        assert not torch.equal(plain, want), "the checkpoint's penalty is not what it was: the test tests nothing"


def test_the_command_streams_what_the_function_says(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    said = continuation(
        load_model(MODEL, dtype=torch.float32),
        load_tokenizer(MODEL),
        encode(load_tokenizer(MODEL), PROMPT),
        max_new_tokens=9,
    )
    done = intactkv("generate", tmp_path / "model", PROMPT, "--max-new-tokens", "9", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{said}\n"


@pytest.mark.parametrize(
    ("template", "prompt", "said"),
    [
        (None, "Hello", "has no chat template; leave --chat out"),
        ("{{ raise_exception('no user here') }}", "Hello", r"refuses this prompt \(no user here\)"),
        ("{{ messages[0]['content'] }}", "", "the prompt has no tokens; give a text"),
    ],
)
def test_a_prompt_that_cannot_be_is_one_sentence(template: str | None, prompt: str, said: str) -> None:
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = template
    with pytest.raises(IntactKVError, match=said):
        encode(tokenizer, prompt, chat=True)


def test_the_version_is_told() -> None:
    assert intactkv("--version").stdout.strip() == ik.__version__


def test_ids_and_a_named_prefix_are_not_both_taken(tmp_path: Path) -> None:
    for command in ("capture", "quantize"):
        for other in (["--prefix", "chat"], ["--prefix", "auto"], ["--system", "Be brief."]):
            done = intactkv(command, MODEL, "-o", tmp_path / "x", "--ids", "0,5", *other)
            assert done.returncode == 1
            assert "--ids 0,5 is the whole prefix; leave --prefix and --system out" in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_system_prompt_is_not_dropped_where_the_prefix_is_searched(tmp_path: Path) -> None:
    done = intactkv("capture", MODEL, "-o", tmp_path / "kv", "--prefix", "auto", "--system", "Be brief.")
    assert done.returncode == 1
    assert "--system goes with --prefix chat, not with --prefix 'auto'" in done.stderr
    assert not any(tmp_path.iterdir())
