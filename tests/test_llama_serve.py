"""`intactkv serve MODEL.gguf` with a real llama-server: every answer is the intact model's, or an error."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from command import intactkv, serving
from gguf_model import write_gguf
from models import greedy, rounded
from test_llama_cpp import IDS
from transformers import PreTrainedModel

from intactkv import IntactKV, IntactKVError, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.serving.gguf import opened
from intactkv.serving.layout import common_prefix
from intactkv.serving.llama_capture import states_for
from intactkv.serving.llama_cpp import SavedState
from intactkv.serving.llama_proxy import Proxy, Refusal, _until_timed, check_body
from intactkv.serving.llama_server import Engine, Server, installed_program, option, server_command, without

F32 = ["-ctk", "f32", "-ctv", "f32", "-c", "2048", "-t", "1"]


@dataclass
class Pair:
    """The exact model as a GGUF, and the keys and values of its 3-bit form, so that llama.cpp rounds nothing itself."""

    full: PreTrainedModel
    source: PreTrainedModel
    kv: IntactKV
    gguf: Path
    file: Path

    def greedy(self, ids: list[int], count: int, *, intact: bool = True) -> list[int]:
        return greedy(self.full, self.kv if intact else None, ids, count)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("served")
    full = load_model(MODEL, dtype="float32")
    source = rounded(full)
    kv = capture(source, IDS, logits=False)
    return Pair(full, source, kv, write_gguf(full, folder / "f32.gguf"), kv.save(folder / "kv.intactkv"))


@cache
def text() -> list[int]:
    return list(load_tokenizer(MODEL)(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids)


@asynccontextmanager
async def kept_up(pair: Pair) -> AsyncIterator[tuple[Engine, Any]]:
    """The engine and a client of its proxy, in this process."""
    engine = Engine(installed_program(), str(pair.gguf), states_for(str(pair.file), opened(pair.gguf), F32), F32)
    ready = asyncio.Event()
    running = asyncio.create_task(engine.run(ready.set))
    await asyncio.wait({running, asyncio.create_task(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
    try:
        async with TestClient(TestServer(Proxy(engine).app())) as client:
            yield engine, client
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def post(url: str, body: Any) -> tuple[int, dict[str, str], Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=120) as answer:
            return answer.status, dict(answer.headers), json.loads(answer.read())
    except HTTPError as error:
        return error.code, dict(error.headers), json.loads(error.read())


def tokens(said: str) -> list[int]:
    """The ids of a text of this vocabulary, `t12t7`."""
    return [int(each) for each in re.findall(r"t(\d+)", said)]


def prompts(count: int) -> list[list[int]]:
    """Most with the prefix, some with a part of it, some without, some with no more than it."""
    rng, found = random.Random(0), []
    for i in range(count):
        at = rng.randrange(len(text()) - 60)
        rest = text()[at : at + rng.randrange(5, 50)]
        head = {0: [], 1: IDS[:5]}.get(i % 6, IDS)
        found.append([*head, *rest])
    return [*found[:-2], IDS, IDS[:4]]


def children(process: subprocess.Popen[str]) -> list[int]:
    told = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(each) for each in told]


@pytest.mark.engine(
    engine="llama.cpp server",
    package="xllamacpp",
    architecture="llama",
    cache="f32",
    how="serve: {count} mixed requests, a killed server",
)
@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_mixed_requests_and_a_killed_server(pair: Pair, count: int) -> None:
    """Requests, 8 at once, streamed or not; then the server is killed: errors, nothing wrong, all right again."""
    asked = prompts(count)
    want = [pair.greedy(ids, 8) for ids in asked]
    intact = [i for i, ids in enumerate(asked) if ids[: len(IDS)] == IDS and len(ids) > len(IDS)][:30]
    plain = {i: pair.greedy(asked[i], 8, intact=False) for i in intact}
    assert sum(want[i] != plain[i] for i in intact) > 10, "nothing to get wrong"
    with serving(pair.gguf, "--kv", pair.file, *F32) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

        def ask(i: int) -> tuple[list[int], int] | str:
            given = {"model": "m", "prompt": asked[i], "max_tokens": 8, "temperature": 0}
            try:
                if i % 2:
                    stream = client.completions.create(**given, stream=True)
                    rows = int(stream.response.headers["X-IntactKV-Rows"])
                    return tokens("".join(chunk.choices[0].text for chunk in stream)), rows
                raw = client.completions.with_raw_response.create(**given)
                return tokens(raw.parse().choices[0].text), int(raw.headers["X-IntactKV-Rows"])
            except openai.APIError as error:
                return str(error)

        with ThreadPoolExecutor(8) as pool:
            told = list(pool.map(ask, range(len(asked))))
            for i, answer in enumerate(told):
                assert answer == (want[i], min(common_prefix(asked[i], IDS), len(asked[i]) - 1)), (i, asked[i])
            again = [pool.submit(ask, i) for i in range(60)]
            os.kill(children(process)[0], signal.SIGKILL)
            answers = [each.result() for each in again]
        failed = [answer for answer in answers if isinstance(answer, str)]
        assert failed
        assert not [each for each in failed if "llama-server" not in each]
        assert all(isinstance(a, str) or a[0] == want[i] for i, a in enumerate(answers))
        until = time.monotonic() + 60
        while isinstance(ask(0), str):
            assert time.monotonic() < until
            time.sleep(0.2)
        with ThreadPoolExecutor(8) as pool:
            for i, answer in enumerate(pool.map(ask, range(40))):
                assert not isinstance(answer, str), answer
                assert answer[0] == want[i]


@pytest.mark.engine(
    engine="llama.cpp server",
    package="xllamacpp",
    architecture="llama",
    cache="f32",
    how="serve: 2 split slots, no flash attention",
)
def test_requests_that_cannot_be_right(pair: Pair) -> None:
    """Refused with a sentence, in OpenAI's form; others pass."""
    with serving(pair.gguf, "--kv", pair.file, *F32, "--parallel", "2", "--no-kv-unified", "-fa", "off") as (
        url,
        process,
    ):
        for path, body, status, sentence in (
            ("/completion", {"prompt": IDS, "id_slot": 1}, 400, "id_slot is what the proxy gives"),
            ("/v1/completions", {"prompt": [IDS, IDS]}, 400, "2 prompts in one request"),
            ("/v1/completions", {"prompt": IDS, "n": 2}, 400, "n=2 spreads one prompt over slots"),
            ("/v1/completions", {"prompt": IDS, "lora": [{"id": 0, "scale": 1}]}, 400, "leave lora out"),
            ("/v1/completions", b"{", 400, "the request is no JSON"),
            ("/v1/completions", [1], 400, "the request must be an object"),
            ("/slots/0?action=erase", {}, 404, "POST /slots/0 is not offered with an intact prefix"),
            ("/v1/embeddings", {}, 404, "POST /v1/embeddings is not offered"),
        ):
            code, _, told = post(url + path, body)
            assert code == status
            assert sentence in told["error"]["message"]
        ids = [*IDS, *text()[:20]]
        code, headers, told = post(f"{url}/completion", {"prompt": [ids], "n_predict": 4, "temperature": 0})
        assert (code, headers["X-IntactKV-Rows"]) == (200, str(len(IDS)))
        assert tokens(told["content"]) == pair.greedy(ids, 4)
        assert post(f"{url}/detokenize", {"tokens": [5]})[2] == {"content": "t5"}
        with urlopen(f"{url}/v1/models") as answer:
            assert answer.status == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        stream = client.completions.create(model="m", prompt=ids, max_tokens=300, temperature=0, stream=True)
        first = next(iter(stream)).choices[0].text
        server = children(process)[0]
        process.terminate()  # what is under way is answered first
        whole = tokens(first + "".join(chunk.choices[0].text for chunk in stream))
        assert len(whole) == 300
        assert process.wait(60) == 0
        assert not Path(f"/proc/{server}").exists()


def test_a_state_that_is_not_used_is_not_served(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says it restored and did not: asked again, then refused."""

    async def run() -> tuple[int, str]:
        async with kept_up(pair) as (engine, client):

            async def restore(self: Engine, slot: Any, server: Any = None) -> None:
                await self.server.ask(f"/slots/{slot.number}?action=erase", {})
                slot.intact = True

            monkeypatch.setattr(Engine, "restore", restore)
            for slot in engine.slots:
                slot.intact = False
            answer = await client.post("/completion", json={"prompt": [*IDS, 5, 6], "n_predict": 2})
            return answer.status, (await answer.json())["error"]["message"]

    status, said = asyncio.run(run())
    assert status == 502
    assert "did not use the intact prefix (cache_n 0); not served" in said


def test_a_request_while_an_ended_server_is_tidied_away(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session is closed, and the next server is not there yet: told as such, not the proxy's own fault."""

    async def run() -> tuple[int, str]:
        closed, close = asyncio.Event(), Server.__aexit__

        async def slow(self: Server, *why: object) -> None:
            await close(self, *why)
            closed.set()
            await asyncio.sleep(1)

        monkeypatch.setattr(Server, "__aexit__", slow)
        async with kept_up(pair) as (engine, client):
            process = engine.server._process
            assert process is not None
            process.kill()
            await closed.wait()
            answer = await client.post("/completion", json={"prompt": [*IDS, 5, 6], "n_predict": 2})
            return answer.status, (await answer.json(content_type=None))["error"]["message"]

    status, said = asyncio.run(run())
    assert status == 503
    assert "llama-server does not serve: it ended with code -9; try again" in said


@pytest.mark.engine(
    engine="llama.cpp server",
    package="xllamacpp",
    architecture="llama",
    cache="q8_0",
    how="capture --engine llama.cpp, serve",
)
def test_the_native_route(pair: Pair, tmp_path: Path) -> None:
    """A state that llama.cpp computes of a full GGUF, for a quantized cache; only its own model takes it."""
    cache_of = ["-ctk", "q8_0", "-ctv", "q8_0", "-c", "1024", "-t", "1"]
    origin, out = write_gguf(pair.source, tmp_path / "full.gguf"), tmp_path / "native.bin"
    ids = ",".join(map(str, IDS))
    done = intactkv("capture", origin, "-o", out, "--engine", "llama.cpp", "--ids", ids, "--gguf", pair.gguf, *cache_of)
    assert done.returncode == 0, done.stderr
    assert SavedState(out).ids == IDS
    asked = [*IDS, *text()[:30]]
    with serving(pair.gguf, "--kv", out, *cache_of) as (url, _):
        status, headers, _ = post(f"{url}/completion", {"prompt": asked, "n_predict": 4})
        assert (status, headers["X-IntactKV-Rows"]) == (200, str(len(IDS)))
    plain = ["-c", "1024", "-t", "1"]
    done = intactkv("serve", pair.gguf, "--kv", out, *plain)
    assert done.returncode == 1
    assert "llama-server takes none of the states" in done.stderr
    torch.manual_seed(1)
    other = write_gguf(type(pair.full)(pair.full.config).eval(), tmp_path / "other.gguf")
    for command in (
        ("serve", other, "--kv", out, *cache_of),
        (
            "capture",
            origin,
            "-o",
            tmp_path / "x.bin",
            "--engine",
            "llama.cpp",
            "--ids",
            ids,
            "--gguf",
            other,
            *cache_of,
        ),
    ):
        done = intactkv(*command)
        assert done.returncode == 1
        assert "makes other values of these tokens" in done.stderr
    assert not (tmp_path / "x.bin").exists()
    (tmp_path / "native.bin.check").unlink()
    assert "which says whose state it is, cannot be read" in intactkv("serve", pair.gguf, "--kv", out, *cache_of).stderr


def test_the_native_route_says_where_it_compares_nothing(pair: Pair, tmp_path: Path) -> None:
    """A model whose queries, keys and values are one product: its state is saved, and served unchecked only."""
    phi, out = write_gguf(pair.source, tmp_path / "phi.gguf", fused=True), tmp_path / "phi.bin"
    done = intactkv("capture", phi, "-o", out, "--engine", "llama.cpp", "--ids", "0,5,7", "--gguf", pair.gguf, *F32)
    assert done.returncode == 0, done.stderr
    said = f"warning: {phi} has no plain first layer, so nothing was compared with {pair.gguf};"
    assert said in " ".join(done.stderr.split())
    assert SavedState(out).ids == [0, 5, 7]
    assert not out.with_name("phi.bin.check").exists()
    assert "which says whose state it is, cannot be read" in intactkv("serve", phi, "--kv", out, *F32).stderr


def test_the_prefix_of_a_gguf(pair: Pair, tmp_path: Path) -> None:
    """[BOS] by name; texts of a vocabulary; a quantized GGUF is no full model."""
    done = intactkv("capture", pair.gguf, "-o", tmp_path / "bos.bin", "--engine", "llama.cpp", "-c", "512")
    assert done.returncode == 0, done.stderr
    assert SavedState(tmp_path / "bos.bin").ids == [pair.full.config.bos_token_id]
    q4 = write_gguf(pair.full, tmp_path / "q4.gguf", "Q4_0")
    done = intactkv("capture", q4, "-o", tmp_path / "q.bin", "--engine", "llama.cpp")
    assert done.returncode == 1
    assert "has tensors of Q4_0; an intact KV comes from the full model" in done.stderr
    for args, sentence in (
        (["--engine", "vllm"], "--engine vllm is not known"),
        (["--engine", "llama.cpp", "--prefix", "auto"], "--prefix auto cannot go with --engine llama.cpp"),
        (["--engine", "llama.cpp", "--system", "x"], "--system goes with --prefix chat"),
        (["--engine", "llama.cpp", "--no-logits"], "--no-logits is not for --engine llama.cpp"),
        (["--engine", "llama.cpp", "--stream"], "--stream is not for --engine llama.cpp"),
        (["--engine", "llama.cpp", "--device", "cuda"], "--device is not for --engine llama.cpp"),
        (["--gguf", str(q4)], "--gguf is not known without --engine llama.cpp"),
        (["--typo"], "--typo is not known without --engine llama.cpp"),
    ):
        done = intactkv("capture", pair.gguf, "-o", tmp_path / "q.bin", *args)
        assert done.returncode == 1
        assert sentence in " ".join(done.stderr.split())


def test_what_serve_refuses_before_it_starts(pair: Pair, tmp_path: Path) -> None:
    """Wrong pairs, caches that cannot be written, options that are ours, a taken port."""
    (tmp_path / "junk.bin").write_bytes(b"qsgg" + b"\\xff" * 40)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for args, sentence in (
            ([], "a GGUF holds no intact KV; name it by --kv"),
            (["--kv", pair.file, "--mode", "external"], "--mode and --print are for vLLM"),
            (["--kv", pair.file, "--port", "x"], "--port x is no number"),
            (["--kv", pair.file, "-ctk", "q8_0", "-ctv", "q8_0"], "a cache of q8_0 holds rows as its build rounds"),
            (["--kv", pair.file, "-ctk", "f32"], "keys of f32 beside values of f16 are not written here"),
            (["--kv", pair.file, "--rope_freq_base", "1e6"], "--rope-freq-base turns keys otherwise"),
            (["--kv", pair.file, "-hfr", "owner/name"], "-hfr is given to llama-server here (the model)"),
            (["--kv", tmp_path / "junk.bin"], "is no sequence state of llama.cpp"),
            (["--kv", pair.file, *F32, "--cache-ram", "64"], "--cache-ram is given to llama-server here"),
            (["--kv", pair.file, *F32, "--no-such-option"], "llama-server ended with code"),
            (["--kv", pair.file, *F32, "--port", str(taken.getsockname()[1])], "cannot listen on 127.0.0.1"),
        ):
            done = intactkv("serve", pair.gguf, *args)
            assert done.returncode == 1, args
            assert sentence in " ".join(done.stderr.split()), (args, done.stderr)


def test_a_prompt_without_tokens_stands_on_no_rows() -> None:
    engine: Any = SimpleNamespace(states=SimpleNamespace(ids=[1, 2, 3]))
    assert asyncio.run(Proxy(engine)._rows("/completion", {"prompt": []}, 0)) == 0


def test_what_a_stream_begins_with() -> None:
    """Lines that only keep the connection come first where a prompt is long; errors are passed on as they are."""

    async def told(*chunks: bytes, stream: bool = True) -> tuple[bytes, int | None]:
        async def each() -> Any:
            for chunk in chunks:
                yield chunk

        return await _until_timed(each(), stream=stream)

    ping, first = b":\n\n", b'data: {"choices": []}\n\n'
    timed = b'data: {"timings": {"cache_n": 13}}\n\n'
    assert asyncio.run(told(ping, ping, first, timed[:9], timed[9:], b"rest")) == (ping * 2 + first + timed, 13)
    error = b'data: {"error": {"message": "no"}}\n\n'
    assert asyncio.run(told(ping, error)) == (ping + error, None)
    assert asyncio.run(told(b'{"timings": {"cac', b'he_n": 5}}', stream=False))[1] == 5
    with pytest.raises(Refusal, match="does not say what came from its cache"):
        asyncio.run(told(b"{}", stream=False))


def test_a_key_is_asked_of_clients_too(pair: Pair) -> None:
    """The proxy has the server's key for itself alone."""
    with serving(pair.gguf, "--kv", pair.file, *F32, "--parallel", "1", "--api-key", "secret") as (url, _):
        assert post(f"{url}/completion", {"prompt": [*IDS, 5], "n_predict": 1})[0] == 401
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        told = client.completions.create(model="m", prompt=[*IDS, 5], max_tokens=1, temperature=0)
        assert tokens(told.choices[0].text) == pair.greedy([*IDS, 5], 1)
        with pytest.raises(HTTPError):
            urlopen(f"{url}/v1/stream?conv_id=x")


def test_a_client_that_leaves_gives_its_slot_back(pair: Pair) -> None:
    """Many that leave at once, with and without the prefix; then every answer is right."""
    with serving(pair.gguf, "--kv", pair.file, *F32, "--parallel", "2") as (url, _):
        for i in range(12):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
                ids = [*(IDS if i % 2 else []), *text()[: 40 + i]]
                body = json.dumps({"prompt": ids, "n_predict": 200}).encode()
                head = f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                time.sleep(0.01 * (i % 4))
        for i in range(6):
            ids = [*IDS, *text()[30 * i : 30 * i + 20]]
            status, headers, told = post(f"{url}/completion", {"prompt": ids, "n_predict": 6, "temperature": 0})
            assert (status, headers["X-IntactKV-Rows"]) == (200, str(len(IDS)))
            assert tokens(told["content"]) == pair.greedy(ids, 6)


def test_command_lines() -> None:
    assert option(["-c", "5", "--port=7"], "--port") == "7"
    assert option(["-c", "5"], "-c", "--ctx-size") == "5"
    assert option(["-c"], "-c") is None
    assert without(["--host", "h", "-c", "5", "--port=7"], "--host", "--port") == ["-c", "5"]
    assert server_command(["x"], "m", 1, "f/", ["-c", "5"])[-4:] == ["--cache-ram", "0", "-c", "5"]
    assert option(["--cache_type_k", "f32"], "-ctk", "--cache-type-k") == "f32"  # as llama-server reads it
    for more in (["--host", "0.0.0.0"], ["--lora-scaled", "a_b.gguf"], ["--lora_scaled", "a_b.gguf"], ["--no_slots"]):
        with pytest.raises(IntactKVError, match=f"{more[0]} is given to llama-server here"):
            server_command(["x"], "m", 1, "f/", more)
    assert check_body(b'{"prompt": [[1, 2]]}') == {"prompt": [1, 2]}
    with pytest.raises(Refusal, match="best_of=3 spreads"):
        check_body(b'{"prompt": "a", "best_of": 3}')
