"""Pivot strength, on models where it is known."""

from __future__ import annotations

import pytest
import torch
from models import build, by_name, prompts

from intactkv import IntactKVError
from intactkv.pivots import first_token_pivots, uniform_mass
from intactkv.report import pivot_sentence


def test_attention_that_ignores_content_gives_uniform_mass() -> None:
    model = build(by_name("llama-gqa"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    for pivot in first_token_pivots(model, prompts()):
        assert pivot.mass == pytest.approx(uniform_mass(20), rel=1e-5)
        assert pivot.best_head == pytest.approx(uniform_mass(20), rel=1e-5)


def test_a_massive_first_embedding_is_seen_as_it_is() -> None:
    model = build(by_name("llama-gqa"))
    ids = prompts()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()  # now every block is the identity
        embedding = model.get_input_embeddings().weight
        embedding.clamp_(-1, 1)[:, 0] = 1.0
        embedding[ids[0, 0]] *= 50
    pivots = first_token_pivots(model, ids)
    assert [p.ratio for p in pivots[:-1]] == pytest.approx([50.0] * 2)
    assert pivots[-1].ratio is None
    assert "Its pivots are weak" in pivot_sentence(pivots, 20)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = build(by_name("llama-gqa"))
    before = model.config._attn_implementation
    first_token_pivots(model, prompts())
    assert model.config._attn_implementation == before
    with pytest.raises(IntactKVError, match="at least two tokens"):
        first_token_pivots(model, prompts()[:, :1])
