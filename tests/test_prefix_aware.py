"""Quantizers are shown what the served model will see: prefix tokens do not count, later tokens read intact ones."""

from __future__ import annotations

import io
import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from models import ARCHITECTURES, PREFIX, VOCAB, build, by_name, prompts
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from intactkv import IntactKV, IntactKVError, attach, bos, capture
from intactkv.artifact.served import quantizer_settings, refuse_unchecked
from intactkv.attaching.locate import Sites
from intactkv.attaching.plain import made_for_prefix, recipe_folder
from intactkv.attaching.tensors import IntactTensors, put
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.decoder import blocks
from intactkv.demo import MODEL, TEXT
from intactkv.evaluating import command, prefixed_windows
from intactkv.texts import read_text

pytest.importorskip("llmcompressor")

from intactkv.quantizing import AWQ, GPTQ, PREFIX_KV, RECIPE, RTN, AutoRound, Method, Rotated, SmoothQuant, quantize
from intactkv.quantizing.aware import PrefixAware
from intactkv.quantizing.compress import batches, compress_
from intactkv.quantizing.made_for import MadeFor
from intactkv.quantizing.quiet import patched, quiet

GROUP, P = 32, len(PREFIX)
STATIC = RTN(8, None, activation_bits=8, static_activations=True)
windows = prefixed_windows(torch.arange(8, 8 + 64 * 12).remainder(VOCAB - 8) + 8, prefix=PREFIX, window=32)
MANY = torch.cat([windows.ids] * 6)[:152]  # more than one batch


def saved(name: str, folder: Path) -> PreTrainedModel:
    """A random model as llm-compressor wants it: from a folder."""
    build(by_name(name)).save_pretrained(folder / name)
    return AutoModelForCausalLM.from_pretrained(folder / name).eval()


def shown(
    model: PreTrainedModel, method: Method, ids: Tensor = windows.ids, weight: float | None = 0.0
) -> dict[str, Tensor]:
    """Quantize `model` in place; what GPTQ's hooks of every Linear were given, `(token, width)` by name."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    given: dict[nn.Module, list[Tensor]] = {}
    calibrate = GPTQModifier.calibrate_module

    def look(self: Any, module: nn.Module, args: Any, output: Any) -> None:
        given.setdefault(module, []).append(args[0].detach().clone().flatten(0, -2))
        calibrate(self, module, args, output)

    with patched(GPTQModifier, "calibrate_module", look):
        compressed(model, method, ids, weight)
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: torch.cat(rows) for module, rows in given.items()}


def compressed(
    model: PreTrainedModel, method: Method, ids: Tensor = windows.ids, weight: float | None = 0.0
) -> PrefixAware:
    """Quantize `model` in place as `quantize` does; what its steps were shown."""
    made_for = MadeFor.decide(model, torch.tensor(PREFIX), method, ids, weight, [])
    assert made_for is not None
    aware = made_for.aware
    with quiet():
        compress_(model, method, ids, aware=aware, transformed=lambda m: aware.show(capture(m, PREFIX)))
    return aware


@torch.no_grad()
def inputs_of(model: PreTrainedModel, layer: int, kv: IntactKV | None) -> dict[str, Tensor]:
    """What block `layer`'s Linears read behind the prefix, `(token, width)`, by an ordinary forward."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(len(windows), windows.ids.shape[1], -1)  # OPT flattens them
            found[name] = rows[:, P:].flatten(0, 1).clone()

        return look

    linears = [(n, m) for n, m in blocks(model)[layer].named_modules() if type(m) is nn.Linear]
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in linears]
    with attach(model, kv, check=False) if kv is not None else nullcontext():
        model(windows.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


WORKS = ["llama-gqa", "llama-mha", "mistral-sliding", "qwen2", "qwen3", "qwen3-moe", "gemma2", "gemma3", "phi3",
         "opt", "gpt-neox", "cohere", "cohere2", "deepseek-v3", "olmo2", "granite", "smollm3", "glm4", "starcoder2",
         "stablelm"]  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_gptq_is_given_what_follows_the_prefix_as_the_served_model_computes_it(name: str, tmp_path: Path) -> None:
    """The first block's inputs are the full model's own; the second's those behind the rounded first, its KV intact."""
    full, quantized = build(by_name(name)), saved(name, tmp_path)
    given = shown(quantized, GPTQ(3, None))
    first = next(n for n, module in full.named_modules() if module is blocks(full)[0])
    for linear, want in inputs_of(full, 0, None).items():
        torch.testing.assert_close(given[f"{first}.{linear}"], want, rtol=0, atol=1e-3)
    if "moe" in name or "deepseek" in name:
        return  # experts are other modules once they are quantized
    kv, half = capture(full, PREFIX), build(by_name(name))  # its first block rounded, the others full
    rounded = {n: p for n, p in quantized.state_dict().items() if n.startswith(f"{first}.")}
    half.load_state_dict(rounded, strict=False)
    second = first.removesuffix("0") + "1"
    for linear, want in inputs_of(half, 1, kv).items():
        if not linear.endswith(("o_proj", "down_proj")):  # their own block is rounded after they were looked at
            torch.testing.assert_close(given[f"{second}.{linear}"], want, rtol=0, atol=1e-3)


def test_an_ordinary_checkpoint_is_what_it_was(tmp_path: Path) -> None:
    """Weight 1 is the path without any hook: the same bits as without a prefix on the same windows."""
    full = build(by_name("llama-gqa"))
    made = {}
    for name, settings in (("with", {"prefix": PREFIX, "prefix_weight": 1.0}), ("without", {})):
        out = quantize(full, tmp_path / name, method=GPTQ(3, GROUP), calibration=windows.ids, **settings)
        made[name] = load_model(out).state_dict()
        assert made_for_prefix(out) is None
    assert all(torch.equal(tensor, made["without"][name]) for name, tensor in made["with"].items())
    aware = quantize(full, tmp_path / "aware", method=GPTQ(3, GROUP), calibration=windows.ids, prefix=PREFIX)
    assert any(not torch.equal(t, made["with"][name]) for name, t in load_model(aware).state_dict().items())


@pytest.mark.parametrize("weight", [0.25, 0.5])
def test_a_weight_is_the_share_of_windows_shown_the_ordinary_way(weight: float, tmp_path: Path) -> None:
    assert len(batches(MANY, GPTQ(3, GROUP))) > 1
    assert len(MANY) % 4 == 0
    given = shown(saved("llama-gqa", tmp_path), GPTQ(3, GROUP), MANY, weight)
    rows = len(given["model.layers.1.mlp.down_proj"])
    assert rows == len(MANY) * (32 - P) + int(weight * len(MANY)) * P


def test_experts_never_see_prefix_tokens(tmp_path: Path) -> None:
    """A prefix token that reached an expert would be one row too many."""
    full = saved("mixtral", tmp_path)
    given = shown(full, GPTQ(3, GROUP))
    for layer in range(full.config.num_hidden_layers):
        rows = sum(len(x) for n, x in given.items() if f"layers.{layer}.mlp.experts" in n and n.endswith("down_proj"))
        assert rows == full.config.num_local_experts * len(windows.ids) * (32 - P)  # all are shown every token


def test_ranges_leave_the_prefix_out(tmp_path: Path) -> None:
    """A prefix token with an activation a thousand times the others' does not stretch a static scale."""
    full = build(by_name("llama-gqa"))
    mlp = full.model.layers[0].mlp
    with torch.no_grad():  # channel 0 of the first block's MLP answers to prefix tokens
        row = mlp.gate_proj.weight[0] + mlp.up_proj.weight[0]
        full.model.embed_tokens.weight[PREFIX] = 100 * row / row.norm()
    scales = {}
    for weight in (0.0, 1.0):
        out = tmp_path / str(weight)
        float8 = RTN(8, None, activation_bits=8, static_activations=True, float8=True)  # whose scale is the largest's
        quantize(full, out, method=float8, calibration=windows.ids, prefix=PREFIX, prefix_weight=weight)
        state = load_model(out).state_dict()
        scales[weight] = {n: float(x) for n, x in state.items() if n.endswith("input_scale")}
    found = {}

    def keep(module: nn.Module, args: Any) -> None:
        found["all"], found["later"] = args[0].abs().max(), args[0][:, P:].abs().max()

    hook = mlp.down_proj.register_forward_pre_hook(keep)
    with torch.no_grad():
        full(windows.ids)
    hook.remove()
    name = "model.layers.0.mlp.down_proj.input_scale"
    assert scales[0.0][name] * 448 == pytest.approx(float(found["later"]), rel=0.02)
    assert scales[1.0][name] * 448 == pytest.approx(float(found["all"]), rel=0.02)
    assert 2 * scales[0.0][name] < scales[1.0][name]


@torch.no_grad()
def test_awqs_search_reads_the_keys_and_values_from_before(tmp_path: Path) -> None:
    """While trial weights are in place, attention's keys at prefix positions are those of the untouched weights."""
    from llmcompressor.modifiers.transform.awq import AWQModifier

    model = saved("llama-mha", tmp_path)
    clean = capture(model, PREFIX)
    read: list[tuple[bool, Tensor]] = []
    own = PrefixAware.read

    def look(self: Any, cache: Any, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = own(self, cache, layer, key, value)
        if layer == 0 and self._trial:
            read.append((torch.allclose(key[:, :, :P], out[0][:, :, :P]), out[0][0, :, :P].clone()))
        return out

    losses: list[float] = []
    compute = AWQModifier._compute_loss

    def watch(self: Any, a: list[Tensor], b: list[Tensor]) -> float:
        losses.append(compute(self, a, b))
        poisoned = [x.clone() for x in b]
        for x in poisoned:
            if x.ndim == 3 and x.shape[1] == 32:
                x[:, :P] = 1e6  # what is computed at prefix positions must not matter
        assert compute(self, a, poisoned) == losses[-1]
        return losses[-1]

    with patched(PrefixAware, "read", look), patched(AWQModifier, "_compute_loss", watch):
        compressed(model, AWQ(3, GROUP, grid=4))
    assert losses
    assert read
    assert not all(same for same, _ in read)
    for _, key in read:
        torch.testing.assert_close(key, clean.layers[0][0], rtol=0, atol=1e-4)


def test_autorounds_loss_knows_nothing_of_prefix_positions(tmp_path: Path) -> None:
    """Blocks are tuned on outputs that are zero there, and attention reads the intact KV in any batch."""
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    seen: list[Tensor] = []
    loss = SignRoundQuantizer._get_loss

    def look(self: Any, pred_output: Tensor, ref_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.extend((pred_output.detach(), ref_output.detach()))
        return loss(self, pred_output, ref_output, *args, **kwargs)

    with patched(SignRoundQuantizer, "_get_loss", look):
        compressed(saved("llama-gqa", tmp_path), AutoRound(3, GROUP, iterations=2))
    assert seen
    assert all(x.shape[1] == 32 for x in seen)
    assert all(not x[:, :P].any() and x[:, P:].any() for x in seen)


@pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES if not a.recurrent])
def test_nobody_reads_what_is_computed_at_prefix_positions(name: str) -> None:
    """Saturated or not: whatever a block is handed there, later logits are the same."""
    model = build(by_name(name))
    kv, ids = capture(model, PREFIX), prompts(rows=2, length=16)
    hidden_name = "hidden_states"

    def spoil(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs[hidden_name]
        noise = torch.randn(given[..., :P, :].shape, generator=torch.Generator().manual_seed(3))
        spoilt = torch.cat([50 * noise.to(given), given[..., P:, :]], -2)
        return ((spoilt, *args[1:]), kwargs) if args else (args, {**kwargs, hidden_name: spoilt})

    with torch.no_grad(), attach(model, kv, check=False):
        clean = model(ids, use_cache=False).logits
        hooks = [block.register_forward_pre_hook(spoil, with_kwargs=True) for block in blocks(model)]
        spoilt = model(ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(spoilt, clean, rtol=0, atol=by_name(name).tolerance)
    with torch.no_grad():  # and without the KV it is read
        own = model(ids, use_cache=False).logits
        hooks = [block.register_forward_pre_hook(spoil, with_kwargs=True) for block in blocks(model)]
        assert not torch.allclose(model(ids, use_cache=False).logits[:, P:], own[:, P:], rtol=0, atol=1e-2)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", WORKS)
def test_a_checkpoint_made_for_its_prefix_of_every_architecture(name: str, tmp_path: Path) -> None:
    """Fused projections, MLA, windows, experts: it is made, loads back, and says what it is."""
    out = quantize(build(by_name(name)), tmp_path / "q", method=GPTQ(4, None), calibration=windows.ids, prefix=PREFIX)
    made_for = made_for_prefix(out)
    assert made_for is not None
    assert (made_for["weight"], made_for["prefix"]) == (1 / 16, PREFIX)
    kv = IntactKV.load(out / PREFIX_KV)
    assert kv.provenance["prefix_aware"] == made_for
    attach(load_model(out), kv).remove()


@pytest.mark.parametrize(
    "method", [GPTQ(3, GROUP), AWQ(3, GROUP, grid=3), SmoothQuant(), STATIC, Rotated(GPTQ(4, GROUP)),
               RTN(8, None, activation_bits=8, static_activations=True, float8=True),
               RTN(4, GROUP, activation_bits=8, static_activations=True)],
    ids=lambda m: f"{type(m).__name__}-{m.levels.bits}-{m.levels.activation_bits}",
)  # fmt: skip
def test_every_method_that_learns_says_what_it_was_made_for(method: Method, tmp_path: Path) -> None:
    full = build(by_name("llama-gqa"))
    out = quantize(full, tmp_path / "q", method=method, calibration=windows.ids, prefix=PREFIX)
    said = json.loads((out / RECIPE).read_text())["prefix_aware"]
    assert said["weight"] == (1 / 16 if method.weighs else 0)
    figures = said["perplexity"]
    assert figures["windows"] == 8
    assert all(figures[arm] > 1 for arm in ("full", "with_kv", "without_kv"))
    model, kv = load_model(out), IntactKV.load(out / PREFIX_KV)
    with pytest.warns(UserWarning, match=r"was quantized for its intact prefix and runs without it \(perplexity"):
        model(windows.ids[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(windows.ids[:1])  # once
        again = load_model(out)
        with attach(again, kv, check=False):
            again(windows.ids[:1])


def test_a_method_that_learns_nothing_makes_the_ordinary_checkpoint(tmp_path: Path) -> None:
    out = quantize(build(by_name("llama-gqa")), tmp_path / "q", method=RTN(4, GROUP), prefix=PREFIX)
    assert made_for_prefix(out) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(out)(windows.ids[:1])


def test_recurrent_layers_read_the_prefix_so_it_counts(tmp_path: Path) -> None:
    full = build(by_name("lfm2"))
    with pytest.raises(IntactKVError, match=r"layers \[0, 2\] of lfm2 keep a state .* leave prefix_weight=0"):
        quantize(full, tmp_path / "q", method=GPTQ(4, None), calibration=windows.ids, prefix=PREFIX, prefix_weight=0)
    with pytest.warns(UserWarning, match=r"these count as in an ordinary checkpoint"):
        out = quantize(full, tmp_path / "q", method=GPTQ(4, None), calibration=windows.ids, prefix=PREFIX)
    assert made_for_prefix(out) is None


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (GPTQ(3, GROUP), {"prefix_weight": 1.5}, r"prefix_weight=1\.5 must lie between 0 .* and 1"),
        (GPTQ(3, GROUP), {"prefix_weight": -0.1}, "must lie between"),
        (GPTQ(3, GROUP), {"prefix_weight": float("nan")}, "must lie between"),
        (GPTQ(3, GROUP), {"prefix": None, "prefix_weight": 0.5}, "no prefix is given; give its ids"),
        (RTN(3, GROUP), {"prefix_weight": 0.0}, "RTN learns nothing from text"),
        (SmoothQuant(), {"prefix_weight": 0.5}, "SmoothQuant cannot let prefix tokens count in part"),
        (STATIC, {"prefix_weight": 0.5}, "RTN cannot let prefix tokens count in part"),
        (AutoRound(4, GROUP), {"prefix_weight": 0.5}, "AutoRound cannot let prefix tokens count in part"),
        (GPTQ(3, GROUP), {"prefix": list(range(1, 32))}, r"prefix of 31 tokens leaves nothing to learn from .* of 32"),
        (GPTQ(3, GROUP), {"prefix": [1, 5, 8]}, r"calibration window 0 begins with \[1, 5, 7\], not with"),
    ],
)
def test_impossible_weights_and_windows_are_refused(
    method: Method, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    full = build(by_name("llama-gqa"))
    with pytest.raises(IntactKVError, match=message):
        quantize(full, tmp_path / "q", method=method, calibration=windows.ids, **{"prefix": PREFIX, **settings})
    assert list(tmp_path.iterdir()) == []


def test_awq_on_routed_experts_cannot_leave_tokens_out(tmp_path: Path) -> None:
    with pytest.raises(IntactKVError, match=r"AWQ .* experts .* GPTQ, or prefix_weight=1"):
        quantize(build(by_name("mixtral")), tmp_path / "q", method=AWQ(4, None), calibration=windows.ids, prefix=PREFIX)


def test_static_and_float8_settings() -> None:
    with pytest.raises(
        IntactKVError, match="static_activations=True says how inputs are rounded; give activation_bits"
    ):
        RTN(4, GROUP, static_activations=True)
    with pytest.raises(IntactKVError, match="float8=True is 8 bits, not bits=4"):
        RTN(4, GROUP, float8=True)
    with pytest.raises(IntactKVError, match="group_size=big must be positive"):
        RTN(4, "big")  # type: ignore[arg-type]


def test_groups_of_the_largest_size_that_fits_every_layer(tmp_path: Path) -> None:
    full = build(by_name("llama-gqa"), intermediate_size=160)
    out = quantize(full, tmp_path / "q", method=RTN(4, "auto"), prefix=PREFIX)
    assert json.loads((out / RECIPE).read_text())["group_size"] == 32
    with pytest.raises(
        IntactKVError, match=r"group_size=64 does not divide in_features=160 .*; 32, 16 fit every layer"
    ):
        quantize(full, tmp_path / "r", method=RTN(4, 64), prefix=PREFIX)


def test_put_is_what_later_tokens_read() -> None:
    kv = capture(build(by_name("llama-gqa")), PREFIX)
    key = torch.randn(2, kv.layers[0][0].shape[0], 8, kv.layers[0][0].shape[2])
    intact = IntactTensors(kv).like(0, key, key)[0]
    row = torch.tensor([1] * P)
    out = put(key, intact, Sites(row, torch.arange(P), torch.arange(P)), layer=0)
    assert torch.equal(out[0], key[0])
    assert torch.equal(out[1, :, :P], kv.layers[0][0])


@pytest.mark.parametrize("kind", [EntryNotFoundError, LocalEntryNotFoundError, ConnectionError, ValueError])
def test_a_repository_without_a_recipe_was_made_for_nothing(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(*args: Any) -> None:
        raise kind("no such file")

    monkeypatch.setattr("intactkv.attaching.plain.hf_hub_download", missing)
    assert made_for_prefix("somebody/model") is None


@pytest.mark.parametrize(
    ("said", "why"),
    [(b"", "Expecting value"), (b"{", "Expecting property name"), (b"\xff", "can't decode byte"),
     (b"[" * 100_000, "nested too deeply"), (b"[]", r"it is \[\]"), (b'{"prefix_aware": 3}', "prefix_aware is 3")],
)  # fmt: skip
def test_what_cannot_be_read_of_a_checkpoint_is_refused_before_it_is_loaded(
    said: bytes, why: str, tmp_path: Path
) -> None:
    """Taken for nothing, a checkpoint made for its prefix would run without it, and nobody be told."""
    folder = tmp_path / "q"
    build(by_name("llama-gqa")).save_pretrained(folder)
    kv = capture(load_model(folder), [1])
    assert made_for_prefix(folder) is None
    (folder / RECIPE).write_bytes(said)
    (folder / "model.safetensors").write_bytes(b"spoilt as well, and would be refused for that")
    for reads in (made_for_prefix, quantizer_settings, load_model, lambda it: refuse_unchecked(kv, it, str(it))):
        with pytest.raises(IntactKVError, match=f"says what prefix it was made for, and cannot be read: .*{why}"):
            reads(folder)


def test_what_a_hub_name_was_made_with_is_read_from_its_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / RECIPE).write_text('{"method": "GPTQ", "bits": 3, "prefix": [1], "prefix_aware": {"weight": 0}}')
    monkeypatch.setattr("intactkv.attaching.plain.hf_hub_download", lambda name, file: str(tmp_path / file))
    folder = recipe_folder("somebody/model")
    assert quantizer_settings(folder) == {"method": "GPTQ", "bits": 3}
    assert made_for_prefix("somebody/model") == {"weight": 0}


def test_an_ordinary_checkpoint_and_one_made_for_its_prefix_in_one_table(tmp_path: Path) -> None:
    """It is compared with the one of its quantizer, own and intact; not with itself without its KV, nor with RTN."""
    tokenizer, text = load_tokenizer(MODEL), read_text(TEXT)
    full, prefix = tmp_path / "full", bos(tokenizer)
    build(by_name("llama-gqa"), vocab_size=len(tokenizer), bos_token_id=prefix[0]).save_pretrained(full)
    tokenizer.save_pretrained(full)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    learned = prefixed_windows(tokens, prefix=prefix, window=64).ids[:8]
    quantize(full, tmp_path / "rtn", method=RTN(3, "auto"), prefix=prefix)
    for name, weight in (("ordinary", 1.0), ("aware", 0.0)):
        method = GPTQ(3, "auto")
        quantize(full, tmp_path / name, method=method, calibration=learned, prefix=prefix, prefix_weight=weight)
    out, seen = tmp_path / "e.json", io.StringIO()
    command.run(
        [str(tmp_path / "rtn"), str(tmp_path / "ordinary"), str(tmp_path / "aware")],
        str(full),
        [tmp_path / "aware" / PREFIX_KV],
        protocol=command.Protocol(TEXT, 64, False, 8, 8, "cpu", "float32"),
        cache=command.Cache(tmp_path / "cache", None, 2**30),
        outputs=command.OutputFiles(out, str(tmp_path / "rows.md")),
        console=Console(file=seen, width=200),
    )
    figures = json.loads(out.read_text())
    kinds = [f"{name} {arm}" for name in ("rtn", "ordinary", "aware") for arm in ("own", "intact", "bare")]
    assert set(figures["arms"]) == {"full", "full bare", *kinds}
    pairs = [(pair["own"], pair["intact"]) for pair in figures["pairs"]]
    assert pairs == [
        ("rtn own", "rtn intact"),
        ("ordinary own", "ordinary intact"),
        ("ordinary own", "aware intact"),
        ("ordinary intact", "aware intact"),
    ]
    said = " ".join(seen.getvalue().split())
    assert "aware was made for its intact prefix and is not meant to run with its own." in said
    assert "aware intact against ordinary own:" in said
    assert figures["models"]["aware"]["made_for_prefix"]["weight"] == 0
    rows = (tmp_path / "rows.md").read_text().strip().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| rtn", "| ordinary", "| aware against ordinary own"]
    first, ordinary, aware = (row.split(" | ")[2] for row in rows[2:])
    assert aware == ordinary != first  # KL own: the ordinary one's, not the first model's
