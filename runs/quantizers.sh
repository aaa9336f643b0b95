#!/usr/bin/env bash
# Every quantizer on the embedded model, one markdown table: runs/quantizers.sh [--text FILE] [--calibration FILE] [--out FILE]
set -euo pipefail
export TOKENIZERS_PARALLELISM=false
exec python "$(dirname "$0")/quantizers.py" "$@"
