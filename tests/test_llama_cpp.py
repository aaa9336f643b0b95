"""A sequence state for llama.cpp: its bytes by another reader, its refusals, a real server where one is installed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PREFIX, build, by_name, rounded
from test_cli import intactkv

pytest.importorskip("gguf")

from gguf_model import write_gguf
from transformers import PreTrainedModel

from intactkv import IntactKV, IntactKVError, capture
from intactkv.checkpoint.load import load_model, load_tokenizer
from intactkv.demo import MODEL, TEXT
from intactkv.serving.llama_cpp import CacheKind, advice, in_pairs, state, write_state

IDS = [0, *range(40, 52)]  # of the embedded model, [BOS] first


@dataclass
class Read:
    """What a state file holds: for each cache its streams, and of the filled one (key rows, value rows) by layer."""

    version: int
    ids: list[int]
    caches: list[tuple[int, int, list[tuple[torch.Tensor, torch.Tensor]]]]  # streams, the filled one, layers


def read(data: bytes) -> Read:
    """Written from files that llama.cpp saved, not from our writer."""
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return values if len(values) > 1 else values[0]

    magic, version, count = take("III")
    assert magic.to_bytes(4, "little") == b"qsgg"
    ids = [take("i") for _ in range(count)]
    caches = []
    while at < len(data):
        streams, filled, layers = take("I"), -1, []
        for stream in range(streams):
            cells = take("I")
            if not cells:
                continue
            filled = stream
            assert [take("iIi") for _ in range(cells)] == [(p, 1, 0) for p in range(cells)]
            transposed, number = take("II")
            if version >= 4:
                assert take("II") == (0, 0)

            def rows(width: int, kind: int, shape: tuple[int, int]) -> torch.Tensor:
                nonlocal at
                found = torch.frombuffer(bytearray(data[at : at + width]), dtype=[torch.float32, torch.float16][kind])
                at += width
                return found.reshape(shape).float()

            keys, values = [], []
            for _ in range(number):
                kind, size = take("iQ")
                keys.append(rows(size * cells, kind, (cells, -1)))
            for _ in range(number):
                if transposed:
                    kind, element, width = take("iII")
                    values.append(rows(element * width * cells, kind, (width, cells)).t())
                else:
                    kind, size = take("iQ")
                    values.append(rows(size * cells, kind, (cells, -1)))
            layers = list(zip(keys, values, strict=True))
        caches.append((streams, filled, layers))
    return Read(version, ids, caches)


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("flash_attention", [True, False])
@pytest.mark.parametrize(("streams", "stream"), [(1, 0), (4, 2)])
@pytest.mark.parametrize("cache_type", ["f16", "f32"])
def test_the_bytes(version: int, flash_attention: bool, streams: int, stream: int, cache_type: str) -> None:
    kv = capture(build(by_name("llama-gqa")), PREFIX)
    found = read(state(kv, "llama", CacheKind(version, cache_type, flash_attention, streams, stream)))
    assert (found.version, found.ids) == (version, PREFIX)
    ((count, filled, layers),) = found.caches
    assert (count, filled, len(layers)) == (streams, stream, 3)
    within = 0.0 if cache_type == "f32" else 2e-3
    for i, (key, value) in enumerate(layers):
        own = in_pairs(kv.layers[i][0], kv.layers[i][0].shape[2])
        torch.testing.assert_close(key, own.transpose(0, 1).flatten(1), atol=within, rtol=within)
        torch.testing.assert_close(value, kv.layers[i][1].transpose(0, 1).flatten(1), atol=within, rtol=within)


def test_a_model_with_sliding_layers_has_two_caches_and_keys_as_they_are() -> None:
    kv = capture(build(by_name("gemma3")), PREFIX)
    whole, sliding = read(state(kv, "gemma3", CacheKind(cache_type="f32"))).caches
    types = kv.fingerprint["layer_types"]
    for (_, _, layers), kind in ((whole, "full_attention"), (sliding, "sliding_attention")):
        own = [i for i in range(3) if types[i] == kind]
        assert len(layers) == len(own)
        for i, (key, _) in zip(own, layers, strict=True):
            torch.testing.assert_close(key, kv.layers[i][0].transpose(0, 1).flatten(1), atol=0, rtol=0)


def test_a_server_that_would_not_use_the_state_is_told_of() -> None:
    assert advice(capture(build(by_name("llama-gqa")), PREFIX)) is None
    assert "--swa-full" in str(advice(capture(build(by_name("gemma3")), PREFIX)))


def test_pairs_are_the_rows_order_of_the_converter() -> None:
    key = torch.randn(2, 3, 16)
    turned = in_pairs(key, 16)
    for i in range(8):  # channels i and i + 8 of a half-split head are 2 i and 2 i + 1
        assert torch.equal(turned[..., 2 * i], key[..., i])
        assert torch.equal(turned[..., 2 * i + 1], key[..., i + 8])


@pytest.fixture(scope="module")
def full() -> PreTrainedModel:
    return load_model(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def kv(full: PreTrainedModel) -> IntactKV:
    return capture(full, IDS)


@pytest.fixture(scope="module")
def q4(full: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at 4 bits, as llama.cpp knows them."""
    return write_gguf(full, tmp_path_factory.mktemp("gguf") / "q4.gguf", "Q4_0")


def test_the_command_writes_what_the_function_does(q4: Path, kv: IntactKV, tmp_path: Path) -> None:
    file = kv.save(tmp_path / "kv.intactkv")
    done = intactkv("export", file, "--to", "llama.cpp", "--gguf", q4, "-o", tmp_path / "s.bin", "--state-version", "3")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.bin").read_bytes() == state(kv, "llama", CacheKind(version=3))
    done = intactkv("export", file, "--to", "ollama", "--gguf", q4, "-o", tmp_path / "t.bin")
    assert (done.returncode, "--to ollama is not known" in done.stderr) == (1, True)


def test_another_models_gguf_is_refused(full: PreTrainedModel, kv: IntactKV, q4: Path, tmp_path: Path) -> None:
    def refused(artifact: IntactKV, gguf: Path, sentence: str) -> None:
        with pytest.raises(IntactKVError, match=sentence):
            write_state(artifact, gguf, tmp_path / "s.bin")
        assert not (tmp_path / "s.bin").exists()

    torch.manual_seed(1)
    other = type(full)(full.config).eval()  # the same shapes
    refused(kv, write_gguf(other, tmp_path / "other.gguf"), "makes other values of these tokens")
    wrong = {i: (in_pairs(key, key.shape[2]), value) for i, (key, value) in kv.layers.items()}
    refused(replace(kv, layers=wrong), q4, "makes other keys of these tokens")
    refused(capture(build(by_name("llama-gqa")), PREFIX), q4, r"llama.block_count=12, the intact KV 3")
    refused(kv, tmp_path / "other.gguf.missing", "is no readable GGUF")
    (tmp_path / "noise").write_bytes(b"GGUFxxxx" * 9)
    refused(kv, tmp_path / "noise", "is no readable GGUF")
    write_state(kv, tmp_path / "other.gguf", tmp_path / "s.bin", check=False)
    for kind, sentence in (
        ({"version": 5}, "version 5 of a sequence state is not known"),
        ({"cache_type": "q8_0"}, "a cache of q8_0 holds rows as its build rounds and rotates them"),
        ({"streams": 2, "stream": 2}, "stream 2 of 2 cannot be"),
    ):
        with pytest.raises(IntactKVError, match=sentence):
            CacheKind(**kind)  # type: ignore[arg-type]


SERVER = """
import json, sys, urllib.request
import xllamacpp as x

job = json.load(open(sys.argv[1]))
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.port, p.slot_save_path = job["model"], 1024, job["parallel"], 0, job["folder"]
p.endpoint_slots, p.warmup, p.cache_ram_mib, p.cpuparams.n_threads = True, False, 0, 1
p.kv_unified = job["unified"]
p.flash_attn_type = getattr(x.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_" + job["flash"])
p.cache_type_k = p.cache_type_v = getattr(x.ggml_type, "GGML_TYPE_" + job["cache"].upper())
server = x.Server(p)

def post(path, body):
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), kind)
    return json.loads(urllib.request.urlopen(request).read())

def answer(ids):
    told = post("/completion", {"prompt": ids, "n_predict": 6, "id_slot": job["slot"], "cache_prompt": True,
                                "temperature": 0, "n_probs": 1, "return_tokens": True})
    return {"tokens": told["tokens"], "logprobs": [t["logprob"] for t in told["completion_probabilities"]],
            "cached": told["timings"]["cache_n"]}

found = {}
if "restore" in job:
    found["restored"] = post(f"/slots/{job['slot']}?action=restore", {"filename": job["restore"]})["n_restored"]
found["answers"] = [answer(ids) for ids in job["prompts"]]
if "save" in job:
    post("/completion", {"prompt": job["prefix"], "n_predict": 0, "id_slot": job["slot"], "cache_prompt": False})
    post(f"/slots/{job['slot']}?action=save", {"filename": job["save"]})
json.dump(found, open(job["out"], "w"))
"""


@pytest.mark.engine(
    engine="llama.cpp server",
    package="xllamacpp",
    architecture="llama",
    cache="{cache}",
    how="export; {parallel} slots, unified {unified}, flash attention {flash}",
)
@pytest.mark.parametrize(
    ("flash", "cache", "parallel", "slot", "unified"),
    [("ENABLED", "f16", 1, 0, True), ("DISABLED", "f16", 1, 0, True), ("ENABLED", "f32", 1, 0, True),
     ("ENABLED", "f16", 4, 2, False), ("ENABLED", "f16", 4, 3, True)],
)  # fmt: skip
def test_a_real_server_reads_it(
    full: PreTrainedModel, tmp_path: Path, flash: str, cache: str, parallel: int, slot: int, unified: bool
) -> None:
    """The rows of a 3-bit model under the exact one, where llama.cpp rounds no activations: ours and its own."""
    pytest.importorskip("xllamacpp")
    text = load_tokenizer(MODEL)(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    prompts = [IDS + text[60 * i : 60 * i + 50] for i in range(3)]
    source = rounded(full)
    served, origin = write_gguf(full, tmp_path / "f32.gguf"), write_gguf(source, tmp_path / "w3.gguf")
    kind = CacheKind(4, cache, flash == "ENABLED", 1 if unified else parallel, 0 if unified else slot)
    write_state(capture(source, IDS), served, tmp_path / "ours.bin", kind)

    def run(model: Path, **job: Any) -> Any:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        told = {"model": str(model), "folder": f"{tmp_path}/", "parallel": parallel, "slot": slot, "unified": unified,
                "flash": flash, "cache": cache, "prompts": prompts, "prefix": IDS, "out": str(out), **job}  # fmt: skip
        (tmp_path / "job.json").write_text(json.dumps(told))
        (tmp_path / "server.py").write_text(SERVER)
        done = subprocess.run([sys.executable, str(tmp_path / "server.py"), str(tmp_path / "job.json")],
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert out.exists(), (done.stdout + done.stderr)[-3000:]
        return json.loads(out.read_text())

    run(origin, save="native.bin", prompts=[])
    native, ours, plain = (
        run(served, **({} if name is None else {"restore": name})) for name in ("native.bin", "ours.bin", None)
    )
    assert ours["restored"] == native["restored"] == len(IDS)
    assert all(one["cached"] >= len(IDS) for one in ours["answers"])

    def apart(a: Any, b: Any) -> float:
        return max(abs(x["logprobs"][0] - y["logprobs"][0]) for x, y in zip(a["answers"], b["answers"], strict=True))

    assert apart(ours, native) < 2e-3 < 0.02 < apart(plain, native), (apart(ours, native), apart(plain, native))
    assert [one["tokens"] for one in ours["answers"]] == [one["tokens"] for one in native["answers"]]
