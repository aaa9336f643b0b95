"""Decoding on a GPU: layers that hold their newest tokens in a ring, and steps replayed from a CUDA graph.

Here under Triton's interpreter on a CPU, where a graph is replayed by calling the step again; `benchmarks/gpu.py` runs
the same comparison with real graphs on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

pytest.importorskip("triton")

from test_packed_kernel import packed
from triton.runtime import interpreter

from intactkv import IntactKVError, PackedCache, Packing, read_packed
from intactkv.packed import cache as cache_module
from intactkv.packed import graphs, kernel, reads
from intactkv.packed import steady as steady_module

pytestmark = pytest.mark.usefixtures("interpreter")

PROMPT, STEPS = 46, 3  # beside `residual`: the second step fills every packing's ring, and packs; the third goes on
PACKINGS = {
    "per-token": Packing(bits=4, keys="per_token"),
    "per-token, 2 bits, rounded": Packing(bits=2, own="rounded", keys="per_token"),
    "per-token, 8 bits, residual": Packing(bits=8, residual=3, keep=2, keys="per_token"),
    "per-token, 3 bits, kept": Packing(bits=3, keep=2, keys="per_token"),
    "per-channel": Packing(bits=2, keys="per_channel", token_group=16, residual=4),
    "per-channel, 3 bits, rounded, kept": Packing(
        bits=3, keys="per_channel", token_group=16, residual=0, keep=2, own="rounded"
    ),
    "per-channel, 4 bits, kept": Packing(bits=4, keys="per_channel", token_group=16, keep=3),
}


@pytest.fixture(autouse=True)
def two_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens go in two shares, not in eight: the interpreter runs one after the other, empty ones too."""
    monkeypatch.setattr(kernel, "programs_at_once", lambda *asked: 4)
    monkeypatch.setattr(kernel, "BLOCK", 16)  # or a prompt would be one block, and one share


def built(layers: int) -> PreTrainedModel:
    """A Llama whose heads the kernels serve."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=128, intermediate_size=32, num_hidden_layers=layers,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=64)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return built(2)


@pytest.fixture(scope="module")
def shallow() -> PreTrainedModel:
    """One layer, where every kind of packing is tried: Triton's interpreter takes seconds for a step of one."""
    return built(1)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def set_(yes: bool) -> None:
        for module in (cache_module, reads):
            monkeypatch.setattr(module, "on_gpu", lambda x: yes)

    return set_


def decode(
    model: PreTrainedModel, packing: Packing, *, prompt: int | None = None, steps: int = STEPS, pad: int = 0
) -> Any:
    """Logits of a prompt and of steps after it, and the cache; row 1 has `pad` columns of padding on the left."""
    prompt = PROMPT + packing.residual if prompt is None else prompt
    ids = torch.randint(0, 97, (2, prompt + steps), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits = PackedCache(model.config, packing), []
    with torch.no_grad():
        for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, prompt + steps))]:
            out = model(
                ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                past_key_values=cache,
            )  # fmt: skip
            logits.append(out.logits)
    return torch.cat(logits, 1), cache


def contents(cache: PackedCache) -> list[torch.Tensor]:
    """All that the layers hold, newest tokens in order."""
    held = []
    for layer in cache.layers:
        layer.crop(layer.length)  # type: ignore[union-attr]
        assert layer.steady is None  # type: ignore[union-attr]
        for store in layer.stores:  # type: ignore[union-attr]
            packed = store.view(layer.runs[0])  # type: ignore[union-attr]
            held += [packed.codes, packed.scale, packed.low]
        held += [*layer.tail, *layer.kept]  # type: ignore[union-attr]
    return held


PADDED = [  # with and without padding on the left
    pytest.param(PACKINGS[name], pad, id=f"{name}, {pad}")
    for pad, names in ((0, PACKINGS), (3, [*PACKINGS][2::2]))
    for name in names
]


@pytest.mark.parametrize(("packing", "pad"), PADDED)
def test_a_ring_holds_bit_for_bit_what_pytorch_packs(
    model: PreTrainedModel, shallow: PreTrainedModel, packing: Packing, pad: int, on_gpu: Callable[[bool], None]
) -> None:
    model = model if packing is PACKINGS["per-token"] else shallow
    with read_packed(model):
        on_gpu(False)
        want, plain = decode(model, packing, pad=pad)
        on_gpu(True)
        got, ring = decode(model, packing, pad=pad)
    for layer in ring.layers:
        before = PROMPT // packing.together * packing.together
        assert layer.steady is not None
        assert layer.steady.packed > before
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    for a, b in zip(contents(ring), contents(plain), strict=True):
        if a.is_floating_point() and a.dtype == torch.float32:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        else:  # later layers see hidden states that differ in the last bit
            assert float((a.float() - b.float()).abs().gt(1e-3 * b.float().abs() + 1e-3).float().mean()) < 0.01
    assert torch.equal(contents(ring)[0], contents(plain)[0])  # the first layer's do not


@pytest.mark.parametrize("pad", [0, 3])
def test_a_ring_with_padding_and_kept_tokens_in_it(
    shallow: PreTrainedModel, pad: int, on_gpu: Callable[[bool], None]
) -> None:
    """A group that a step packs leaves padding and kept tokens out of its scales."""
    packing, found = PACKINGS["per-channel, 4 bits, kept"], []
    with read_packed(shallow):
        for way in (False, True):
            on_gpu(way)
            found.append(decode(shallow, packing, prompt=packing.together - 2, pad=pad))
    (want, plain), (got, ring) = found
    torch.testing.assert_close(got[:, -STEPS:], want[:, -STEPS:], atol=2e-5, rtol=2e-5)
    held = [contents(cache) for cache in (plain, ring)]
    for one, other in zip(*held, strict=True):
        torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)
    assert torch.equal(held[0][0], held[1][0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("keys", ["per_token", "per_channel"])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's, of the interpreter
def test_one_kernel_rounds_as_pytorch_does(bits: int, keys: Any, on_gpu: Callable[[bool], None]) -> None:
    torch.manual_seed(bits)
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, hidden_size=128)
    packing = Packing(bits=bits, keys=keys, token_group=16)
    states = torch.randn(2, 2, 2, 26, 64) * torch.logspace(-6, 6, 26)[:, None]
    states[:, 1, 1, 12, 7] = torch.nan
    states[:, 0, 1, 14, 9] = torch.inf
    caches = []
    for steady in (False, True):
        on_gpu(steady)
        cache = PackedCache(config, packing)
        cache.update(*states[..., :5, :], 0)
        for t in range(5, 26):
            cache.update(*states[..., t : t + 1, :], 0)
        assert (cache.layers[0].steady is not None) == steady  # type: ignore[union-attr]
        caches.append(cache)
    plain, ring = (contents(cache) for cache in caches)
    finite = ~(plain[1].isnan() | plain[1].isinf())  # scales; a group with a NaN is NaN or infinite as a whole
    for a, b in zip(ring, plain, strict=True):
        if a.shape == finite.shape:
            assert torch.equal(a[finite], b[finite])
    dense = [cache.layers[0].stores[0].view(cache.layers[0].runs[0]).dense(torch.float32) for cache in caches]  # type: ignore[union-attr]
    torch.testing.assert_close(dense[1].isfinite(), dense[0].isfinite())
    torch.testing.assert_close(dense[1][dense[1].isfinite()], dense[0][dense[0].isfinite()], atol=0, rtol=0)
    assert not bool(dense[1][1, 1, 12].isfinite().any() if keys == "per_token" else dense[1][1, 1, 12, 7].isfinite())


def test_anything_else_takes_the_tokens_out_of_the_ring(model: PreTrainedModel, on_gpu: Callable[[bool], None]) -> None:
    outcomes = []
    for steady in (False, True):
        on_gpu(steady)
        with read_packed(model), torch.no_grad():
            _, cache = decode(model, Packing(bits=4, residual=3, keep=1, keys="per_token"), prompt=13, steps=5)
            ids = torch.arange(6).reshape(2, 3)
            cache.crop(15)
            first = model(ids, past_key_values=cache).logits
            more = [model(ids[:, :1], past_key_values=cache).logits for _ in range(2)]
            cache.reorder_cache(torch.tensor([1, 1]))
            more += [model(ids[:, 1:2], past_key_values=cache).logits for _ in range(2)]
            cache.batch_select_indices(torch.tensor([0]))
            more += [model(ids[:1, 1:2], past_key_values=cache).logits.expand(2, -1, -1) for _ in range(2)]
            outcomes.append(torch.cat([first, *more], 1))
            assert cache.get_seq_length() == 15 + 3 + 6
    torch.testing.assert_close(outcomes[1], outcomes[0], atol=2e-5, rtol=2e-5)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A graph that is replayed by calling the step again, into the same output; counts captures and replays."""
    counts = [0, 0]

    def record(step: Callable[[], Any], tick: Callable[[], None]) -> Any:
        counts[0] += 1
        step()  # it runs twice before the first replay, as with CUDA
        with monkeypatch.context() as patch:  # while a graph is captured, transformers makes a mask that hides nothing
            patch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)
            patch.setattr(steady_module, "capturing", lambda: True)
            output = step()

        def replay() -> None:
            counts[1] += 1
            output.logits.copy_(again())
            tick()

        clocks = [(layer.steady, layer.steady.clock) for layer in output.past_key_values.layers]

        def again() -> torch.Tensor:
            for steady, clock in clocks:
                steady.clock = clock
            logits: torch.Tensor = step().logits
            for steady, _ in clocks:
                steady.clock = None
            return logits

        return replay, output

    monkeypatch.setattr(graphs, "record", record)
    return counts


def test_replayed_steps_read_no_padding_that_is_in_the_ring(
    shallow: PreTrainedModel, on_gpu: Callable[[bool], None], recorded: list[int]
) -> None:
    packing, found = PACKINGS["per-channel, 4 bits, kept"], []
    for way in (False, True):
        on_gpu(way)
        with read_packed(shallow, graphs=way):
            found.append(decode(shallow, packing, prompt=packing.together - 4, pad=3)[0][:, -STEPS:])
    assert recorded[1] == STEPS
    torch.testing.assert_close(*found, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("packing", "pad"), PADDED)
def test_replayed_steps_equal_the_models_own(
    shallow: PreTrainedModel,
    packing: Packing,
    pad: int,
    on_gpu: Callable[[bool], None],
    recorded: list[int],
) -> None:
    on_gpu(False)
    with read_packed(shallow):
        want, plain = decode(shallow, packing, pad=pad)
    on_gpu(True)
    with read_packed(shallow, graphs=True):
        got, cache = decode(shallow, packing, pad=pad)
    assert recorded[1] == STEPS
    assert recorded[0] == 1
    assert cache.get_seq_length() == plain.get_seq_length()
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert "forward" not in vars(shallow)


def test_a_replay_goes_on_after_other_calls(
    model: PreTrainedModel, on_gpu: Callable[[bool], None], recorded: list[int]
) -> None:
    outcomes = []
    ids = torch.arange(12).reshape(2, 6) + 3
    for way in (False, True):
        on_gpu(way)
        with read_packed(model, **({"graphs": True} if way else {})), torch.no_grad():
            cache, logits = PackedCache(model.config, Packing(bits=4, residual=2, keys="per_token")), []
            for begin, end in ((0, 2), (2, 3), (3, 4)):
                logits.append(model(ids[:, begin:end], past_key_values=cache).logits)
            # a call that the graph does not serve stores a token too
            out = model(ids[:, 4:5], past_key_values=cache, output_hidden_states=True)
            assert out.hidden_states is not None
            logits += [out.logits, model(ids[:, 5:6], past_key_values=cache).logits]
            cache.crop(4)
            logits.append(model(ids[:, 4:5], past_key_values=cache).logits)
            hiding = torch.ones(2, 6, dtype=torch.int64)
            hiding[0, 1] = 0  # a hole: not padding
            logits.append(model(ids[:, 5:6], past_key_values=cache, attention_mask=hiding).logits)
            outcomes.append(torch.cat(logits, 1))
    assert recorded[1] == 4
    torch.testing.assert_close(outcomes[1], outcomes[0], atol=2e-5, rtol=2e-5)


def test_generating_with_graphs_gives_the_same_tokens(
    model: PreTrainedModel, on_gpu: Callable[[bool], None], recorded: list[int]
) -> None:
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    answers = []
    for way in ({}, {"graphs": True}):
        on_gpu(bool(way))
        with read_packed(model, **way):
            cache = PackedCache(model.config, Packing(bits=4, keep=2, keys="per_token"))
            answers.append(
                model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
            )
    assert recorded[1] == 3
    assert torch.equal(answers[0], answers[1])


def test_every_launch_says_whether_products_and_sums_are_one(
    shallow: PreTrainedModel, on_gpu: Callable[[bool], None], recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.9 warns where nothing is said, 3.10 makes them two, 6 % more instructions for a block of the kernel."""
    run, said = interpreter.InterpretedFunction.run, {}

    def heard(self: Any, *args: Any, **settings: Any) -> Any:
        said[self.fn.__name__] = settings.get("enable_fp_fusion")
        return run(self, *args, **settings)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", heard)
    on_gpu(True)
    with read_packed(shallow, graphs=True):
        decode(shallow, PACKINGS["per-token"], steps=2)
    key, value = (packed(torch.randn(1, 1, 16, 64), 4) for _ in range(2))
    kernel.packed_attention_gpu(torch.randn(1, 1, 2, 64), key, value)
    assert said == {"store": False, "_attend": True, "finish": True, "tick": True, "_merge": True}


def test_graphs_need_a_gpu(model: PreTrainedModel) -> None:
    with pytest.raises(IntactKVError, match="this one is on cpu"):
        read_packed(model, graphs=True)


def test_graphs_need_one_gpu(on_gpu: Callable[[bool], None]) -> None:
    on_gpu(True)
    spread = built(1)
    spread.lm_head.to("meta")
    with pytest.raises(IntactKVError, match="a model on one GPU; this one is on cpu, meta; leave it out"):
        read_packed(spread, graphs=True)
