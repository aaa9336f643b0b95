"""Laws of the two window protocols, on streams small enough to write out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intactkv.error import IntactKVError
from intactkv.evaluating import Windows, paper_windows, prefixed_windows

STREAM = torch.arange(10, 21)  # 11 tokens


def test_prefixed_windows_exactly() -> None:
    windows = prefixed_windows(STREAM, prefix=torch.tensor([1, 2]), window=6)
    assert windows.ids.tolist() == [[1, 2, 10, 11, 12, 13], [1, 2, 14, 15, 16, 17]]  # 18, 19, 20 are dropped
    assert windows.scored.tolist() == [[False, False, False, True, True, True]] * 2
    assert len(windows) == 2


def test_paper_windows_exactly() -> None:
    windows = paper_windows(STREAM, bos=1, window=5)
    assert windows.ids.tolist() == [[1, 11, 12, 13, 14], [1, 16, 17, 18, 19]]  # 10 and 15 are overwritten
    assert windows.scored.tolist() == [[False, False, True, True, True]] * 2


def test_some_windows_are_windows_of_the_same_labels() -> None:
    windows = prefixed_windows(range(10, 40), prefix=[1, 2], window=6)
    assert torch.equal(windows[1:6:2].ids, windows.ids[1:6:2])
    assert torch.equal(windows[1:6:2].scored, windows.scored[1:6:2])
    with pytest.raises(IntactKVError, match="non-empty"):
        windows[len(windows) :]


def test_the_stream_is_not_changed() -> None:
    stream = STREAM.clone()
    paper_windows(stream, bos=1, window=5)
    assert torch.equal(stream, STREAM)


@given(length=st.integers(4, 60), prefix=st.integers(1, 3), window=st.integers(5, 12))
def test_pieces_are_the_stream_in_order(length: int, prefix: int, window: int) -> None:
    stream, step = torch.arange(100, 100 + length), window - prefix
    if length < step:
        with pytest.raises(IntactKVError, match="too few"):
            prefixed_windows(stream, prefix=range(prefix), window=window)
        return
    windows = prefixed_windows(stream, prefix=range(prefix), window=window)
    assert torch.equal(windows.ids[:, prefix:].flatten(), stream[: length // step * step])
    assert (windows.ids[:, :prefix] == torch.arange(prefix)).all()
    assert int(windows.scored.sum()) == len(windows) * (step - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": [], "window": 5}, "prefix is empty"),
        ({"prefix": [1, 2], "window": 3}, "use 4 or more"),
        ({"prefix": [1], "window": 13}, "11 tokens are too few"),
        ({"prefix": torch.tensor([[1]]), "window": 5}, r"prefix is torch.int64 of shape \(1, 1\)"),
        ({"prefix": [0.5], "window": 5}, "one vector of integer ids"),
    ],
)
def test_prefixed_windows_refuses(options: dict, message: str) -> None:
    with pytest.raises(IntactKVError, match=message):
        prefixed_windows(STREAM, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos": -1, "window": 5}, "bos=-1 is no token id"),
        ({"bos": 1, "window": 2}, "use 3 or more"),
        ({"bos": 1, "window": 12}, "11 tokens are too few"),
    ],
)
def test_paper_windows_refuses(options: dict, message: str) -> None:
    with pytest.raises(IntactKVError, match=message):
        paper_windows(STREAM, **options)


def test_a_stream_is_one_vector() -> None:
    with pytest.raises(IntactKVError, match=r"tokens is torch.int64 of shape \(1, 11\)"):
        prefixed_windows(STREAM[None], prefix=[1], window=5)


@pytest.mark.parametrize(
    ("ids", "scored", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool), "must be non-empty int64"),
        (torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), "must be non-empty int64"),
        (torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool), "scored is"),
        (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[True, True]]), "no logits predict token 0"),
        (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[False, False]]), "window 0 has no scored"),
    ],
)
def test_windows_refuse(ids: torch.Tensor, scored: torch.Tensor, message: str) -> None:
    with pytest.raises(IntactKVError, match=message):
        Windows(ids, scored)
