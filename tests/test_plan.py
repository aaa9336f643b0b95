"""The plan of a call, without a model: what is given to it, what it remembers, what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import PagedAttentionCache

from intactkv import IntactKV, IntactKVError
from intactkv.attaching.locate import Progress
from intactkv.attaching.masks import as_tensor
from intactkv.attaching.plan import Plan, Planner
from intactkv.attaching.tensors import IntactTensors

PREFIX = [7, 8, 9]


def planner(*, takes_positions: bool = True, **config: Any) -> Planner:
    key = torch.zeros(1, len(PREFIX), 4)
    kv = IntactKV(torch.tensor(PREFIX), {0: (key, key)}, None, {})
    settings = SimpleNamespace(model_type="toy", **config)
    settings.get_text_config = lambda decoder: settings
    return Planner(IntactTensors(kv), settings, takes_positions=takes_positions)


def sites(plan: Plan) -> list[tuple[int, int, int]]:
    return list(zip(plan.sites.row.tolist(), plan.sites.col.tolist(), plan.sites.index.tolist(), strict=True))


def test_rows_are_found_by_position_wherever_padding_puts_them() -> None:
    ids = torch.tensor([[7, 8, 9, 1], [0, 7, 8, 1], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    progress = Progress()
    with pytest.warns(UserWarning, match="row 1 agrees with only 2 of the 3"):
        plan = planner().plan({"input_ids": ids, "attention_mask": mask}, 0, progress, caches=True)
    assert sites(plan) == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 1, 0), (1, 2, 1)]
    assert plan.positions is not None
    assert plan.positions[1].tolist()[1:] == [0, 1, 2]
    assert progress.padded
    assert progress.matched is not None
    assert progress.matched.tolist() == [3, 2, 0]


def test_unpadded_rows_are_whole_sites_and_need_nothing() -> None:
    plan = planner().plan({"input_ids": torch.tensor([[7, 8, 9, 1]] * 2)}, 0, Progress(), caches=True)
    assert (plan.sites.whole, plan.positions, plan.packed) == (3, None, False)


def paged(ids: list[int], positions: list[int]) -> dict[str, Any]:
    given = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    wide = torch.zeros(1, 1, len(ids), 50)  # over the pages' slots
    cache = object.__new__(PagedAttentionCache)  # one takes a GPU's memory or a configuration to make
    cache.block_size = 32
    return {**given, "attention_mask": wide, "cache": cache}


def test_a_paged_call_finds_prompts_beside_decoding_steps(recwarn: pytest.WarningsRecorder) -> None:
    one = planner()
    found = one.plan(paged([5, 7, 8, 9, 1], [12, 0, 1, 2, 3]), 0, Progress(), caches=False)
    assert sites(found) == [(0, 1, 0), (0, 2, 1), (0, 3, 2)]
    assert sites(one.plan(paged([5, 6], [13, 4]), 0, Progress(), caches=False)) == []
    assert not recwarn


def test_a_paged_prefix_in_pieces_is_refused_and_a_token_that_looks_like_it_is_not() -> None:
    one = planner()
    one.plan(paged([5, 9], [12, 2]), 0, Progress(), caches=False)  # an answer of another prompt says 9 at position 2
    one.plan(paged([5, 7, 8], [12, 0, 1]), 0, Progress(), caches=False)
    one.plan(paged([5, 4], [13, 2]), 0, Progress(), caches=False)
    with pytest.raises(IntactKVError, match="goes on with the prefix at position 2"):
        one.plan(paged([5, 9, 1], [13, 2, 3]), 0, Progress(), caches=False)


@pytest.mark.parametrize(("mask", "told"), [(torch.ones(2, 3, 4), r"of shape \(2, 3, 4\)"), ([[1, 1]], "a list")])
def test_a_mask_that_is_none_is_refused_with_what_it_is(mask: Any, told: str) -> None:
    with pytest.raises(IntactKVError, match=f"the attention mask is {told}; give a 2D mask"):
        as_tensor(mask)


def test_a_prefix_at_another_position_is_refused() -> None:
    call = {"input_ids": torch.tensor([[7, 8, 9, 1]]), "position_ids": torch.tensor([[4, 5, 6, 7]])}
    with pytest.raises(IntactKVError, match="begins with the prefix at position 4"):
        planner().plan(call, 0, Progress(), caches=True)


DYNAMIC = {"rope_type": "dynamic", "original_max_position_embeddings": 6}


@pytest.mark.parametrize("rope", [DYNAMIC, {"sliding_attention": {"rope_type": "default"}, "full_attention": DYNAMIC}])
def test_a_length_that_changes_all_keys_is_refused(rope: dict[str, Any]) -> None:
    ids = torch.tensor([[7, 8, 9, 1, 1, 1, 1]])
    with pytest.raises(IntactKVError, match="reaches position 6, but the model's RoPE scaling"):
        planner(rope_parameters=rope, max_position_embeddings=12).plan({"input_ids": ids}, 0, Progress(), caches=True)
