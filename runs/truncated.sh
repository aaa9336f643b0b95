#!/bin/sh
# How far below the exact KL a truncated cache's lower bound lies: one row for each number of kept tokens.
# sh runs/truncated.sh TEXT OUT      (TEXT: WikiText-2's test split; OUT: a new folder)
set -eu
text=$1 out=$2
model=$(python -c 'from intactkv.demo import MODEL; print(MODEL)')
mkdir "$out"
for bits in 4 3; do intactkv quantize "$model" -o "$out/w$bits" --bits $bits; done
kv=$out/w3/prefix.intactkv
for top in "" 16 64 256 1024 4096; do
    intactkv eval "$out/w4" "$out/w3" --full "$model" --kv "$kv" --data "$text" --window 512 --windows 40 \
        --cache "$out/cache" ${top:+--top $top} -o "$out/top${top:-all}.json" --markdown "$out/rows.md"
done
cat "$out/rows.md"
