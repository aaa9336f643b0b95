#!/usr/bin/env bash
# Train one setting for a given time: a short sitting finds the pace, the second one's steps and decay fill the time.
#   timed.sh CONFIG DATA EVAL OUT SECONDS
# Then the model as a Hugging Face folder in OUT/model, its pivot table and its three arms. Its `steps` are replaced.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
config=$1 data=$2 eval=$3 out=$4 seconds=$5
name=$(basename "$config" .json)
mkdir -p "$out/configs"

python "$here/train.py" --data "$data" --eval "$eval" --out "$out" --seconds $((seconds / 5)) "$config"
python - "$config" "$out" "$name" "$seconds" <<'PY'
import json, sys
from pathlib import Path

config, out, name, seconds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
lines = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
plain = [line for line in lines if "mass" not in line]  # a measurement's time is not a step's
pace = (plain[-1]["step"] - plain[0]["step"]) / (plain[-1]["seconds"] - plain[0]["seconds"])
steps = int(lines[-1]["step"] + 0.9 * pace * (seconds - lines[-1]["seconds"])) // 100 * 100
settings = json.loads(config.read_text()) | {"steps": steps}
(out / "configs" / f"{name}.json").write_text(json.dumps(settings, indent=2) + "\n")
print(f"{pace:.1f} steps/s: {steps} steps", flush=True)
PY
python "$here/train.py" --data "$data" --eval "$eval" --out "$out" "$out/configs/$name.json"
python "$here/export.py" --data "$data" "$out/$name" "$out/model"
python "$here/pivots.py" "$out/model" "$eval"
python "$here/arms.py" "$out/model" "$eval"
