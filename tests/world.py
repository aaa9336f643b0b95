"""A folder with a tiny model, its rounded form, an artifact and files of every kind, for tests of the commands."""

from __future__ import annotations

import json
from pathlib import Path

import mtbench
from gguf_model import write_gguf
from models import build, by_name, rounded

from intactkv import capture
from intactkv.checkpoint.load import load_tokenizer
from intactkv.demo import MODEL, TEXT


def write_world(folder: Path) -> Path:
    """`model`, `w3`, `kv`, `model.gguf`, `text`, `rows.jsonl`, `noise`, `empty` and `folder` in `folder`."""
    tokenizer = load_tokenizer(MODEL)
    full = build(by_name("llama-gqa"), vocab_size=len(tokenizer), head_dim=16, bos_token_id=tokenizer.bos_token_id)
    for name, model in (("model", full), ("w3", rounded(full))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    capture(full, [tokenizer.bos_token_id], tokenizer=tokenizer).save(folder / "kv")
    write_gguf(full, folder / "model.gguf", vocabulary=False)
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "noise").write_bytes(bytes(range(256)) * 4)
    (folder / "text").write_text(TEXT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mtbench.QUESTIONS[:2]))
    return folder
