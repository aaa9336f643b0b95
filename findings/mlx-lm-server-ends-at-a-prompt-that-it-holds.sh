#!/usr/bin/env bash
# mlx_lm.server, 0.32.2: a prompt whose tokens are those of a conversation in its prompt cache, to the last one, ends it.
#
# Guess: the server computes such a prompt's last token anew, as it does where it holds a longer conversation.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, Linux, CPU): LRUPromptCache.fetch_nearest_cache gives the whole cache and no token to
# compute, BatchGenerator.insert_segments raises "Sequence 1 has an empty prompt.", and the thread that generates dies.
# The connection is closed without an answer, /health says 503, and every later request gets "generation thread died".
# A completion that goes on from an answer's text is such a prompt. Known of 0.31.3: ml-explore/mlx-lm#1215.
# Remedy: `intactkv serve`, whose prompt cache always leaves a token to compute.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'kill "$server" 2> /dev/null || true; rm -rf "$work"' EXIT
server=
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip --disable-pip-version-check install -q mlx-lm==0.32.2 'mlx[cpu]==0.32.4' httpx2
cd "$work"
"$work/env/bin/python" -m mlx_lm server --model "$root/src/intactkv/demo/model" --port 8799 > log 2>&1 &
server=$!
url=http://127.0.0.1:8799
for _ in $(seq 60); do curl -s -m 2 $url/health | grep -q ok && break; sleep 1; done
ask() {
    "$work/env/bin/python" -c 'import json, sys; print(json.dumps({"prompt": sys.argv[1], "max_tokens": 4}))' "$1" |
        curl -s -m 30 -d @- -H 'Content-Type: application/json' $url/v1/completions || echo "no answer (curl: $?)"
}
prompt="The Danube is the second longest river in Europe after the Volga. It"
answer=$(ask "$prompt" | "$work/env/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["text"])')
echo "an answer:         $answer"
echo "prompt and answer: $(ask "$prompt $answer")"
echo "health:            $(curl -s -m 5 $url/health)"
echo "any other prompt:  $(ask "Hello")"
grep -q "has an empty prompt" log || { tail -20 log; echo "not seen any more"; exit 1; }
