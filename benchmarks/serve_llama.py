"""What the proxy before llama-server costs: the server itself and one behind `intactkv serve` take turns.

    python benchmarks/serve_llama.py --model MODEL.gguf --kv KV --out FILE.json

Time to first token of one streamed chat prompt, request by request, and the time of 8 chats, 4 at once, that all begin
with the prefix; ratios, medians over rounds. The server alone computes its own prefix once and keeps it in its slots.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, sleep
from typing import Any

import openai

from intactkv.serving.llama_server import installed_program, server_command

WORDS = ["the", "model", "reads", "a", "line", "of", "text", "and", "says", "what", "comes", "next", "by", "the", "sea"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait(client: openai.OpenAI) -> None:
    for _ in range(600):
        try:
            client.models.list()
            client.completions.create(model="m", prompt="a", max_tokens=1)
            return
        except openai.APIError:
            sleep(0.2)
    raise SystemExit("the server does not come up")


def first_token(client: openai.OpenAI, messages: Any) -> float:
    began = perf_counter()
    stream = client.chat.completions.create(model="m", messages=messages, max_tokens=2, temperature=0, stream=True)
    next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content)
    took = perf_counter() - began
    stream.close()
    return took


def whole(client: openai.OpenAI, chats: Any) -> float:
    began = perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(
            lambda messages: client.chat.completions.create(model="m", messages=messages, max_tokens=32, temperature=0,
                                                            extra_body={"ignore_eos": True}), chats
        ))  # fmt: skip
    return perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--kv", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--system", default=None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1, help="llama-server's; it spins, the rest needs a core")
    given = parser.parse_args()
    more, ports = ["-c", "4096", "-t", str(given.threads)], {"bare": free_port(), "proxy": free_port()}
    with tempfile.TemporaryDirectory() as folder:
        bare = server_command(installed_program(), given.model, ports["bare"], f"{folder}/", more)
        proxy = [sys.executable, "-m", "intactkv.cli", "serve", given.model, "--kv", given.kv, "--port",
                 str(ports["proxy"]), *more]  # fmt: skip
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes = [subprocess.Popen(command, **quiet) for command in (bare, proxy)]
        try:
            clients = {
                name: openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
                for name, port in ports.items()
            }
            for client in clients.values():
                wait(client)
            rng, found = random.Random(0), {"time to first token": list[float](), "throughput": list[float]()}
            head = [] if given.system is None else [{"role": "system", "content": given.system}]

            def chat() -> Any:
                return [*head, {"role": "user", "content": " ".join(rng.choices(WORDS, k=60))}]

            for turn in range(given.rounds + 1):
                order = list(clients) if turn % 2 == 0 else list(reversed(clients))
                for _ in range(10):
                    one, order = chat(), order[::-1]
                    took = {name: first_token(clients[name], one) for name in order}
                    if turn:
                        found["time to first token"].append(took["proxy"] / took["bare"])
                chats = [chat() for _ in range(8)]
                took = {name: whole(clients[name], chats) for name in order}
                if turn:  # the first round warms up
                    found["throughput"].append(took["bare"] / took["proxy"])
        finally:
            for process in processes:
                process.terminate()
                process.wait(60)
    told = {name: {"median": median(of), "quartiles": quantiles(of)[::2], "of": len(of)} for name, of in found.items()}
    print(json.dumps(told, indent=1))
    if given.out:
        given.out.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
