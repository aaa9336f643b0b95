"""What is measured of pivots, on models where it is known, and against whole attention maps."""

from __future__ import annotations

import subprocess
import sys
from math import nan
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ARCHITECTURES, TOLERANCE, Architecture, build, by_name, prompts
from planted import BOS, MASSIVE, planted
from torch import Tensor
from transformers import PreTrainedModel

from intactkv import IntactKVError
from intactkv.evaluating import WORTH_IT, Interval, decide, verdict
from intactkv.pivots import diagnose, first_token_pivots, measure, uniform_mass
from intactkv.pivots.attention import watched_attention
from intactkv.pivots.classify import KEY_BIAS
from intactkv.pivots.weights import BLOCK_ELEMENTS, Rule, weight_blocks
from intactkv.pivots.words import pivot_sentence

ROOT = Path(__file__).parent.parent
LENGTH = 8  # no longer than llama4's attention chunk


def maps(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Every attention layer's whole map, from the model's own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        found = model(ids, output_attentions=True, use_cache=False).attentions
        if model.config.model_type == "falcon":  # without a mask its maps look ahead, unlike its outputs
            found = [weights.tril() / weights.tril().sum(-1, keepdim=True) for weights in found]
        return list(found)
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
@torch.no_grad()
def test_what_is_measured_is_what_the_model_itself_says(architecture: Architecture) -> None:
    model, ids = build(architecture), prompts(length=LENGTH)
    measured = measure(model, ids)
    whole = maps(model, ids)
    attending = [i for i, layer in enumerate(measured.received) if not layer[:, 0].isnan().any()]
    assert len(attending) == len(whole) > 0
    for layer, weights in zip(attending, whole, strict=True):
        for t in range(LENGTH - 1):
            want = weights[:, :, t + 1 :, t].float().mean(2)  # (window, head)
            assert measured.received[layer, :, t] == pytest.approx(want.mean(1), abs=1e-5)
            assert measured.best_head[layer, :, t] == pytest.approx(want.amax(1), abs=1e-5)
    assert measured.received[:, :, -1].isnan().all()
    outputs = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    if architecture.name != "gemma3n":  # it has four residual streams
        for layer in range(len(measured.largest) - 1):  # the last one is given after the final norm only
            assert measured.largest[layer] == pytest.approx(outputs[layer + 1].abs().amax(-1), rel=1e-3, abs=1e-5)
    cache = model(ids, use_cache=True).past_key_values
    for layer, stored in enumerate(cache.layers):
        keys = getattr(stored, "keys", None)
        if keys is not None and keys.ndim == 4 and keys.shape[2] == LENGTH:
            want = keys.float().square().sum(-1).mean(1).sqrt()
            assert measured.key_norm[layer] == pytest.approx(want, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
@torch.no_grad()
def test_watching_changes_nothing(architecture: Architecture) -> None:
    model, ids = build(architecture), prompts(length=LENGTH)
    if architecture.name == "gemma2":
        model.set_attn_implementation("eager")  # SDPA leaves its softcap out, the watched attention does not
    before, plain = model.config._attn_implementation, model(ids).logits
    layers: list[int] = []
    with watched_attention(model, lambda call: layers.append(call.layer)) as sees:
        watched = model(ids).logits
    assert bool(layers) == sees
    assert torch.allclose(watched, plain, atol=max(architecture.tolerance, TOLERANCE[torch.float32]))
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, plain)


def test_attention_that_ignores_content_gives_uniform_mass() -> None:
    model = build(by_name("llama-gqa"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    for pivot in first_token_pivots(measure(model, prompts())):
        assert pivot.mass == pytest.approx(uniform_mass(20), rel=1e-5)
        assert pivot.best_head == pytest.approx(uniform_mass(20), rel=1e-5)


def identity_blocks(name: str) -> PreTrainedModel:
    """A model whose blocks change nothing, so that what the embedding says is what every block gives out."""
    model = build(by_name(name))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.get_input_embeddings().weight.clamp_(-1, 1)[:, 0] = 1.0
    return model


def test_a_massive_embedding_is_seen_as_it_is() -> None:
    model, ids = identity_blocks("llama-gqa"), prompts()
    with torch.no_grad():
        model.get_input_embeddings().weight[ids[0, 0]] *= 50
    measured = measure(model, ids)
    assert measured.ratio[:, :, 0] == pytest.approx(torch.full((3, 3), 50.0))
    assert (measured.channel[:, :, 0] == 0).all()
    assert "Its pivots are weak" in pivot_sentence(first_token_pivots(measured), 20)


@pytest.mark.parametrize(
    ("ids", "message"), [(prompts()[:, :1], "at least two tokens"), (prompts()[0], "at least two tokens")]
)
def test_what_cannot_be_measured_is_refused(ids: Tensor, message: str) -> None:
    with pytest.raises(IntactKVError, match=message):
        measure(build(by_name("llama-gqa")), ids)


def test_models_in_training_and_long_texts_that_need_maps_are_refused() -> None:
    with pytest.raises(IntactKVError, match="training mode"):
        measure(build(by_name("llama-gqa")).train(), prompts())
    long = torch.randint(8, 90, (1, 2049))
    with pytest.raises(IntactKVError, match="at most 2048"):
        measure(build(by_name("falcon-rotary"), max_position_embeddings=4096), long)
    with pytest.raises(IntactKVError, match="attention chunk"):
        measure(build(by_name("llama4")), prompts())


@pytest.mark.slow
def test_sixteen_thousand_tokens_need_no_map() -> None:
    """A child process, whose peak the system keeps: measure beyond a short text's, against one map's size."""
    script = (
        "import resource, sys, torch; sys.path.insert(0, 'tests')\n"
        "from models import build, by_name\n"
        "from intactkv.pivots import measure\n"
        "torch.set_num_threads(1)\n"
        "model = build(by_name('llama-gqa'), num_hidden_layers=1, max_position_embeddings=2**15)\n"
        "def peak(length):\n"
        "    measure(model, torch.randint(8, 90, (1, length)))\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "short = peak(256)\n"
        "print(peak(2**14) - short)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    map_of_one_layer = 4 * 2**14 * 2**14 * 4  # heads, query, key, bytes of float32: 4 GiB
    assert int(done.stdout) < map_of_one_layer / 12, done.stdout
    print(f"16,384 tokens, 4 heads: {int(done.stdout) / 2**20:.0f} MiB beyond 256 tokens")


def test_blocks_of_queries_are_bounded_whatever_the_length() -> None:
    query = torch.zeros(1, 4, 6000, 4)
    for _, weights in weight_blocks(query, query[:, :2], Rule(1.0)):
        assert weights.numel() <= BLOCK_ELEMENTS
        break


# --- what kind of pivot it is ---


def plain_windows(rows: int = 6, length: int = 40) -> Tensor:
    return torch.randint(8, 97, (rows, length), generator=torch.Generator().manual_seed(3))


def test_a_token_pivot_is_told_from_a_positional_one() -> None:
    (pivot,) = diagnose(planted(), plain_windows(), bos=BOS).pivots
    assert (pivot.kind, pivot.token, pivot.position, pivot.channel) == ("token", BOS, None, 0)
    assert pivot.layers == (0, 1, 2)
    assert pivot.share == 1
    assert pivot.strength > MASSIVE / 30

    model = build(by_name("opt"))
    with torch.no_grad():
        model.model.decoder.embed_positions.weight[2, 5] = 200.0  # OPT's position 0
    (pivot,) = diagnose(model, plain_windows(), bos=BOS).pivots
    assert (pivot.kind, pivot.position, pivot.token, pivot.channel) == ("position", 0, None, 5)


def test_a_token_pivot_that_is_not_bos_is_found_in_the_text() -> None:
    model, windows = identity_blocks("llama-gqa"), plain_windows()
    with torch.no_grad():
        model.get_input_embeddings().weight[50] *= 100
    windows[:, 17] = 50
    (pivot,) = diagnose(model, windows, bos=BOS).pivots
    assert (pivot.kind, pivot.token) == ("token", 50)
    assert pivot.strength == pytest.approx(100, rel=0.01)


def test_a_random_model_has_no_pivots_and_a_later_sink_is_no_pivot() -> None:
    assert diagnose(build(by_name("llama-gqa")), plain_windows(), bos=BOS).pivots == ()
    model, windows = planted(), plain_windows(length=60)
    with torch.no_grad():  # the same sink, moved to a token whose hidden state is not massive
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 0.0
        embedding[33, 0] = 8.0
    windows[windows == 33] = 34
    windows[:, 10] = 33
    diagnosis = diagnose(model, windows, bos=BOS)
    assert {(sink.position, sink.token) for sink in diagnosis.sinks} == {(11, 33)}  # one later, behind [BOS]
    assert all(sink.mass > 0.3 for sink in diagnosis.sinks)
    assert diagnosis.pivots == ()


def test_a_large_key_bias_is_trouble_of_its_own_and_no_pivot() -> None:
    model = build(by_name("qwen2"))
    assert diagnose(model, plain_windows(), bos=None).key_bias == {}
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias[3] = 100.0
    diagnosis = diagnose(model, plain_windows(), bos=None)
    assert list(diagnosis.key_bias) == [1]
    assert 0.9 < diagnosis.key_bias[1] <= 1.0
    assert diagnosis.pivots == ()
    assert KEY_BIAS < 0.9


def test_too_little_text_to_tell_is_refused() -> None:
    with pytest.raises(IntactKVError, match="at least 4 of at least 32"):
        diagnose(planted(), plain_windows(rows=3), bos=BOS)


# --- the verdict's rule ---

FLOOR = WORTH_IT


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (FLOOR, 0.5, "worth it"),
        (0.001, 0.5, "marginal"),
        (0.001, FLOOR, "marginal"),
        (0.001, 0.019, "no effect"),
        (-0.001, 0.5, "no effect"),
        (-0.5, 0.001, "no effect"),
        (-0.5, -0.001, "harmful"),
        (-FLOOR, -0.001, "harmful"),
        (-0.019, -0.001, "no effect"),
        (nan, nan, "no effect"),
    ],
)
def test_the_verdict_follows_its_rule(low: float, high: float, want: str) -> None:
    gap = Interval((low + high) / 2, low, high)
    assert decide(gap) == want
    assert verdict(gap).startswith(want)
    assert decide(gap, own_kl=1e-9) == "no effect"
    assert decide(gap, times=9.9) == want
    assert decide(gap, times=10.0) == decide(gap, times=float("nan")) == "broken"
    assert verdict(gap, times=4.7e6).startswith("broken: its perplexity with the intact prefix is 4.7e+06 times")


@given(low=st.floats(-2, 1), width=st.floats(0, 1), shift=st.floats(0, 1))
def test_a_better_interval_never_gets_a_worse_verdict(low: float, width: float, shift: float) -> None:
    order = ["harmful", "no effect", "marginal", "worth it"]
    one, two = (Interval(a, a, a + width) for a in (low, low + shift))
    assert order.index(decide(two)) >= order.index(decide(one))
