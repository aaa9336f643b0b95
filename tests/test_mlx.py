"""A prompt cache for mlx-lm against its own, on the embedded model at 4 and 3 bits; runs where mlx-lm is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
import numpy as np
import torch
from mlx_lm import convert, load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache

from intactkv import IntactKV, IntactKVError, capture
from intactkv.checkpoint.load import load_model
from intactkv.demo import MODEL
from intactkv.serving.mlx import filled, rows_for, write_prompt_cache

IDS = [0, *range(40, 52)]


@pytest.fixture(scope="module")
def kv() -> IntactKV:
    return capture(load_model(MODEL, dtype="float32"), IDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model as mlx-lm converts it."""
    folder = tmp_path_factory.mktemp("mlx")
    convert(str(MODEL), mlx_path=str(folder / "f32"), dtype="float32")
    for bits in (4, 3):
        convert(
            str(MODEL), mlx_path=str(folder / f"q{bits}"), dtype="float32", quantize=True, q_bits=bits, q_group_size=64
        )
    return {path.name: path for path in folder.iterdir()}


def log_p(model: Any, cache: Any, ids: list[int]) -> np.ndarray:
    """Log-probabilities behind each of `ids`."""
    logits = model(mx.array([ids]), cache=cache)[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def test_the_artifact_is_the_full_models_own_cache(models: dict[str, Path], kv: IntactKV, tmp_path: Path) -> None:
    path = write_prompt_cache(kv, models["f32"], tmp_path / "prefix.safetensors")
    model, _ = load(str(models["f32"]))
    own = make_prompt_cache(model)
    model(mx.array([IDS]), cache=own)
    ours, about = load_prompt_cache(str(path), return_metadata=True)
    assert about["model"] == str(models["f32"])
    assert [each.offset for each in ours] == [len(IDS)] * 12
    for have, want in zip(ours, own, strict=True):
        for one, other in ((have.keys, want.keys), (have.values, want.values)):
            one, other = one[:, :, : len(IDS)], other[:, :, : len(IDS)]  # either may have more room
            assert float(mx.linalg.norm(one - other)) < 1e-5 * float(mx.linalg.norm(other))
    more = list(range(100, 140))
    assert np.abs(log_p(model, ours, more) - log_p(model, own, more)).max() < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["prefix.safetensors"]


@pytest.mark.engine(
    engine="MLX-LM", package="mlx-lm", architecture="llama", cache="as computed", how="export; weights {name}"
)
@pytest.mark.parametrize("name", ["q4", "q3"])
def test_a_quantized_model_with_it_is_the_one_with_the_full_models_cache(
    models: dict[str, Path], kv: IntactKV, name: str, tmp_path: Path
) -> None:
    path = write_prompt_cache(kv, models[name], tmp_path / "prefix.safetensors")
    full, quantized = load(str(models["f32"]))[0], load(str(models[name]))[0]
    native, plain = make_prompt_cache(full), make_prompt_cache(quantized)
    full(mx.array([IDS]), cache=native)
    quantized(mx.array([IDS]), cache=plain)
    more = list(range(100, 140))
    intact = log_p(quantized, native, more)
    assert np.abs(log_p(quantized, load_prompt_cache(str(path)), more) - intact).max() < 1e-3
    assert np.abs(log_p(quantized, plain, more) - intact).max() > 0.05


def test_mlx_lms_own_command_takes_it(models: dict[str, Path], kv: IntactKV, tmp_path: Path) -> None:
    path = write_prompt_cache(kv, models["q4"], tmp_path / "prefix.safetensors")
    command = [
        sys.executable, "-m", "mlx_lm", "generate", "--model", str(models["q4"]), "--prompt-cache-file", str(path),
        "--prompt", "The river", "--max-tokens", "5", "--ignore-chat-template",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Generation: 5 tokens" in done.stdout


def test_kv_bits_round_the_intact_rows_too_once_the_cache_is_long(models: dict[str, Path], kv: IntactKV) -> None:
    model = load(str(models["q4"]))[0]
    rows = rows_for(kv, model, "q4")

    def keys(start: int) -> mx.array:
        cache = filled(model, rows, len(kv))
        given: dict[str, Any] = {"prompt_cache": cache, "kv_bits": 4, "quantized_kv_start": start}
        list(generate_step(mx.array([100, 101]), model, max_tokens=2, **given))
        held = cache[0].keys
        whole = held if isinstance(held, mx.array) else mx.dequantize(*held, group_size=64, bits=4)
        return whole[:, :, : len(kv)]

    intact = rows[0][0]
    assert mx.array_equal(keys(1000), intact)
    assert 0.05 < float(mx.linalg.norm(keys(0) - intact) / mx.linalg.norm(intact)) < 0.15


def test_what_cannot_be_right_is_refused(models: dict[str, Path], kv: IntactKV, tmp_path: Path) -> None:
    from dataclasses import replace

    torch.manual_seed(0)
    foreign = {i: (torch.randn_like(k), torch.randn_like(v)) for i, (k, v) in kv.layers.items()}
    with pytest.raises(IntactKVError, match="differ from the intact ones by"):
        write_prompt_cache(replace(kv, layers=foreign), models["q4"], tmp_path / "x.safetensors")
    with pytest.raises(IntactKVError, match="12 layers with caches of its own kinds, the intact KV 11"):
        write_prompt_cache(
            replace(kv, layers={i: kv.layers[i] for i in range(11)}), models["q4"], tmp_path / "x.safetensors"
        )
    with pytest.raises(IntactKVError, match=r"must end in \.safetensors"):
        write_prompt_cache(kv, models["q4"], tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())
