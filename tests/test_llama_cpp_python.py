"""The cache for llama-cpp-python, where one is installed (it builds from source): against transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_cpp", exc_type=ImportError)

from pathlib import Path

import torch
from gguf_model import write_gguf
from llama_cpp import Llama
from test_llama_serve import IDS, Pair, pair, text, tokens

from intactkv import IntactKVError
from intactkv.serving.llama_cpp_python import intact_cache

__all__ = ["pair"]


@pytest.fixture(params=[True, False], ids=["flash", "no flash"])
def llm(pair: Pair, request: pytest.FixtureRequest) -> Llama:
    return Llama(
        str(pair.gguf), n_ctx=512, n_threads=1, type_k=0, type_v=0, flash_attn=request.param, verbose=False, n_batch=64
    )


@pytest.mark.engine(
    engine="llama-cpp-python", package="llama_cpp", architecture="llama", cache="f32", how="intact_cache; {llm}"
)
def test_prompts_with_and_without_the_prefix(pair: Pair, llm: Llama) -> None:
    """Whatever came before, the rows that prompt and prefix share are the artifact's."""
    rest = [text()[60 * i : 60 * i + 30] for i in range(6)]
    asked = [
        [*IDS, *rest[0]], rest[1], [*IDS, *rest[2]], IDS, [*IDS, *rest[3]], IDS[:5], [*IDS[:5], *rest[4]],
        [*IDS, *rest[5]], [*IDS, *rest[5][:20], *rest[1][:5]],
    ]  # fmt: skip
    want = [pair.greedy(ids, 24) for ids in asked]
    assert sum(each != pair.greedy(ids, 24, intact=False) for ids, each in zip(asked, want, strict=True)) >= 4
    llm.set_cache(intact_cache(llm, pair.file))
    for ids, each in zip(asked, want, strict=True):
        told = llm.create_completion(ids, max_tokens=24, temperature=0, repeat_penalty=1)
        said = tokens(told["choices"][0]["text"])
        assert said == each[: len(said)], ids[:14]
        assert len(said) >= len(each) - 1  # the end of sequence is not told


def test_another_model_is_refused(pair: Pair, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = write_gguf(type(pair.full)(pair.full.config).eval(), tmp_path / "other.gguf")
    with pytest.raises(IntactKVError, match="makes other values of these tokens"):
        intact_cache(Llama(str(other), n_ctx=512, verbose=False), pair.file)
    with pytest.raises(IntactKVError, match="a cache of ggml type 8 holds rows as its build rounds"):
        intact_cache(Llama(str(pair.gguf), n_ctx=512, type_k=8, type_v=8, flash_attn=True, verbose=False), pair.file)


@pytest.mark.parametrize("turned", [{"rope_freq_base": 5e5}, {"rope_freq_scale": 0.5}, {"rope_scaling_type": 1}])
def test_other_rotary_frequencies_are_refused(pair: Pair, turned: dict[str, float]) -> None:
    llm = Llama(str(pair.gguf), n_ctx=512, type_k=0, type_v=0, verbose=False, **turned)
    with pytest.raises(IntactKVError, match=f"loaded with {next(iter(turned))}=.*load it without"):
        intact_cache(llm, pair.file)
