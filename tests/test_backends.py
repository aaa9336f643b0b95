"""The attach laws on real quantized checkpoints, each made by its own library; missing libraries are skipped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS, BROKEN, ROWS, STEP, Backend, Load, page, save_full
from models import PREFIX, padded, prompts, reference_cache, reference_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from intactkv import Attachment, IntactKV, IntactKVError, attach, capture
from intactkv.calibrating import CalibrationConfig, Objective, Sample, Samples, Split, calibrate

P = len(PREFIX)
PAGE = Path(__file__).parent.parent / "docs/backends.md"
DTYPES = [torch.float32, torch.bfloat16]

# Absolute, on logits; beside it three times the plain model's own noise is allowed. A rounded activation that flips
# moves a logit by up to this much (0.16 is the most that was seen), seldom enough for a small sample to miss it.
TOLERANCE, FLIPPED = 1e-5, 0.25


@dataclass(frozen=True)
class Served:
    """A loaded quantized model, the full model's intact KV, and what two right answers may differ by."""

    backend: Backend
    dtype: torch.dtype  # asked for; some backends choose their own
    load: Load
    model: PreTrainedModel
    kv: IntactKV
    tolerance: float

    def attached(self) -> Attachment:
        return attach(self.model, self.kv, check=not self.backend.other_basis)

    def record(self, column: str, value: Any) -> None:
        """Keep a figure for the page, the largest of them if there are several."""
        row = ROWS.setdefault(self.backend.name, {})
        key = f"{column} {str(self.dtype).removeprefix('torch.')}"
        row[key] = max(value, row.get(key, value))


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IntactKV]:
    folder = tmp_path_factory.mktemp("full")
    return folder, capture(save_full(folder), PREFIX)


@pytest.fixture(scope="session")
def checkpoints() -> dict[str, Load]:
    """Made once, loaded in each dtype."""
    return {}


@pytest.fixture(scope="session", autouse=True)
def written_page(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    names = {backend.name for backend in (*BACKENDS, *BROKEN)}
    if request.config.getoption("--regenerate") and not request.session.testsfailed:
        if names - set(ROWS):
            print(f"\n{PAGE.name} is left as it is: {len(names - set(ROWS))} of its backends did not run here")
        else:
            PAGE.write_text(page())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for the logs that GPTQModel writes where it is."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", params=[(b, d) for b in BACKENDS for d in DTYPES], ids=lambda p: f"{p[0].name}-{p[1]}")
def served(
    request: pytest.FixtureRequest,
    full: tuple[Path, IntactKV],
    checkpoints: dict[str, Load],
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    backend, dtype = request.param
    if backend.missing:
        pytest.skip(f"{backend.missing} is not installed")
    folder, kv = full
    if backend.name not in checkpoints:
        made = tmp_path_factory.mktemp("made")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(made)
            checkpoints[backend.name] = backend.make(folder, made / "out")
    load = checkpoints[backend.name]
    model = load(dtype)
    own = noise(model)
    tolerance = max(FLIPPED if backend.rounds_activations else TOLERANCE, 3 * own)
    served = Served(backend, dtype, load, model, kv, tolerance)
    served.record("noise", own)
    return served


def rows() -> list[Tensor]:
    """Rows of different length that begin with the whole prefix."""
    return [row[:length] for row, length in zip(prompts(), (20, 13, 17), strict=True)]


def differ(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN anywhere counts as infinite."""
    gap = (a.double() - b.double()).abs().max().item()
    return gap if gap == gap else float("inf")


@torch.no_grad()
def noise(model: PreTrainedModel) -> float:
    """How far the plain model's logits move when the same tokens are computed in another shape.

    Alone in two calls, cut after the prefix, against in a padded batch, with and without cache. In float32 this is
    the order of a sum; kernels in 16 bits and rounded activations differ visibly, whatever is attached.
    """
    worst, single = 0.0, []
    for row in rows():
        cache = DynamicCache(config=model.config)
        model(row[None, :P], past_key_values=cache)
        single.append(model(row[None, P:], past_key_values=cache).logits[0])
    for side in ("left", "right"):
        ids, mask, positions = padded(rows(), side)
        for use_cache in (True, False):
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
            gaps = [differ(logits[i][mask[i].bool()][P:], want) for i, want in enumerate(single)]
            worst = max(worst, *gaps)
    return worst


@torch.no_grad()
def test_attached_equals_injection_by_hand(served: Served) -> None:
    model, kv = served.model, served.kv
    single = [reference_logits(model, kv, row) for row in rows()]
    effect = differ(model(rows()[0][None]).logits[0, P:], single[0])
    served.record("effect", effect)
    assert effect > 0
    for side in ("left", "right"):
        ids, mask, _ = padded(rows(), side)
        for use_cache in (True, False):
            with served.attached():
                logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
            for i, want in enumerate(single):
                gap = differ(logits[i][mask[i].bool()][P:], want)
                served.record("error", gap)
                assert gap <= served.tolerance, (side, use_cache, i)


def test_attach_refuses_another_basis(served: Served) -> None:
    if not served.backend.other_basis:
        served.attached().remove()  # with the check
        return
    with pytest.raises(IntactKVError, match="another basis"):
        attach(served.model, served.kv)


class ByHand(DynamicCache):
    """A cache that writes the prefix over each row's first tokens as they come in, knowing where the rows start."""

    def __init__(self, model: PreTrainedModel, kv: IntactKV, starts: list[int]) -> None:
        super().__init__(config=model.config)
        self.kv, self.starts = kv, starts

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        key_states, value_states = key_states.clone(), value_states.clone()
        for row, start in enumerate(self.starts):
            key, value = self.kv.layers[layer_idx]
            key_states[row, :, start : start + P] = key.to(key_states.dtype)
            value_states[row, :, start : start + P] = value.to(value_states.dtype)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def test_attached_equals_the_same_batch_by_hand_bit_for_bit(served: Served) -> None:
    model, kv = served.model, served.kv
    for side in ("left", "right"):
        ids, mask, positions = padded(rows(), side)
        cache = ByHand(model, kv, mask.argmax(1).tolist())
        want = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        with served.attached():
            logits = model(ids, attention_mask=mask).logits
        for i, row in enumerate(mask.bool()):
            gap = differ(logits[i, row][P:], want[i, row][P:])
            assert gap <= (served.tolerance if served.backend.mixes_rows else 0.0)


@torch.no_grad()
def test_the_cache_holds_the_intact_rows_bit_for_bit(served: Served) -> None:
    model, kv = served.model, served.kv
    for side in ("left", "right"):
        ids, mask, _ = padded(rows(), side)
        with served.attached():
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        for i, pair in kv.layers.items():
            for kept, intact in zip((cache.layers[i].keys, cache.layers[i].values), pair, strict=True):
                for row, real in enumerate(mask.bool()):
                    assert torch.equal(kept[row, :, real][:, :P], intact.to(kept.dtype))


@torch.no_grad()
def test_detach_leaves_no_trace(served: Served) -> None:
    model, ids = served.model, prompts()
    before, state, hooks = model(ids).logits, contents(model), hook_counts(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with served.attached():
        model(ids)
        model(ids, use_cache=False)
        assert hook_counts(model) != hooks
    assert torch.equal(model(ids).logits, before)
    assert contents(model) == state
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert hook_counts(model) == hooks


def contents(model: PreTrainedModel) -> dict[str, Any]:
    """Which tensors the model holds and, where they are plain ones, which version of their bytes and its sum."""
    return {
        name: (id(t), t.data_ptr(), t._version, t.double().sum().item()) if type(t.data) is Tensor else id(t)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }


def hook_counts(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    return {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}


def generated(model: PreTrainedModel, ids: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """Greedy new tokens `(row, new)` and their logits `(row, new, vocab)`."""
    out = model.generate(
        ids, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **more
    )
    return out.sequences[:, -6:], torch.stack(out.logits, 1)


def test_padded_generation_equals_injection(served: Served) -> None:
    model, kv = served.model, served.kv
    ids, mask, _ = padded(rows(), "left")
    with served.attached():
        tokens, logits = generated(model, ids, attention_mask=mask)
    for i, row in enumerate(rows()):
        want, want_logits = generated(model, row[None], past_key_values=reference_cache(model, kv))
        for step in range(tokens.shape[1]):
            gap = differ(logits[i, step], want_logits[0, step])
            served.record("error", gap)
            assert gap <= served.tolerance
            if tokens[i, step] != want[0, step]:  # only where two tokens are as good within the tolerance
                best, second = want_logits[0, step].topk(2).values.tolist()
                assert best - second <= 2 * served.tolerance
                break


def test_what_the_page_says_of_it(served: Served) -> None:
    model, kv = served.model, served.kv
    with torch.no_grad():
        own = model(kv.ids[None], use_cache=True).past_key_values
    for part, name in enumerate("KV"):
        theirs = [(own.layers[i].keys, own.layers[i].values)[part][0].float() for i in kv.layers]
        full = [pair[part] for pair in kv.layers.values()]
        served.record(f"{name} off", off(torch.stack(theirs), torch.stack(full)))
        served.record("door", min(map(off, theirs, full)))
    served.record("runs as", runs_as(model.model.layers[0].self_attn.k_proj, own.layers[0].keys.dtype, served.dtype))
    arrives = gradient(model, kv)
    if arrives.startswith("none") and served.backend.trainable is not None and served.dtype == torch.float32:
        model = served.backend.trainable(served.load)
        with torch.no_grad():
            model(prompts())
        remedied = gradient(model, kv)
        assert remedied.startswith("yes")
        arrives += f"; with the remedy: {remedied}"
    served.record("gradient", arrives)


def test_it_calibrates_or_is_refused_by_name(served: Served, full: tuple[Path, IntactKV]) -> None:
    """With the gradient of its own kernel, or with that of its effective weights where the kernel has none."""
    if served.dtype != torch.float32:
        pytest.skip("in float32 only, where the loss must fall")
    rows = Samples(tuple(Sample(row, torch.arange(len(row)) >= P) for row in prompts()))
    settings = CalibrationConfig(Objective(1, 1), learning_rate=0.02, steps=8, batch_size=len(rows), check_every=8)
    whole = AutoModelForCausalLM.from_pretrained(full[0], dtype=torch.float32)
    arrives, job = gradient(served.model, served.kv), (served.model, whole, Split(rows, rows, rows))
    if served.backend.other_basis:
        with pytest.raises(IntactKVError, match="basis"):
            calibrate(served.kv, *job, config=settings)
        served.record("calibrates", "refused: another basis")
        return
    found = calibrate(served.kv, *job, config=settings)
    about = found.provenance["calibration"]
    mended = ", ".join(f"{count} {name}" for name, count in about["straight_through"].items())
    assert bool(mended) != arrives.startswith("yes"), (mended, arrives)
    assert (
        about["losses"][-1] < about["losses"][0] or about["losses"][0] < TOLERANCE
    )  # half precision leaves nothing to learn
    fallen = f"{about['losses'][-1] / about['losses'][0]:.2f}"
    served.record("calibrates", f"{'effective weights of ' + mended if mended else 'own kernel'}, {fallen}")


def off(theirs: Tensor, full: Tensor) -> float:
    return ((theirs - full).norm() / full.norm()).item()


def runs_as(layer: torch.nn.Module, dtype: torch.dtype, asked: torch.dtype) -> str:
    """The class of a layer, or of its weight where the layer is a plain one, and the dtype if it is another one."""
    weight, name = getattr(layer, "weight", None), type(layer).__name__
    if name == "Linear" and isinstance(weight, Tensor) and type(weight.data) is not Tensor:
        name = type(weight.data).__name__
    return name if dtype == asked else f"{name}, {str(dtype).removeprefix('torch.')}"


def gradient(model: PreTrainedModel, kv: IntactKV) -> str:
    """Whether a loss reaches the attached keys and values, and its slope by finite differences over autograd's."""
    ids, flat = prompts(), [t.float() for pair in kv.layers.values() for t in pair]

    def loss(tensors: list[Tensor]) -> Tensor:
        layers = {i: (tensors[2 * n], tensors[2 * n + 1]) for n, i in enumerate(kv.layers)}
        with attach(model, replace(kv, layers=layers), check=False):
            return model(ids, labels=ids).loss

    leaves = [t.clone().requires_grad_() for t in flat]
    try:
        got = torch.autograd.grad(loss(leaves), leaves, allow_unused=True)
    except RuntimeError as error:
        return f"raises: {str(error).splitlines()[0][:90]}"
    arrived = [g for g in got if g is not None and bool(g.any())]
    if len(arrived) < len(got):
        return f"none, silently, for {len(got) - len(arrived)} of {len(got)} tensors"
    slope = sum(g.double().square().sum().item() for g in arrived)  # of the loss along the gradient
    step = STEP / 2 / slope
    with torch.no_grad():
        up, down = (loss([t + sign * step * g for t, g in zip(flat, arrived, strict=True)]) for sign in (1, -1))
    return f"yes, {(up - down).item() / STEP:.2f}"


@pytest.mark.parametrize("backend", BROKEN, ids=lambda b: b.name)
def test_what_does_not_run_here_says_so(backend: Backend, full: tuple[Path, IntactKV], tmp_path: Path) -> None:
    if backend.missing:
        pytest.skip(f"{backend.missing} is not installed")
    if backend.error.startswith("A GPU") and torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(Exception) as caught:
        backend.make(full[0], tmp_path / "out")(torch.float32)
    said = " ".join(f"{type(caught.value).__name__}: {caught.value}".split()).replace(str(tmp_path), "…")
    assert re.search(backend.error, said)
    ROWS[backend.name] = {"error": said.removesuffix(":").replace("`", "'")}


def test_the_page_is_of_these_tables(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--regenerate"):
        pytest.skip("it is being written")
    named = re.findall(r"^\| ((?!backend |-)[^|]+) \|", PAGE.read_text(), re.MULTILINE)
    assert named == [backend.name for backend in (*BACKENDS, *BROKEN)]
