"""The doctor says of models what is known of them, and its page is whole, accessible and shows its pictures."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from command import intactkv
from models import build, by_name
from planted import BOS, damaged, planted
from rich.console import Console
from test_control import CONTROL, control  # noqa: F401 (a fixture)
from transformers import PreTrainedModel

from intactkv import IntactKVError
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.checkpoint.stream import load_streamed
from intactkv.demo import MODEL, TEXT
from intactkv.doctor import examine, page, rounded_model
from intactkv.doctor.examine import Examination, to_dict
from intactkv.doctor.html import _STYLE, _verdicts
from intactkv.doctor.run import run
from intactkv.doctor.simulate import round_streamed_, round_to_nearest
from intactkv.evaluating.verdict import Verdict

pytest.importorskip("matplotlib")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 1000, 4000


@pytest.fixture(scope="module", autouse=True)
def fewer_windows() -> Iterator[None]:
    """Ten windows of 24 already tell worth it from no effect, and take half of an examination's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[Examination.__module__], "MOST_WINDOWS", 10)
        yield


def random_tokens(count: int = 1700) -> list[int]:
    return torch.randint(8, 97, (count,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def on_planted() -> Examination:
    full = planted()
    models = {"bos": damaged(full, "bos"), "head": damaged(full, "head")}
    return examine(full, models, random_tokens(), start=BOS, window=64)


def test_damage_to_the_pivot_is_worth_it_and_to_the_head_is_not(on_planted: Examination) -> None:
    assert on_planted.verdict("bos") == "worth it"
    assert on_planted.verdict("head") == "no effect"
    assert (on_planted.prefix, on_planted.discovered) == ([BOS], True)
    assert on_planted.kv.ids.tolist() == [BOS]


@pytest.mark.parametrize("verdict", get_args(Verdict))
def test_the_page_shows_every_verdict(
    on_planted: Examination, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Examination, "verdict", lambda found, name: verdict)
    assert f'class="verdict {verdict.replace(" ", "-")}"' in _verdicts(on_planted, str)
    assert f".{verdict.replace(' ', '-')}" in _STYLE


def test_the_budget_puts_all_of_the_planted_error_on_bos(on_planted: Examination) -> None:
    assert on_planted.examined == "bos"
    for budget in on_planted.budgets:  # deeper layers also hold what the first one's error did to later tokens
        assert budget.projected
        assert 0 < budget.tightness <= 1
        assert float(budget.layer_carried.sum()) == pytest.approx(1, abs=1e-6)
    assert float(on_planted.budgets[0].layer_carried[0]) == pytest.approx(1, abs=1e-3)
    assert float(on_planted.budgets[0].layer_left[1]) < 1e-6
    mse = on_planted.mse.mean(1)
    assert float(mse[1]) < 1e-6 * float(mse[0])


def test_the_control_model_gets_no_effect(control: PreTrainedModel) -> None:  # noqa: F811
    tokenizer = load_tokenizer(CONTROL)
    tokens = tokenizer(TEXT.read_text(), add_special_tokens=False, verbose=False).input_ids
    models = {"3-bit": rounded_model(control, bits=3), "4-bit": rounded_model(control, bits=4)}
    found = examine(control, models, tokens, start=tokenizer.bos_token_id)
    assert {found.verdict(name) for name in models} == {"no effect"}
    assert found.diagnosis.pivots == ()
    assert not found.discovered
    assert any("attention function of its own" in sentence for sentence in found.missing)
    html = page(found, title="control", name=str, made_by={})
    assert "No pivots" in html
    assert "The error budget was not measured" in html


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Examination]:
    """The page of the embedded model, what was printed, and what was found."""
    out, console = tmp_path_factory.mktemp("doctor") / "page.html", Console(file=io.StringIO(), width=100)
    found = run(None, out, console, quantized=None, data=None, window=128)
    return out, console.file.getvalue(), found  # type: ignore[attr-defined]


def test_the_embedded_model_is_worth_it(embedded: tuple[Path, str, Examination]) -> None:
    out, printed, found = embedded
    assert {found.verdict(name) for name in found.models} == {"worth it"}
    assert (found.prefix, found.discovered) == ([0], True)
    assert found.kv.nbytes == 12 * 2 * 2 * 64 * 4
    assert len(printed.splitlines()) < 50  # one screen
    for word in ("worth it", "Recommended prefix: 1 token (<s>)", "Most sensitive: layer", "harmful if"):
        assert word in " ".join(printed.split())
    figures = json.loads(out.with_suffix(".json").read_text())
    assert figures["verdicts"] == dict.fromkeys(found.models, "worth it")
    assert figures["prefix"] == [0]
    assert [p.name for p in sorted(out.parent.iterdir())] == ["page.html", "page.json"]
    searched = max(int(0.3 * 3832), 128)
    tokens = load_tokenizer(MODEL)(TEXT.read_text(), add_special_tokens=False, verbose=False).input_ids
    assert found.windows.ids[0, 1:].tolist() == tokens[searched : searched + 127]  # held out


class Page(HTMLParser):
    """The page's tags in order, unclosed ones, and all text."""

    VOID = frozenset(("meta", "img", "source", "br", "link"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_is_well_formed_self_contained_and_accessible(embedded: tuple[Path, str, Examination]) -> None:
    text = embedded[0].read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert parsed.all("html") == [{"lang": "en"}]
    assert len(parsed.all("h1")) == len(parsed.all("title")) == len(parsed.all("main")) == 1
    assert not parsed.all("script")
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"base64,[\w+/=]+", "", text))  # nothing is fetched
    pictures = parsed.all("img")
    assert [picture["class"] for picture in pictures] == 4 * ["on-light", "on-dark"]
    for picture in pictures:
        assert len(picture["alt"] or "") > 60
        assert base64.b64decode((picture["src"] or "").split(",")[1]).startswith(b"\x89PNG")
    assert all(th["scope"] in ("col", "row") for th in parsed.all("th"))
    assert len(parsed.all("caption")) == len(parsed.all("table")) == 4
    for needed in ("prefers-color-scheme: dark", "@media print"):
        assert needed in text


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_has_contrast_on_its_paper(embedded: tuple[Path, str, Examination]) -> None:
    text = embedded[0].read_text()
    palettes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{([^}]*)\}", text)]
    assert len(palettes) == 3
    for palette in palettes:
        paper = luminance(palette["paper"])
        for name in ("ink", "soft", "good", "some", "none", "bad"):
            bright, dim = sorted((paper, luminance(palette[name])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (name, palette)  # WCAG AA


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True])
def test_a_real_browser_shows_it_without_errors(
    embedded: tuple[Path, str, Examination], tmp_path: Path, dark: bool
) -> None:
    from PIL import Image  # comes with matplotlib

    page_path, picture = tmp_path / "page.html", tmp_path / "page.png"
    probe = (  # only in the test's copy: says on the console how large each picture came out
        "<script>addEventListener('load', () => { for (const i of document.images) if (i.offsetParent) "
        "console.log('IMAGE', i.className, i.complete, i.naturalWidth, Math.round(i.getBoundingClientRect().width)); "
        "console.log('OVERFLOW', document.documentElement.scrollWidth > innerWidth); })</script></body>"
    )
    page_path.write_text(embedded[0].read_text().replace("</body>", probe))
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", page_path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = re.findall(r'CONSOLE[^"]*"([^"]*)"', done.stderr)
    images = [line.split()[1:] for line in said if line.startswith("IMAGE")]
    assert len(images) == 4
    for theme, loaded, natural, shown in images:
        assert theme == ("on-dark" if dark else "on-light")
        assert loaded == "true"
        assert int(natural) > 500
        assert int(shown) > 400
    assert [line for line in said if not line.startswith("IMAGE")] == ["OVERFLOW false"]  # no error, no sideways scroll
    with Image.open(picture) as image:
        shot = image.convert("RGB")
        assert shot.size == (WIDTH, HEIGHT)
        red, green, blue = shot.getpixel((5, 5))
        assert (max(red, green, blue) < 60) if dark else (min(red, green, blue) > 250)
        assert len(shot.getcolors(maxcolors=2**24)) > 500  # text and pictures are there


def test_the_page_says_harm_and_key_bias_too() -> None:
    full = build(by_name("qwen2"))
    with torch.no_grad():
        full.model.layers[0].self_attn.k_proj.bias[3] = 100.0
    found = examine(full, {"<b>4 & bits</b>": rounded_model(full, bits=4)}, random_tokens(), window=64)
    html = page(found, title="<title>", name=lambda token: f"<{token}>", made_by={"command": "a & b"})
    assert "Key-bias trouble in layers 1:" in html
    assert "&lt;b&gt;4 &amp; bits&lt;/b&gt;" in html
    assert "<b>" not in html
    assert found.trials[0].pivots == 0
    assert json.dumps(to_dict(found), allow_nan=False)


def test_what_cannot_be_examined_is_refused_before_any_work(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(IntactKVError, match=r"let it end in \.html"):
        run(None, tmp_path / "page.txt", console, quantized=None, data=None, window=128)
    with pytest.raises(IntactKVError, match="does not exist; create it first"):
        run(None, tmp_path / "missing" / "page.html", console, quantized=None, data=None, window=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(IntactKVError, match=r"pip install 'intactkv\[doctor\]'"):
            run(None, tmp_path / "page.html", console, quantized=None, data=None, window=128)
    with pytest.raises(IntactKVError, match="tokens are too few for an examination"):
        examine(planted(), {"bos": planted()}, random_tokens(300), start=BOS)
    with pytest.raises(IntactKVError, match="no quantized model"):
        examine(planted(), {}, random_tokens(), start=BOS)
    assert list(tmp_path.iterdir()) == []


# --- the simulated quantizer ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_errs_by_half_a_step_at_most_and_keeps_zero(bits: int) -> None:
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    weight[0, :5] = 0.0
    rounded = round_to_nearest(weight, bits=bits)
    groups = weight.view(-1, 128)
    step = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / (2**bits - 1)
    # a rounded zero point can move an end of the range by half a step more
    assert ((rounded - weight).view(-1, 128).abs() <= (1.0 + 1e-5) * step[:, None]).all()
    assert ((rounded - weight).view(-1, 128).abs() <= (0.5 + 1e-5) * step[:, None]).float().mean() > 0.98
    assert (rounded[0, :5] == 0).all()
    assert all(len(group.unique()) <= 2**bits for group in rounded.view(-1, 128))
    assert torch.allclose(round_to_nearest(rounded, bits=bits), rounded, atol=1e-6)


def test_simulated_rounding_is_llm_compressors(tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    from intactkv.quantizing import RTN, quantize

    quantize(MODEL, tmp_path / "w3", method=RTN(bits=3, group_size=128, symmetric=False))
    theirs = load_model(tmp_path / "w3", dtype=torch.float32)
    ours = rounded_model(load_model(MODEL), bits=3).float()
    ids = torch.randint(300, 8000, (2, 64), generator=torch.Generator().manual_seed(0))
    full = load_model(MODEL, dtype=torch.float32)
    with torch.no_grad():
        a, b, f = (model(ids).logits for model in (ours, theirs, full))
    # llm-compressor finds its scales in the model's bfloat16, we in float32: not the same noise, but as much of it
    assert float((a - b).std()) < 0.3 * float((a - f).std())
    assert float((a - f).std()) == pytest.approx(float((b - f).std()), rel=0.05)


def test_gpt2s_turned_matrices_are_rounded_along_their_input() -> None:
    full = build(by_name("gpt2"))
    model = rounded_model(full, bits=3, group_size=64)
    weight = model.transformer.h[0].attn.c_attn.weight  # (in, out)
    assert all(len(column.unique()) <= 8 for column in weight.T)
    assert torch.equal(model.transformer.wte.weight, full.transformer.wte.weight)
    assert not torch.equal(weight, full.transformer.h[0].attn.c_attn.weight)


def test_a_folder_is_no_page() -> None:
    done = intactkv("doctor", "-o", ".")
    assert done.returncode == 1
    assert "cannot write .: it is a folder; name a file in it" in done.stderr


@pytest.mark.parametrize("large", ["full", "quantized"])
def test_models_larger_than_memory_are_streamed(large: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def enough(*args: object, stream: bool, **kwargs: object) -> None:
        raise IntactKVError(f"asked for streamed: {stream}")

    full, quantized = str(MODEL), str(tmp_path)
    size = {full: 2**50, quantized: 0} if large == "full" else {full: 0, quantized: 2**50}
    monkeypatch.setattr("intactkv.checkpoint.stream.stored_bytes", lambda source: size[str(source)])
    monkeypatch.setattr("intactkv.doctor.run.load_full", enough)
    for asked, streams in ((None, True), (False, False)):
        with pytest.raises(IntactKVError, match=f"asked for streamed: {streams}"):
            run(full, tmp_path / "page.html", Console(), quantized=quantized, data=None, window=128, stream=asked)


@pytest.mark.parametrize("models", [("owner/name", None), (str(MODEL), "owner/name")])
def test_what_is_not_at_hand_is_not_fetched_again_and_again(
    models: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intactkv.doctor.run.load_tokenizer", lambda source: None)
    with pytest.raises(IntactKVError, match=r"owner/name is not in the Hub's cache.*: hf download owner/name"):
        run(models[0], tmp_path / "page.html", Console(), quantized=models[1], data=None, window=128, stream=True)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral", "qwen3-moe"])
def test_a_streamed_model_is_rounded_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    build(by_name(name)).save_pretrained(tmp_path)
    model, ids = load_streamed(tmp_path), torch.tensor([random_tokens(24)])
    round_streamed_(model, bits=3, group_size=16)
    with torch.no_grad():
        rounded = rounded_model(load_model(tmp_path), bits=3, group_size=16)(ids).logits
        assert torch.equal(model(ids).logits, rounded)
        assert not torch.equal(load_streamed(tmp_path)(ids).logits, rounded)


def test_a_loaded_model_is_not_rounded_as_it_is_read() -> None:
    with pytest.raises(IntactKVError, match="is not streamed; take rounded_model"):
        round_streamed_(planted(), bits=4)


def test_streamed_models_have_the_figures_of_loaded_ones(tmp_path: Path) -> None:
    build(by_name("llama-gqa")).save_pretrained(tmp_path)
    full, streamed, rounded = load_model(tmp_path), load_streamed(tmp_path), load_streamed(tmp_path)
    round_streamed_(rounded, bits=3)
    settings: dict[str, Any] = {"tokens": random_tokens(700), "start": BOS, "window": 64}
    loaded = examine(full, {"3-bit": rounded_model(full, bits=3)}, **settings)
    found = examine(streamed, {"3-bit": rounded}, **settings)
    expected = to_dict(loaded)
    differs = {key for key, value in to_dict(found).items() if json.dumps(value) != json.dumps(expected[key])}
    assert differs - {"seconds", "tokens_per_second"} == {"gap_closed_by_layer", "missing"}
    assert loaded.by_layer
    assert not found.by_layer
    assert [each for each in found.missing if each not in loaded.missing] == [
        "Layers were not measured one by one: each would read the whole model; --no-stream loads it."
    ]
    assert "Layers were not measured one by one." in page(found, title="streamed", name=str, made_by={})


@pytest.mark.slow
def test_the_command_streams_the_full_and_the_quantized_model(tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    done = intactkv("quantize", str(MODEL), "--method", "rtn", "--bits", "4", "-o", str(tmp_path / "q"))
    assert done.returncode == 0, done.stderr
    told = []
    for stream in ("--stream", "--no-stream"):
        out = tmp_path / f"page{stream}.html"
        models = (str(MODEL), "--quantized", str(tmp_path / "q"))
        done = intactkv("doctor", *models, "-o", str(out), stream, "--dtype", "float32")
        assert done.returncode == 0, done.stderr
        told.append(json.loads(out.with_suffix(".json").read_text()))
    differs = {key for key in told[0] if told[0][key] != told[1][key]}
    assert differs - {"made_by", "seconds", "tokens_per_second"} == {"gap_closed_by_layer", "missing"}
