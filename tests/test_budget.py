"""The error budget's laws, in float64: the bound always holds, the first order is the first order, shares add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, Architecture, build, prompts, rounded
from torch import Tensor

from intactkv import IntactKVError
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.doctor import rounded_model
from intactkv.pivots.budget import (
    Pair,
    energy_left,
    error_bound,
    output,
    output_error,
    token_errors,
    token_shares,
)
from intactkv.pivots.pair import error_budget, layer_pairs, mse_by_prefix_size, shortened
from intactkv.pivots.weights import Rule, weight_blocks

HEADS, KV_HEADS, TOKENS, DIM, HIDDEN = 4, 2, 12, 6, 10

RULES = {
    "causal": Rule(DIM**-0.5),
    "window": Rule(DIM**-0.5, window=5),
    "softcap": Rule(0.7, softcap=2.0),
    "sinks": Rule(DIM**-0.5, sinks=torch.linspace(-1, 1, HEADS, dtype=torch.float64)),
    "two-sided": Rule(1.0, causal=False),
}


def random_pair(rule: Rule, *, seed: int = 0, size: float = 1.0, change: float = 0.1, project: bool = True) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key, value = size * draw(KV_HEADS, TOKENS, DIM), draw(KV_HEADS, TOKENS, DIM)
    return Pair(
        query=size * draw(HEADS, TOKENS, DIM),
        key=key,
        value=value,
        changed_key=key + change * draw(KV_HEADS, TOKENS, DIM),
        changed_value=value + change * draw(KV_HEADS, TOKENS, DIM),
        rule=rule,
        output_weight=draw(HEADS, DIM, HIDDEN) if project else None,
    )


def scaled(pair: Pair, amount: float) -> Pair:
    """The same pair with `amount` times its errors."""
    return Pair(
        pair.query, pair.key, pair.value,
        pair.key + amount * (pair.changed_key - pair.key), pair.value + amount * (pair.changed_value - pair.value),
        pair.rule, pair.output_weight,
    )  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_blocks_give_plain_attention(name: str) -> None:
    pair, rule = random_pair(RULES[name]), RULES[name]
    query, key, value = (pair.per_query_head(x) for x in (pair.query, pair.key, pair.value))
    logits = rule.scaling * query @ key.mT
    if rule.softcap:
        logits = rule.softcap * (logits / rule.softcap).tanh()
    t, i = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    if rule.causal:
        seen &= i <= t
    if rule.window:
        seen &= t - i < rule.window
    powers = logits.exp() * seen
    extra = 0.0 if rule.sinks is None else rule.sinks.exp()[:, None, None]
    want = powers / (powers.sum(-1, keepdim=True) + extra) @ value
    assert torch.allclose(output(pair.query, pair.key, pair.value, rule), want, atol=1e-12)
    for elements in (1, 100, 2**30):
        for rows, weights in weight_blocks(pair.query[None], pair.key[None], rule, elements=elements):
            assert rows.stop - rows.start == max(1, min(elements // (HEADS * TOKENS), TOKENS))
            ours = weights[0] @ value[:, : weights.shape[3]]
            assert torch.allclose(ours, want[:, rows], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(RULES)),
    seed=st.integers(0, 10_000),
    size=st.sampled_from([0.01, 1.0, 30.0]),
    change=st.sampled_from([1e-3, 0.3, 20.0]),
    project=st.booleans(),
)
def test_the_bound_is_never_violated(name: str, seed: int, size: float, change: float, project: bool) -> None:
    pair = random_pair(RULES[name], seed=seed, size=size, change=change, project=project)
    error = output_error(pair).norm(dim=-1)
    assert (error <= error_bound(pair) * (1 + 1e-9) + 1e-12).all()


def test_the_bound_is_reached_where_values_alone_err_alike() -> None:
    pair = random_pair(RULES["causal"], project=False)
    same = Pair(pair.query, pair.key, pair.value, pair.key, pair.value + 0.5, pair.rule)
    assert torch.allclose(output_error(same).norm(dim=-1), error_bound(same), rtol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_the_first_order_is_the_first_order(name: str) -> None:
    pair = random_pair(RULES[name], change=1.0)
    missed = []
    for amount in (1e-3, 1e-4):
        small = scaled(pair, amount)
        exact, first = output_error(small), token_errors(small).sum(2)
        missed.append(float((exact - first).norm()))
        assert missed[-1] < 0.1 * float(exact.norm())
    assert missed[0] / missed[1] == pytest.approx(100, rel=0.1)  # what is missed is of second order


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("project", [True, False])
def test_shares_are_those_of_the_first_order_and_add_up(name: str, project: bool) -> None:
    pair = random_pair(RULES[name], project=project)
    parts = token_errors(pair)  # (head, query, token, hidden)
    whole = parts.sum(2)
    carried, energy = token_shares(pair)
    assert torch.allclose(carried, (parts * whole[:, :, None]).sum((1, 3)), atol=1e-12)
    assert torch.allclose(energy, whole.square().sum((1, 2)), atol=1e-12)


def test_a_token_without_error_carries_nothing_and_the_only_one_with_it_carries_all() -> None:
    pair = random_pair(RULES["causal"])
    key, value = pair.key.clone(), pair.value.clone()
    key[:, 3], value[:, 3] = pair.changed_key[:, 3], pair.changed_value[:, 3]
    one = Pair(pair.query, pair.key, pair.value, key, value, pair.rule, pair.output_weight)
    carried, energy = token_shares(one)
    assert torch.allclose(carried[:, 3], energy)
    others = torch.arange(TOKENS) != 3
    assert carried[:, others].abs().max() < 1e-12
    left = energy_left(one, [0, 3, 4, TOKENS])
    assert torch.equal(left[0], left[1])
    assert left[0].min() > 0
    assert left[2:].abs().max() == 0


# --- on models ---

OUTSIDE = {"gpt-j", "falcon-rotary", "falcon-alibi", "bloom", "mpt"}  # of transformers' AttentionInterface


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_the_laws_hold_on_every_architectures_keys_and_values(architecture: Architecture) -> None:
    full, ids = build(architecture), prompts(rows=1, length=8)
    model = rounded(full)
    if architecture.name in OUTSIDE:
        with pytest.raises(IntactKVError, match="AttentionInterface"):
            error_budget(full, model, ids)
        return
    for budget in error_budget(full, model, ids, sizes=[0, 1, 8]):
        assert 0 < budget.largest <= 1
        assert budget.tightness <= budget.largest
        assert torch.allclose(budget.carried.sum(1), torch.ones(len(budget.energy), dtype=torch.float64))
        assert torch.equal(budget.left[0], torch.ones_like(budget.left[0]))
        assert budget.left[2].max() == 0
    for pair in layer_pairs(full, full, ids[0]).values():
        assert output_error(pair).abs().max() == 0


@pytest.mark.parametrize("bits", [2, 4])
def test_the_bound_and_the_first_order_hold_on_the_embedded_models_keys_and_values(bits: int) -> None:
    full = load_model(MODEL, dtype=torch.float32)
    tokens = load_tokenizer(MODEL)(TEXT.read_text()[:800]).input_ids[:64]
    pairs = layer_pairs(full, rounded_model(full, bits=bits), torch.tensor(tokens))
    assert len(pairs) == 12
    for pair in pairs.values():
        assert pair.output_weight is not None
        assert (output_error(pair).norm(dim=-1) <= error_bound(pair) + 1e-12).all()
        missed = []
        for amount in (1e-3, 1e-4):
            small = scaled(pair, amount)
            missed.append(float((output_error(small) - token_errors(small).sum(2)).norm()))
        assert missed[0] / missed[1] == pytest.approx(100, rel=0.1)


def test_a_whole_intact_prefix_leaves_what_its_own_tokens_did_not_cause() -> None:
    full = load_model(MODEL, dtype=torch.float32)
    ids = torch.tensor(load_tokenizer(MODEL)(TEXT.read_text()[:800]).input_ids[:48])[None]
    mse = mse_by_prefix_size(full, rounded_model(full, bits=3), ids, most=6)
    assert mse.shape == (7, 12)
    assert mse.mean(1).diff()[0] < 0  # [BOS] is the pivot
    assert mse_by_prefix_size(full, full, ids, most=3).max() < 1e-6
    with pytest.raises(IntactKVError, match="must lie between 1"):
        mse_by_prefix_size(full, full, ids, most=47)


def test_sizes_that_make_no_sense_and_other_models_are_refused() -> None:
    full, ids = build(ARCHITECTURES[1]), prompts(rows=1)
    for sizes in ([], [1, 2], [0, 2, 1], [0, 99]):
        with pytest.raises(IntactKVError, match="must begin with 0, rise"):
            error_budget(full, full, ids, sizes=sizes)
    with pytest.raises(IntactKVError, match="quantized from"):
        error_budget(full, build(ARCHITECTURES[1], num_hidden_layers=2), ids)
    with pytest.raises(IntactKVError, match="quantized from"):
        error_budget(full, build(ARCHITECTURES[0]), ids)


def test_the_beginning_of_an_artifact_is_the_artifact_of_the_beginning() -> None:
    from intactkv import capture

    full, ids = build(ARCHITECTURES[1]), prompts(rows=1)[0]
    kv = capture(full, ids[:5])
    for size in (1, 3, 5):
        part, alone = shortened(kv, size), capture(full, ids[:size])
        assert torch.equal(part.ids, alone.ids)
        for i, (key, value) in alone.layers.items():
            assert torch.allclose(part.layers[i][0], key, atol=1e-5)
            assert torch.allclose(part.layers[i][1], value, atol=1e-5)
    with pytest.raises(IntactKVError, match="between 1 and the 5 tokens"):
        shortened(kv, 6)
