"""The importance matrices of runs/k_quants.py against llama-imatrix's own, of the same windows.

    python runs/imatrix.py FOLDER --model HF --gguf F16.gguf --data ../shared/data --imatrix llama-imatrix

What it does: takes FOLDER's matrices of all tokens and without the prefix's, or makes them; writes the windows that
they are of as one text, which llama.cpp's tokenizer must take apart into the same tokens; lets llama-imatrix read that
in chunks of a window; and says how far the means of squares are apart, by matrix (of its norm) and by channel.
What it gives up: GGUFs whose vocabulary is not the model's.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path
from typing import Annotated

import llama_cpp as ll
import torch
import typer
from gguf import GGUFReader
from k_quants import LEARN, WINDOW, importance, silent, write_imatrix
from torch import Tensor

from intactkv import bos
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.evaluating import prefixed_windows
from intactkv.files import write_atomically
from intactkv.texts import first_tokens, read_text


def tokens_of(gguf: Path, text: str) -> list[int]:
    """As llama-imatrix reads a file with --parse-special."""
    ll.llama_log_set(silent, ctypes.c_void_p())
    params = ll.llama_model_default_params()
    params.vocab_only = True
    model = ll.llama_model_load_from_file(str(gguf).encode(), params)
    data = text.encode()
    found = (ll.llama_token * (len(data) + 8))()
    count = ll.llama_tokenize(ll.llama_model_get_vocab(model), data, len(data), found, len(found), True, True)
    ll.llama_model_free(model)
    return list(found[:count])


def means(path: Path) -> dict[str, Tensor]:
    """The mean of an input's squares by matrix, of a file that llama-quantize reads."""
    read = {each.name: torch.from_numpy(each.data.copy()).double() for each in GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): sums.flatten() / read[name.replace(".in_sum2", ".counts")].flatten()
        for name, sums in read.items()
        if name.endswith(".in_sum2")
    }


def main(
    folder: Path,
    model: Annotated[Path, typer.Option()],
    gguf: Annotated[Path, typer.Option()],
    data: Annotated[Path, typer.Option()],
    imatrix: Annotated[Path, typer.Option()],
    windows: int = LEARN,
) -> None:
    """Let llama-imatrix make its own, and print how far apart they are."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, text, theirs = load_tokenizer(str(model)), folder / "windows.txt", folder / "llama.imatrix.gguf"
    learned = first_tokens(tokenizer, read_text(data / "calib" / "wikitext2_valid_tokenised.txt"), None)
    prefix = bos(tokenizer)
    rows = prefixed_windows(learned, prefix=prefix, window=WINDOW).ids[:windows]
    whole = "".join(tokenizer.decode(row) for row in rows)
    if tokens_of(gguf, whole) != rows.flatten().tolist():
        raise SystemExit(f"{gguf} takes the windows' text apart otherwise than {model}; give one with its vocabulary")
    write_atomically(text, whole.encode())
    options = ["-c", str(WINDOW), "-b", str(WINDOW), "--parse-special", "--no-ppl", "-t", "2"]
    command = [str(imatrix), "-m", str(gguf), "-f", str(text), "-o", str(theirs), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-500:])
    made = {"llama-imatrix": means(theirs)}
    full = load_model(str(model), dtype="float32")
    for name, skip in (("all", 0), ("free", len(prefix))):
        path = folder / f"{name}.imatrix.gguf"
        if not path.exists():
            write_imatrix(importance(full, rows, skip=skip), full.config, path)
        made[name] = means(path)
        if made[name].keys() != made["llama-imatrix"].keys():
            raise SystemExit(f"other matrices: {sorted(made[name].keys() ^ made['llama-imatrix'].keys())[:4]}")
    told = {}
    for name, other in (("all", "llama-imatrix"), ("free", "all")):
        ours, theirs_ = made[name], made[other]
        matrices = torch.stack([(ours[each] - theirs_[each]).norm() / theirs_[each].norm() for each in ours])
        channels = torch.cat([(ours[each] / theirs_[each] - 1).abs() for each in ours])
        told[f"{name} against {other}"] = {
            of: {"median": float(x.median()), "99 %": float(x.quantile(0.99)), "worst": float(x.max())}
            for of, x in (("matrices", matrices), ("channels", channels))
        }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    typer.run(main)
