"""Calibration lowers its own loss, touches nothing but the kv, never does harm, and survives being killed."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PREFIX, VOCAB, build, by_name, make_pair, prompts, reference_cache, rounded
from torch import Tensor, nn

from intactkv import IntactKV, IntactKVError, attach, capture
from intactkv.artifact.digest import weights_digest
from intactkv.calibrating import (
    CalibrationConfig,
    Objective,
    Report,
    Sample,
    Samples,
    Split,
    Spool,
    calibrate,
    spool,
    spool_bytes,
)
from intactkv.calibrating.activations import activations_fit
from intactkv.calibrating.backward import effective_weight, frozen, passes_gradient, straight_through
from intactkv.calibrating.board import board
from intactkv.calibrating.judge import verdict_of
from intactkv.calibrating.outputs import batched, outputs
from intactkv.calibrating.step import gradients_, order, step_, with_tensors
from intactkv.calibrating.targets import Live
from intactkv.calibrating.train import _start, most_that_fit, sized
from intactkv.evaluating import TokenMetrics
from intactkv.processes import exchange_device, share

P = len(PREFIX)
KL, BLOCKS, BOTH = Objective(blocks=0, kl=1), Objective(), Objective(blocks=1, kl=1)
QUICK = CalibrationConfig(objective=KL, learning_rate=0.03, steps=12, batch_size=4, check_every=4, patience=9)


def samples(rows: int, seed: int, length: int = 20) -> Samples:
    """Random rows of different lengths, of which the second half is learned."""
    ids = prompts(rows, length, seed)
    lengths = [length - i % 4 for i in range(rows)]
    found = [Sample(row[:n].clone(), torch.arange(n) >= n // 2) for row, n in zip(ids, lengths, strict=True)]
    return Samples(tuple(found))


def data() -> Split:
    return Split(samples(8, 1), samples(6, 2), samples(8, 3))


def seen() -> Split:
    """Judged by what was learned, so that a calibration that works is adopted: random text has no sequel."""
    return Split(samples(8, 1), samples(8, 1), samples(8, 1))


@pytest.fixture(scope="module")
def trio() -> Any:
    return make_pair(by_name("llama-gqa"))


def start(kv: IntactKV, model: Any, config: CalibrationConfig = QUICK) -> dict[str, Tensor]:
    return _start(kv, model, config).tensors


# What is trained


@pytest.mark.parametrize("objective", [KL, BLOCKS, BOTH], ids=["kl", "blocks", "both"])
def test_it_lowers_its_own_loss_and_leaves_both_models_as_they_were(trio: Any, objective: Objective) -> None:
    full, model, kv = trio
    before = [weights_digest(m) for m in (full, model)], kv.digest
    learning = [p.requires_grad for p in model.parameters()]
    found = calibrate(kv, model, full, data(), config=replace(QUICK, objective=objective, batch_size=8))
    losses = found.provenance["calibration"]["losses"]
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])
    assert before == ([weights_digest(m) for m in (full, model)], kv.digest)
    assert learning == [p.requires_grad for p in model.parameters()]
    assert not model.is_gradient_checkpointing
    assert not any(m.training for m in model.modules())
    assert torch.equal(found.logits, kv.logits)


@pytest.mark.parametrize("name", ["llama-mha", "mistral-sliding", "qwen3-moe", "gemma2", "phi3", "bloom", "gpt-oss",
                                  "deepseek-v3", "olmo2", "llama4", "cohere2", "gpt-neox"])  # fmt: skip
@pytest.mark.parametrize("objective", [KL, BLOCKS], ids=["kl", "blocks"])
def test_a_gradient_reaches_every_layer_and_no_weight(name: str, objective: Objective) -> None:
    full, model, kv = make_pair(by_name(name))
    config = replace(QUICK, objective=objective)
    tensors = start(kv, model, config)
    rows = samples(2, 1, length=8).rows  # shorter than any window, so that every layer still sees the prefix
    with frozen(model):
        gradients_(tensors, kv, model, Live(full, kv.ids), rows, config)
    assert all(p.grad is None for p in [*model.parameters(), *full.parameters()])
    assert {f"layers.{i}.{part}" for i in kv.layers for part in ("key", "value")} == set(tensors)
    for tensor_name, tensor in tensors.items():
        assert tensor.grad is not None, tensor_name
        assert tensor.grad.abs().max() > 0, tensor_name


@pytest.mark.parametrize("checkpoint", [True, False])
def test_the_gradient_is_that_of_injection_by_hand_and_of_the_formulas(trio: Any, checkpoint: bool) -> None:
    """The paper's loss and KL written out, over a cache filled by hand, one row at a time."""
    full, model, kv = (m.double() if isinstance(m, nn.Module) else m for m in make_pair(by_name("llama-gqa")))
    kv = kv.to(dtype=torch.float64)
    rows = samples(3, 5).rows
    config = CalibrationConfig(objective=BOTH, micro_batch=2, checkpoint_blocks=checkpoint)
    tensors = start(kv, model, config)
    loss = gradients_(tensors, kv, model, Live(full, kv.ids), rows, config)
    leaves = start(kv, model, config)
    layers = {i: (leaves[f"layers.{i}.key"], leaves[f"layers.{i}.value"]) for i in kv.layers}
    squares, divergence, learned = torch.zeros(()), torch.zeros(()), sum(int(r.learned.sum()) for r in rows)
    for row in rows:
        cache = reference_cache(model, replace(kv, layers=layers))
        given = model(row.ids[P:][None], past_key_values=cache, output_hidden_states=True)
        want = full(row.ids[None], output_hidden_states=True)
        here = row.learned[P:]
        for own, target in list(zip(given.hidden_states[1:], want.hidden_states[1:], strict=True))[:-1]:
            squares = squares + 0.5 * (own[0][here] - target[0, P:][here]).square().mean(-1).sum()
        p, q = (x.log_softmax(-1) for x in (want.logits[0, P:-1][here[1:]], given.logits[0, :-1][here[1:]]))
        divergence = divergence + (p.exp() * (p - q)).sum()
    last = config.objective.blocks * _last_block(full, model, replace(kv, layers=layers), rows)
    want_loss = (squares + last) / len(kv.layers) / learned + divergence / learned
    want_loss.backward()
    assert loss == pytest.approx(want_loss.item(), rel=1e-7)
    for name, tensor in tensors.items():
        # Llama's norms work in float32 whatever the model's dtype
        torch.testing.assert_close(tensor.grad, leaves[name].grad, rtol=1e-4, atol=1e-8)


def _last_block(full: Any, model: Any, kv: IntactKV, rows: Any) -> Tensor:
    """The last block's part, before the final norm: hooks of the test's own."""
    total, seen = torch.zeros(()), []
    hooks = [m.model.layers[-1].register_forward_hook(lambda *a: seen.append(a[2])) for m in (full, model)]
    for row in rows:
        seen.clear()
        full(row.ids[None])
        model(row.ids[P:][None], past_key_values=reference_cache(model, kv))
        target, own = seen[0].detach()[0, P:], seen[1][0]
        total = total + 0.5 * (own - target)[row.learned[P:]].square().mean(-1).sum()
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("parts", [("value",), ("key",)])
def test_only_the_chosen_parts_of_the_chosen_layers_change(trio: Any, parts: tuple[str, ...]) -> None:
    full, model, kv = trio
    found = calibrate(kv, model, full, seen(), config=replace(QUICK, parts=parts, layers=(1,)))
    assert found.provenance["calibration"]["adopted"]
    changed = {name for name, t in found.tensors.items() if not torch.equal(t, kv.tensors[name])}
    assert changed == {f"layers.1.{parts[0]}"}


def test_micro_batches_and_checkpointing_do_not_change_the_gradient(trio: Any) -> None:
    full, model, kv = trio
    rows, got = samples(6, 1).rows, []
    for size, checkpoint in ((1, True), (3, False), (4, True)):
        config = replace(QUICK, objective=BOTH, micro_batch=size, checkpoint_blocks=checkpoint)
        tensors = start(kv, model, config)
        loss = gradients_(tensors, kv, model, Live(full, kv.ids), rows, config)
        got.append((loss, [t.grad for t in tensors.values()]))
    for loss, gradients in got[1:]:
        assert loss == pytest.approx(got[0][0], rel=1e-5)
        torch.testing.assert_close(gradients, got[0][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("room", "most", "size"), [(0, 16, 1), (1, 16, 1), (5, 16, 4), (16, 16, 16), (99, 12, 12), (9, 1, 1)]
)
def test_as_many_samples_go_into_a_forward_as_fit(room: int, most: int, size: int) -> None:
    asked = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= room

    assert most_that_fit(fits, most) == size
    assert all(count <= most for count in asked)


def test_what_is_not_said_is_decided_by_device_and_room(trio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, kv = trio
    rows, config = samples(6, 1).rows, replace(QUICK, objective=BOTH, batch_size=4)
    own = with_tensors(kv, start(kv, model, config))
    assert sized(own, model, rows, config).micro_batch == 1  # a CPU has enough to do
    monkeypatch.setattr("intactkv.calibrating.train.input_device", lambda model: torch.device("cuda"))
    for room, (size, again) in {2**40: (4, False), 0: (1, True)}.items():
        found = sized(own, model, rows, replace(config, activation_bytes=room))
        assert (found.micro_batch, found.checkpoint_blocks) == (size, again)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, room=room: (2 * room, 2**50))
        assert sized(own, model, rows, config).micro_batch == size  # half of what is free, where nothing is said
    found = sized(own, model, rows, replace(config, micro_batch=3, checkpoint_blocks=True))
    assert (found.micro_batch, found.checkpoint_blocks) == (3, True)
    with pytest.raises(IntactKVError, match="micro_batch=0 is too few"):
        replace(config, micro_batch=0)


def test_bfloat16_models_train_float32_tensors_and_save_what_was_measured() -> None:
    full = build(by_name("llama-gqa"), dtype=torch.bfloat16)
    model, kv = rounded(full), capture(full, PREFIX)
    tensors = start(kv, model)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    found = calibrate(kv, model, full, seen(), config=replace(QUICK, batch_size=8))
    assert found.provenance["calibration"]["adopted"]
    assert {t.dtype for pair in found.layers.values() for t in pair} == {torch.bfloat16}


def test_every_sample_comes_once_in_an_epoch_and_steps_need_no_memory() -> None:
    config = CalibrationConfig(batch_size=4)
    seen = [i for step in range(5) for i in order(10, step, config)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert order(10, 3, config) == seen[12:16]


def test_the_learning_rate_is_the_papers_for_its_objective_and_falls_for_kl(trio: Any) -> None:
    full, model, kv = trio
    paper, ours = CalibrationConfig(), CalibrationConfig(objective=KL)
    assert [paper.rate(step) for step in (0, 80, 159)] == [2e-4] * 3
    assert [ours.rate(step) for step in (0, 80, 160)] == pytest.approx([1e-2, 5e-3, 0.0])
    assert replace(ours, learning_rate=0.5, decay=False).rate(99) == 0.5
    with frozen(model):  # AdamW's first step is the rate times the sign of the gradient
        for step, rate in ((0, 0.03), (6, 0.015)):
            state = _start(kv, model, QUICK)
            state.step = step
            before = {name: t.detach().clone() for name, t in state.tensors.items()}
            step_(state, kv, model, Live(full, kv.ids), samples(2, 1).rows, QUICK)
            moved = max(float((t.detach() - before[name]).abs().max()) for name, t in state.tensors.items())
            assert moved == pytest.approx(rate, rel=1e-2)


# The targets


def test_spooled_targets_are_the_live_ones_and_their_bytes_are_stated(trio: Any, tmp_path: Path) -> None:
    full, model, kv = trio
    parts, wanted = data(), {"blocks": True, "logits": True}
    kept = spool(full, parts, tmp_path / "s", prefix=kv.ids, **wanted)
    stated = spool_bytes(full, parts, prefix=kv.ids, **wanted)
    written = sum(f.stat().st_size for f in (tmp_path / "s").glob("*.safetensors"))
    assert stated < written < stated + 400 * 22  # a header a file
    rows = list(parts.train.rows[:3])
    again = Spool(str(tmp_path / "s"))  # in another process, which has the folder's name
    assert again.weights == kept.weights
    live, read = (targets.of(rows, **wanted) for targets in (Live(full, kv.ids), again))
    torch.testing.assert_close(live.blocks, read.blocks)
    torch.testing.assert_close(live.logits, read.logits)
    by_live, by_spool = (calibrate(kv, model, t, parts, config=replace(QUICK, objective=BOTH)) for t in (full, kept))
    losses = [kv.provenance["calibration"]["losses"] for kv in (by_live, by_spool)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_spool_goes_on_where_it_stopped_and_refuses_what_is_not_its_own(trio: Any, tmp_path: Path) -> None:
    full, model, kv = trio
    parts = data()
    kept = spool(full, parts, tmp_path, prefix=kv.ids)
    times = {f.name: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    first = next(iter(sorted(times)))
    (tmp_path / first).unlink()
    spool(full, parts, tmp_path, prefix=kv.ids)
    assert {f.name for f in tmp_path.iterdir() if f.stat().st_mtime_ns != times[f.name]} == {first}
    with pytest.raises(IntactKVError, match="does not hold what this sample needs"):
        kept.of(parts.train.rows[:1], blocks=False, logits=True)
    with pytest.raises(IntactKVError, match="another full model"):
        spool(model, parts, tmp_path, prefix=kv.ids)
    with pytest.raises(IntactKVError, match="1,000 are allowed"):
        spool(full, parts, tmp_path / "new", prefix=kv.ids, most_bytes=1000)


def test_targets_kept_on_disk_are_those_computed_again_bit_for_bit(trio: Any, monkeypatch: Any, tmp_path: Path) -> None:
    full, model, kv = trio
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    config, found = replace(QUICK, objective=BOTH, micro_batch=3, steps=6), []
    for most in (1, 30_000, 2**30):  # none fits, some do, all do
        computed: list[int] = []
        hook = full.register_forward_hook(lambda *_, computed=computed: computed.append(1))
        found.append((calibrate(kv, model, full, data(), config=replace(config, keep_bytes=most)), len(computed)))
        hook.remove()
    rows = sum(len(part) for part in (data().train, data().choose, data().judge))
    assert found[0][1] > found[1][1] > found[2][1]
    assert found[2][1] <= rows + 2  # each once, and what is looked at before the first step
    losses = [one.provenance["calibration"]["losses"] for one, _ in found]
    assert losses[0] == losses[1] == losses[2]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_place_for_targets(trio: Any, monkeypatch: Any, tmp_path: Path) -> None:
    full, model, kv = trio
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(IntactKVError, match=r"targets cannot be kept in .* keep_bytes=0"):
            calibrate(kv, model, full, data(), config=QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    calibrate(kv, model, full, data(), config=replace(QUICK, keep_bytes=0, steps=1))


# What the graph takes


@pytest.mark.parametrize("objective", [KL, BLOCKS], ids=["kl", "blocks"])
def test_blocks_are_checkpointed_where_the_graph_passes_its_bound(trio: Any, objective: Objective) -> None:
    """The bound is exact: what the graph keeps, counted by hand over the same forward, and one byte less."""
    full, model, kv = trio
    rows = list(data().train.rows)[:2]
    tensors = _start(kv, model, QUICK).tensors
    own, kept = with_tensors(kv, tensors), dict[int, int]()
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def count(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    wanted = {"blocks": objective.blocks > 0, "logits": objective.kl > 0}
    with frozen(model):
        target = Live(full, kv.ids).of(rows, **wanted)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), attach(model, own, check=False):
            graph = objective.sums(target, outputs(model, batched(rows, prefix=kv.ids), **wanted))
        size = sum(kept.values())
        assert any(part is not None and part.requires_grad for part in graph)
        assert size > 2 * sum(len(row.ids) for row in rows) * model.config.hidden_size * 4 * len(kv.layers)
        fits = {most: activations_fit(own, model, rows, objective, most_bytes=most) for most in (0, size - 1, size)}
    assert fits == {0: False, size - 1: False, size: True}
    for most, checkpointed in ((0, True), (2**30, False)):
        found = calibrate(kv, model, full, data(), config=replace(QUICK, steps=1, activation_bytes=most))
        assert found.provenance["calibration"]["checkpointed"] is checkpointed


# The gate


def metrics(kl: Tensor) -> TokenMetrics:
    return TokenMetrics(kl, kl == 0, kl, kl)


def test_the_gate_adopts_what_is_lower_beyond_its_interval_only() -> None:
    noise = torch.rand(30, 16, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.3
    coin = (torch.rand(30, 1, generator=torch.Generator().manual_seed(1)) - 0.5) * 0.2
    for change, adopted in ((-0.02, True), (0.02, False), (0.0, False), (coin, False)):
        arms = {"own": metrics(noise * 2), "before": metrics(noise), "after": metrics(noise + change)}
        assert verdict_of(arms)["adopted"] is adopted


def test_a_calibration_that_does_harm_is_not_kept(trio: Any) -> None:
    full, model, kv = trio
    found = calibrate(kv, model, full, data(), config=replace(QUICK, learning_rate=50.0, clip=1e9))
    about = found.provenance["calibration"]
    assert about["best_step"] == 0
    assert about["adopted"] is False
    assert found.digest == kv.digest


def test_it_stops_early_and_returns_the_best_step(trio: Any) -> None:
    full, model, kv = trio
    config = replace(QUICK, learning_rate=1.5, steps=60, check_every=1, patience=3)
    about = calibrate(kv, model, full, data(), config=config).provenance["calibration"]
    best = min(about["readings"], key=lambda reading: reading[1])
    assert about["best_step"] == best[0]
    assert about["steps"] == best[0] + 3 < 60


def test_what_is_kept_is_written_with_its_story(trio: Any, tmp_path: Path) -> None:
    full, model, kv = trio
    found = calibrate(kv, model, full, seen(), config=QUICK)
    about = found.provenance["calibration"]
    assert about["adopted"]
    assert about["kl"]["after"] < about["kl"]["before"] - about["kl_removed"]["low"]
    loaded = IntactKV.load(found.save(tmp_path / "kv2"))
    assert loaded.digest == found.digest != kv.digest
    assert loaded.provenance["calibration"]["data"]["train"]["digest"] == seen().train.digest
    assert loaded.provenance["basis"] == kv.provenance["basis"]


# What goes wrong

KILLER = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from dataclasses import replace
from pathlib import Path
from test_calibrate import QUICK, data
from models import by_name, make_pair
from intactkv.calibrating import calibrate
full, model, kv = make_pair(by_name("llama-gqa"))
config = replace(QUICK, steps=26, check_every=1, patience=99)

def run(folder):
    child = os.fork()  # nothing has used autograd yet
    if child == 0:
        calibrate(kv, model, full, data(), config=config, checkpoint=folder / "state").save(folder / "kv")
        os._exit(0)
    return child

def written(folder):
    return (folder / "state").stat().st_mtime_ns if (folder / "state").exists() else 0

whole, broken = map(Path, sys.argv[1:])
assert os.waitpid(run(whole), 0)[1] == 0
for kill in range(4):  # after more checkpoints each time, and a little later after the last of them
    child, before, seen = run(broken), written(broken), 0
    while seen < 2 + 2 * kill:
        now = written(broken)
        seen, before = seen + (now != before), now
        time.sleep(0.0005)
    time.sleep(0.006 * kill)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (broken / "kv").exists()
assert os.waitpid(run(broken), 0)[1] == 0
"""


def test_killed_at_several_moments_it_ends_bit_for_bit_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    code = KILLER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(whole), str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (broken / "kv").read_bytes() == (whole / "kv").read_bytes()


def test_a_full_disk_ends_with_a_sentence_and_the_last_good_state(trio: Any, tmp_path: Path) -> None:
    full, model, kv = trio
    state, config = tmp_path / "state", replace(QUICK, steps=8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(report: Any) -> None:
        if report.step == 4:  # after the checkpoint of step 4 no file may grow beyond a kilobyte
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))

    try:
        with pytest.raises(IntactKVError, match=r"state cannot be written .*; what was there before is kept"):
            calibrate(kv, model, full, data(), config=config, checkpoint=state, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [f.name for f in tmp_path.iterdir()] == ["state"]
    resumed: list[int] = []
    found = calibrate(kv, model, full, data(), config=config, checkpoint=state,
                      progress=lambda report: resumed.append(report.step))  # fmt: skip
    assert resumed == [5, 6, 7, 8]
    assert found.provenance == calibrate(kv, model, full, data(), config=config).provenance


def test_a_loss_that_is_no_number_ends_with_a_sentence_and_the_last_good_state(trio: Any, tmp_path: Path) -> None:
    full, model, kv = trio
    state = tmp_path / "state"

    def spoil(report: Any) -> None:
        if report.step == 4:
            with torch.no_grad():
                model.model.embed_tokens.weight[spoiled] = math.nan

    spoiled = int(data().train.rows[0].ids[5])
    kept = model.model.embed_tokens.weight.detach().clone()
    try:
        with pytest.raises(IntactKVError, match=r"the loss of step \d+ is nan"):
            calibrate(kv, model, full, data(), config=QUICK, checkpoint=state, progress=spoil)
    finally:
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(kept)
    resumed: list[int] = []
    calibrate(kv, model, full, data(), config=QUICK, checkpoint=state, progress=lambda r: resumed.append(r.step))
    assert resumed[0] == 5


def test_the_checkpoint_of_another_run_and_rubbish_are_refused(trio: Any, tmp_path: Path) -> None:
    full, model, kv = trio
    state = tmp_path / "state"
    short = replace(QUICK, steps=4)
    calibrate(kv, model, full, data(), config=short, checkpoint=state)
    elsewhere = data()  # the same samples of the same file, and the same model, by other spellings of their paths
    spelled = Split(*(replace(part, source=f"./{part.source}") for part in vars(elsewhere).values()))
    named, model.config.name_or_path = model.config.name_or_path, "another/spelling"
    steps: list[int] = []
    calibrate(kv, model, full, spelled, config=short, checkpoint=str(state), progress=lambda r: steps.append(r.step))
    model.config.name_or_path = named
    assert 1 not in steps, "it began anew"
    for other in (replace(short, seed=1), replace(short, learning_rate=0.02)):
        with pytest.raises(IntactKVError, match="of another calibration"):
            calibrate(kv, model, full, data(), config=other, checkpoint=state)
    with pytest.raises(IntactKVError, match="does not exist; create it first"):
        calibrate(
            kv, model, full, data(), config=short, checkpoint=tmp_path / "no" / "state",
            progress=lambda r: steps.append(r.step),
        )  # fmt: skip
    assert 1 not in steps, "it began before it looked"
    content = state.read_bytes()
    for rubbish in (content[: len(content) // 2], b"", b"{}"):
        state.write_bytes(rubbish)
        with pytest.raises(IntactKVError, match="is no checkpoint of a calibration"):
            calibrate(kv, model, full, data(), config=short, checkpoint=state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"parts": ("query",)}, "parts="),
        ({"patience": 0}, "patience=0"),
        ({"keep_bytes": -1}, "keep_bytes=-1"),
        ({"activation_bytes": -1}, "activation_bytes=-1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IntactKVError, match=message):
        replace(QUICK, **change)


def test_an_objective_without_a_weight_is_refused() -> None:
    with pytest.raises(IntactKVError, match="give one above 0"):
        Objective(0, 0)


def test_samples_that_cannot_learn_are_refused(trio: Any) -> None:
    full, model, kv = trio
    row = data().train.rows[0]
    strange, alone = row.ids.clone(), torch.zeros_like(row.learned)
    strange[0], alone[P] = 9, True
    beyond = row.ids.clone()
    beyond[-1] = VOCAB
    for bad, message in (
        (Sample(strange, row.learned), "does not begin with the 3 prefix tokens"),
        (Sample(row.ids, alone), "nothing to learn"),
        (Sample(beyond, row.learned), "outside the vocabulary"),
    ):
        with pytest.raises(IntactKVError, match=message):
            calibrate(kv, model, full, replace(data(), train=Samples((row, bad))), config=QUICK)
    with pytest.raises(IntactKVError, match="layers="):
        calibrate(kv, model, full, data(), config=replace(QUICK, layers=(7,)))


# Kernels without a backward pass


class Kernel(nn.Linear):
    """A layer whose kernel gives no gradient, silently."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Opaque(nn.Module):
    """A whole MLP without a backward pass, and without a Linear layer that could be mended."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = [inner]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x)


def kernels(model: Any) -> Any:
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = Kernel
    return model


def test_kernels_without_backward_are_trained_through_their_effective_weights() -> None:
    full, model, kv = make_pair(by_name("qwen2"))  # with biases
    config = replace(QUICK, objective=BOTH)
    plain = calibrate(kv, model, full, data(), config=config)
    served = kernels(rounded(full))
    mended = calibrate(kv, served, full, data(), config=config)
    about = mended.provenance["calibration"]
    assert about["straight_through"] == {"Kernel": 21}
    assert plain.provenance["calibration"]["straight_through"] == {}
    assert about["losses"] == pytest.approx(plain.provenance["calibration"]["losses"], rel=1e-4)
    assert not any("forward" in vars(module) for module in served.modules())


class Packing(nn.Linear):
    """A layer that loses its backward pass with the first forward without gradients, as bitsandbytes' nf4 does."""

    packed = False

    def forward(self, x: Tensor) -> Tensor:
        self.packed = self.packed or not torch.is_grad_enabled()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.packed):
            return nn.functional.linear(x, self.weight, self.bias)


def test_kernels_that_lose_their_backward_with_the_first_reading_are_mended() -> None:
    full, model, kv = make_pair(by_name("llama-gqa"))
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = Packing
    about = calibrate(kv, model, full, data(), config=replace(QUICK, batch_size=8)).provenance["calibration"]
    assert about["straight_through"] == {"Packing": 21}
    assert sum(about["losses"][-3:]) < 0.98 * sum(about["losses"][:3])


def test_where_no_gradient_can_be_had_the_backend_is_named() -> None:
    full, model, kv = make_pair(by_name("llama-gqa"))
    for layer in model.model.layers:
        layer.self_attn.o_proj = Opaque(layer.self_attn.o_proj)
    with pytest.raises(IntactKVError, match=r"no gradient reaches layers\.\d\.\w+ .*LlamaForCausalLM.*backends\.md"):
        calibrate(kv, model, full, data(), config=QUICK)


class Crowded(nn.Linear):
    """A card that others fill: no room for what a backward pass needs."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried …")
        return super().forward(x)


def test_memory_that_does_not_suffice_is_no_missing_gradient() -> None:
    full, model, kv = make_pair(by_name("llama-gqa"))
    linear = model.model.layers[0].mlp.down_proj
    linear.__class__ = Crowded
    with pytest.raises(torch.OutOfMemoryError):
        calibrate(kv, model, full, data(), config=QUICK)
    with pytest.raises(torch.OutOfMemoryError):
        passes_gradient(linear, model)


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_checkpoints_by_llm_compressor_calibrate(tmp_path: Path, activation_bits: int | None) -> None:
    """Rounded weights have a backward pass in transformers; rounded activations do not, and are mended."""
    pytest.importorskip("llmcompressor")
    from intactkv.checkpoint.load import load_model
    from intactkv.quantizing import RTN, quantize

    full = build(by_name("llama-gqa"), num_hidden_layers=2)
    method = RTN(3, 32, symmetric=False) if activation_bits is None else RTN(8, None, activation_bits=activation_bits)
    model = load_model(quantize(full, tmp_path / "q", method=method), dtype=torch.float32)
    kv = capture(full, PREFIX)
    found = calibrate(kv, model, full, data(), config=replace(QUICK, objective=BOTH, batch_size=8))
    about = found.provenance["calibration"]
    assert about["straight_through"] == ({} if activation_bits is None else {"Linear": 14})
    if activation_bits is None:
        assert sum(about["losses"][-3:]) < 0.98 * sum(about["losses"][:3])
    else:
        linear = model.model.layers[0].mlp.down_proj
        eye = torch.eye(linear.in_features)
        torch.testing.assert_close(effective_weight(linear, model), linear(eye).detach(), rtol=1e-2, atol=1e-3)
        with straight_through(model) as mended:
            assert mended == about["straight_through"]


def test_blocks_that_drop_out_in_training_mode_are_not_checkpointed() -> None:
    full, model, kv = make_pair(by_name("opt"))
    assert model.config.dropout > 0
    for config in (replace(QUICK, checkpoint_blocks=True), replace(QUICK, activation_bytes=0)):
        with pytest.raises(IntactKVError, match="checkpoint_blocks=False"):
            calibrate(kv, model, full, data(), config=config)
    found = calibrate(kv, model, full, data(), config=QUICK)
    assert found.provenance["calibration"]["steps"] == QUICK.steps


# Curves


def test_curves_hold_every_step_and_take_back_what_a_resumed_run_repeats(trio: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    full, model, kv = trio
    state, config = tmp_path / "state", replace(QUICK, steps=6, check_every=4)

    def stop(report: Any) -> None:
        draw(report)
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), board(tmp_path / "curves") as draw:
        calibrate(kv, model, full, data(), config=config, checkpoint=state, progress=stop)
    with board(tmp_path / "curves") as draw:
        found = calibrate(kv, model, full, data(), config=config, checkpoint=state, progress=draw)
    events = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    losses = found.provenance["calibration"]["losses"]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
    last = found.provenance["calibration"]["readings"][-1][1]
    assert events.Scalars("held-out KL")[-1].value == pytest.approx(last, rel=1e-6)


def test_curves_without_tensorboard_end_with_the_remedy(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(IntactKVError, match=r"pip install 'intactkv\[tensorboard\]'"), board(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


# Several processes

PAIR = """
import os, socket, sys, torch
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from pathlib import Path
from test_calibrate import QUICK, BOTH, kernels, seen
from models import by_name, make_pair
from dataclasses import replace
from intactkv.calibrating import calibrate
torch.set_num_threads(1)

def process(rank, port):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    state = PartialState(cpu=True)
    assert state.num_processes == 2 and state.backend == "gloo", (state.num_processes, state.backend)
    full, model, kv = make_pair(by_name("llama-gqa"))
    state_file, config = Path({folder!r}, "state"), replace(QUICK, objective=BOTH)
    found = calibrate(kv, model, full, seen(), config=config, checkpoint=state_file)
    found.save(Path({folder!r}, f"kv{{state.process_index}}"))
    mended = calibrate(kv, kernels(model), full, seen(), config=replace(config, steps=2))
    assert mended.provenance["calibration"]["straight_through"] == {{"Kernel": 21}}  # in both, or they would part ways
    state.destroy_process_group()

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
# as torchrun starts them, but forked where everything is imported and nothing has run
torch.multiprocessing.start_processes(process, (port,), 2, start_method="fork")
"""


def test_two_processes_of_accelerate_give_what_one_gives(trio: Any, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(PAIR.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    full, model, kv = trio
    one = calibrate(kv, model, full, seen(), config=replace(QUICK, objective=BOTH))
    two, other = (IntactKV.load(tmp_path / f"kv{rank}") for rank in (0, 1))
    assert two.digest == other.digest
    assert one.provenance["calibration"]["adopted"]
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=0, atol=1e-6)
    losses = [found.provenance["calibration"]["losses"] for found in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("backends", "device", "place"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cpu", "cuda"),  # losses and metrics are on the CPU, which NCCL does not serve
    ],
)
def test_sums_are_made_where_the_group_can_make_them(backends: str, device: str, place: str) -> None:
    assert exchange_device(backends, torch.device(device)) == torch.device(place)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_calibrates_as_the_cpu_does(tmp_path: Path) -> None:
    """Also resumed, from a spool, and in a group of GPUs alone; the KV itself stays where it was."""
    full, model, kv = make_pair(by_name("llama-gqa"))
    config, found = replace(QUICK, objective=BOTH), {}
    found["cpu"] = calibrate(kv, model, full, seen(), config=config)
    spooled = spool(full.cuda(), seen(), tmp_path / "spool", prefix=kv.ids, logits=True)
    found["live"] = calibrate(kv, model.cuda(), full, seen(), config=config)
    state = tmp_path / "state"

    def stop(now: Report) -> None:
        if now.step == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        calibrate(kv, model, full, seen(), config=config, checkpoint=state, progress=stop)
    found["resumed"] = calibrate(kv, model, full, seen(), config=config, checkpoint=state)
    found["spooled"] = calibrate(kv, model, spooled, seen(), config=config)
    blocks = replace(config, checkpoint_blocks=True)
    found["checkpointed"] = calibrate(kv, model, full, seen(), config=blocks)
    file = (tmp_path / "group").as_uri()
    torch.distributed.init_process_group("nccl", init_method=file, rank=0, world_size=1)
    try:
        found["grouped"] = calibrate(kv, model, full, seen(), config=config)
    finally:
        torch.distributed.destroy_process_group()
    losses = found["cpu"].provenance["calibration"]["losses"]
    for name, one in found.items():
        about = one.provenance["calibration"]
        assert about["adopted"], name
        assert about["losses"] == pytest.approx(losses, rel=1e-2), name
        assert {tensor.device.type for tensor in one.tensors.values()} == {"cpu"}, name


def test_one_process_takes_everything() -> None:
    assert share([1, 2, 3]) == [1, 2, 3]


@torch.no_grad()
def test_padding_changes_no_output(trio: Any) -> None:
    model, rows = trio[1], samples(4, 1).rows
    together = outputs(model, batched(rows, prefix=torch.tensor(PREFIX)), blocks=True, logits=True)
    alone = [outputs(model, batched([row], prefix=torch.tensor(PREFIX)), blocks=True, logits=True) for row in rows]
    for layer, block in enumerate(together.blocks):
        torch.testing.assert_close(block, torch.cat([one.blocks[layer] for one in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]), rtol=1e-4, atol=1e-5)
