"""A llama-server of one's own, kept up, with an intact prefix restored into every slot."""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector
except ImportError as error:
    raise ImportError("serving a GGUF needs aiohttp: pip install 'intactkv[llama.cpp]'") from error

from intactkv.error import IntactKVError, first_line
from intactkv.serving.llama_cpp import States

_OURS = {
    "-m": "the model", "--model": "the model", "--host": "intactkv's own --host", "--port": "intactkv's own --port",
    "--slot-save-path": "the states' folder", "--cache-ram": "0, or the server swaps slots behind our back",
    "-cram": "0, or the server swaps slots behind our back", "--cache-reuse": "0, or chunks move in the cache",
    "--no-slots": "its opposite", "--no-cache-prompt": "its opposite",
    "--context-shift": "its opposite, or a shift drops rows in the middle of an answer",
    "--lora": "no adapter has the intact rows", "--lora-scaled": "no adapter has the intact rows",
    "--control-vector": "it changes keys and values", "--control-vector-scaled": "it changes keys and values",
    "-hf": "the model", "-hfr": "the model", "--hf-repo": "the model", "-mu": "the model", "--model-url": "the model",
    "-dr": "the model", "--docker-repo": "the model",
}  # fmt: skip


class Refusal(IntactKVError):
    """What a client is told, with its HTTP status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def installed_program() -> list[str]:
    """The llama-server on PATH, else xllamacpp's. Raises `IntactKVError` where there is neither."""
    if (found := shutil.which("llama-server")) is not None:
        return [found]
    if importlib.util.find_spec("xllamacpp") is not None:
        return [sys.executable, "-m", "intactkv.serving.xllamacpp_server"]
    raise IntactKVError("there is no llama-server on PATH; install llama.cpp, or pip install xllamacpp")


def named(argument: str) -> str:
    """The option that an argument names; llama-server reads _ in a long one as -."""
    name = argument.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def option(arguments: Sequence[str], *names: str) -> str | None:
    """The value of an option of a command line, None where it is not given."""
    found = None
    for i, argument in enumerate(arguments):
        _, sign, value = argument.partition("=")
        if named(argument) in names:
            found = value if sign else (arguments[i + 1] if i + 1 < len(arguments) else None)
    return found


def without(arguments: Sequence[str], *names: str) -> list[str]:
    """The command line without these options and their values."""
    found, skip = [], False
    for argument in arguments:
        if skip or named(argument) in names:
            skip = not skip and "=" not in argument
        else:
            found.append(argument)
    return found


def server_command(program: Sequence[str], model: str, port: int, folder: str, more: Sequence[str]) -> list[str]:
    """The command line of llama-server, on loopback. Raises `IntactKVError` for an option that is ours to give."""
    for each in more:
        if (why := _OURS.get(named(each))) is not None:
            raise IntactKVError(f"{each} is given to llama-server here ({why}); leave it out")
    ours = ["-m", model, "--host", "127.0.0.1", "--port", str(port), "--slot-save-path", folder, "--cache-ram", "0"]
    return [*program, *ours, *more]


class Server:
    """One llama-server on a port of its own on loopback; it ends with this."""

    def __init__(self, program: Sequence[str], model: str, folder: Path, more: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._command = server_command(program, model, port, f"{folder}{os.sep}", more)
        self._url = f"http://127.0.0.1:{port}"
        key = option(more, "--api-key")
        self._key = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._session = ClientSession(
            connector=TCPConnector(limit=0, force_close=True),  # it closes kept connections under a request's feet
            timeout=ClientTimeout(total=None),
        )
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Server:
        """Start it, and wait until it serves. Raises `IntactKVError` where it ends instead."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours
            preexec_fn=_end_with_parent,
        )
        try:
            while True:
                if self._process.returncode is not None:
                    raise IntactKVError(
                        f"llama-server ended with code {self._process.returncode} before it served; it says above why"
                    )
                with suppress(ClientError):
                    async with self._session.get(f"{self._url}/health") as answer:
                        if answer.status == 200:
                            return self
                await asyncio.sleep(0.05)
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        """End it."""
        await self._session.close()
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), 10)
        except asyncio.TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def tokens(self, text: str) -> list[int]:
        """The ids of a prompt, special tokens as the server adds and reads them."""
        told = await self.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return [int(token) for token in told["tokens"]]

    async def ended(self) -> int:
        """Its exit code, once there is one."""
        assert self._process is not None
        return await self._process.wait()

    def request(self, method: str, path: str, **given: Any) -> Any:
        """A request to it, to be read by the caller."""
        return self._session.request(method, self._url + path, **given)

    async def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What it answers to a POST, or without `body` to a GET. Raises `Refusal` for an error."""
        async with self.request("GET" if body is None else "POST", path, json=body, headers=self._key) as answer:
            told = await answer.json(content_type=None)
            if answer.status != 200:
                said = told.get("error", {}) if isinstance(told, dict) else {}
                raise Refusal(answer.status, f"llama-server says: {said.get('message', told)}")
            return told


def _end_with_parent() -> None:
    """In the child: on Linux it is told to end when we are gone, however we went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@dataclass(eq=False)
class Slot:
    """One of the server's slots: whether the prefix is in it, and what its last prompt was."""

    number: int
    intact: bool = False
    last: str = ""
    asked: asyncio.Task[Any] | None = None


class Engine:
    """A llama-server that is kept up, and the intact prefix in its slots."""

    def __init__(self, program: Sequence[str], model: str, states: States, more: Sequence[str] = ()) -> None:
        self.model, self.states, self.slots = model, states, list[Slot]()
        self._program, self._more = program, more
        self._folder = Path()
        self._file: Callable[[int], bytes] | None = None  # the state of a slot, in the form that the server takes
        self._server: Server | None = None
        self._down = "it has not been started"

    @property
    def server(self) -> Server:
        """The one that serves. Raises `Refusal` where none does."""
        if self._server is None:
            raise Refusal(503, f"llama-server does not serve: {self._down}; try again")
        return self._server

    async def run(self, started: Callable[[], None]) -> None:
        """Keep a server up until this is cancelled; `started` is called when it serves for the first time.

        Raises `IntactKVError` where it does not come up at first, or takes no state.
        """
        pause, first = 1.0, True
        with tempfile.TemporaryDirectory(prefix="intactkv-") as folder:
            self._folder = Path(folder)
            while True:
                try:
                    async with Server(self._program, self.model, self._folder, self._more) as server:
                        await self._fill(server)
                        self._server = server
                        if first:
                            started()
                        pause, first = 1.0, False
                        try:
                            self._down = f"it ended with code {await server.ended()}"
                        finally:
                            self._server = None  # before its session closes: nobody may ask by a closed one
                except (IntactKVError, ClientError) as error:
                    if first:
                        raise
                    self._down = first_line(error)
                print(f"llama-server: {self._down}; it is started again", file=sys.stderr, flush=True)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 30)

    async def restore(self, slot: Slot, server: Server | None = None) -> None:
        """Put the intact prefix into a slot that nobody uses."""
        assert self._file is not None
        file = self._folder / f"{slot.number}.bin"
        if not file.exists():
            file.write_bytes(self._file(slot.number))
        told = await (server or self.server).ask(f"/slots/{slot.number}?action=restore", {"filename": file.name})
        if told.get("n_restored") != len(self.states.ids):
            raise Refusal(502, f"llama-server restored {told.get('n_restored')} tokens of {len(self.states.ids)}")
        slot.intact = True

    async def _fill(self, server: Server) -> None:
        """Restore the prefix into every slot, and see that it is used. Raises `IntactKVError` where it is not."""
        slots = [Slot(i) for i in range(int((await server.ask("/props"))["total_slots"]))]
        await self._choose(server, slots)
        ids = self.states.ids
        for slot in slots:
            body = {"prompt": [*ids, ids[-1]], "n_predict": 1, "id_slot": slot.number, "cache_prompt": True}
            cached = (await server.ask("/completion", body))["timings"]["cache_n"]
            if cached < len(ids):
                raise IntactKVError(
                    f"llama-server restored {len(ids)} tokens and used {cached}: the answers would be the plain "
                    "model's; a model with sliding windows needs --swa-full, one with states (Mamba) cannot be served"
                )
        self.slots = slots

    async def _choose(self, server: Server, slots: Sequence[Slot]) -> None:
        """Find the form of the state that this server takes: each build and kind of cache refuses the others'."""
        said = ""
        known = self._file
        for each in self.states.candidates(len(slots)) if known is None else [known]:
            self._file = each
            for old in self._folder.glob("*.bin"):
                old.unlink()
            try:
                for slot in slots:
                    await self.restore(slot, server)
                return
            except Refusal as error:
                said = str(error)
        self._file = None
        raise IntactKVError(
            f"llama-server takes none of the states that are written for it ({said}); let it compute one itself: "
            "intactkv capture FULL.gguf --engine llama.cpp, with the same options"
        )
