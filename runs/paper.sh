#!/usr/bin/env bash
# The paper from top to bottom on any model: quantize, capture, calibrate, measure, draw. Started again, it goes on.
#   MODEL=/path/or/name DATA=/path/to/data OUT=DIR runs/paper.sh
# MODEL   the full-precision model; by default the one inside the package
# DATA    a folder with eval/ and calib/ (docs/paper.md names the files); what is missing is left out and named
# OUT     everything goes here (paper-run); the tables are gathered in OUT/tables.md
# METHODS rtn gptq awq autoround       BITS 3 4         PREFIXES bos chat
# WINDOW  2048, at most what the model can; WINDOWS the most of a text (all); TOKENS the most tokens of an answer (1024); LIMIT items of a task (all)
# STEPS   of calibration (160); DEVICE cpu or cuda
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
embedded=$(python -c 'from intactkv.demo import MODEL; print(MODEL)')
MODEL=${MODEL:-$embedded} DATA=${DATA:?give DATA, a folder with eval/ and calib/} OUT=${OUT:-paper-run}
METHODS=${METHODS:-rtn gptq awq autoround} BITS=${BITS:-3 4} PREFIXES=${PREFIXES:-bos chat}
WINDOW=${WINDOW:-2048} TOKENS=${TOKENS:-1024} LIMIT=${LIMIT:-} WINDOWS=${WINDOWS:-} STEPS=${STEPS:-160} DEVICE=${DEVICE:-cpu}
export TOKENIZERS_PARALLELISM=false HF_DATASETS_DISABLE_PROGRESS_BARS=1
wiki=$DATA/eval/wikitext2_test_raw.txt c4=$DATA/eval/c4_sample_500.jsonl questions=$DATA/eval/mt_bench_question.jsonl
learn=$DATA/calib/wikitext2_valid_tokenised.txt chats=$DATA/calib/dolly_instructions_1000.jsonl
tables=$OUT/tables logs=$OUT/logs
mkdir -p "$OUT" "$tables" "$logs"

# once NAME COMMAND…: run a step unless it is done; its output goes to a log, and a failure ends the script.
once() {
    local name=$1; shift
    test -e "$logs/$name.done" && return
    echo "$(date +%T) $name"
    if ! "$@" > "$logs/$name.log" 2>&1; then tail -n 20 "$logs/$name.log"; echo "$name failed: see $logs/$name.log"; exit 1; fi
    touch "$logs/$name.done"
}
# has NAME FILE: whether a file is there; what is left out is named in the tables.
has() { test -e "$2" || { echo "$1 left out: no $2" | tee -a "$OUT/left-out.txt"; return 1; }; }
# words JSONL TEXT: the documents of a JSON-lines file, a blank line between them.
words() { python -c '
import json, sys
print("\n\n".join(json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")))' "$1" > "$2"; }
# conversations JSONL OUT: {prompt, response} as messages, without the instruction template around the prompt.
conversations() { python -c '
import json, sys
with open(sys.argv[1], encoding="utf-8") as rows, open(sys.argv[2], "w", encoding="utf-8") as out:
    for row in map(json.loads, rows):
        asked = row["prompt"].split("### Instruction:")[-1].split("### Response:")[0].strip()
        turns = [("user", asked), ("assistant", row["response"].strip())]
        out.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")' "$1" "$2"; }
# harness ARM ARGUMENTS: lm-eval on one arm.
harness() {
    local arm=$1 arguments=$2
    intactkv lm-eval run --model intactkv --model_args "$arguments" --include_path "$OUT/tasks" --tasks "$(cat "$OUT/tasks/names")" \
        --batch_size 8 --device "$DEVICE" --log_samples --output_path "$OUT/harness/$arm" ${LIMIT:+--limit "$LIMIT"}
}
names() { python -c '
import sys; from pathlib import Path; from intactkv.harness.tasks import write_tasks
out = Path(sys.argv[2])
print(",".join(n for n in write_tasks(Path(sys.argv[1]), out) if "loglikelihood_rolling" not in (out / f"{n}.yaml").read_text()))' \
    "$DATA/eval" "$OUT/tasks" > "$OUT/tasks.names" && mv "$OUT/tasks.names" "$OUT/tasks/names"; }

: > "$OUT/left-out.txt"
has "calibration text" "$learn" || exit 1

# 1. Quantize by every method; the artifact beside a checkpoint is [B]'s, in the right basis.
for method in $METHODS; do
    for bits in $BITS; do
        data=(); test "$method" = rtn || data=(--data "$learn")
        once "quantize-$method-$bits" intactkv quantize "$MODEL" -o "$OUT/$method-$bits" --method "$method" --bits "$bits" \
            --asymmetric --prefix bos "${data[@]}"
    done
done
once quantize-rotated-4 intactkv quantize "$MODEL" -o "$OUT/rotated-4" --method rotated --bits 4 --activation-bits 4 \
    --rounding gptq --data "$learn"

# 2. Capture [P], and bring it into each checkpoint's basis.
for prefix in $PREFIXES; do
    once "capture-$prefix" intactkv capture "$MODEL" -o "$OUT/$prefix.safetensors" --prefix "$prefix"
    for method in $METHODS; do
        for bits in $BITS; do
            once "align-$prefix-$method-$bits" intactkv check "$OUT/$method-$bits" --full "$MODEL" \
                --kv "$OUT/$prefix.safetensors" -o "$OUT/$method-$bits.$prefix.safetensors"
        done
    done
done

# 3. Calibrate [P] on conversations with the paper's objective and rate.
if [[ " $PREFIXES " == *" chat "* ]] && has calibration "$chats"; then
    once conversations conversations "$chats" "$OUT/conversations.jsonl"
    for method in $METHODS; do
        for bits in $BITS; do
            once "calibrate-$method-$bits" intactkv calibrate "$OUT/$method-$bits" --full "$MODEL" \
                --kv "$OUT/$method-$bits.chat.safetensors" --data "$OUT/conversations.jsonl" \
                -o "$OUT/$method-$bits.calibrated.safetensors" --steps "$STEPS" --length 512 \
                --checkpoint "$OUT/$method-$bits.calibrating"
        done
    done
fi

# 4. Perplexity and KL: WikiText-2 and C4, the paper's protocol with [B]; then [P] and calibrated [P], windows behind it.
evaluate() {
    local name=$1 text=$2 suffix=$3; shift 3
    local models=() kvs=()
    for method in $METHODS; do
        for bits in $BITS; do
            test -e "$OUT/$method-$bits.$suffix" || continue
            models+=("$OUT/$method-$bits"); kvs+=(--kv "$OUT/$method-$bits.$suffix")
        done
    done
    once "$name" intactkv eval "${models[@]}" --full "$MODEL" "${kvs[@]}" --data "$text" --window "$WINDOW" \
        ${WINDOWS:+--windows "$WINDOWS"} --cache "$OUT/cache" --device "$DEVICE" -o "$OUT/$name.json" --markdown "$tables/$name.md" "$@"
}
texts=()
has WikiText-2 "$wiki" && texts+=("wikitext2:$wiki")
has C4 "$c4" && { words "$c4" "$OUT/c4.txt"; texts+=("c4:$OUT/c4.txt"); }
for text in "${texts[@]}"; do
    evaluate "${text%%:*}-bos" "${text#*:}" bos.safetensors --paper
    for kind in chat calibrated; do
        ls "$OUT"/*."$kind".safetensors > /dev/null 2>&1 && evaluate "${text%%:*}-$kind" "${text#*:}" "$kind.safetensors"
    done
done
if [ ${#texts[@]} -gt 0 ]; then
    once w4a4 intactkv eval "$OUT/rotated-4" --full "$MODEL" --kv "$OUT/rotated-4/prefix.intactkv" --device "$DEVICE" \
        --data "${texts[0]#*:}" --window "$WINDOW" ${WINDOWS:+--windows "$WINDOWS"} --paper --cache "$OUT/cache" -o "$OUT/w4a4.json" --markdown "$tables/w4a4.md"
fi

# 5. LAMBADA, QA and MMLU by lm-eval, three arms, item by item.
kind=bos; [[ " $PREFIXES " == *" chat "* ]] && kind=chat
once tasks names
once harness-full harness full "pretrained=$MODEL,kv=$OUT/$kind.safetensors,attached=False"
for method in $METHODS; do
    for bits in $BITS; do
        name=$method-$bits
        once "harness-$name-own" harness "$name-own" "pretrained=$OUT/$name,kv=$OUT/$name.$kind.safetensors,attached=False"
        once "harness-$name-intact" harness "$name-intact" "pretrained=$OUT/$name,kv=$OUT/$name.$kind.safetensors"
        once "compare-$name" intactkv compare --full "$OUT/harness/full" --own "$OUT/harness/$name-own" \
            --intact "$OUT/harness/$name-intact" -o "$OUT/harness-$name.json" --markdown "$tables/harness-$name.md"
    done
done

# 6. MT-Bench answers, for FastChat's judge or `intactkv mtbench judge`.
first=${METHODS%% *}-${BITS%% *}
if has "MT-Bench" "$questions" && [ "$kind" = chat ]; then
    once mtbench intactkv mtbench answer "$OUT/$first" --full "$MODEL" --kv "$OUT/$first.chat.safetensors" \
        --questions "$questions" -o "$OUT/mtbench" --max-new-tokens "$TOKENS" --device "$DEVICE"
fi

# 7. The cache's bits.
if [ ${#texts[@]} -gt 0 ]; then
    bits_sweep() { python "$here/kv_bits.py" "$OUT/$first" --full "$MODEL" --kv "$OUT/$first.bos.safetensors" \
        --data "${texts[0]#*:}" --device "$DEVICE" > "$tables/kv-bits.md"; }
    once kv-bits bits_sweep
fi

# 8. The figures: activations, attention, error against the prefix's size, on one page.
once doctor intactkv doctor "$MODEL" --quantized "$OUT/$first" --data "${texts[0]#*:}" -o "$OUT/doctor.html"

{
    echo "# $MODEL: $METHODS at $BITS bits"
    for table in "$tables"/*.md; do printf '\n## %s\n\n' "$(basename "$table" .md)"; cat "$table"; done
    test -s "$OUT/left-out.txt" && { printf '\n## Left out\n\n'; sed 's/^/- /' "$OUT/left-out.txt"; }
} > "$OUT/tables.md"
echo "$(date +%T) tables: $OUT/tables.md, figures: $OUT/doctor.html"
