"""K-quants with an intact prefix, through llama.cpp's own logits: does it help, and does a prefix-free imatrix?

    python runs/k_quants.py FOLDER --model HF --gguf F16.gguf --data ../shared/data --quantize llama-quantize

What it does: collects two importance matrices of the full model over the same calibration windows (WikiText-2 valid),
one of all tokens and one without the prefix's; lets llama.cpp quantize the F16 GGUF to every kind with none, the one
and the other; and measures each on C4 windows in llama-cpp-python, with the prefix as the GGUF itself computes it and
with a state written from the artifact (version 3), against the F16 GGUF: KL, same-top-1, perplexity, paired intervals.
A checkpoint is one JSON with every window's figures; a run goes on where it stopped, and ends in the page's table.
What it gives up: 100 windows of 512 tokens to learn from, few to measure on.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import llama_cpp as ll
import numpy as np
import torch
import typer
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from intactkv import IntactKVError, bos, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.evaluating import Windows, prefixed_windows
from intactkv.evaluating.bootstrap import bootstrap
from intactkv.evaluating.metrics import (
    TokenMetrics,
    full_metrics,
    gap_closed_statistic,
    paired_bootstrap,
    summary,
    token_metrics,
)
from intactkv.files import check_outputs, replacing, write_atomically
from intactkv.serving.llama_cpp import CacheKind, write_state
from intactkv.texts import first_tokens, read_text

KINDS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "IQ3_S", "IQ4_XS")
MATRICES = ("none", "all", "free")
LEARN, WINDOW = 100, 512


@dataclass
class Importance:
    """Of every linear layer of the decoder: the sum of its input's squares over tokens, float64, and how many.

    `chunk` tokens a window, `chunks` windows.
    """

    squares: dict[str, Float[Tensor, "input"]]
    tokens: int
    chunk: int
    chunks: int


@torch.no_grad()
def importance(
    model: PreTrainedModel, windows: Int[Tensor, "window length"], *, skip: int = 0, batch_size: int = 4
) -> Importance:
    """Run `model` over the windows and sum what its linear layers read, but for the first `skip` tokens of each."""
    if not 0 <= skip < windows.shape[1]:
        raise IntactKVError(f"skip={skip} leaves nothing of windows of {windows.shape[1]} tokens; use fewer")
    found: dict[str, Tensor] = {}
    head = model.get_output_embeddings()

    def add(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        squares = inputs[0][:, skip:].double().square().sum((0, 1)).cpu()
        found[name] = found[name] + squares if name in found else squares

    handles = [
        module.register_forward_pre_hook(partial(add, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    try:
        for batch in windows.split(batch_size):
            model(batch.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    count, length = windows.shape
    return Importance(found, count * (length - skip), length, count)


def write_imatrix(of: Importance, config: PreTrainedConfig, path: Path) -> Path:
    """Write it as `llama-quantize --imatrix` reads it, a GGUF. Raises `IntactKVError` for an unknown architecture."""
    check_outputs(path)
    names = _names(of.squares, config)
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["intactkv"])
        writer.add_uint32("imatrix.chunk_count", of.chunks)
        writer.add_uint32("imatrix.chunk_size", of.chunk)
        for name, squares in of.squares.items():
            writer.add_tensor(f"{names[name]}.in_sum2", squares.float().numpy()[None])
            writer.add_tensor(f"{names[name]}.counts", np.array([[of.tokens]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _names(modules: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, str]:
    kind = re.sub(r"_text$", "", str(config.model_type))
    arch = next((number for number, name in MODEL_ARCH_NAMES.items() if name == kind), None)
    if arch is None:
        raise IntactKVError(f"the gguf package knows no architecture {kind!r}; its names in an imatrix are not known")
    table = get_tensor_name_map(arch, config.num_hidden_layers)
    found = {name: table.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in modules}
    if unknown := [name for name, there in found.items() if there is None]:
        raise IntactKVError(f"the gguf package has no name for {unknown[0]} of {kind}")
    return {name: str(there) for name, there in found.items()}


class Context:
    """One GGUF in llama.cpp, and the logits that it gives for tokens at positions."""

    def __init__(self, path: Path, threads: int = 2) -> None:
        ll.llama_log_set(silent, ctypes.c_void_p())
        self._model = ll.llama_model_load_from_file(str(path).encode(), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 1024, 1024, 512, 1
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type, params.swa_full = 1, True
        self._context = ll.llama_init_from_model(self._model, params)
        assert self._context is not None
        self._vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))

    def close(self) -> None:
        ll.llama_free(self._context)
        ll.llama_model_free(self._model)

    def logits(self, ids: Sequence[int], first: int, state: Path | None = None) -> Tensor:
        """The logits at positions `first` to the end, with an empty cache before or the state of the first tokens."""
        ll.llama_memory_clear(ll.llama_get_memory(self._context), True)
        begin = 0
        if state is not None:
            told, count = (ll.llama_token * 1024)(), ctypes.c_size_t()
            if not ll.llama_state_seq_load_file(self._context, str(state).encode(), 0, told, 1024, count):
                raise SystemExit(f"{state} was refused")
            begin = count.value
            assert list(told[:begin]) == list(ids[:begin])
        batch = ll.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids) - begin
        for i, position in enumerate(range(begin, len(ids))):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = ids[position], position, 1
            batch.seq_id[i][0], batch.logits[i] = 0, position >= first
        if ll.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        ll.llama_batch_free(batch)
        rows = len(ids) - max(first, begin)
        array = np.ctypeslib.as_array(ll.llama_get_logits(self._context), shape=(rows, self._vocab))
        return torch.from_numpy(array.copy())


@ll.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    return None


def metrics_of(context: Context, full: Sequence[Tensor], windows: Windows, prefix: int, state: Path | None) -> Any:
    """A GGUF's figures, a window a row."""
    found = []
    for ids, theirs in zip(windows.ids, full, strict=True):
        here = context.logits(ids.tolist(), prefix, state)[:-1]
        found.append(token_metrics(theirs.float(), here, ids[prefix + 1 :]))
    return stacked(found)


def stacked(rows: Sequence[TokenMetrics]) -> TokenMetrics:
    return TokenMetrics.cat([row.map(lambda values: values[None]) for row in rows])


def table(folder: Path) -> None:
    """Print what `folder` holds; in the last column against the kind's ordinary matrix (all) with its own prefix."""
    held = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-*.json"))}
    for told in held.values():
        own, intact, gap = told["own"], told["intact"], told["gap closed"]
        last = "–"
        if (ordinary := held.get(f"{told['kind']}-all")) is not None:
            windows = torch.tensor([told["kl by window"]["intact"], ordinary["kl by window"]["own"]]).double()
            ratio = bootstrap(partial(_ratio, windows), windows.shape[1], generator=torch.Generator().manual_seed(0))
            last = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**ratio["ratio"].__dict__)
        print(
            f"| {told['kind']} | {told['imatrix']} | {own['kl_mean']:.4f} | {intact['kl_mean']:.4f} "
            f"| {100 * gap['value']:.1f} % [{100 * gap['low']:.1f}, {100 * gap['high']:.1f}] "
            f"| {own['kl_median']:.4f}, {intact['kl_median']:.4f} "
            f"| {own['same_top1_percent']:.1f}, {intact['same_top1_percent']:.1f} "
            f"| {own['perplexity']:.2f}, {intact['perplexity']:.2f} ({told['full perplexity']:.2f}) | {last} |"
        )


def _ratio(windows: Tensor, counts: Tensor) -> dict[str, Tensor]:
    above, below = (counts.double() @ windows.T).unbind(1)
    return {"ratio": above / below}


def main(
    folder: Path,
    model: Annotated[Path, typer.Option()],
    gguf: Annotated[Path, typer.Option()],
    data: Annotated[Path, typer.Option()],
    quantizer: Annotated[Path, typer.Option("--quantize")],
    windows: int = 32,
    length: int = WINDOW,
    kinds: str = ",".join(KINDS),
) -> None:
    """Make and measure every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(model))
    prefix = bos(tokenizer)
    kv_file, state = folder / "prefix.intactkv", folder / "prefix.state"
    if not state.exists():
        full = load_model(str(model), dtype="float32")
        kv = capture(full, prefix, logits=False)
        kv.save(kv_file)
        learned = first_tokens(tokenizer, read_text(data / "calib" / "wikitext2_valid_tokenised.txt"), None)
        calibration = prefixed_windows(learned, prefix=prefix, window=WINDOW).ids[:LEARN]
        for name, skip in (("all", 0), ("free", len(prefix))):
            write_imatrix(importance(full, calibration, skip=skip), full.config, folder / f"{name}.imatrix.gguf")
        write_state(kv, gguf, state, CacheKind(version=3))
        del full
    text = first_tokens(tokenizer, read_text(data / "eval" / "c4_sample_500.jsonl"), None)
    every = prefixed_windows(text, prefix=prefix, window=length)
    shown = every[:: len(every) // windows][:windows]
    held: list[Tensor] = []
    for kind in kinds.split(","):
        for matrix in MATRICES:
            out = folder / f"{kind}-{matrix}.json"
            if out.exists():
                continue
            made = folder / f"{kind}-{matrix}.gguf"
            given = [] if matrix == "none" else ["--imatrix", str(folder / f"{matrix}.imatrix.gguf")]
            command = [str(quantizer), *given, str(gguf), str(made), kind, "2"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{made.name}: {(done.stderr or done.stdout)[-300:]}", flush=True)
                continue
            if not held:
                origin = Context(gguf)
                held = [origin.logits(ids.tolist(), len(prefix))[:-1].half() for ids in shown.ids]
                origin.close()
            context = Context(made)
            arms = {
                name: metrics_of(context, held, shown, len(prefix), of)
                for name, of in (("own", None), ("intact", state))
            }
            context.close()
            full_arm = stacked(
                [full_metrics(t.float(), i[len(prefix) + 1 :]) for t, i in zip(held, shown.ids, strict=True)]
            )
            figures = {
                "kind": kind, "imatrix": matrix, "bytes": made.stat().st_size, "prefix": prefix, "windows": len(shown),
                "full perplexity": summary(full_arm)["perplexity"],
                **{name: summary(arm) for name, arm in arms.items()},
                "gap closed": paired_bootstrap(
                    gap_closed_statistic, arms["own"], arms["intact"], generator=torch.Generator().manual_seed(0)
                )["gap_closed"].__dict__,
                "kl by window": {name: arm.kl.double().mean(1).tolist() for name, arm in arms.items()},
            }  # fmt: skip
            write_atomically(out, json.dumps(figures, indent=1, default=str).encode())
            made.unlink()
            print(
                f"{kind:7} {matrix:5} own {figures['own']['kl_mean']:.4f} intact {figures['intact']['kl_mean']:.4f} "
                f"gap closed {figures['gap closed']}", flush=True,
            )  # fmt: skip
    table(folder)


if __name__ == "__main__":
    typer.run(main)
