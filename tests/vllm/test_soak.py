"""Five thousand mixed requests through one engine: no memory that it does not take without the connector."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engine import Reference, Served, ids, serve


@pytest.mark.engine(engine="vLLM (CPU)", package="vllm", architecture="llama", cache="float32", how="5,000 requests")
def test_five_thousand_requests(chat: Served, tmp_path: Path) -> None:
    draw = random.Random(0)
    kinds = [
        lambda n, s: chat.prefix + ids(n, seed=s), lambda n, s: chat.prefix[: draw.randrange(1, 34)] + ids(n, seed=s),
        lambda n, s: ids(n, seed=s), lambda n, s: chat.prefix[:],
    ]  # fmt: skip
    rounds = []
    for turn in range(10):
        asked = []
        for i in range(500):
            prompt = draw.choices(kinds, (6, 2, 1, 1))[0](draw.randrange(1, 40), draw.randrange(200))
            asked.append({"ids": prompt, "max_tokens": draw.randrange(1, 7), "prompt": (turn * 500 + i) % 37 == 0})
        rounds.append(asked)
    found = serve(chat.engine(max_num_seqs=64), rounds, tmp_path)
    without = serve({"model": chat.model, "max_num_seqs": 64}, rounds, tmp_path)
    grown = [(each.rss[-1] - each.rss[1]) / 2**20 for each in (found, without)]
    assert grown[0] < grown[1] + 20, grown  # MiB: vLLM itself keeps some 70 kB a request in one process
    intact = Reference(chat.model, chat.kv)
    for asked, told in zip(rounds, found.rounds, strict=True):
        for request, answer in list(zip(asked, told, strict=True))[::10]:
            intact.check(request, answer, within=2e-5)
