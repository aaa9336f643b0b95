#!/usr/bin/env bash
# The paper from top to bottom on any model: quantize, capture, calibrate, measure, draw. Started again, it goes on.
#   MODEL=/path/or/name DATA=/path/to/data OUT=DIR runs/paper.sh
# MODEL    the full-precision model; by default the one inside the package
# DATA     a folder with eval/ and calib/ (docs/paper.md names the files); what is missing is left out and named
# OUT      everything goes here (paper-run); the tables are gathered in OUT/tables.md
# STAGES   quantize capture calibrate evaluate effect tasks mtbench cache doctor: all, in this order
# METHODS  rtn gptq awq autoround      BITS 3 4      AWARE gptq autoround: those that also make a checkpoint for the prefix
# GROUP    weights that share a scale (128; auto: the largest up to that which fits)
# PREFIX   what stays intact beside [B]: chat (what the chat template begins with), a text, or nothing
# WINDOW   2048, at most what the model can; WINDOWS the most of a text (all); TOKENS the most tokens of an answer (1024); LIMIT items of a task (all)
# STEPS    of calibration (160), LENGTH of its samples (512); CACHE the folder for the full model's distributions (OUT/cache; nothing: none is kept)
# DEVICE   cpu or cuda                 BATCH lm-eval's (8)             JOBS commands at once (1)    GPUS 0 1: they take turns on these
# A command that fails is named in the tables, and what hangs on it is left out; the others go on, and the script ends with 1.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
embedded=$(python -c 'from intactkv.demo import MODEL; print(MODEL)')
MODEL=${MODEL:-$embedded} DATA=${DATA:?give DATA, a folder with eval/ and calib/} OUT=${OUT:-paper-run}
STAGES=${STAGES:-quantize capture calibrate evaluate effect tasks mtbench cache doctor}
METHODS=${METHODS:-rtn gptq awq autoround} BITS=${BITS:-3 4} AWARE=${AWARE-gptq autoround} GROUP=${GROUP:-128} PREFIX=${PREFIX-chat}
WINDOW=${WINDOW:-2048} TOKENS=${TOKENS:-1024} LIMIT=${LIMIT:-} WINDOWS=${WINDOWS:-} STEPS=${STEPS:-160} LENGTH=${LENGTH:-512}
DEVICE=${DEVICE:-cpu} BATCH=${BATCH:-8} JOBS=${JOBS:-1} GPUS=${GPUS:-} turn=0 CACHE=${CACHE-$OUT/cache}
export TOKENIZERS_PARALLELISM=false HF_DATASETS_DISABLE_PROGRESS_BARS=1
wiki=$DATA/eval/wikitext2_test_raw.txt c4=$DATA/eval/c4_sample_500.jsonl questions=$DATA/eval/mt_bench_question.jsonl
learn=$DATA/calib/wikitext2_valid_tokenised.txt chats=$DATA/calib/dolly_instructions_1000.jsonl
tables=$OUT/tables logs=$OUT/logs
mkdir -p "$OUT" "$tables" "$logs"
rm -f "$logs"/*.failed

# once NAME COMMAND…: run a step unless it is done, beside at most JOBS - 1 others; its output goes to a log. `all` waits for them.
once() {
    test -e "$logs/$1.done" && return
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
    local gpus=($GPUS)
    if [ ${#gpus[@]} -eq 0 ]; then
        step "$@" &
    else
        CUDA_VISIBLE_DEVICES=${gpus[turn % ${#gpus[@]}]} step "$@" &
        turn=$((turn + 1))
    fi
}
step() {
    local name=$1 began=$SECONDS; shift
    if "$@" > "$logs/$name.log" 2>&1; then
        touch "$logs/$name.done"
        echo "$(date +%T) $name: $((SECONDS - began)) s"
    else
        touch "$logs/$name.failed"
        echo "$(date +%T) $name failed, see $logs/$name.log: $(tail -n 1 "$logs/$name.log")"
    fi
}
all() { wait; }
# has NAME FILE: whether a file is there; what is left out is named in the tables.
has() { test -e "$2" || { echo "$1 left out: no $2" | tee -a "$OUT/left-out.txt"; return 1; }; }
made() { test -e "$logs/quantize-$1.done"; }
# conversations JSONL OUT: {prompt, response} as messages, without the instruction template around the prompt.
conversations() { python -c '
import json, sys
with open(sys.argv[1], encoding="utf-8") as rows, open(sys.argv[2], "w", encoding="utf-8") as out:
    for row in map(json.loads, rows):
        asked = row["prompt"].split("### Instruction:")[-1].split("### Response:")[0].strip()
        turns = [("user", asked), ("assistant", row["response"].strip())]
        out.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")' "$1" "$2"; }
cells() { for method in $METHODS; do for bits in $BITS; do echo "$method-$bits"; done; done; }
aware() { for method in $METHODS; do for bits in $BITS; do [[ " $AWARE " != *" $method "* ]] || echo "$method-$bits-aware"; done; done; }
kv_of() {  # CELL KIND: the artifact of a checkpoint for [B], for [P], or calibrated
    if [ "$2" = B ]; then echo "$OUT/$1/prefix.intactkv"; else echo "$OUT/$1.$2.intactkv"; fi; }

# 1. Quantize by every method; [B]'s artifact lies in each folder, in the right basis. W4A4 over rotations, and with a cache of 4 bits.
quantize() {
    has "calibration text" "$learn"
    local options=(--group-size "$GROUP" --device "$DEVICE" --data "$learn")
    for method in $METHODS; do
        for bits in $BITS; do
            local grid=--asymmetric; [ "$method" != autoround ] || grid=--symmetric
            local cell=(intactkv quantize "$MODEL" --method "$method" --bits "$bits" $grid "${options[@]}")
            once "quantize-$method-$bits" "${cell[@]}" -o "$OUT/$method-$bits" --plain-prefix
            [[ " $AWARE " != *" $method "* ]] || once "quantize-$method-$bits-aware" "${cell[@]}" -o "$OUT/$method-$bits-aware"
        done
    done
    local rotated=(intactkv quantize "$MODEL" --method rotated --bits 4 --activation-bits 4 --rounding gptq --plain-prefix "${options[@]}")
    once quantize-rotated-w4a4 "${rotated[@]}" -o "$OUT/rotated-w4a4"
    once quantize-rotated-w4a4kv4 "${rotated[@]}" -o "$OUT/rotated-w4a4kv4" --kv-bits 4
    all
}

# 2. Capture [P], and bring it into each checkpoint's basis.
capture() {
    test -n "$PREFIX" || return 0
    once capture-P intactkv capture "$MODEL" -o "$OUT/P.intactkv" --prefix "$PREFIX" --device "$DEVICE"; all
    for cell in $(cells); do
        made "$cell" && once "align-$cell" intactkv check "$OUT/$cell" --full "$MODEL" --kv "$OUT/P.intactkv" -o "$(kv_of "$cell" P)" --device "$DEVICE"
    done
    all
}

# 3. Calibrate [B] and [P] with the paper's objective and with KL: [P] of a chat template on conversations, others on the text.
calibrate() {
    local data
    for kind in B P; do
        data=$learn
        if [ "$kind" = P ] && [ "$PREFIX" = chat ] && has conversations "$chats"; then
            once conversations conversations "$chats" "$OUT/conversations.jsonl"; all
            data=$OUT/conversations.jsonl
        fi
        for cell in $(cells); do
            test -e "$(kv_of "$cell" $kind)" || continue
            for goal in blocks kl; do
                once "calibrate-$cell-$kind-$goal" intactkv calibrate "$OUT/$cell" --full "$MODEL" --kv "$(kv_of "$cell" $kind)" --data "$data" \
                    -o "$(kv_of "$cell" "$kind-$goal")" --objective $goal --steps "$STEPS" --length "$LENGTH" --device "$DEVICE" --dtype float32 \
                    --checkpoint "$OUT/$cell.$kind-$goal.calibrating"
            done
        done
    done
    all
}

# 4. Perplexity and KL on WikiText-2 and C4: the paper's protocol with [B]; windows behind [P]; each calibrated too.
evaluate() {
    has WikiText-2 "$wiki" && measure wikitext2 "$wiki"
    has C4 "$c4" && measure c4 "$c4"
    all
}
measure() {
    for kind in B B-blocks B-kl P P-blocks P-kl; do
        local protocol=() models=() kvs=() more=
        case $kind in B*) protocol=(--paper);; esac
        test "$kind" = B && more="$(aware) rotated-w4a4 rotated-w4a4kv4"
        for cell in $(cells) $more; do
            test -e "$(kv_of "$cell" $kind)" && models+=("$OUT/$cell") && kvs+=(--kv "$(kv_of "$cell" $kind)")
        done
        [ ${#models[@]} -eq 0 ] || once "$1-$kind" intactkv eval "${models[@]}" --full "$MODEL" "${kvs[@]}" --data "$2" --window "$WINDOW" \
            ${WINDOWS:+--windows "$WINDOWS"} ${CACHE:+--cache "$CACHE"} --no-bare --device "$DEVICE" --dtype float32 \
            -o "$OUT/$1-$kind.json" --markdown "$tables/$1-$kind.md" "${protocol[@]}"
    done
}

# 5. What decides the size of the effect: the pivot's strength and its share of the error, beside what was closed.
effect() {
    has C4 "$c4" || return 0
    local found=()
    for cell in $(cells); do made "$cell" && found+=("$cell"); done
    once effect python "$here/effect.py" measure "$MODEL" "$DATA" "$OUT" "${found[@]}" --device "$DEVICE"; all
    once effect-table python "$here/effect.py" table "model=$OUT/effect.json"; all
    cp "$logs/effect-table.log" "$tables/effect.md"
}

# 6. LAMBADA, QA and MMLU by lm-eval with [B]: three arms, and the checkpoint made for [B], item by item.
tasks() {
    once tasks names; all
    once harness-full harness full "pretrained=$MODEL,kv=$(kv_of "$first" B),attached=False"
    for cell in $(cells); do
        made "$cell" && once "harness-$cell-own" harness "$cell-own" "pretrained=$OUT/$cell,kv=$(kv_of "$cell" B),attached=False"
    done
    for cell in $(cells) $(aware); do
        made "$cell" && once "harness-$cell-intact" harness "$cell-intact" "pretrained=$OUT/$cell,kv=$(kv_of "$cell" B)"
    done
    all
    for cell in $(cells) $(aware); do
        test -e "$logs/harness-$cell-intact.done" && once "compare-$cell" intactkv compare --full "$OUT/harness/full" \
            --own "$OUT/harness/${cell%-aware}-own" --intact "$OUT/harness/$cell-intact" -o "$OUT/harness-$cell.json" --markdown "$tables/harness-$cell.md"
    done
    all
}
names() { python -c '
import sys; from pathlib import Path; from intactkv.harness.tasks import write_tasks
out = Path(sys.argv[2])
print(",".join(n for n in write_tasks(Path(sys.argv[1]), out) if "loglikelihood_rolling" not in (out / f"{n}.yaml").read_text()))' \
    "$DATA/eval" "$OUT/tasks" > "$OUT/tasks.names" && mv "$OUT/tasks.names" "$OUT/tasks/names"; }
harness() {  # ARM ARGUMENTS
    intactkv lm-eval run --model intactkv --model_args "$2" --include_path "$OUT/tasks" --tasks "$(cat "$OUT/tasks/names")" \
        --batch_size "$BATCH" --device "$DEVICE" --log_samples --output_path "$OUT/harness/$1" ${LIMIT:+--limit "$LIMIT"}
}

# 7. MT-Bench answers, for FastChat's judge or `intactkv mtbench judge`: a chat model's only.
mtbench() {
    [ "$PREFIX" = chat ] && has MT-Bench "$questions" || return 0
    for cell in $(cells); do
        test -e "$(kv_of "$cell" P)" && once "mtbench-$cell" intactkv mtbench answer "$OUT/$cell" --full "$MODEL" --kv "$(kv_of "$cell" P)" \
            --questions "$questions" -o "$OUT/mtbench-$cell" --max-new-tokens "$TOKENS" --batch-size 80 --device "$DEVICE"
    done
    all
}

# 8. The cache's bits: per token, per channel, rotated, with tokens kept; and under the weights of the first checkpoint.
cache() {
    has C4 "$c4" || return 0
    for width in 4 3 2; do
        once "cache-$width" python "$here/packed.py" --model "$MODEL" --quantized "$OUT/$first" --text "$c4" --bits $width \
            --device "$DEVICE" --window 256 --out "$tables/cache-$width.md"
    done
    all
}

# 9. The figures: activations, attention, error against the prefix's size, on one page.
doctor() { has WikiText-2 "$wiki" && once doctor intactkv doctor "$MODEL" --quantized "$OUT/$first" --data "$wiki" -o "$OUT/doctor.html" --device "$DEVICE"; all; }

: > "$OUT/left-out.txt"
first=$(cells) first=${first%%$'\n'*}
for stage in $STAGES; do $stage; done
for failed in "$logs"/*.failed; do
    test -e "$failed" && { name=$(basename "$failed" .failed); echo "$name: $(tail -n 1 "$logs/$name.log")" >> "$OUT/left-out.txt"; }
done
{
    echo "# $MODEL: $METHODS at $BITS bits"
    for table in "$tables"/*.md; do test -e "$table" && { printf '\n## %s\n\n' "$(basename "$table" .md)"; cat "$table"; }; done
    test -s "$OUT/left-out.txt" && { printf '\n## Left out\n\n'; sed 's/^/- /' "$OUT/left-out.txt"; }
} > "$OUT/tables.md"
echo "$(date +%T) tables: $OUT/tables.md"
! ls "$logs"/*.failed > /dev/null 2>&1
