"""A real vLLM with the connector against transformers with `attach`: tokens equal, log-probabilities to float noise."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import Reference, Served, ids, process, serve, with_kv
from transformers import AutoModelForCausalLM

from intactkv import IntactKV, IntactKVError, capture

WITHIN = 1e-5  # of a log-probability, in float32
PLAIN = 1e-2  # what plain and intact differ by at least, or a row tests nothing


def requests(prefix: list[int]) -> list[list[dict[str, Any]]]:
    """Short, long, repeated, shared, mixed with others, scored, and scored then served: round by round."""
    long, short = prefix + ids(60, seed=1), prefix + ids(3, seed=2)
    return [
        [{"ids": short}, {"ids": long}],
        [{"ids": long}, {"ids": long + ids(9, seed=3)}],  # the engine has blocks of these
        [{"ids": prefix[: max(1, len(prefix) - 1)] + ids(40, seed=4)}, {"ids": ids(40, seed=5)}, {"ids": short}],
        [{"ids": prefix[:20] + ids(20, seed=6)}, {"ids": prefix + ids(1, seed=7)}, {"ids": ids(1, seed=8)}],
        [{"ids": prefix + ids(50, seed=9), "prompt": True}, {"ids": ids(50, seed=10), "prompt": True}],
        [{"ids": prefix + ids(50, seed=9)}, {"ids": prefix + ids(50, seed=9) + ids(5, seed=11)}],
    ]


def check(served: Served, found: Any, rounds: list[list[dict[str, Any]]], *, within: float = WITHIN) -> None:
    """Every answer is the intact model's; those of prompts with the prefix are not the plain one's."""
    intact, plain = Reference(served.model, served.kv), Reference(served.model, None)
    for asked, told in zip(rounds, found.rounds, strict=True):
        for request, answer in zip(asked, told, strict=True):
            intact.check(request, answer, within=within)
            if request["ids"][: len(served.prefix)] == served.prefix:
                with pytest.raises(AssertionError):
                    plain.check(request, answer, within=PLAIN, same=False)


@pytest.mark.engine(
    engine="vLLM (CPU)", package="vllm", architecture="llama", cache="float32", how="eager; {mode}, prefix {prefix}"
)
@pytest.mark.parametrize("mode", ["auto", "overwrite"])
@pytest.mark.parametrize("prefix", ["bos", "chat"])
def test_eager(request: Any, prefix: str, mode: str, tmp_path: Path) -> None:
    served = request.getfixturevalue(prefix)
    rounds = requests(served.prefix)
    found = serve(served.engine(mode=mode), rounds, tmp_path)
    check(served, found, rounds)
    assert found.rows["overwritten"] > 0
    assert (found.rows["external"] > 0) == (mode == "auto")


@pytest.mark.engine(engine="vLLM (CPU)", package="vllm", architecture="llama", cache="float32", how="chunks; {mode}")
@pytest.mark.parametrize("mode", ["auto", "external", "overwrite"])
def test_a_chunk_ends_inside_the_prefix(chat: Served, mode: str, tmp_path: Path) -> None:
    rounds = [[r for r in each if not (r.get("prompt") and mode == "external")] for each in requests(chat.prefix)]
    found = serve(chat.engine(mode=mode, max_num_batched_tokens=16, max_num_seqs=8), rounds, tmp_path)
    check(chat, found, rounds)


@pytest.mark.engine(engine="vLLM (CPU)", package="vllm", architecture="llama", cache="float32", how="compiled")
def test_compiled(chat: Served, tmp_path: Path) -> None:
    rounds = requests(chat.prefix)
    check(chat, serve(chat.engine(enforce_eager=False), rounds, tmp_path), rounds)


@pytest.mark.engine(
    engine="vLLM (CPU)", package="vllm", architecture="llama", cache="float32", how="tensor parallel {ranks}"
)
@pytest.mark.parametrize("ranks", [2, 4])  # of two key heads: split, and replicated
def test_tensor_parallel(chat: Served, ranks: int, tmp_path: Path) -> None:
    rounds = requests(chat.prefix)
    found = serve(chat.engine(tensor_parallel_size=ranks), rounds, tmp_path)
    check(chat, found, rounds)
    one = serve(chat.engine(), rounds, tmp_path)
    assert found.rows == one.rows  # counted once, not by every rank


@pytest.mark.engine(
    engine="vLLM (CPU)", package="vllm", architecture="llama", cache="float32", how="pipeline parallel 2"
)
def test_pipeline_parallel(chat: Served, tmp_path: Path) -> None:
    rounds = requests(chat.prefix)
    check(chat, serve(chat.engine(pipeline_parallel_size=2, enforce_eager=False), rounds, tmp_path), rounds)


@pytest.mark.engine(engine="vLLM (CPU)", package="vllm", architecture="llama", cache="float32", how="preempted; {mode}")
@pytest.mark.parametrize("mode", ["auto", "overwrite"])
def test_preempted_requests_get_their_rows_again(chat: Served, mode: str, tmp_path: Path) -> None:
    rounds = [[{"ids": chat.prefix + ids(5, seed=i), "max_tokens": 90} for i in range(6)]]
    found = serve(chat.engine(mode=mode, num_gpu_blocks_override=14, max_model_len=160), rounds, tmp_path)
    assert found.metrics["vllm:num_preemptions"] > 0
    check(chat, found, rounds)


@pytest.mark.engine(
    engine="vLLM (CPU)", package="vllm", architecture="llama", cache="float32", how="scored, then served"
)
def test_a_scored_prompt_does_not_spoil_the_cache(chat: Served, tmp_path: Path) -> None:
    prompt = chat.prefix + ids(70, seed=1)
    rounds = [[{"ids": prompt, "prompt": True}], [{"ids": prompt}], [{"ids": prompt + ids(3, seed=2)}]]
    found = serve(chat.engine(), rounds, tmp_path)
    assert found.rounds[1][0]["cached"] > len(chat.prefix)  # it did read the blocks of the scored one
    check(chat, found, rounds)


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}])
def test_a_models_own_kv_changes_nothing(chat: Served, settings: dict[str, Any], tmp_path: Path) -> None:
    dtype = torch.bfloat16 if settings.get("dtype") == "bfloat16" else torch.float32
    full = AutoModelForCausalLM.from_pretrained(chat.full, dtype=dtype)
    capture(full, chat.prefix, logits=False).save(tmp_path / "own")
    rounds = [[{"ids": chat.prefix + ids(n, seed=n)} for n in (3, 40)], [{"ids": chat.prefix + ids(3, seed=3)}]]
    with_own = serve(with_kv(chat.full, tmp_path / "own", **settings), rounds, tmp_path)
    without = serve({"model": chat.full, **settings}, rounds, tmp_path)
    # vLLM's and transformers' bfloat16 round differently, so that a row may be off by its last bit
    within = {"bfloat16": 0.1}.get(settings.get("dtype", ""), 2e-6)
    for a, b in zip(chain(*with_own.rounds), chain(*without.rounds), strict=True):
        same = [x == y for x, y in zip(a["tokens"], b["tokens"], strict=True)]
        upto = same.index(False) if False in same else len(same)
        assert upto >= (len(same) if not settings else 2)
        worst = max(abs(x - y) for x, y in zip(a["logprobs"][:upto], b["logprobs"][:upto], strict=True))
        assert worst <= within
    assert sum(with_own.rows.values()) > 0


@pytest.mark.engine(engine="vLLM (CPU)", package="vllm", architecture="llama", cache="fp8", how="bfloat16")
def test_fp8_rows_are_written_as_the_engine_writes_its_own(chat: Served, tmp_path: Path) -> None:
    rounds = [[{"ids": chat.prefix + ids(n, seed=n), "max_tokens": 1} for n in (3, 40, 80)]]
    settings = {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}
    found = {
        name: serve(engine, rounds, tmp_path).rounds[0]
        for name, engine in {
            "intact": chat.engine(**settings), "overwrite": chat.engine(mode="overwrite", **settings),
            "plain": {"model": chat.model, **settings}, "bf16": chat.engine(dtype="bfloat16"),
        }.items()
    }  # fmt: skip

    def apart(a: str, b: str) -> float:
        return max(abs(x["logprobs"][0] - y["logprobs"][0]) for x, y in zip(found[a], found[b], strict=True)
                   if x["tokens"] == y["tokens"])  # fmt: skip

    assert apart("intact", "overwrite") < 0.1
    assert any(x["tokens"] != y["tokens"] for x, y in zip(found["intact"], found["plain"], strict=True)) or (
        apart("intact", "plain") > 3 * apart("intact", "overwrite")
    )


@pytest.mark.engine(
    engine="vLLM (CPU)", package="vllm", architecture="llama", cache="float32", how="speculation: n-grams, draft"
)
def test_speculation_by_n_grams_and_by_a_draft_model(chat: Served, tmp_path: Path) -> None:
    repeated = ids(6, seed=1) * 6
    rounds = [[{"ids": chat.prefix + repeated, "max_tokens": 24}, {"ids": chat.prefix + ids(9, seed=2)}]]
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    found = serve(chat.engine(speculative_config=ngram), rounds, tmp_path)
    check(chat, found, rounds)
    assert found.rows["external"] > 0
    draft = {"method": "draft_model", "model": str(chat.model), "num_speculative_tokens": 2}
    found = serve(chat.engine(speculative_config=draft), rounds, tmp_path)
    check(chat, found, rounds)
    assert (found.rows["external"], found.rows["overwritten"] > 0) == (0, True)  # the draft computes its own rows


@pytest.mark.engine(engine="vLLM (CPU)", package="vllm", architecture="llama", cache="float32", how="LoRA")
def test_an_adapters_requests_get_no_rows(chat: Served, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(chat.model)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(base, config)
    tuned.save_pretrained(tmp_path / "adapter")
    prompt = chat.prefix + ids(9, seed=1)
    # one after the other: in one batch, vLLM's CPU build up to 0.32 gives the adapter to both (findings/)
    rounds = [[{"ids": prompt}], [{"ids": prompt, "lora": str(tmp_path / "adapter")}], [{"ids": prompt}]]
    found = serve(chat.engine(enable_lora=True, max_lora_rank=8), rounds, tmp_path)
    intact = Reference(chat.model, chat.kv)
    for answer in (found.rounds[0][0], found.rounds[2][0]):
        intact.check({"ids": prompt}, answer, within=WITHIN)
    plain = Reference(chat.model, None)
    plain.model = tuned.merge_and_unload()
    plain.check({"ids": prompt}, found.rounds[1][0], within=WITHIN)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mode": "other"}, "mode='other' is none of auto, external, overwrite"),
        ({"prefix": 3}, "kv_connector_extra_config has ['prefix']"),
        ({"check": True}, "nothing says that this intact KV is in the basis of"),
        ({"artifact": "foreign"}, "was captured from a model with hidden_size=64"),
        ({"artifact": "nowhere.safetensors"}, "is not a file or folder"),
    ],
)
def test_what_cannot_be_right_is_refused_at_the_start(
    chat: Served, change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    if change.get("artifact") == "foreign":
        small = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=32)  # fmt: skip
        change = {"artifact": str(capture(LlamaForCausalLM(small).eval(), chat.prefix).save(tmp_path / "foreign"))}
    engine = chat.engine()
    engine["kv_transfer_config"]["kv_connector_extra_config"].update(change)
    done = process(engine, [[{"ids": [1]}]], tmp_path / "out.json")
    assert done.returncode != 0
    assert sentence in done.stdout + done.stderr


def test_a_checkpoint_made_for_its_prefix_is_not_served_without_it(chat: Served, tmp_path: Path) -> None:
    from shutil import copytree

    from intactkv.artifact.served import mark_needing

    marked = copytree(chat.model, tmp_path / "marked")
    mark_needing(marked)
    done = process({"model": marked}, [[{"ids": [1]}]], tmp_path / "out.json")
    assert done.returncode != 0
    assert "LlamaForCausalLMNeedsIntactKV" in done.stdout + done.stderr
    rounds = [[{"ids": chat.prefix + ids(9, seed=1)}]]
    check(chat, serve(with_kv(marked, chat.kv), rounds, tmp_path), rounds)


def test_another_artifact_on_a_worker_or_a_layer_without_one_ends_the_start(chat: Served) -> None:
    from intactkv.serving.vllm import IntactKVConnector, IntactKVHandshake

    connector = object.__new__(IntactKVConnector)
    connector.kv = IntactKV.load(chat.kv)
    own = connector.kv.digest
    connector.set_xfer_handshake_metadata_pp_aware(
        {(0, 0): IntactKVHandshake(own, (0, 1)), (1, 0): IntactKVHandshake(own, (2,))}
    )
    with pytest.raises(IntactKVError, match=r"the worker of rank \(0, 1\) has an intact KV of digest 00"):
        connector.set_xfer_handshake_metadata_pp_aware({(0, 1): IntactKVHandshake("0" * 64, (0, 1, 2))})
    with pytest.raises(IntactKVError, match=r"no worker has the layers \[2\]"):
        connector.set_xfer_handshake_metadata_pp_aware({(0, 0): IntactKVHandshake(own, (0, 1))})


@pytest.mark.parametrize(
    ("model", "parallel", "sentence"),
    [
        ({"use_mla": True}, {}, "keeps a latent"),
        ({"is_encoder_decoder": True}, {}, "has an encoder"),
        ({}, {"decode_context_parallel_size": 2}, "decode_context_parallel_size=2 spreads one prefix over ranks"),
        ({}, {"prefill_context_parallel_size": 4}, "prefill_context_parallel_size=4"),
    ],
)
def test_engines_that_keep_other_things_are_refused(
    chat: Served, model: dict[str, Any], parallel: dict[str, Any], sentence: str
) -> None:
    from intactkv.serving.vllm import check_engine

    config = SimpleNamespace(
        model_config=SimpleNamespace(**{"use_mla": False, "is_encoder_decoder": False, **model}),
        parallel_config=SimpleNamespace(**parallel),
    )
    with pytest.raises(IntactKVError, match=sentence):
        check_engine(config, IntactKV.load(chat.kv), check=False)  # type: ignore[arg-type]
