"""The proxy before llama-server, by which every answer stands on the intact rows that it should.

A slot that has restored a state keeps its tokens as long as prompts begin with them. One that does not erases them, and
from then on every answer is the plain model's, without a word. So the proxy gives each request a slot, restores the
state into it where the last prompt took it away, and reads from the answer how many tokens came from the cache
(`cache_n`) before it passes the first byte on. Where that is less than what prompt and prefix share, the state was not
used: it is restored and asked again, and then refused. Answers say how many intact rows they stand on:
`X-IntactKV-Rows`.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import ClientError, web

from intactkv.error import IntactKVError, first_line
from intactkv.lines import from_json
from intactkv.serving.layout import common_prefix, rows_due
from intactkv.serving.llama_server import Engine, Refusal, Slot

GENERATE = ("/completion", "/completions", "/v1/completions", "/chat/completions", "/v1/chat/completions")
PASS_ON = ("/tokenize", "/detokenize", "/apply-template")
SHOW = ("/health", "/v1/health", "/models", "/v1/models", "/props", "/slots", "/metrics")
WAITING = 256  # requests that may wait for a slot
_HOPS = {"connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "host",
         "x-conversation-id"}  # fmt: skip  # by the last, the server would go on for clients that have left


class Proxy:
    """The HTTP side: OpenAI's and llama-server's own routes, a slot for each request."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._free = engine, asyncio.Semaphore(0)
        self._idle: list[Slot] = []
        self._slots: list[Slot] = []
        self._waiting = 0
        self._ending: set[asyncio.Task[None]] = set()

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=1 << 26, middlewares=[_told])
        for path in GENERATE:
            app.router.add_post(path, self.generate)
        for path in PASS_ON:
            app.router.add_post(path, self.pass_on)
        for path in SHOW:
            app.router.add_get(path, self.pass_on)
        app.router.add_route("*", "/{path:.*}", self.refuse)
        return app

    async def refuse(self, request: web.Request) -> web.StreamResponse:
        """Whatever else would change the slots behind our back."""
        offered = ", ".join(GENERATE)
        raise Refusal(404, f"{request.method} {request.path} is not offered with an intact prefix; use {offered}")

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        """A request that generates nothing."""
        body = await request.read()
        async with self._engine.server.request(
            request.method, request.path_qs, data=body or None, headers=_headers(request.headers)
        ) as answer:
            return web.Response(body=await answer.read(), status=answer.status, headers=_headers(answer.headers))

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """A request that generates, in a slot that holds the prefix."""
        body = check_body(await request.read())
        _ = self._engine.server  # before it waits: is there one?
        prompt = json.dumps(body.get("messages", body.get("prompt")))
        async with self._slot(prompt) as slot:
            for attempt in (1, 2):
                if not slot.intact:
                    await self._engine.restore(slot)
                slot.intact = False  # until the answer says so
                given = {**body, "id_slot": slot.number, "cache_prompt": True, "n_cache_reuse": 0}
                if body.get("stream"):
                    given["timings_per_token"] = True
                slot.asked = asyncio.create_task(self._ask(request.path, given, _headers(request.headers)))
                answer, head, cached, chunks = await asyncio.shield(slot.asked)
                try:
                    if cached is None:
                        return web.Response(body=head, status=answer.status, headers=_headers(answer.headers))
                    rows = await self._rows(request.path, body, cached)
                    if rows is None and attempt == 1:
                        continue
                    if rows is None:
                        raise Refusal(502, f"llama-server did not use the intact prefix (cache_n {cached}); not served")
                    response = await self._answer(request, answer, head, chunks, rows)
                    slot.intact, slot.last = cached >= len(self._engine.states.ids), prompt
                    return response
                finally:
                    answer.close()
        raise AssertionError

    async def _ask(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> tuple[Any, bytes, int | None, AsyncIterator[bytes]]:
        """The server's answer, its beginning, and how many tokens came from the cache; None where it is an error."""
        answer = await self._engine.server.request("POST", path, json=body, headers=headers)
        chunks = answer.content.iter_any()
        try:
            if answer.status != 200:
                return answer, await answer.read(), None, chunks
            head, cached = await _until_timed(chunks, stream=bool(body.get("stream")))
        except BaseException:
            answer.close()
            raise
        return answer, head, cached, chunks

    async def _answer(
        self, request: web.Request, answer: Any, head: bytes, chunks: AsyncIterator[bytes], rows: int
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=200, headers={**_headers(answer.headers), "X-IntactKV-Rows": str(rows)})
        await response.prepare(request)
        await response.write(head)
        try:
            async for chunk in chunks:
                await response.write(chunk)
        except ClientError as error:  # the client has a half: a clean end would look like the whole
            told = {"error": {"message": f"llama-server ended: {first_line(error)}", "type": "server_error"}}
            await response.write(f"data: {json.dumps(told)}\n\n".encode())
            if request.transport is not None:
                request.transport.close()
            raise
        await response.write_eof()
        return response

    async def _rows(self, path: str, body: Mapping[str, Any], cached: int) -> int | None:
        """How many intact rows an answer stands on; None where they should be more."""
        ids = self._engine.states.ids
        if cached >= len(ids):
            return len(ids)
        due = rows_due(await self._tokens(path, body), ids)
        return due if cached >= due else None

    async def _tokens(self, path: str, body: Mapping[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if "chat" in path:
            prompt = (await self._engine.server.ask("/apply-template", body))["prompt"]
        if isinstance(prompt, list) and all(isinstance(each, int) for each in prompt):
            return prompt
        if not isinstance(prompt, str):
            raise Refusal(400, "a prompt must be a text or a list of tokens")
        return await self._engine.server.tokens(prompt)

    @asynccontextmanager
    async def _slot(self, prompt: str) -> AsyncIterator[Slot]:
        """A slot of one's own: of the idle ones that whose last prompt is most like this one."""
        if self._slots is not self._engine.slots:  # a server was started, now or again
            self._slots, self._idle = self._engine.slots, list(self._engine.slots)
            self._free = asyncio.Semaphore(len(self._idle))
        if self._waiting >= WAITING:
            raise Refusal(429, f"{WAITING} requests wait for a slot already; try again later")
        free, idle, self._waiting = self._free, self._idle, self._waiting + 1
        try:
            await free.acquire()
        finally:
            self._waiting -= 1
        slot = max(idle, key=lambda each: common_prefix(each.last, prompt))
        idle.remove(slot)

        async def give_back(asked: Any) -> None:
            try:
                if asked is not None:  # its client has left before the server began: a restore could come before it
                    (await asked)[0].close()
            except Exception:  # it was told to the client, if there still is one
                pass
            finally:
                slot.asked = None
                idle.append(slot)
                free.release()

        try:
            yield slot
        finally:
            task = asyncio.create_task(give_back(slot.asked))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)


def check_body(data: bytes) -> dict[str, Any]:
    """A request's JSON. Raises `Refusal` for what cannot be right here."""
    try:
        body = from_json(data)
    except ValueError as error:
        raise Refusal(400, f"the request is no JSON: {first_line(error)}") from error
    if not isinstance(body, dict):
        raise Refusal(400, "the request must be an object")
    if "id_slot" in body:
        raise Refusal(400, "id_slot is what the proxy gives; leave it out")
    if body.get("lora"):
        raise Refusal(400, "an adapter's keys and values are not the intact ones; leave lora out")
    for name in ("n", "n_cmpl", "best_of"):
        if body.get(name) not in (None, 1):
            raise Refusal(400, f"{name}={body[name]} spreads one prompt over slots; send {name}=1 several times")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not all(isinstance(each, int) for each in prompt):
        if len(prompt) > 1:
            raise Refusal(400, f"{len(prompt)} prompts in one request; send one a request, side by side")
        body["prompt"] = prompt[0]
    return body


async def _until_timed(chunks: AsyncIterator[bytes], *, stream: bool) -> tuple[bytes, int | None]:
    """What an answer begins with, until it says how many tokens came from the cache; None where it is an error."""
    head = b""
    async for chunk in chunks:
        head += chunk
        for line in head.split(b"\n")[:-1] if stream else []:  # between them lines that only keep the connection
            if line.startswith((b"error:", b'data: {"error"')):
                return head, None
            if line.startswith(b"data:") and b'"timings"' in line:
                return head, int(from_json(line.partition(b":")[2])["timings"]["cache_n"])
    try:
        return head, int(from_json(head)["timings"]["cache_n"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(502, "llama-server's answer does not say what came from its cache; use a newer build") from error


def _headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOPS}


@web.middleware
async def _told(request: web.Request, handler: Any) -> web.StreamResponse:
    """Errors as OpenAI's clients read them."""
    try:
        return await handler(request)
    except Refusal as error:
        status, sentence = error.status, str(error)
    except ClientError as error:
        status, sentence = 503, f"llama-server ended while it answered ({first_line(error)}); try again"
    told = {"error": {"message": sentence, "type": "invalid_request_error" if status < 500 else "server_error"}}
    return web.json_response(told, status=status, headers={"Retry-After": "1"} if status in (429, 503) else None)


async def serve(engine: Engine, host: str, port: int, said: Callable[[str], None]) -> None:
    """Run the engine and the proxy until SIGINT or SIGTERM; requests under way are answered first.

    Raises `IntactKVError` where the engine does not come up or the port is taken.
    """
    loop, stop, ready = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    came_up, stopped = asyncio.create_task(ready.wait()), asyncio.create_task(stop.wait())
    running = asyncio.create_task(engine.run(ready.set))
    runner = web.AppRunner(Proxy(engine).app(), handler_cancellation=True, shutdown_timeout=60)
    try:
        await asyncio.wait({running, came_up, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done() and not stopped.done():
            await runner.setup()
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise IntactKVError(f"cannot listen on {host}:{port} ({first_line(error)}); choose --port") from error
            said(f"serving {engine.model} with {len(engine.states.ids)} intact tokens on http://{host}:{port}")
            await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        came_up.cancel()
        stopped.cancel()
        await runner.cleanup()
        running.cancel()
        with suppress(asyncio.CancelledError, IntactKVError, ClientError):
            await running
