"""Serving's plan: which rows go where and when, against an engine of a few lines that keeps blocks by their tokens."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intactkv import IntactKVError
from intactkv.serving.layout import NULL_BLOCK, Ledger, Plan, Rows, Scheduled, Step, common_prefix, head_slice

PREFIX = [1, 2, 3, 4, 5, 6, 7]
SIZE = 4  # tokens of a block


def test_no_engine_and_no_transformers_is_imported() -> None:
    code = (
        "import sys, intactkv.serving.layout\n"
        "print([m for m in ('vllm', 'transformers', 'mlx', 'llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("ids", "shared"), [([], 0), ([9], 0), ([1, 2], 2), ([1, 2, 9, 4], 2), (PREFIX, 7), ([*PREFIX, 8], 7)]
)
def test_the_common_prefix(ids: list[int], shared: int) -> None:
    assert common_prefix(ids, PREFIX) == shared


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_have_every_head_and_as_many_each(heads: int, size: int) -> None:
    slices = [range(heads)[head_slice(heads, rank, size)] for rank in range(size)]
    assert {len(each) for each in slices} == {max(1, heads // size)}
    assert sorted({head for each in slices for head in each}) == list(range(heads))
    if size > heads:  # neighbours hold the same head
        assert [each[0] for each in slices] == [rank * heads // size for rank in range(size)]


def test_heads_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(IntactKVError, match="3 key heads cannot be split over 2 ranks"):
        head_slice(3, 0, 2)


def test_slots_follow_the_blocks_and_leave_out_what_a_window_let_go() -> None:
    rows = Rows(2, 7, ((5, 9), (NULL_BLOCK, 3)))
    assert rows.slots(0, SIZE) == [(2, 22), (3, 23), (4, 36), (5, 37), (6, 38)]
    assert rows.slots(1, SIZE) == [(4, 12), (5, 13), (6, 14)]


def test_the_last_token_is_never_offered_and_a_local_hit_is_taken_off() -> None:
    plan = Plan(PREFIX, [SIZE])
    assert [plan.offer([*PREFIX, 8], c) for c in (0, 4, 7)] == [7, 3, 0]
    assert plan.offer(PREFIX, 0) == 6
    assert plan.offer([1, 2, 9], 0) == 2
    assert plan.offer([9], 0) == 0


def test_requests_are_held_only_while_rows_are_missing() -> None:
    plan = Plan(PREFIX, [SIZE])
    plan.admit("plain", [9, 9], 0)
    assert not plan.waiting
    plan.admit("a", [*PREFIX, 8, 9], 7)
    plan.admit("b", [*PREFIX, 8, 9], 0)
    step = plan.step([Scheduled("a", 7, 2, ((4, 5, 6),), True), Scheduled("b", 0, 5, ((7, 8),), True)])
    assert step == Step((Rows(0, 7, ((4, 5),)),), (Rows(0, 5, ((7, 8),)),))
    assert plan.waiting
    assert plan.step([Scheduled("b", 5, 4, ((9,),), False)]) == Step((), (Rows(5, 7, ((7, 8),)),))
    assert not plan.waiting
    plan.admit("c", [*PREFIX, 8], 0)
    plan.finish("c")
    assert not plan.waiting


def test_a_short_prompt_that_goes_on_as_the_prefix_does_gets_its_rows() -> None:
    plan, ids = Plan(PREFIX, [SIZE]), [1, 2]
    plan.admit("a", ids, 0)
    assert plan.step([Scheduled("a", 0, 2, ((4,),), True)]).during == (Rows(0, 2, ((4,),)),)
    ids.append(3)
    assert plan.step([Scheduled("a", 2, 1, None, False)]).during == (Rows(2, 3, ((4,),)),)
    # asynchronous scheduling knows a token one step late: the row is written over then
    assert plan.step([Scheduled("a", 3, 1, None, False)]).during == ()
    ids += [4, 5]
    assert plan.step([Scheduled("a", 4, 1, ((6,),), False)]).during == (Rows(3, 5, ((4, 6),)),)
    ids.append(99)
    assert plan.step([Scheduled("a", 5, 1, None, False)]).during == ()
    assert not plan.waiting


def test_a_ledger_knows_the_layers_that_have_not_written() -> None:
    ledger = Ledger(["a", "b", "c"])
    assert not ledger.take("a")
    ledger.promise()
    assert ledger.take("b")
    assert not ledger.take("b")
    assert not ledger.take("draft")
    assert ledger.left() == ["a", "c"]
    assert ledger.left() == []


@dataclass
class Engine:
    """Blocks by their tokens, chunks, preemption; a row is the token's own value, or its intact one."""

    plan: Plan
    room: int
    cache: dict[int, tuple[int, bool]] = field(default_factory=dict)  # slot → position and whether it is intact
    known: dict[tuple[int, ...], int] = field(default_factory=dict)  # tokens up to a block's end → block
    free: int = 1

    def blocks(self, count: int) -> list[int]:
        self.free += count
        return list(range(self.free - count, self.free))

    def serve(self, name: str, ids: list[int], *, reads: bool, external: bool, chunk: int, stop: int | None) -> None:
        held: list[int] = []
        if reads:
            while (key := tuple(ids[: (len(held) + 1) * SIZE])) in self.known and len(key) < len(ids):
                held.append(self.known[key])
        local = len(held) * SIZE
        taken = self.plan.offer(ids, local) if external and reads else 0
        need = -(-len(ids) // SIZE)
        held += self.blocks(need - len(held))
        self.plan.admit(name, ids, taken)
        computed, first = local + taken, True
        while computed < len(ids):
            if (
                stop is not None and computed >= stop and not first
            ):  # preempted: all blocks are gone, and it begins again
                return self.serve(name, ids, reads=reads, external=external, chunk=chunk, stop=None)
            count = min(chunk, len(ids) - computed)
            step = self.plan.step([Scheduled(name, computed, count, (held,) if first else None, first)])
            for position in range(computed, computed + count):
                self.cache[held[position // SIZE] * SIZE + position % SIZE] = (position, False)
            for rows in (*step.before, *step.during):
                for position, slot in rows.slots(0, SIZE):
                    self.cache[slot] = (position, True)
            computed, first = computed + count, False
            for block in range(computed // SIZE):
                self.known[tuple(ids[: (block + 1) * SIZE])] = held[block]
        self.plan.finish(name)
        shared = common_prefix(ids, self.plan.prefix)
        for position in range(len(ids)):
            assert self.cache[held[position // SIZE] * SIZE + position % SIZE] == (position, position < shared)
        return None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(PREFIX)), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(1, 20),
            st.none() | st.integers(1, 8),
        ),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_every_row_of_the_shared_part_is_intact_and_no_other(
    requests: list[tuple[int, int, bool, bool, int, int]],
) -> None:
    engine = Engine(Plan(PREFIX, [SIZE]), room=64)
    for i, (shared, more, reads, external, chunk, stop) in enumerate(requests):
        ids = [*PREFIX[:shared], *range(50, 50 + more)]
        engine.serve(str(i), ids, reads=reads, external=external, chunk=chunk, stop=stop)
        assert not engine.plan.waiting
