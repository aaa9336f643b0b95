#!/usr/bin/env bash
# Quality of packed KV caches on a model, by default the embedded one, as Markdown tables: runs/packed.sh [--windows N] [--out FILE] …
set -euo pipefail
export TOKENIZERS_PARALLELISM=false
exec python "$(dirname "$0")/packed.py" "$@"
