"""Checkpoints and models that are not made here: what `intactkv quantize` wrote, and SmolLM2, where they are named.

INTACTKV_CHECKPOINTS=FOLDER   every folder in it was written by `quantize` with a prefix
INTACTKV_MODELS=FOLDER:…      full models with their tokenizers, such as SmolLM2
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Reference, Served, ids, round_, serve

from intactkv import IntactKV, bos, capture, chat_prefix, text_prefix
from intactkv.artifact.hub import FILE
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.serving.launch import vllm_arguments

MADE = os.environ.get("INTACTKV_CHECKPOINTS")
MODELS = os.environ.get("INTACTKV_MODELS")


@pytest.mark.engine(
    engine="vLLM (CPU)", package="vllm", architecture="llama", cache="bfloat16", how="W4 by GPTQ made for its prefix"
)
@pytest.mark.skipif(MADE is None, reason="INTACTKV_CHECKPOINTS names no folder of checkpoints by `intactkv quantize`")
@pytest.mark.parametrize("folder", sorted(Path(MADE).iterdir()) if MADE else [], ids=lambda path: path.name)
def test_a_quantized_checkpoint_with_the_kv_it_was_made_for(folder: Path, tmp_path: Path) -> None:
    prefix = IntactKV.load(folder / FILE).ids.tolist()
    rounds = [[{"ids": prefix + ids(40, seed=i), "max_tokens": 1, "prompt": True} for i in range(8)]]
    engine = {"model": folder, "dtype": "bfloat16", **vllm_arguments(folder)}
    found = serve(engine, rounds, tmp_path).rounds[0]
    apart: dict[str, float] = {}
    for name, kv in (("intact", folder / FILE), ("plain", None)):
        reference = Reference(folder, kv, dtype=torch.bfloat16)
        differences = [reference.apart(r, a, behind=len(prefix)) for r, a in zip(rounds[0], found, strict=True)]
        apart[name] = float(torch.cat(differences).mean())
    assert apart["intact"] < 0.5 * apart["plain"], apart


@pytest.mark.engine(
    engine="vLLM (CPU)", package="vllm", architecture="{source}", cache="float32", how="4 bits, prefix {kind}"
)
@pytest.mark.skipif(MODELS is None, reason="INTACTKV_MODELS names no full model")
@pytest.mark.parametrize("source", MODELS.split(os.pathsep) if MODELS else [], ids=lambda path: Path(path).parent.name)
@pytest.mark.parametrize("kind", ["bos", "longer"])
def test_a_real_model_at_four_bits(source: str, kind: str, tmp_path: Path) -> None:
    full, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
    prefix = bos(tokenizer)
    if kind == "longer":
        words = "You are a helpful assistant."
        chats = tokenizer.chat_template is not None
        prefix = chat_prefix(tokenizer, system=words) if chats else text_prefix(tokenizer, words)
    kv = capture(full, prefix, logits=False).save(tmp_path / "kv")
    round_(full, bits=4)
    full.save_pretrained(tmp_path / "w4")
    served = Served(Path(source), tmp_path / "w4", kv, prefix)
    text = "The harbour was quiet that morning, and the boats that had come in overnight lay close together."
    told: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    rounds: list[list[dict[str, Any]]] = [
        [{"ids": prefix + told}, {"ids": prefix + told[:3]}, {"ids": told}],
        [{"ids": prefix + told, "prompt": True}],
        [{"ids": prefix + told + told}],
    ]
    found = serve(served.engine(), rounds, tmp_path)
    intact, plain = Reference(served.model, kv), Reference(served.model, None)
    for asked, answers in zip(rounds, found.rounds, strict=True):
        for request, answer in zip(asked, answers, strict=True):
            intact.check(request, answer, within=1e-4)
            if request["ids"][: len(prefix)] == prefix:
                with pytest.raises(AssertionError):
                    plain.check(request, answer, within=1e-2, same=False)
