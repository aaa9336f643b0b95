"""What `intactkv eval` does: windows of a text, three arms for each quantized model, a table, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from intactkv.artifact import IntactKV
from intactkv.artifact.served import made_for_prefix, quantizer_settings
from intactkv.attaching.plain import recipe_folder
from intactkv.capturing.live import check_tokenizer
from intactkv.checkpoint.load import device_named, dtype_named, load_model_on, load_tokenizer
from intactkv.checkpoint.source import checkpoint_digest, config_of
from intactkv.error import IntactKVError
from intactkv.evaluating.cached import Checkpoint, StoredArm, Traces, evaluate_cached
from intactkv.evaluating.compare import Arm, evaluate
from intactkv.evaluating.evaluation import Evaluation
from intactkv.evaluating.markdown import append_rows, header, page_text, row
from intactkv.evaluating.stored import DistributionStore
from intactkv.evaluating.windows import Windows, paper_windows, prefixed_windows
from intactkv.evaluating.words import arms_table, sentences
from intactkv.positions import check_positions
from intactkv.processes import grouped, is_main, join
from intactkv.provenance import write_json
from intactkv.screen import Screen, Show, working
from intactkv.texts import first_tokens, read_text


@dataclass(frozen=True)
class Protocol:
    """Which windows of which text are measured, in batches of how many, on which device and in which dtype.

    `bare` says whether prompts without the prefix are measured too; None: where a model was made for its prefix.
    """

    data: Path
    window: int
    paper: bool
    windows: int | None
    batch_size: int
    device: str
    dtype: str = "auto"
    bare: bool | None = None


@dataclass(frozen=True)
class Cache:
    """Where measurements are kept, how many tokens of each distribution (None: all), and the bytes they may take."""

    folder: Path
    top: int | None
    most_bytes: int


@dataclass(frozen=True)
class OutputFiles:
    """The files to write: all figures as JSON, one row for each model as Markdown ("-": print it)."""

    json: Path | None
    markdown: str | None


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized model under its short name, with the intact KV that goes with it."""

    name: str
    source: str
    file: Path
    kv: IntactKV
    made_for: Mapping[str, Any] | None  # what its folder says of the prefix that it was made for
    settings: Mapping[str, Any]  # … and of its quantizer

    def arm(self, kind: str, alone: bool) -> str:
        """The arm's name in tables: with the model's where there are several."""
        return kind if alone else f"{self.name} {kind}"


def run(
    models: Sequence[str], full: str, kvs: Sequence[Path], *, protocol: Protocol, cache: Cache | None,
    outputs: OutputFiles, console: Console,
) -> None:  # fmt: skip
    """Compare every quantized model with the full one, from the command line's arguments.

    Processes that `torchrun` started share the windows, each on a device of its own; the first one speaks and writes.
    """
    place = join()
    console = console if is_main() else Screen(quiet=True)
    if outputs.markdown not in (None, "-"):
        page_text(Path(str(outputs.markdown)))  # now, and not when the figures are there
    quantized = _quantized(models, kvs)
    windows = _windows(quantized, full, protocol)
    bare = any(q.made_for for q in quantized) if protocol.bare is None else protocol.bare
    protocol = replace(protocol, bare=bare)
    here = replace(protocol, device=place or protocol.device)
    needed = (full, *models) if cache is not None or outputs.json is not None else ()
    digests = _digests(needed, console)
    with working(console, "measuring") as show:
        traces = None
        if cache is None:
            evaluation = _in_memory(quantized, full, windows, here, show)
        else:
            store = DistributionStore(cache.folder, _loaded_as(digests[full], full, here), cache.top, cache.most_bytes)
            evaluation, traces = _on_disk(quantized, full, digests, windows, (store, here), show)
    if not is_main():
        return
    evaluation = replace(evaluation, pairs=_pairs(quantized))
    figures = _figures(evaluation, cache, traces)
    title = f"{figures['windows']} windows of {figures['window']} tokens, {figures['scored_tokens']} scored"
    console.print(arms_table(figures, title=title))
    for sentence in (*_about_cache(figures), *_about_prefix(quantized), *sentences(evaluation)):
        console.print(sentence, highlight=False)
    if outputs.json is not None:
        about = {
            "models": {q.name: _about(q, digests) for q in quantized},
            "full": {"source": full, "checkpoint": digests[full]},
            "options": {**asdict(protocol), "data": str(protocol.data)},
            "text": sha256(protocol.data.read_bytes()).hexdigest(),
        }
        write_json(outputs.json, {**about, **figures})
    if outputs.markdown is not None:
        rows = []
        for q in quantized:
            intact = q.arm("intact", len(models) == 1)
            own = next(own for own, other in evaluation.pairs if other == intact)
            name = q.name if own == q.arm("own", len(models) == 1) else f"{q.name} against {own}"
            rows.append(row(figures, model=name, arms=(own, intact)))
        if outputs.markdown == "-":
            console.print("\n".join((*header(), *rows)), markup=False, highlight=False, soft_wrap=True)
        else:
            append_rows(Path(outputs.markdown), rows)


def _digests(sources: Sequence[str], console: Console) -> dict[str, str]:
    """The digest of each checkpoint's files, which takes a while for large ones."""
    found = {}
    for source in sources:
        with working(console, f"reading {source}, MiB") as show:
            found[source] = checkpoint_digest(source, progress=partial(_in_mib, show))
    return found


def _in_mib(show: Show, done: int, total: int) -> None:
    show(done >> 20, total >> 20)


def _quantized(models: Sequence[str], kvs: Sequence[Path]) -> list[Quantized]:
    if len(kvs) not in (1, len(models)):
        raise IntactKVError(
            f"{len(kvs)} intact KVs are given for {len(models)} models; give one --kv for all, or one for each in order"
        )
    names = [Path(model).name or model for model in models]
    if len(set(names)) < len(names):
        names = list(models)
    if len(set(names)) < len(names):
        raise IntactKVError(f"the model {max(names, key=names.count)} is given twice; name each once")
    artifacts = {path: IntactKV.from_pretrained(path) for path in dict.fromkeys(kvs)}
    files = list(kvs) * (len(models) if len(kvs) == 1 else 1)
    found = []
    for name, model, file in zip(names, models, files, strict=True):
        recipe = recipe_folder(model)
        found.append(Quantized(name, model, file, artifacts[file], made_for_prefix(recipe), quantizer_settings(recipe)))
    return found


def _windows(quantized: Sequence[Quantized], full: str, protocol: Protocol) -> Windows:
    config, tokenizer, text = config_of(full), load_tokenizer(full), read_text(protocol.data)
    if config is not None:
        check_positions(config, protocol.window, "a window")
    first = quantized[0]
    for q in quantized:
        check_tokenizer(q.kv, tokenizer, full)
        if q.kv.ids.tolist() != first.kv.ids.tolist():
            raise IntactKVError(
                f"{q.file} keeps another prefix than {first.file}; models are compared on windows that begin with one "
                "prefix: capture the same, or compare them one by one"
            )
    tokens = first_tokens(tokenizer, text, None if protocol.windows is None else protocol.windows * protocol.window)
    if protocol.paper:
        if len(first.kv) != 1:
            raise IntactKVError(
                f"--paper overwrites one token by BOS, but {first.file} holds {len(first.kv)}; capture `bos`"
            )
        windows = paper_windows(tokens, bos=int(first.kv.ids[0]), window=protocol.window)
    else:
        windows = prefixed_windows(tokens, prefix=first.kv.ids, window=protocol.window)
    return windows[: protocol.windows]


def _loaded_as(digest: str, source: str, protocol: Protocol) -> str:
    """The digest of a model and of how it is loaded here: what "auto" is hangs on the machine.

    Processes that share the windows are on alike devices of other numbers: all count as the first.
    """
    device = device_named(protocol.device)
    if grouped() and device.type != "cpu":
        device = torch.device(device.type, 0)
    dtype = dtype_named(protocol.dtype, source, device)
    how = "as stored" if dtype == "auto" else f"in {dtype}"
    return sha256(f"{digest} {how} on {device}".encode()).hexdigest()


def _kinds(q: Quantized, protocol: Protocol) -> list[tuple[str, IntactKV | None, int]]:
    """A quantized model's arms: the name of each, its intact KV, and how many tokens it is not shown."""
    kinds: list[tuple[str, IntactKV | None, int]] = [("own", None, 0), ("intact", q.kv, 0)]
    return [*kinds, ("bare", None, len(q.kv))] if protocol.bare else kinds


def _pairs(quantized: Sequence[Quantized]) -> tuple[tuple[str, str], ...]:
    """Whose KL is compared with whose: a model with its own prefix against the intact one.

    A model made for its prefix is compared with ordinary ones, own and intact, as long as there are any: its own prefix
    is not what it was made to be used with. Those are the ones of the same quantizer's settings, else all.
    """
    alone = len(quantized) == 1
    ordinary = [q for q in quantized if q.made_for is None]
    pairs = [(q.arm("own", alone), q.arm("intact", alone)) for q in quantized if q.made_for is None or not ordinary]
    for q in quantized:
        if q.made_for is not None:
            alike = [other for other in ordinary if other.settings == q.settings and q.settings] or ordinary
            pairs += [(other.arm(kind, alone), q.arm("intact", alone)) for other in alike for kind in ("own", "intact")]
    return tuple(pairs)


def _in_memory(
    quantized: Sequence[Quantized], full: str, windows: Windows, protocol: Protocol, progress: Any
) -> Evaluation:
    arms: list[Arm] = []
    for q in quantized:
        model, alone = load_model_on(q.source, protocol.device, dtype=protocol.dtype), len(quantized) == 1
        arms += [Arm(q.arm(kind, alone), model, kv, skip) for kind, kv, skip in _kinds(q, protocol)]
    loaded = load_model_on(full, protocol.device, dtype=protocol.dtype)
    return evaluate(loaded, arms, windows, batch_size=protocol.batch_size, shared=grouped(), progress=progress)


def _on_disk(
    quantized: Sequence[Quantized], full: str, digests: dict[str, str], windows: Windows,
    places: tuple[DistributionStore, Protocol], progress: Any,
) -> tuple[Evaluation, Traces]:  # fmt: skip
    store, protocol = places
    arms: list[StoredArm] = []

    def checkpoint(source: str) -> Checkpoint:
        load = partial(load_model_on, source, protocol.device, dtype=protocol.dtype)
        return Checkpoint(_loaded_as(digests[source], source, protocol), load)

    for q in quantized:
        made, alone = checkpoint(q.source), len(quantized) == 1
        arms += [StoredArm(q.arm(kind, alone), made, kv, skip) for kind, kv, skip in _kinds(q, protocol)]
    return evaluate_cached(
        checkpoint(full), arms, windows, store=store, batch_size=protocol.batch_size, shared=grouped(),
        progress=progress,
    )  # fmt: skip


def _figures(evaluation: Evaluation, cache: Cache | None, traces: Traces | None) -> dict[str, Any]:
    """All figures, and what they are worth: is KL exact, and which part of them an earlier run has measured."""
    figures: dict[str, Any] = {"kl": "exact", **evaluation.to_dict()}
    if cache is not None and traces is not None:
        figures["cache"] = {**asdict(cache), "folder": str(cache.folder), **asdict(traces)}
        if cache.top is not None:
            figures["kl"] = (
                f"lower bound: over the full model's {cache.top} likeliest tokens at each position and all others as "
                f"one, which hold {100 * traces.rest_mass:.3g} % of its probability on average"
            )
    return figures


def _about_prefix(quantized: Sequence[Quantized]) -> list[str]:
    """What a reader must know of models that were made for their prefix."""
    said = []
    for q in quantized:
        if q.made_for is None:
            continue
        alone = all(other.made_for is not None for other in quantized)
        less = "; name the ordinary checkpoint too to see what it gains" if alone else ""
        said.append(f"{q.name} was made for its intact prefix and is not meant to run with its own{less}.")
        if q.made_for.get("prefix") != q.kv.ids.tolist():
            said.append(f"{q.name} was made for the prefix {q.made_for.get('prefix')}, not for {q.kv.ids.tolist()}.")
    return said


def _about_cache(figures: dict[str, Any]) -> list[str]:
    """What a reader must know of figures that come from disk."""
    said = []
    if figures["kl"] != "exact":
        said.append(
            f"Every KL above is a {figures['kl']}; shares closed are shares of these bounds: leave --top out for exact "
            "ones."
        )
    if traces := figures.get("cache"):
        said.append(
            f"{traces['read']} batches of an arm were read from {traces['folder']}, {traces['computed']} measured."
        )
        said += [f"Computed again: {reason}" for reason in traces["unusable"]]
        said.append("No block-output MSE with --cache: the models were not in memory together.")
    return said


def _about(q: Quantized, digests: dict[str, str]) -> dict[str, Any]:
    return {
        "source": q.source,
        "checkpoint": digests[q.source],
        "kv": str(q.file),
        "kv_digest": q.kv.digest,
        "prefix": q.kv.ids.tolist(),
        "made_for_prefix": q.made_for,
        "provenance": dict(q.kv.provenance),
    }
