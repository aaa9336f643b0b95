"""No more positions than a model knows, and no more of a text than is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import PREFIX, build, by_name
from test_cli import intactkv
from test_control import CONTROL
from transformers import BloomConfig, Gemma3TextConfig, LlamaConfig

from intactkv import IntactKVError, capture
from intactkv.calibrating import CalibrationConfig, Sample, Samples, calibrate, split
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import Arm, evaluate, prefixed_windows
from intactkv.generate import continuation
from intactkv.pivots import measure
from intactkv.positions import check_positions, most_positions
from intactkv.texts import first_tokens, read_text


def llama(**settings: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=1000, **settings)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 1000),
        ({"rope_type": "linear", "factor": 4.0}, 4000),
        ({"rope_type": "dynamic", "factor": 2.0}, 2000),
        ({"rope_type": "yarn", "factor": 4.0}, 4000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 125}, 1000),
    ],
)  # fmt: skip
def test_the_limit_is_the_scaled_length(rope: dict[str, Any] | None, limit: int) -> None:
    config = llama() if rope is None else llama(rope_parameters={"rope_theta": 10000.0, **rope})
    assert most_positions(config) == limit
    check_positions(config, limit, "a window")
    with pytest.raises(IntactKVError, match=f"a window takes {limit + 1} positions, but llama has {limit}"):
        check_positions(config, limit + 1, "a window")


def test_the_limit_is_that_of_the_kind_of_layer_that_is_stretched() -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    assert most_positions(Gemma3TextConfig(max_position_embeddings=1000, rope_parameters=rope)) == 8000


def test_learned_positions_have_a_limit_and_alibi_has_none() -> None:
    assert most_positions(build(by_name("gpt2")).config) is not None
    assert most_positions(BloomConfig()) is None
    assert most_positions(build(by_name("falcon-alibi")).config) is None


@pytest.fixture(scope="module")
def short() -> Any:
    model = build(by_name("llama-gqa"))
    model.config.max_position_embeddings = 32
    return model


def test_every_door_refuses_what_is_longer(short: Any) -> None:
    ids = torch.randint(8, 97, (4, 33), generator=torch.Generator().manual_seed(1))
    ids[:, : len(PREFIX)] = torch.tensor(PREFIX)
    message = "takes 33 positions, but llama has 32"
    windows = prefixed_windows(ids.flatten(), prefix=PREFIX, window=33)
    kv = capture(short, PREFIX)
    with pytest.raises(IntactKVError, match=f"a window of arm 'full' {message}"):
        evaluate(short, [Arm("own", short)], windows)
    with pytest.raises(IntactKVError, match=f"the prefix {message}"):
        capture(short, ids[0])
    with pytest.raises(IntactKVError, match=f"a window {message}"):
        measure(short, ids)
    learned = torch.arange(33) >= len(PREFIX)
    data = split(Samples(tuple(Sample(row, learned) for row in ids), "here"), held_out=3)
    with pytest.raises(IntactKVError, match=f"sample 0 of here {message}"):
        calibrate(kv, short, short, data, config=CalibrationConfig(steps=1))
    with pytest.raises(IntactKVError, match=r"the prompt with what is generated takes 34 positions"):
        continuation(short, load_tokenizer(MODEL), ids[:1, :20], max_new_tokens=14)
    pytest.importorskip("llmcompressor")
    from intactkv.quantizing import GPTQ, quantize

    with pytest.raises(IntactKVError, match=f"a calibration window {message}"):
        quantize(short, "never", method=GPTQ(4, 16), calibration=ids)
    assert not Path("never").exists()


def test_eval_refuses_before_it_loads(tmp_path: Path) -> None:
    assert intactkv("capture", MODEL, "-o", tmp_path / "kv").returncode == 0
    done = intactkv(
        "eval", tmp_path / "absent", "--full", MODEL, "--kv", tmp_path / "kv", "--data", TEXT, "--window", "1025"
    )
    assert done.returncode == 1
    assert "a window takes 1025 positions, but llama has 1024" in done.stderr


@pytest.mark.parametrize("source", [MODEL, CONTROL], ids=["embedded", "control"])
def test_the_first_tokens_are_those_of_the_whole_text(source: Path) -> None:
    tokenizer = load_tokenizer(source)
    text = read_text(TEXT) + "  no   regular\u00a0blanks\n\n\nΩμέγα 日本語" * 300 + read_text(TEXT)
    whole = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    for count in (1, 100, 5_000, len(whole) - 1, len(whole), len(whole) + 10):
        assert first_tokens(tokenizer, text, count) == whole[:count]
    assert first_tokens(tokenizer, text, None) == whole


def test_a_long_text_is_not_read_to_its_end() -> None:
    read = []

    class Tokenizer:
        def __call__(self, text: str, **_: Any) -> Any:
            read.append(len(text))
            return type("Encoding", (), {"input_ids": list(range(len(text) // 4))})()

    tokenizer: Any = Tokenizer()
    assert first_tokens(tokenizer, "word" * 1_000_000, 1_000) == list(range(1_000))
    assert sum(read) < 10_000
    model = load_model(MODEL, dtype=torch.float32)
    assert most_positions(model.config) == 1024
