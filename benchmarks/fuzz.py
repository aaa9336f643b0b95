"""Coverage-guided fuzzing of what reads files: python benchmarks/fuzz.py artifact|gguf|state [libFuzzer's options].

Takes atheris (`pip install --target FOLDER atheris`, FOLDER on PYTHONPATH), which is no dependency of the tests. Ends
at the first input that is neither read nor refused by `IntactKVError`, with libFuzzer's report; -max_total_time=60 is
a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
with atheris.instrument_imports(include=["intactkv", "gguf", "safetensors"], exclude=["intactkv.demo"]):
    import gguf.gguf_reader  # noqa: F401
    from gguf_model import write_gguf
    from models import PREFIX, build, by_name

    from intactkv import IntactKV, IntactKVError, capture
    from intactkv.serving.gguf import opened
    from intactkv.serving.llama_cpp import SavedState, state

READERS = {"artifact": IntactKV.load, "gguf": opened, "state": SavedState}


def seeds(what: str, folder: Path) -> None:
    """A whole file, to begin from."""
    model = build(by_name("llama-gqa"), head_dim=16, num_hidden_layers=1, vocab_size=20)
    kv = capture(model, PREFIX)
    if what == "artifact":
        kv.save(folder / "seed")
    elif what == "gguf":
        write_gguf(model, folder / "seed")
    else:
        (folder / "seed").write_bytes(state(kv, "llama"))


def main() -> None:
    what, *options = sys.argv[1:]
    read, folder = READERS[what], Path(tempfile.mkdtemp(prefix="fuzz-"))
    torch.set_num_threads(1)
    (folder / "corpus").mkdir()
    seeds(what, folder / "corpus")
    path = folder / "input.gguf"

    def one(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read(path)
        except IntactKVError as error:
            if "\n" in str(error):
                raise AssertionError(error) from error

    atheris.Setup([sys.argv[0], str(folder / "corpus"), "-max_len=60000", "-timeout=5", *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
