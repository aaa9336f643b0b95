"""Ways of calling an attached model: caches, packing, decoding modes, compilation, and calls that must be refused."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import PREFIX, VOCAB, build, by_name, padded, prompts, reference_cache, reference_logits, rounded
from test_laws import differ, rows
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)

from intactkv import IntactKV, IntactKVError, attach, capture, detach
from intactkv.attaching.handle import is_attached
from intactkv.decoder import cache_name

P, TOLERANCE = len(PREFIX), 1e-5


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, IntactKV]:
    """A rounded Llama and its full model's intact KV."""
    full = build(by_name("llama-gqa"))
    return rounded(full), capture(full, PREFIX)


@pytest.fixture(scope="module")
def two_layers() -> tuple[PreTrainedModel, IntactKV]:
    """As `pair`, for torch.compile, which takes a second for each layer."""
    full = build(by_name("llama-gqa"), num_hidden_layers=2)
    return rounded(full), capture(full, PREFIX)


def want_rows(model: PreTrainedModel, kv: IntactKV, some: list[Tensor]) -> list[Tensor]:
    return [reference_logits(model, kv, row) for row in some]


# Which rows get what


@torch.no_grad()
def test_a_row_that_shares_m_prefix_tokens_gets_m_intact_rows(pair: Any) -> None:
    model, kv = pair
    ids = prompts(rows=4)
    for shared in range(4):
        ids[shared, shared:P] = 90 - shared  # row m agrees in its first m tokens
    with attach(model, kv), pytest.warns(UserWarning, match=f"row 1 agrees with only 1 of the {P} prefix tokens"):
        logits = model(ids).logits
    for shared in range(4):
        if shared == 0:
            want = model(ids[:1]).logits[0]
            assert torch.equal(logits[0], want) or differ(logits[0], want) <= 1e-6
            continue
        part = IntactKV(
            kv.ids[:shared],
            {i: (k[:, :shared], v[:, :shared]) for i, (k, v) in kv.layers.items()},
            kv.logits[:shared],
            kv.fingerprint,
        )
        assert differ(logits[shared, shared:], reference_logits(model, part, ids[shared])) <= TOLERANCE
        assert torch.equal(logits[shared, :shared], kv.logits[:shared])


@torch.no_grad()
def test_rows_without_the_prefix_are_the_plain_model_bit_for_bit_and_warn_once(pair: Any) -> None:
    model, kv = pair
    ids = prompts()
    ids[:, 0] = 40
    with attach(model, kv):
        with pytest.warns(UserWarning, match="no row begins with the prefix"):
            first = model(ids).logits
        assert torch.equal(first, model(ids, use_cache=False).logits)  # pytest turns a second warning into an error
    assert torch.equal(first, model(ids).logits)


@torch.no_grad()
def test_rows_that_leave_the_prefix_are_told_of_in_any_padding_and_short_ones_are_not(pair: Any) -> None:
    model, kv = pair
    ids = prompts()[:1]
    with attach(model, kv):  # a prompt that ends inside the prefix may go on in it
        model(ids[:, : P - 1])
    ids[0, P - 1] = 90
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    for arguments in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        with attach(model, kv), pytest.warns(UserWarning, match=f"row 0 agrees with only {P - 1} of the {P} prefix"):
            model(**arguments)


@torch.no_grad()
def test_packed_rows_equal_their_sequences_alone(pair: Any) -> None:
    model, kv = pair
    a, b = rows()[0][:9], rows()[2][:12]
    ids = torch.cat([a, b])[None]
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    with attach(model, kv):
        logits = model(ids, position_ids=positions, use_cache=False).logits[0]
        blocks = torch.block_diag(torch.ones(9, 9), torch.ones(12, 12)).tril().bool()[None, None]
        masked = model(ids, position_ids=positions, attention_mask=blocks, use_cache=True).logits[0]
        with pytest.raises(IntactKVError, match="position_ids restart inside a row"):
            model(ids, position_ids=positions, use_cache=True)
        with pytest.raises(IntactKVError, match="position_ids restart inside a row"):
            model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
    for got in (logits, masked):
        assert differ(got[P:9], reference_logits(model, kv, a)) <= TOLERANCE
        assert differ(got[9 + P :], reference_logits(model, kv, b)) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-gqa", "opt", "gpt2", "qwen3"])
def test_left_padding_without_position_ids_is_put_right_also_in_a_decode_loop(name: str) -> None:
    full = build(by_name(name))
    model, kv = rounded(full), capture(full, PREFIX)
    ids, mask, _ = padded(rows(), "left")
    new = prompts(rows=3, seed=9)[:, -3:]
    cache, steps = DynamicCache(config=model.config), []
    with attach(model, kv):
        model(ids, attention_mask=mask, past_key_values=cache)
        for t in range(3):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            steps.append(model(new[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
    for i, row in enumerate(rows()):
        want = reference_logits(model, kv, torch.cat([row, new[i]]))[-3:]
        assert differ(torch.cat(steps, 1)[i], want) <= TOLERANCE


# Logits of prefix positions


@torch.no_grad()
def test_prefix_logits_come_from_the_artifact_however_many_are_kept(pair: Any) -> None:
    model, kv = pair
    ids, mask, _ = padded(rows(), "left")
    with attach(model, kv):
        whole = model(ids, attention_mask=mask).logits
        for i, row in enumerate(rows()):
            assert torch.equal(whole[i, len(ids[0]) - len(row) :][:P], kv.logits)
        for keep in (1, 5, 18, torch.tensor([0, 7, 8, 9, 19])):
            kept = model(ids, attention_mask=mask, logits_to_keep=keep).logits
            assert differ(kept, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]) <= 1e-6
        prompt_is_prefix = torch.tensor([PREFIX])
        assert torch.equal(model(prompt_is_prefix, logits_to_keep=1).logits[0], kv.logits[-1:])
        first = model.generate(prompt_is_prefix, max_new_tokens=1, do_sample=False)[0, -1]
    assert first == kv.logits[-1].argmax()


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "llama-gqa"])
def test_loss_and_scaled_logits_are_those_of_the_full_model_at_prefix_positions(name: str) -> None:
    full = build(by_name(name))
    model, kv = rounded(full), capture(full, PREFIX)
    ids = prompts()
    with attach(model, kv):
        out = model(ids, labels=ids)
        as_tuple = model(ids, use_cache=False, return_dict=False)
    assert differ(out.logits[:, :P], full(ids).logits[:, :P]) <= TOLERANCE
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(out.loss - want) <= 1e-6
    assert len(as_tuple) == 1
    assert differ(as_tuple[0], out.logits) <= TOLERANCE


# Caches


@torch.no_grad()
def test_a_static_cache_is_right_again_after_reset_even_for_a_one_token_prompt() -> None:
    full = build(by_name("llama-gqa"))
    model, kv = rounded(full), capture(full, PREFIX[:1])
    cache = StaticCache(config=model.config, max_cache_len=32)
    row = prompts()[0]
    want = reference_logits(model, kv, row[:8])
    with attach(model, kv):
        for _ in range(2):
            cache.reset()
            model(row[None, :1], past_key_values=cache, position_ids=torch.zeros(1, 1, dtype=torch.int64))
            steps = []
            for t in range(1, 8):
                step = model(row[None, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]]))
                steps.append(step.logits[0])
            assert differ(torch.cat(steps), want) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("crop", [0, 1, 2, 5])
def test_a_cropped_cache_goes_on_right_inside_and_after_the_prefix(pair: Any, crop: int) -> None:
    model, kv = pair
    first, row = prompts(seed=3)[:1], prompts(seed=4)[:1]
    row[:, :crop] = first[:, :crop]
    cache = DynamicCache(config=model.config)
    with attach(model, kv):
        model(first, past_key_values=cache)
        cache.crop(crop - 20)
        steps = [model(row[:, t : t + 1], past_key_values=cache).logits[0] for t in range(crop, 20)]
    want = reference_logits(model, kv, row[0])
    got = torch.cat(steps)
    assert differ(got[-15:], want[-15:]) <= TOLERANCE


def test_a_row_that_leaves_the_prefix_after_a_crop_does_not_get_the_rest_of_it(pair: Any) -> None:
    model, kv = pair
    cache, ids = DynamicCache(config=model.config), prompts()[:1]
    other = ids.clone()
    other[0, 1] = 30  # cropped to [BOS], then another token, then the prefix's third
    part = IntactKV(
        kv.ids[:1], {i: (k[:, :1], v[:, :1]) for i, (k, v) in kv.layers.items()}, kv.logits[:1], kv.fingerprint
    )
    want = reference_logits(model, part, other[0])
    with attach(model, kv):
        model(ids, past_key_values=cache)
        cache.crop(1 - 20)
        steps = [model(other[:, t : t + 1], past_key_values=cache).logits[0] for t in range(1, 20)]
    assert differ(torch.cat(steps), want) <= TOLERANCE


@torch.no_grad()
def test_rows_reordered_inside_the_prefix_are_told_by_what_the_cache_holds(pair: Any) -> None:
    model, kv = pair
    ids = prompts()[:2]
    ids[1, 1] = 40  # row 1 shares one token only
    with attach(model, kv):
        with pytest.warns(UserWarning, match=f"row 1 agrees with only 1 of the {P} prefix tokens"):
            want = model(ids).logits
        cache = DynamicCache(config=model.config)
        model(ids[:, :2], past_key_values=cache)  # once is enough
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = [model(ids[[1, 0], t : t + 1], past_key_values=cache).logits for t in range(2, 8)]
    assert differ(torch.cat(swapped, 1), want[[1, 0], 2:8]) <= TOLERANCE


@torch.no_grad()
def test_right_padded_rows_go_on_at_their_own_positions(pair: Any) -> None:
    model, kv = pair
    ids, mask, _ = padded(rows(), "right")
    new = prompts(rows=3, seed=9)[:, -3:]
    want = [reference_logits(model, kv, torch.cat([row, new[i]]))[-3:] for i, row in enumerate(rows())]
    cache, steps = DynamicCache(config=model.config), []
    with attach(model, kv):
        model(ids, attention_mask=mask, past_key_values=cache)
        for t in range(3):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            steps.append(model(new[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
    for i in range(3):
        assert differ(torch.cat(steps, 1)[i], want[i]) <= TOLERANCE


@torch.no_grad()
def test_caches_of_another_artifact_or_another_size_are_refused(pair: Any) -> None:
    model, kv = pair
    other = IntactKV(kv.ids, {i: (k + 1, v) for i, (k, v) in kv.layers.items()}, kv.logits, kv.fingerprint)
    with attach(model, kv):
        with pytest.raises(IntactKVError, match="with another intact KV"):
            model(prompts()[:1, P:], past_key_values=other.cache(model))
        with pytest.raises(IntactKVError, match="made for 1 rows and is used with 3"):
            model(prompts()[:, P:], past_key_values=kv.cache(model))
        again = copy.deepcopy(kv)  # the same artifact, loaded twice, is the same
        model(prompts()[:1, P:], past_key_values=again.cache(model))


def test_a_single_token_on_another_artifacts_cache_is_refused() -> None:
    model = build(by_name("llama-gqa"))
    prompt = torch.tensor([[*PREFIX, 40, 41]])
    first, second = capture(model, PREFIX), capture(model, [*PREFIX, 40])
    with attach(model, first):
        cache = model(prompt, use_cache=True).past_key_values
        model(torch.tensor([[42]]), past_key_values=cache)
    with attach(model, second), pytest.raises(IntactKVError, match="computed with another intact KV"):
        model(torch.tensor([[43]]), past_key_values=cache)


@torch.no_grad()
def test_a_prefilled_cache_before_padding_counts_positions_right(pair: Any) -> None:
    model, kv = pair
    row = rows()[1]
    rest = torch.cat([torch.zeros(4, dtype=torch.int64), row[P:]])[None]
    mask = torch.cat([torch.ones(P), torch.zeros(4), torch.ones(len(row) - P)])[None].long()
    want = reference_logits(model, kv, row)
    with attach(model, kv):
        logits = model(rest, past_key_values=kv.cache(model), attention_mask=mask).logits[0, 4:]
    assert differ(logits, want) <= TOLERANCE


@torch.no_grad()
def test_threads_on_one_model_do_not_mix(pair: Any) -> None:
    model, kv = pair
    want = [torch.stack(want_rows(model, kv, list(prompts(seed=s)))) for s in range(4)]

    def work(seed: int) -> float:
        with torch.no_grad():  # per thread
            return max(differ(model(prompts(seed=seed)).logits[:, P:], want[seed]) for _ in range(20))

    with attach(model, kv), ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) <= TOLERANCE


@torch.no_grad()
def test_eight_threads_that_generate_get_what_each_gets_alone(pair: Any) -> None:
    """Prompts with the prefix, padded and not, and one without: tokens and logits, while the others run."""
    model, kv = pair
    batches = []
    for seed in range(8):
        rows = list(prompts(rows=2, length=12 + seed, seed=seed))
        if seed % 2:
            rows[0] = rows[0][:-3]
        if seed == 6:
            rows = [row[P:] for row in rows]
        batches.append(padded(rows, "left"))

    def work(batch: Any) -> Any:
        ids, mask, _ = batch
        with torch.no_grad():  # per thread
            return model.generate(
                ids, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the prompts without the prefix
        with attach(model, kv):
            alone = [work(batch) for batch in batches]
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(work, batches * 3))
    for one, other in zip(alone * 3, found, strict=True):
        assert torch.equal(one.sequences, other.sequences)
        assert max(differ(a, b) for a, b in zip(one.logits, other.logits, strict=True)) <= TOLERANCE


@torch.no_grad()
def test_a_cache_with_an_update_of_its_own_keeps_it(pair: Any) -> None:
    model, kv = pair
    cache, seen = DynamicCache(config=model.config), []
    original = cache.update

    def own(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        seen.append(layer)
        return original(key, value, layer, *args, **kwargs)

    cache.update = own
    with attach(model, kv):
        model(prompts(), past_key_values=cache)
    assert cache.update is own
    assert seen == [0, 1, 2]


@torch.no_grad()
def test_an_interrupted_forward_leaves_nothing_behind(pair: Any) -> None:
    model, kv = pair
    cache = DynamicCache(config=model.config)
    want = reference_logits(model, kv, prompts()[0])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with attach(model, kv) as handle:
        hook = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompts(), past_key_values=cache)
        hook.remove()
        assert differ(model(prompts()).logits[0, P:], want) <= TOLERANCE
        assert "update" not in vars(cache)
        hook = model.model.layers[1].register_forward_hook(lambda *_: handle.remove())
        model(prompts(), past_key_values=(fresh := DynamicCache(config=model.config)))
        hook.remove()
        assert "update" not in vars(fresh)


def test_an_attached_model_can_be_saved_but_not_copied(pair: Any, tmp_path: Any) -> None:
    model, kv = copy.deepcopy(pair[0]), pair[1]
    with attach(model, kv):
        with pytest.raises(IntactKVError, match="cannot be copied or pickled"):
            copy.deepcopy(model)
        model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


@torch.no_grad()
def test_conversation_goes_on_with_the_returned_cache_and_with_a_copy_of_it(pair: Any) -> None:
    model, kv = pair
    ids = prompts()
    want = want_rows(model, kv, list(ids))
    with attach(model, kv):
        cache = model(ids[:, :8]).past_key_values
        assert "update" not in vars(cache)
        again = copy.deepcopy(cache)
        for c in (cache, again):
            logits = model(ids[:, 8:], past_key_values=c).logits
            for i in range(3):
                assert differ(logits[i], want[i][8 - P :]) <= TOLERANCE
        longer = torch.cat([ids, prompts(seed=8)[:, -2:]], 1)
        turns = model.generate(longer, past_key_values=again, max_new_tokens=3, do_sample=False)
        assert torch.equal(turns, model.generate(longer, max_new_tokens=3, do_sample=False))


class _Poisoned(Exception):
    pass


@torch.no_grad()
def test_an_exception_inside_the_forward_leaves_model_and_cache_clean(pair: Any) -> None:
    model, kv = pair
    ids, cache = prompts(), DynamicCache(config=model.config)

    want = reference_logits(model, kv, ids[0])

    def fail(*_: Any) -> None:
        raise _Poisoned

    with attach(model, kv):
        handle = model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(_Poisoned):
            model(ids, past_key_values=cache)
        handle.remove()
        assert "update" not in vars(cache)
        assert differ(model(ids).logits[0, P:], want) <= TOLERANCE


def quantized_cache(model: PreTrainedModel, **more: Any) -> QuantizedCache:
    pytest.importorskip("optimum.quanto")
    return QuantizedCache("quanto", model.config, nbits=4, residual_length=4, **more)


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, -1], ids=["per token", "per channel"])
def test_quantized_cache_gives_back_the_prefix_bit_for_bit_and_keeps_it_out_of_every_scale(
    pair: Any, axis: int
) -> None:
    model, kv = pair
    loud = IntactKV(
        kv.ids, {i: (1000 * k, 1000 * v) for i, (k, v) in kv.layers.items()}, kv.logits, kv.fingerprint
    )  # would ruin every scale it entered
    ids, mask, positions = padded(rows(), "left")
    cache = quantized_cache(model, axis_key=axis, axis_value=axis, q_group_size=16 if axis == 0 else 6)
    with attach(model, kv):
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        read: list[tuple[Tensor, Tensor]] = []
        for t in range(6):  # past the residual length: everything is rounded again at least once
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            where = positions.amax(1, keepdim=True) + 1 + t
            with _reads(cache, read):
                model(prompts(seed=7)[:, t + 3 : t + 4], attention_mask=mask, position_ids=where, past_key_values=cache)
    for layer, (key, value) in enumerate(read[-len(kv.layers) :]):
        for i, row in enumerate(rows()):
            at = slice(20 - len(row), 20 - len(row) + P)
            assert torch.equal(key[i, :, at], kv.layers[layer][0])
            assert torch.equal(value[i, :, at], kv.layers[layer][1])
    stored = []
    for artifact in (kv, loud):
        cache = quantized_cache(model, axis_key=axis, axis_value=axis, q_group_size=16 if axis == 0 else 6)
        with attach(model, artifact, check=False):
            model(ids, attention_mask=mask[:, :20], position_ids=positions, past_key_values=cache)
        stored.append(cache.layers[0]._dequantize(cache.layers[0]._quantized_keys))
    assert torch.equal(*stored)


class _reads:
    """Collect what every layer's attention reads from a cache, seen from inside the attention function."""

    def __init__(self, cache: Any, out: list[tuple[Tensor, Tensor]]) -> None:
        self.cache, self.out = cache, out

    def __enter__(self) -> None:
        from transformers.integrations import sdpa_attention
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.out.append((key, value))
            return sdpa_attention.sdpa_attention_forward(module, query, key, value, *args, **kwargs)

        self.functions = ALL_ATTENTION_FUNCTIONS
        self.functions["sdpa"] = spy

    def __exit__(self, *_: Any) -> None:
        del self.functions["sdpa"]


# Ways of decoding


def test_assisted_and_prompt_lookup_decoding_equal_greedy(pair: Any) -> None:
    model, kv = pair
    assistant = rounded(build(by_name("llama-gqa")), bits=4)
    ids = prompts()[:1]
    with attach(model, kv), attach(assistant, kv):
        greedy = model.generate(ids, max_new_tokens=12, do_sample=False)
        assisted = model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=assistant)
        lookup = model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=2)
    want = model.generate(ids, past_key_values=reference_cache(model, kv), max_new_tokens=12, do_sample=False)
    assert torch.equal(greedy, want)
    assert torch.equal(assisted, want)
    assert torch.equal(lookup, want)


def test_beams_and_several_sequences_equal_injection(pair: Any) -> None:
    model, kv = pair
    for row in rows():
        for way in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
            with attach(model, kv):
                got = model.generate(row[None], max_new_tokens=6, do_sample=False, **way)
            cache = reference_cache(model, kv)
            cache.batch_repeat_interleave(way["num_beams"])
            want = model.generate(row[None], past_key_values=cache, max_new_tokens=6, do_sample=False, **way)
            assert torch.equal(got, want)


def test_compiled_static_decoding_has_no_graph_break_and_the_same_graph(two_layers: Any) -> None:
    model, kv = two_layers
    ids, mask, positions = padded(rows(), "left")
    counts, results = [], []
    for attached in (True, False):
        cache = StaticCache(config=model.config, max_cache_len=32)
        handle = attach(model, kv) if attached else None
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            graphs: list[int] = []

            def backend(graph: Any, inputs: Any, into: list[int] = graphs) -> Any:
                into.append(len(graph.graph.nodes))
                return graph.forward

            torch._dynamo.reset()
            step = torch.compile(model.__call__, backend=backend, fullgraph=True)
            visible = torch.zeros(3, 1, 1, 32, dtype=torch.bool)
            visible[:, 0, 0, :20] = mask.bool()
            logits = []
            for t in range(3):
                visible[..., 20 + t] = True
                where = positions.amax(1, keepdim=True) + 1 + t
                new = prompts(seed=5)[:, t + 3 : t + 4]
                logits.append(
                    step(new, attention_mask=visible, position_ids=where, past_key_values=cache).logits.clone()
                )
        counts.append(graphs)
        results.append(torch.cat(logits, 1))
        if handle is not None:
            handle.remove()
    assert counts[0] == counts[1]
    assert len(counts[0]) == 1
    for i, row in enumerate(rows()):
        whole = torch.cat([row, prompts(seed=5)[i, 3:6]])
        assert differ(results[0][i], reference_logits(model, kv, whole)[-3:]) <= TOLERANCE
    assert differ(results[0], results[1]) > 100 * TOLERANCE


def test_a_compiled_step_inside_the_prefix_replaces_too(two_layers: Any) -> None:
    model, kv = two_layers
    row = prompts()[0]
    want = reference_logits(model, kv, row)
    torch._dynamo.reset()
    with torch.no_grad(), attach(model, kv):
        step, cache = torch.compile(model, backend="eager"), DynamicCache(config=model.config)
        logits = [step(row[None, t : t + 1], past_key_values=cache).logits[0] for t in range(8)]
    torch._dynamo.reset()
    assert differ(torch.cat(logits)[P:], want[: 8 - P]) <= TOLERANCE


def test_a_compiled_model_with_prefill_equals_eager(two_layers: Any) -> None:
    model, kv = two_layers
    torch._dynamo.reset()
    with torch.no_grad(), attach(model, kv):
        eager = model(prompts()).logits
        compiled = torch.compile(model, backend="eager")(prompts()).logits
    torch._dynamo.reset()
    assert differ(compiled, eager) <= TOLERANCE


@pytest.mark.parametrize("kept", ["all", "last", "some of the prefix"])
@pytest.mark.parametrize("cache", ["none", "dynamic", "dynamic with layers", "static"])
def test_a_compiled_prefill_is_one_graph_and_equals_eager(two_layers: Any, cache: str, kept: str) -> None:
    """Rows that all begin with the prefix, compiled once for all such prompts; intact tokens agree to the bit."""
    model, kv = two_layers
    made: dict[str, Any] = {
        "none": lambda: None,
        "dynamic": DynamicCache,
        "dynamic with layers": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
    }
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad(), attach(model, kv):
        step = torch.compile(model, backend=counter)
        for seed in range(3):
            ids = prompts(seed=seed)
            keep = {"all": 0, "last": 1, "some of the prefix": ids.shape[1] - P + 1}[kept]
            got, want = (call(ids, past_key_values=made[cache](), logits_to_keep=keep) for call in (step, model))
            assert differ(got.logits, want.logits) <= TOLERANCE
            for mine, other in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
                for x, y in ((mine.keys, other.keys), (mine.values, other.values)):
                    assert torch.equal(x[:, :, :P], y[:, :, :P])
                    assert differ(x, y) <= TOLERANCE
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_compiled_prefill_has_gradients(two_layers: Any) -> None:
    model, kv = two_layers
    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model.zero_grad()
        with attach(model, kv):
            call = torch.compile(model, backend="aot_eager") if compiled else model
            call(prompts(), use_cache=False).logits.sin().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch._dynamo.reset()
    model.zero_grad()
    assert len(gradients[0]) == len(gradients[1]) > 0
    for eager, traced in zip(*gradients, strict=True):
        assert differ(traced, eager) <= 10 * TOLERANCE


# Training


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_reach_the_kv_and_equal_injection(pair: Any, reentrant: bool | None) -> None:
    model, frozen = copy.deepcopy(pair[0]), pair[1]
    kv = IntactKV(
        frozen.ids,
        {i: (k.clone().requires_grad_(), v.clone().requires_grad_()) for i, (k, v) in frozen.layers.items()},
        frozen.logits,
        frozen.fingerprint,
    )
    leaves = [t for pair_ in kv.layers.values() for t in pair_]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ids, mask, _ = padded(rows(), "left")
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
    with attach(model, kv):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    torch.stack([logits[i][mask[i].bool()][P:].logsumexp(-1).sum() for i in range(3)]).sum().backward()
    got = [leaf.grad for leaf in leaves]
    model.gradient_checkpointing_disable()
    model.eval()
    total = torch.zeros(())
    for row in rows():
        cache = DynamicCache(config=model.config)
        for layer, (key, value) in kv.layers.items():
            cache.update(key[None], value[None], layer)
        rest = model(row[P:][None], past_key_values=cache, attention_mask=torch.ones(1, len(row)))
        total = total + rest.logits.logsumexp(-1).sum()
    want = torch.autograd.grad(total, leaves)
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0
        assert differ(a, b) <= 1e-4 * max(1.0, b.abs().max().item())


@torch.no_grad()
def test_autocast_and_additive_masks_with_a_bias_are_right(pair: Any) -> None:
    model, kv = pair
    ids = prompts()
    bias = torch.full((20, 20), torch.finfo(torch.float32).min).triu(1)[None, None] - 0.5 * torch.rand(1, 1, 20, 20)
    bias = bias.clamp(min=torch.finfo(torch.float32).min)
    cache = reference_cache(model, kv)
    want = model(ids[:1, P:], past_key_values=cache, attention_mask=bias[:, :, P:]).logits
    with attach(model, kv):
        assert differ(model(ids[:1], attention_mask=bias).logits[:, P:], want) <= TOLERANCE
        with torch.autocast("cpu", torch.bfloat16):
            low = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.stack([reference_logits(model, kv, row) for row in ids])
    assert differ(low[:, P:], plain) <= 0.1


def test_gradients_arrive_also_when_they_are_asked_for_after_a_first_call(pair: Any) -> None:
    model, frozen = pair
    kv = copy.deepcopy(frozen)
    with attach(model, kv):
        with torch.no_grad():
            model(prompts())
        for pair_ in kv.layers.values():
            pair_[1].requires_grad_()
        model(prompts())[0][:, P:].sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for _, value in kv.layers.values())


# Devices


@torch.no_grad()
def test_a_model_spread_and_offloaded_by_accelerate_is_right(pair: Any, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, kv = copy.deepcopy(pair[0]), pair[1]
    want = torch.stack(want_rows(model, kv, list(prompts())))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    spread = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    with attach(spread, kv):
        assert differ(spread(prompts()).logits[:, P:], want) <= TOLERANCE
    out = spread(prompts()[:, P:], past_key_values=kv.cache(spread, 3))
    assert differ(out.logits, want) <= TOLERANCE


# What must be refused


def test_two_attachments_on_one_model_are_refused_and_two_models_may_share_one_kv(pair: Any) -> None:
    model, kv = pair
    other = copy.deepcopy(model)
    with attach(model, kv), attach(other, kv):
        with pytest.raises(IntactKVError, match="already has an intact KV"):
            attach(model, kv)
        a, b = model(prompts()).logits, other(prompts()).logits
    assert torch.equal(a, b)
    handle = attach(model, kv)
    handle.remove()
    handle.remove()
    attach(model, kv).remove()


def test_an_attached_model_that_nobody_holds_is_freed(pair: Any) -> None:
    model = copy.deepcopy(pair[0])
    attach(model, pair[1])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_calls_that_cannot_be_right_are_refused(pair: Any) -> None:
    model, kv = pair
    ids, mask, _ = padded(rows(), "left")
    foreign = model(prompts()[:, :5]).past_key_values
    hidden = torch.ones(1, 20, dtype=torch.int64)
    hidden[0, :P] = 0
    blind = torch.ones(20, 20).tril().bool()[None, None].clone()
    blind[..., P:, 0:P] = False
    bad: list[tuple[str, dict[str, Any]]] = [
        ("gives no input_ids", {"inputs_embeds": model.get_input_embeddings()(ids)}),
        ("begins with the prefix at position 7", {"input_ids": ids, "attention_mask": mask,
                                                   "position_ids": torch.arange(20).expand(3, 20)}),
        ("already holds 5 tokens", {"input_ids": prompts()[:, 5:], "past_key_values": foreign}),
        ("hides the prefix of row 0", {"input_ids": prompts()[:1], "attention_mask": hidden}),
        ("hides a prefix token of row 0", {"input_ids": prompts()[:1], "attention_mask": blind}),
        ("is a tuple", {"input_ids": ids, "past_key_values": ((torch.zeros(1), torch.zeros(1)),)}),
        ("covers 7 tokens", {"input_ids": ids, "attention_mask": mask[:, :7]}),
    ]  # fmt: skip
    want = reference_logits(model, kv, ids[0])
    with attach(model, kv):
        for message, call in bad:
            with pytest.raises(IntactKVError, match=message):
                model(**call)
        assert differ(model(ids, attention_mask=mask).logits[0, P:], want) <= TOLERANCE


@torch.no_grad()
def test_padding_with_bos_hides_nothing_where_prompts_have_none() -> None:
    """bos = eos = pad, as GPT-2 has it, whose tokenizer puts no [BOS] before a text."""
    full = build(by_name("llama-gqa"))
    kv = capture(full, PREFIX[:1])
    ids, mask, _ = padded([row[1:] for row in rows()], "left")
    ids[mask == 0] = PREFIX[0]
    want = full(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    with attach(full, kv), pytest.warns(UserWarning, match="no row begins with the prefix"):
        logits = full(ids, attention_mask=mask).logits
    assert differ(logits[mask.bool()], want[mask.bool()]) <= TOLERANCE


def test_detach_needs_no_handle(pair: Any) -> None:
    model, kv = pair
    attach(model, kv)
    detach(model)
    assert not is_attached(model)
    detach(model)
    with attach(model, kv):
        detach(model)
    attach(model, kv).remove()


def test_resized_embeddings_are_told_their_remedy(pair: Any) -> None:
    model, kv = pair
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(IntactKVError, match=rf"vocab_size={VOCAB}, .*resize_token_embeddings\({VOCAB + 3}\)"):
        attach(larger, kv)


@torch.no_grad()
def test_a_pad_token_equal_to_bos_is_told_from_a_hidden_bos() -> None:
    full = build(by_name("llama-gqa"))
    model, kv = rounded(full), capture(full, PREFIX[:1])
    ids, mask, _ = padded(rows(), "left")
    ids[mask == 0] = PREFIX[0]
    want = want_rows(model, kv, rows())
    with attach(model, kv):
        logits = model(ids, attention_mask=mask).logits
        for i in range(3):
            assert differ(logits[i][mask[i].bool()][1:], want[i]) <= TOLERANCE
        mask[1, ids[1] == PREFIX[0]] = 0  # what generate() infers when the pad token is the BOS token
        with pytest.raises(IntactKVError, match="hides the prefix of row 1"):
            model(ids, attention_mask=mask)


@torch.no_grad()
def test_rope_that_changes_earlier_keys_with_length_is_refused_past_its_limit() -> None:
    scaling = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 8.0,
    }  # fmt: skip
    full = build(by_name("phi3"), rope_parameters=scaling, original_max_position_embeddings=16)
    kv = capture(full, PREFIX)
    ids = prompts()
    with attach(full, kv):
        short = full(ids[:, :16]).logits
        with pytest.raises(IntactKVError, match="RoPE scaling changes all keys"):
            full(ids)
    assert differ(short, full(ids[:, :16]).logits) <= TOLERANCE


@torch.no_grad()
def test_a_model_that_bypasses_cache_update_is_found_out(pair: Any) -> None:
    model, kv = pair
    layer = model.model.layers[1]

    def without_cache(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, cache_name(layer.self_attn.forward): None}

    handle = layer.self_attn.register_forward_pre_hook(without_cache, with_kwargs=True)
    with attach(model, kv, check=False), pytest.raises(RuntimeError, match=r"layers \[1\] did not pass"):
        model(prompts())
    handle.remove()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_door_lets_rounding_in_and_keeps_rotations_and_strangers_out(bits: int) -> None:
    from test_basis import hadamard, value_rotated

    full = build(by_name("llama-mha"))
    kv = capture(full, PREFIX)
    attach(rounded(full, bits), kv).remove()
    for stranger in (rounded(value_rotated(full, hadamard(16)), bits), build(by_name("llama-mha"), seed=9)):
        with pytest.raises(IntactKVError, match="another basis or model"):
            attach(stranger, kv)
        attach(stranger, kv, check=False).remove()


def test_attach_refuses_what_is_no_causal_lm_and_another_model(pair: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model, kv = pair
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(IntactKVError, match="not OptimizedModule"):
        attach(torch.compile(model), kv)
    with pytest.raises(IntactKVError, match="is an encoder-decoder"):
        attach(t5, kv)
    with pytest.raises(IntactKVError, match="num_hidden_layers=3"):
        attach(build(by_name("llama-gqa"), num_hidden_layers=2), kv)


def continuous(model: PreTrainedModel, rows: list[list[int]], **settings: Any) -> list[Any]:
    """What `generate_batch` gives for these prompts, in their order."""
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=VOCAB, pad_token_id=2)
    small = {"num_blocks": 16, "block_size": 32, "max_batch_tokens": 96}  # or it fills the memory, and takes its time
    batching = ContinuousBatchingConfig(**{**small, **settings})
    found = model.generate_batch(inputs=rows, generation_config=options, continuous_batching_config=batching)
    return [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]


def test_continuous_batching_generates_what_single_prompts_do(recwarn: pytest.WarningsRecorder) -> None:
    """Prompts are packed into one row, later ones beside decoding steps of earlier ones, over a paged cache."""
    full = build(by_name("llama-gqa"))
    model, kv = rounded(full), capture(full, PREFIX)
    more = torch.randint(8, VOCAB, (12, 9), generator=torch.Generator().manual_seed(4)).tolist()
    rows = [[*PREFIX, *tokens[: 2 + i % 5]] for i, tokens in enumerate(more)] + [more[0]]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": VOCAB, "pad_token_id": 2}

    def singly() -> list[list[int]]:
        return [model.generate(torch.tensor([row]), **options)[0, len(row) :].tolist() for row in rows]

    plain = singly()
    with attach(model, kv):
        intact = singly()
    assert sum(a != b for a, b in zip(plain, intact, strict=True)) >= 3
    assert [found.generated_tokens for found in continuous(model, rows)] == plain
    recwarn.clear()
    with attach(model, kv):
        assert [found.generated_tokens for found in continuous(model, rows[:-1])] == intact[:-1]
        assert [w for w in recwarn if "no row begins" in str(w.message)] == []
        assert [found.generated_tokens for found in continuous(model, rows, max_requests_per_batch=3)] == intact


@pytest.mark.parametrize(
    "settings", [{"max_batch_tokens": 12}, {"block_size": 4, "max_requests_per_batch": 1}], ids=["chunks", "blocks"]
)
def test_a_prefix_in_pieces_is_refused_in_continuous_batching(
    settings: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    full = build(by_name("llama-gqa"))
    model, prefix = rounded(full), list(range(8, 17))
    rows = [[*prefix, 20 + i, 30 + i] for i in range(4)]
    with attach(model, capture(full, prefix)):
        errors = [found.error for found in continuous(model, rows, **settings)]
    told = [caplog.text, *(error or "" for error in errors)]  # transformers 5.15 only logs it
    assert any("goes on with the prefix at position" in each for each in told)


def test_what_is_done_is_logged_and_nothing_is_shown_unasked(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    full = build(by_name("llama-gqa"))
    with attach(full, capture(full, PREFIX)):
        pass
    assert capfd.readouterr() == ("", "")
    with caplog.at_level("INFO", logger="intactkv"), attach(full, capture(full, PREFIX)):
        pass
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == ["captured", "attached", "took"]
    assert "3 tokens, 3 layers of llama" in caplog.text
