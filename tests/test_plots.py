"""The pictures: files of the kind asked for, marks where they belong, nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from intactkv import IntactKVError
from intactkv.pivots.pair import LayerBudget, drops
from intactkv.pivots.plot import Theme, plot_activations, plot_attention, plot_budget, plot_mse

pytest.importorskip("matplotlib")

MSE = torch.tensor([1.0, 0.4, 0.39, 0.38, 0.2, 0.19])
MAGIC = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


def budget(layer: int) -> LayerBudget:
    carried = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    left = torch.tensor([[1.0], [0.3]], dtype=torch.float64)
    return LayerBudget(layer, (0, 1), carried, left, torch.ones(1, dtype=torch.float64), 0.1, 0.5, True)


DRAW: dict[str, Callable[[Path, Theme], Path]] = {
    "activations": lambda p, theme: plot_activations(torch.rand(12, 300), p, layer=2, theme=theme),
    "attention": lambda p, theme: plot_attention(torch.rand(9, 9).tril(), p, layer=0, theme=theme),
    "mse": lambda p, theme: plot_mse(MSE, p, tokens=list("abcde"), theme=theme),
    "budget": lambda p, theme: plot_budget([budget(0), budget(1)], p, prefix=1, theme=theme),
}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("ending", MAGIC)
@pytest.mark.parametrize("name", DRAW)
def test_each_picture_in_each_format(name: str, ending: str, theme: Theme, tmp_path: Path) -> None:
    path = DRAW[name](tmp_path / f"{name}.{ending}", theme)
    assert path.read_bytes().startswith(MAGIC[ending])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", DRAW)
def test_an_unknown_format_is_refused_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match=r"must be \.png, \.svg or \.pdf"):
        DRAW[name](tmp_path / "picture.jpeg", "light")
    assert list(tmp_path.iterdir()) == []


def test_drops_are_marked_where_the_error_falls_suddenly(tmp_path: Path) -> None:
    assert drops(MSE) == [1, 4]
    assert drops(torch.linspace(1, 0.5, 9)) == []
    assert drops(torch.ones(5)) == []
    text = plot_mse(MSE, tmp_path / "mse.svg", tokens=["<s>", "x", "y", ".", "z"]).read_text()
    for said in ("<!-- &lt;s&gt; intact: −60 % -->", "<!-- . intact: −47 % -->"):
        assert said in text, text[:2000]
    assert "<!-- x intact" not in text


def test_drops_side_by_side_do_not_write_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's first two tokens: 4 and 3 %, at one height."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (drawn.append(self), save(self, *args, **more)))
    mse = torch.tensor([47.3, 45.5, 44.2, 44.1, 44.1])
    assert drops(mse) == [1, 2]
    plot_mse(mse, tmp_path / "mse.png", tokens=["<|im_start|>", "' '", "x", "y"])
    first, second = (text.get_window_extent() for text in drawn[0].axes[0].texts)
    assert not first.overlaps(second)


def test_a_prefix_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match=r"prefix=2 is not among the sizes \(0, 1\)"):
        plot_budget([budget(0)], tmp_path / "budget.png", prefix=2)
