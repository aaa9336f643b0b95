#!/usr/bin/env bash
# Calibration on the embedded model, one markdown table: runs/calibrate.sh --learn FILE --text FILE --out FILE [--steps 160 …]
set -euo pipefail
export TOKENIZERS_PARALLELISM=false
exec python "$(dirname "$0")/calibrate.py" "$@"
