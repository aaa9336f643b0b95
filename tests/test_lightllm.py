"""Files for LightLLM, by a memory that keeps them as its source says it does; LightLLM itself needs a GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PREFIX, build, by_name, rounded
from test_cli import intactkv
from torch import Tensor

from intactkv import IntactKV, IntactKVError, capture
from intactkv.artifact.served import with_check
from intactkv.serving.lightllm import write_prompt_buffer


@dataclass
class Memory:
    """What one rank keeps: `slots` of the tokens, in any order, in a tensor of layers, slots, heads and channels."""

    kept: Tensor
    slots: dict[int, int]
    heads: int

    @classmethod
    def filled(cls, config: dict[str, Any], folder: Path, rank: int) -> Memory:
        """As LightLLM does at its start, but that the rows are kept."""
        given = torch.load(folder / config["prompt_cache_kv_buffer"][f"rank_{rank}"], weights_only=True)["kv_buffer"]
        layers, count, both, dim = given.shape
        assert count == len(config["prompt_cache_token_ids"])
        slots = torch.randperm(9, generator=torch.Generator().manual_seed(rank))[:count].int()
        kept = torch.zeros(layers, 9, both, dim)
        kept[:, slots].copy_(given)  # LightLLM's own line, at 148e83c
        assert not kept.any(), "it keeps them: ADVICE and docs/lightllm.md can go"
        kept[:, slots] = given.to(kept)
        return cls(kept, dict(enumerate(slots.tolist())), both // 2)

    def read(self, layer: int, position: int) -> tuple[Tensor, Tensor]:
        """Keys and values `(head, dim)` of a token, as attention there takes them."""
        row = self.kept[layer, self.slots[position]]
        return row[: self.heads], row[self.heads :]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha", "qwen2", "qwen3"])
def test_every_rank_finds_its_heads(name: str, ranks: int, tmp_path: Path) -> None:
    full = build(by_name(name))
    full.save_pretrained(tmp_path / "m")
    kv = capture(full, PREFIX)
    config = write_prompt_buffer(kv, tmp_path / "m", tmp_path / "m" / "rows.pt", ranks=ranks, check=False)
    assert config["prompt_cache_token_ids"] == PREFIX
    memories = [Memory.filled(config, tmp_path / "m", rank) for rank in range(ranks)]
    for i, pair in kv.layers.items():
        for position in range(len(PREFIX)):
            found = [torch.cat(part) for part in zip(*(m.read(i, position) for m in memories), strict=True)]
            assert all(torch.equal(have, want[:, position]) for have, want in zip(found, pair, strict=True))


def test_keys_are_rotated_as_lightllm_rotates_them(tmp_path: Path) -> None:
    """By halves of the channels, half a head apart."""
    full = build(by_name("llama-gqa"))
    full.save_pretrained(tmp_path / "m")
    config = write_prompt_buffer(capture(full, PREFIX), tmp_path / "m", tmp_path / "rows.pt", check=False)
    memory, block = Memory.filled(config, tmp_path / "m", 0), full.model.layers[0]
    with torch.no_grad():
        read = block.input_layernorm(full.model.embed_tokens(torch.tensor(PREFIX)))
        keys = block.self_attn.k_proj(read).unflatten(-1, (memory.heads, -1))
    theta, half = full.config.rope_parameters["rope_theta"], keys.shape[-1] // 2
    for position, key in enumerate(keys):
        angle = position / theta ** (torch.arange(half) / half)
        first, second = key[:, :half], key[:, half:]
        turned = [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()]
        assert torch.allclose(memory.read(0, position)[0], torch.cat(turned, -1), atol=1e-5)


def test_the_command(tmp_path: Path) -> None:
    full, folder = build(by_name("llama-gqa")), tmp_path / "m"
    rounded(full).save_pretrained(folder)
    kv = with_check(capture(full, PREFIX), folder).save(tmp_path / "kv")
    done = intactkv("export", kv, "--to", "lightllm", "--model", folder, "-o", folder / "rows.pt", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert config["prompt_cache_kv_buffer"] == {"rank_0": "rows_rank_0.pt", "rank_1": "rows_rank_1.pt"}
    assert Memory.filled(config, folder, 1).heads == 1
    assert "must hold these two entries; LightLLM as read at 148e83c reserves these rows" in done.stderr


@pytest.mark.parametrize(
    ("name", "ranks", "sentence"),
    [
        ("gemma3", 1, "how LightLLM keeps keys and values of gemma3_text is not known here; it is of llama, mistral"),
        ("mistral-sliding", 1, "LightLLM's caches of sliding windows are not known here"),
        ("llama-gqa", 4, "2 key heads cannot be split over 4 ranks; use a divisor of them"),
        ("llama-gqa", 1, "nothing says that this intact KV is in the basis of"),
    ],
)
def test_what_cannot_be_right_is_refused(name: str, ranks: int, sentence: str, tmp_path: Path) -> None:
    full = build(by_name(name))
    rounded(full).save_pretrained(tmp_path / "m")
    kv: IntactKV = capture(full, PREFIX)
    with pytest.raises(IntactKVError, match=sentence):
        write_prompt_buffer(kv, tmp_path / "m", tmp_path / "rows.pt", ranks=ranks)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m"]
