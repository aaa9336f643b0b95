"""The commands as a user runs them: what they print, write, and say when something is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import intactkv
from safetensors.torch import load_file, save_file

from intactkv import IntactKV
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import Interval, decide
from intactkv.quantizing import method_named

pytest.importorskip("llmcompressor")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished demo: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    command = [Path(sys.executable).parent / "intactkv", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("measuring: ") for line in done.stderr.splitlines()), done.stderr
    return folder / "intactkv-demo", done.stdout


def test_the_demo_writes_what_it_says(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    figures = json.loads((folder / "demo.json").read_text())
    assert set(figures["arms"]) == {"full", "4-bit own", "4-bit intact", "3-bit own", "3-bit intact"}
    for name in ("3-bit own", "3-bit intact"):
        kl = figures["arms"][name]["kl_mean"]
        assert kl["low"] < kl["value"] < kl["high"]
        assert f"{kl['value']:.4f}" in printed
    assert {pair["intact"] for pair in figures["pairs"]} == {"4-bit intact", "3-bit intact"}
    assert figures["made_by"]["versions"]["torch"] == torch.__version__
    assert (folder / "kl_by_position.png").read_bytes().startswith(b"\x89PNG")
    kv = IntactKV.load(folder / "bos.intactkv")
    assert kv.ids.tolist() == [load_tokenizer(MODEL).bos_token_id]


def test_the_demos_sentences_follow_from_its_intervals(demo: tuple[Path, str]) -> None:
    figures = json.loads((demo[0] / "demo.json").read_text())
    for pair, sentence in zip(figures["pairs"], figures["sentences"], strict=True):
        judged = decide(Interval(**pair["gap_closed"]))
        assert sentence.startswith(f"{pair['intact']}: {judged}")


def test_the_demos_checkpoints_are_packed_and_load(demo: tuple[Path, str]) -> None:
    for bits in (3, 4):
        tensors = load_file(demo[0] / f"w{bits}" / "model.safetensors")
        packed = sum(t.numel() * 4 for name, t in tensors.items() if name.endswith("weight_packed"))
        shapes = [t.tolist() for name, t in tensors.items() if name.endswith("weight_shape")]
        assert packed == sum(rows * columns * bits // 8 for rows, columns in shapes)
        assert load_model(demo[0] / f"w{bits}").config.quantization_config is not None


def test_a_second_demo_run_replaces_the_first(demo: tuple[Path, str]) -> None:
    before = json.loads((demo[0] / "demo.json").read_text())
    assert intactkv("demo", "--out", demo[0]).returncode == 0
    after = json.loads((demo[0] / "demo.json").read_text())
    assert after["arms"] == before["arms"]


def test_the_demo_leaves_alone_what_it_did_not_make(demo: tuple[Path, str], tmp_path: Path) -> None:
    mine = tmp_path / "w4"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    done = intactkv("demo", "--out", tmp_path)
    assert done.returncode == 1
    assert "w4, which no finished demo wrote" in " ".join(done.stderr.split())
    assert [p.name for p in tmp_path.iterdir()] == ["w4"]
    changed = tmp_path / "demo"
    shutil.copytree(demo[0], changed)
    (changed / "w3" / "config.json").write_text("{}")
    assert intactkv("demo", "--out", changed).returncode == 1
    assert (changed / "w3" / "config.json").read_text() == "{}"


def test_eval_looks_at_its_page_before_the_work(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_bytes(b"| r\xe9sultats |")
    done = intactkv("eval", "w3", "--full", "model", "--kv", "kv", "--data", TEXT, "--markdown", page)
    assert done.returncode == 1
    assert "results.md is no UTF-8 text" in " ".join(done.stderr.split())
    assert page.read_bytes() == b"| r\xe9sultats |"


@pytest.mark.parametrize("package", ["llmcompressor", "matplotlib"])
def test_the_demo_says_what_it_lacks_before_any_work(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    done = intactkv("demo", "--out", tmp_path / "demo")
    assert done.returncode == 1
    assert f"the demo needs {package}: pip install 'intactkv[demo]'" in " ".join(done.stderr.split())
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("engine", "option", "sentence"),
    [
        (["mlx", "--model", "m"], ["--gguf", "m.gguf"], "--gguf is for --to llama.cpp, not for mlx"),
        (["mlx", "--model", "m"], ["--cache-type", "f32"], "--cache-type is for --to llama.cpp, not for mlx"),
        (["lightllm", "--model", "m"], ["--stream", "1"], "--stream is for --to llama.cpp, not for lightllm"),
        (["llama.cpp", "--gguf", "m.gguf"], ["--ranks", "2"], "--ranks is for --to lightllm, not for llama.cpp"),
        (["llama.cpp", "--gguf", "m.gguf"], ["--model", "m"], "--model is for --to mlx or lightllm, not for llama.cpp"),
    ],
)
def test_export_refuses_what_an_engine_does_not_take(
    engine: list[str], option: list[str], sentence: str, tmp_path: Path
) -> None:
    done = intactkv("export", tmp_path / "kv", "-o", tmp_path / "out", "--to", *engine, *option)
    assert done.returncode == 1
    assert sentence in " ".join(done.stderr.split())


def test_capture_eval_and_generate_on_paths(demo: tuple[Path, str], tmp_path: Path) -> None:
    kv, figures = tmp_path / "kv.safetensors", tmp_path / "eval.json"
    done = intactkv("capture", MODEL, "-o", kv)
    assert done.returncode == 0, done.stderr
    assert IntactKV.load(kv).provenance["tokenizer"] is not None

    done = intactkv(
        "eval", demo[0] / "w3", "--full", MODEL, "--kv", kv, "--data", TEXT, "--window", "64", "--windows", "6",
        "-o", figures,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(figures.read_text())
    assert data["windows"] == 6
    assert data["scored_tokens"] == 6 * 62
    assert data["arms"]["own"]["kl_mean"]["value"] > 0

    for more in ([], ["--kv", kv], ["--kv", kv, "--temperature", "0.7"]):
        done = intactkv("generate", demo[0] / "w3", "The river", "--max-new-tokens", "5", *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_capture_finds_its_own_prefix_and_the_doctor_takes_a_checkpoint(demo: tuple[Path, str], tmp_path: Path) -> None:
    kv, html, text = tmp_path / "auto.safetensors", tmp_path / "doctor.html", tmp_path / "text"
    text.write_text(TEXT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    done = intactkv("capture", MODEL, "-o", kv, "--prefix", "auto", "--data", text)
    assert done.returncode == 0, done.stderr
    assert IntactKV.load(kv).ids.tolist() == [load_tokenizer(MODEL).bos_token_id]
    done = intactkv("capture", MODEL, "-o", kv, "--data", TEXT)
    assert done.returncode == 1
    assert "goes with --prefix auto" in " ".join(done.stderr.split())
    done = intactkv("doctor", MODEL, "--quantized", demo[0] / "w3", "--data", text, "--window", "64", "-o", html)
    assert done.returncode == 0, done.stderr
    assert json.loads(html.with_suffix(".json").read_text())["verdicts"] == {"quantized": "worth it"}
    assert "quantized: worth it" in html.read_text()


def test_the_paper_protocol_and_other_prefixes(demo: tuple[Path, str], tmp_path: Path) -> None:
    kv = tmp_path / "text.safetensors"
    done = intactkv("capture", MODEL, "-o", kv, "--prefix", "The history of")
    assert done.returncode == 0, done.stderr
    assert len(IntactKV.load(kv)) >= 2
    done = intactkv("eval", demo[0] / "w3", "--full", MODEL, "--kv", kv, "--data", TEXT, "--paper")
    assert done.returncode == 1
    assert "overwrites one token" in done.stderr
    bos = demo[0] / "bos.intactkv"
    done = intactkv(
        "eval", demo[0] / "w3", "--full", MODEL, "--kv", bos, "--data", TEXT, "--paper", "--window", "64",
        "--windows", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 windows of 64 tokens, 248 scored" in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["capture", "./nowhere", "-o", "kv"], "./nowhere is not a folder"),
        (["capture", MODEL, "-o", "kv", "--ids", "1,x"], "is no list of numbers"),
        (["capture", MODEL, "-o", "kv", "--ids", "99999999"], "holds id 99999999, outside 0…"),
        (["quantize", MODEL, "-o", "dir", "--prefix", "auto"], "--prefix auto goes with `intactkv capture`"),
        (["capture", MODEL, "-o", "missing/kv"], "does not exist; create it first"),
        (["capture", MODEL, "-o", "kv", "--system", "Be brief."], "--system goes with --prefix chat"),
        (["generate", MODEL, "Hi", "--kv", "absent"], "absent is not a file"),
        (["eval", MODEL, "--full", MODEL, "--kv", "absent", "--data", TEXT], "absent is not a file"),
        (
            ["quantize", MODEL, "-o", "q", "--method", "magic"],
            "use one of rtn, gptq, awq, autoround, smoothquant, rotated",
        ),
        (["quantize", MODEL, "-o", "q", "--method", "awq"], "learns from text; add --data TEXT"),
        (["quantize", MODEL, "-o", "q", "--bits", "5"], "bits=5 is not supported; use one of 2, 3, 4, 8"),
        (["quantize", MODEL, "-o", "q", "--group-size", "100"], "does not divide in_features"),
        (["quantize", MODEL, "-o", "q", "--rounding", "gptq"], "--method rtn has its own"),
        (["quantize", MODEL, "-o", "q", "--method", "rotated", "--rounding", "awq"], "use rtn or gptq"),
        (["generate", ".", "Hi"], "no tokenizer that can be loaded"),
    ],
)
def test_errors_are_one_sentence_without_traceback(command: list[str], message: str, tmp_path: Path) -> None:
    done = intactkv(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_usage_errors_and_help() -> None:
    assert intactkv("eval").returncode == 2
    assert intactkv("nonsense").returncode == 2
    for command in ("capture", "quantize", "check", "eval", "mtbench", "generate", "doctor", "demo"):
        done = intactkv(command, "--help")
        assert done.returncode == 0
        assert "Usage" in done.stdout


def test_help_does_not_wait_for_torch() -> None:
    script = """if True:
        import sys, intactkv, intactkv.cli
        sys.argv = ["intactkv", "--help"]
        try:
            intactkv.cli.main()
        finally:
            print(sorted({"torch", "transformers"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_no_public_name_is_a_modules_too() -> None:
    import intactkv as package

    modules = {path.stem for path in Path(str(package.__file__)).parent.iterdir()}
    assert not modules & set(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = package.nonsense


def test_a_checkpoint_with_missing_or_unexpected_tensors_is_refused(tmp_path: Path) -> None:
    from intactkv import IntactKVError

    folder = tmp_path / "model"
    full = load_model(MODEL)
    full.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntactKVError, match=r"missing keys such as model\.layers\.0\.mlp"):
        load_model(folder)
    save_file(
        {**tensors, "model.layers.0.online_transform": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(IntactKVError, match=r"unexpected keys such as model\.layers\.0\.online"):
        load_model(folder)


@pytest.mark.parametrize("method", ["rtn", "rotated"])
def test_quantize_writes_a_checkpoint_with_the_kv_that_fits_it(method: str, tmp_path: Path) -> None:
    out, kv = tmp_path / "w3", tmp_path / "w3/prefix.intactkv"
    done = intactkv("quantize", MODEL, "-o", out, "--method", method, "--bits", "3", "--asymmetric")
    assert done.returncode == 0, done.stderr
    assert f"attach {kv}" in "".join(done.stdout.split("\n"))
    recipe = json.loads((out / "intactkv.json").read_text())
    settings = recipe.get("levels", recipe)
    assert (settings["bits"], settings["group_size"], settings["symmetric"]) == (3, 128, False)
    assert IntactKV.load(kv).provenance["basis"] == recipe["basis"]
    figures = tmp_path / "eval.json"
    done = intactkv(
        "eval", out, "--full", MODEL, "--kv", kv, "--data", TEXT, "--window", "64", "--windows", "6", "-o", figures
    )
    assert done.returncode == 0, done.stderr
    arms = json.loads(figures.read_text())["arms"]
    assert arms["intact"]["kl_mean"]["value"] < arms["own"]["kl_mean"]["value"]
    done = intactkv("quantize", MODEL, "-o", out)
    assert done.returncode == 1
    assert "exists and is not empty" in " ".join(done.stderr.split())


def test_quantize_calibrates_on_a_text_and_keeps_another_prefix(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    done = intactkv(
        "quantize", MODEL, "-o", tmp_path / "q", "--method", "gptq", "--data", text, "--prefix", "The history of",
        "--group-size", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recipe = json.loads((tmp_path / "q/intactkv.json").read_text())
    assert recipe["method"] == "GPTQ"
    assert recipe["calibration"]["windows"] >= 1
    assert recipe["group_size"] is None
    assert IntactKV.load(tmp_path / "q/prefix.intactkv").ids.tolist() == recipe["prefix"]
    assert len(recipe["prefix"]) >= 2


def test_quantize_without_llm_compressor_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llmcompressor" else found(name, *a)
    )
    done = intactkv("quantize", MODEL, "-o", tmp_path / "q")
    assert done.returncode == 1
    assert "pip install 'intactkv[quantize]'" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "autoround", "smoothquant", "rotated"])
def test_a_method_by_name_has_the_settings_given(name: str) -> None:
    method = method_named(name, bits=3, group_size=64, activation_bits=8)
    assert type(method).__name__.lower() == name
    assert (method.levels.bits, method.levels.group_size, method.levels.activation_bits) == (3, 64, 8)
    assert method.levels.symmetric == (name != "awq")
    assert method_named(name, bits=4, group_size=0).levels.group_size is None
    if method.levels is not method:
        assert type(method_named(name, bits=3, group_size=64, rounding="gptq").levels).__name__ == "GPTQ"


def test_check_tells_the_basis_and_writes_the_aligned_kv(demo: tuple[Path, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    bos = demo[0] / "bos.intactkv"
    done = intactkv("check", demo[0] / "w3", "--full", MODEL, "--kv", bos)
    assert done.returncode == 0, done.stderr
    assert "basis: full\n" in done.stdout

    rewritten = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():  # the same function in another basis
        for layer in rewritten.model.layers:
            scale = 2 ** torch.randn(128, generator=torch.Generator().manual_seed(0))
            layer.self_attn.v_proj.weight /= scale[:, None]
            per_query = scale.view(2, 1, 64).expand(2, 2, 64).flatten()
            layer.self_attn.o_proj.weight *= per_query[None]
    rewritten.save_pretrained(tmp_path / "model")
    load_tokenizer(MODEL).save_pretrained(tmp_path / "model")
    done = intactkv("check", tmp_path / "model", "--full", MODEL, "--kv", bos, "-o", tmp_path / "aligned")
    assert done.returncode == 0, done.stderr
    assert "values rescaled in 12 layers" in done.stdout
    assert IntactKV.load(tmp_path / "aligned").provenance["basis"] == "full, values rescaled in 12 layers"


def test_calibrate_writes_a_kv_that_eval_takes_and_resumes(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, kv2 = demo[0], tmp_path / "kv2.safetensors"
    arguments = [
        "calibrate", folder / "w3", "--full", MODEL, "--kv", folder / "bos.intactkv", "--data", TEXT,
        "-o", kv2, "--objective", "kl", "--learning-rate", "0.01", "--steps", "3", "--batch-size", "2", "--samples",
        "6", "--held-out", "6", "--length", "64", "--spool", tmp_path / "spool", "--checkpoint", tmp_path / "state",
    ]  # fmt: skip
    done = intactkv(*arguments)
    assert done.returncode == 0, done.stderr
    assert "12 samples with 756 learned tokens" in done.stdout
    assert "3 steps, the best after" in " ".join(done.stdout.split())
    size = sum(f.stat().st_size for f in (tmp_path / "spool").glob("*.safetensors"))
    stated = int(re.search(r"targets of the full model: ([\d,]+) bytes", done.stdout)[1].replace(",", ""))
    assert stated < size < stated + 12 * 400
    first = kv2.read_bytes()
    again = intactkv(*arguments)  # nothing is left to do but to judge
    assert again.returncode == 0, again.stderr
    assert kv2.read_bytes() == first
    about = IntactKV.load(kv2).provenance["calibration"]
    assert about["steps"] == 3
    assert about["data"]["train"]["source"] == str(TEXT)


def test_calibrate_says_what_is_wrong(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder = demo[0]
    common = ["calibrate", folder / "w3", "--full", MODEL, "--kv", folder / "bos.intactkv"]
    for more, message in (
        (["--data", TEXT, "--objective", "mse"], "--objective 'mse' is not known"),
        (["--data", TEXT, "--system", "Be brief."], "--system goes with conversations"),
        (["--data", tmp_path / "no.json"], "cannot be read"),
        (["--data", TEXT, "--length", "64", "--steps", "0"], "steps=0"),
        (["--data", TEXT, "--length", "64", "--device", "nowhere"], "cannot be put on --device nowhere"),
    ):
        done = intactkv(*common, *more, "-o", tmp_path / "out")
        assert done.returncode == 1
        assert message in done.stderr
        assert not (tmp_path / "out").exists()
