"""The forecast names the layers that pay for counting the prefix; of a model without a pivot it says that none does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import build, by_name
from test_control import CONTROL
from test_doctor import on_planted  # noqa: F401 (a fixture)

from intactkv import IntactKVError
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.doctor import examine
from intactkv.doctor.examine import Examination
from intactkv.doctor.forecast import forecast, gptq_step, hessians, read_error
from intactkv.doctor.words import forecast_sentence
from intactkv.texts import read_text

pytest.importorskip("llmcompressor")


def text_tokens(source: object, characters: int = 12_000) -> list[int]:
    tokenizer = load_tokenizer(str(source))
    return tokenizer(read_text(TEXT)[:characters], add_special_tokens=False, verbose=False).input_ids


def test_the_embedded_model_pays_in_two_down_projections() -> None:
    full = load_model(str(MODEL), dtype=torch.float32)
    three, four = forecast(full, text_tokens(MODEL), [0], group_size=64)
    assert (three.bits, four.bits) == (3, 4)
    assert {layer.layer for layer in three.layers[:2]} == {
        "model.layers.2.mlp.down_proj",
        "model.layers.11.mlp.down_proj",
    }
    assert all(layer.share > 0.5 and layer.counted > 1.3 * layer.left_out for layer in three.layers[:2])
    assert all(layer.counted < 1.05 * layer.left_out for layer in three.layers[2:])
    assert three.times > 1.2
    assert four.layers[0].left_out < three.layers[0].left_out


def test_the_control_model_pays_nothing() -> None:
    full = load_model(str(CONTROL), dtype=torch.float32)
    for found in forecast(full, text_tokens(CONTROL), [load_tokenizer(str(CONTROL)).bos_token_id]):
        assert found.times == pytest.approx(1, abs=0.02)


def test_errors_are_those_of_outputs_at_later_tokens() -> None:
    full = build(by_name("llama-gqa"))
    name, layer = next((n, m) for n, m in full.named_modules() if n.endswith("down_proj"))
    ids, seen = torch.randint(8, 97, (2, 24), generator=torch.Generator().manual_seed(1)), []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    ours, later = hessians(full, {name: layer}, ids, 3)[name]
    hook.remove()
    x = torch.cat(seen)[:, 3:].flatten(0, 1)
    before = later.clone()
    weight = layer.weight.detach()
    rounded = gptq_step(weight, later, bits=3, group_size=16)
    assert torch.equal(later, before)  # llm-compressor's step works in the Hessian that it is given
    assert all(len(group.unique()) <= 2**3 for group in rounded[:, :16])
    error = (x @ (rounded - weight).T).square().sum() / (x @ weight.T).square().sum()
    assert read_error(rounded, weight, later) == pytest.approx(float(error), rel=1e-3)
    assert float(ours.trace()) == pytest.approx(float(torch.cat(seen)[:, :3].square().sum()), rel=1e-4)


def test_experts_that_see_no_places_are_passed_over_and_no_text_is_refused() -> None:
    full = build(by_name("mixtral"))
    (found,) = forecast(full, list(range(8, 90)) * 4, [1], bits=(4,), group_size=16)
    assert found.layers
    assert all("self_attn" in layer.layer for layer in found.layers)
    with pytest.raises(IntactKVError, match="needs some text"):
        forecast(full, [], [1])


@pytest.mark.parametrize("name", ["opt", "llama-gqa"])  # positions learned, and rotary
def test_windows_are_no_longer_than_the_model_has_positions(name: str) -> None:
    full = build(by_name(name))
    limit, seen = full.config.max_position_embeddings, set()
    assert limit < 512
    full.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.add(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    tokens = torch.randint(8, 97, (1200,), generator=torch.Generator().manual_seed(1)).tolist()
    forecast(full, tokens, [1], bits=(4,), group_size=16)
    assert seen == {limit}
    with pytest.raises(IntactKVError, match=f"a prefix of {limit} tokens .* has {limit}"):
        forecast(full, tokens, [1] * limit)


def test_a_model_without_linear_layers_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    full = build(by_name("gpt2"))  # its layers are Conv1D
    monkeypatch.setattr(full.base_model, "forward", None)
    with pytest.raises(IntactKVError, match=r"no torch\.nn\.Linear in its blocks"):
        forecast(full, list(range(8, 90)), [1])


def test_the_doctor_says_it_and_says_why_not(on_planted: Examination, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    assert [found.bits for found in on_planted.forecast] == [3, 4]
    assert forecast_sentence(on_planted).startswith("Forecast: ")
    monkeypatch.setitem(__import__("sys").modules, "llmcompressor.modifiers.gptq.gptq_quantize", None)
    full = build(by_name("llama-gqa"))
    tokens = torch.randint(8, 97, (700,), generator=torch.Generator().manual_seed(5)).tolist()
    found = examine(full, {"same": full}, tokens, start=1, window=64)
    assert found.forecast == []
    assert any("pip install 'intactkv[quantize]'" in sentence for sentence in found.missing)


def test_the_forecast_brings_no_noise_of_the_quantizer(tmp_path: Path) -> None:
    script = (
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom models import build, by_name\n"
        "from intactkv.doctor.forecast import forecast\n"
        "forecast(build(by_name('llama-gqa')), list(range(8, 90)) * 4, [0], bits=(4,), group_size=16)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
