"""vLLM's OpenAI server as `intactkv serve` starts it: many streams at once, a worker killed, started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import openai
import psutil
import pytest
from engine import Reference, Served, ids, round_

from intactkv import bos, capture, detach
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The embedded model, trained, with its tokenizer, rounded to 3 bits."""
    folder = tmp_path_factory.mktemp("demo")
    full, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)
    prefix = bos(tokenizer)
    kv = capture(full, prefix, logits=False).save(folder / "kv.safetensors")
    round_(full, bits=3)
    full.save_pretrained(folder / "w3")
    tokenizer.save_pretrained(folder / "w3")
    return Served(MODEL, folder / "w3", kv, prefix)


@contextmanager
def server(served: Served, *more: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A running server's port and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("intactkv")), "serve", str(served.model), "--kv", str(served.kv),
        "--unchecked", "--port", str(port), "--host", "127.0.0.1", "--served-model-name", "m", "--dtype", "float32",
        "--max-model-len", "512", "--block-size", "32", "--max-logprobs", "1", *more,
    ]  # fmt: skip
    env = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(process, port)
        yield port, process
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen[str], port: int) -> None:
    """Until the server answers."""
    end = monotonic() + 300
    while monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except OSError:
            assert process.poll() is None, process.stdout.read()[-4000:] if process.stdout else ""
            sleep(1)
        else:
            return
    raise AssertionError("the server did not start")


def stream(port: int, prompt: list[int]) -> list[int]:
    """One streamed completion's token ids."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=120)
    answer = client.completions.create(
        model="m", prompt=prompt, temperature=0, max_tokens=12, stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    return [token for chunk in answer for choice in chunk.choices for token in (choice.token_ids or ())]


@pytest.mark.engine(
    engine="vLLM (CPU)",
    package="vllm",
    architecture="llama",
    cache="float32",
    how="OpenAI server, tensor parallel 2, 64 streams, a killed worker",
)
def test_many_streams_a_killed_worker_and_a_new_server(demo: Served) -> None:
    prompts = [demo.prefix + ids(10 + i, seed=i) for i in range(12)] + [ids(10 + i, seed=50 + i) for i in range(4)]
    intact = Reference(demo.model, demo.kv)
    want = [intact.greedy(prompt, 12) for prompt in prompts]
    plain = Reference(demo.model, None)
    assert sum(plain.greedy(prompt, 12) != tokens for prompt, tokens in zip(prompts[:12], want, strict=False)) >= 6

    def all_streams(port: int) -> list[Any]:
        def one(i: int) -> Any:
            try:
                return stream(port, prompts[i % len(prompts)])
            except openai.APIError as error:
                return error

        with ThreadPoolExecutor(64) as pool:
            return list(pool.map(one, range(64)))

    with server(demo, "--tensor-parallel-size", "2") as (port, process):
        assert all_streams(port) == [want[i % len(want)] for i in range(64)]
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        counted = [line for line in metrics.splitlines() if line.startswith("vllm:intactkv_rows_external_total")]
        assert float(counted[0].split()[-1]) >= 48  # rows of 48 prompts with the prefix, counted by one rank of two
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "Worker" in " ".join(p.cmdline())]
        os.kill((workers or psutil.Process(process.pid).children(recursive=True))[-1].pid, signal.SIGKILL)
        sleep(2)
        assert all(isinstance(answer, openai.APIError) for answer in all_streams(port))  # nothing is served wrong
    with server(demo, "--tensor-parallel-size", "2") as (port, _):
        assert all_streams(port) == [want[i % len(want)] for i in range(64)]


def test_lm_eval_by_vllm_gives_the_intact_models_figures(demo: Served, tmp_path: Path) -> None:
    import json

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from intactkv import IntactKV
    from intactkv.harness.model import IntactLM
    from intactkv.harness.tasks import write_tasks
    from intactkv.serving.launch import vllm_arguments

    (tmp_path / "data").mkdir()
    words = ("red", "sea", "river", "one", "born", "war", "first", "house")
    rows = [{"context": f"The word is {w}, and again {w}, and", "continuation": w} for w in words]
    (tmp_path / "data" / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (name,) = write_tasks(tmp_path / "data", tmp_path / "tasks")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    job: dict[str, Any] = {"tasks": [name], "task_manager": manager, "bootstrap_iters": 0}

    def values(**model: Any) -> list[float]:
        found = simple_evaluate(**model, **job)
        return [sample["filtered_resps"][0][0] for sample in found["samples"][name]]

    model, tokenizer = load_model(demo.model, dtype="float32"), load_tokenizer(demo.model)
    reference = {}
    for attached in (True, False):
        arm = IntactLM(model, tokenizer=tokenizer, kv=IntactKV.load(demo.kv), attached=attached)
        reference[attached] = values(model=arm)
        detach(model)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    job_file = tmp_path / "job.json"
    job_file.write_text(json.dumps({
        "args": {"pretrained": str(demo.model), "dtype": "float32", "add_bos_token": True, "max_model_len": 256,
                 "enforce_eager": True, "block_size": 32, **vllm_arguments(demo.model, demo.kv, check=False)},
        "tasks": str(tmp_path / "tasks"), "name": name, "out": str(tmp_path / "out.json"),
    }))  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), str(job_file)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
             "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )  # fmt: skip
    assert (tmp_path / "out.json").exists(), (done.stdout + done.stderr)[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == pytest.approx(reference[True], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(found, reference[False], strict=True)) > 0.01


SCRIPT = """
import json, sys

def main():
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    job = json.load(open(sys.argv[1]))
    found = simple_evaluate(
        model="vllm", model_args=job["args"], tasks=[job["name"]], bootstrap_iters=0,
        task_manager=TaskManager(include_path=job["tasks"], include_defaults=False),
    )
    told = [sample["filtered_resps"][0][0] for sample in found["samples"][job["name"]]]
    json.dump(told, open(job["out"], "w"))

if __name__ == "__main__":
    main()
"""
