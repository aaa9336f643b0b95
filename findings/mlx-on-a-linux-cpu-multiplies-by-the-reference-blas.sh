#!/usr/bin/env bash
# mlx 0.32.4's wheel for Linux processors (mlx-cpu) multiplies matrices by netlib's reference BLAS, quantized ones slower still.
#
# Guess before running: on a processor MLX multiplies about as fast as numpy, and 4-bit weights, which are read from
# less memory, are no slower than dense ones; so a Linux machine shows what mlx-lm does with a small model.
# Seen: the wheel brings libblas 3.10, the unoptimised one. A product of 256 x 1024 by 1024 x 1024 takes 18 to 40 times as
# long as numpy's in one thread, with 4-bit weights 37 to 52 times: 256 tokens of a model of 135 million parameters take
# a minute. The answers are right, so that only who times it sees it.
# Exits with 1 if that changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
. "$scratch/venv/bin/activate"
pip install -q 'mlx[cpu]==0.32.4' numpy==2.3.5
cat > "$scratch/run.py" <<'PY'
import time
from importlib.metadata import files, version
from statistics import median

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"), "numpy", np.__version__, mx.default_device())
libraries = sorted(file.name for file in files("mlx-cpu") if "blas" in file.name and ".so" in file.name)
print("BLAS in its wheel:", libraries)
a, b = mx.random.normal((256, 1024)), mx.random.normal((1024, 1024))
quantized = mx.quantize(b, group_size=64, bits=4)
mx.eval(a, b, *quantized)
A, B = np.array(a), np.array(b)
ways = {
    "numpy": lambda: A @ B.T,
    "mlx": lambda: mx.eval(a @ b.T),
    "mlx, 4 bits": lambda: mx.eval(mx.quantized_matmul(a, *quantized, transpose=True, group_size=64, bits=4)),
}
assert np.allclose(A @ B.T, np.array(a @ b.T), atol=1e-2)
seconds = {name: [] for name in ways}
for _ in range(5):
    for name, way in ways.items():
        began = time.perf_counter()
        way()
        seconds[name].append(time.perf_counter() - began)
ratios = {
    name: median(mine / numpys for mine, numpys in zip(seconds[name], seconds["numpy"])) for name in ("mlx", "mlx, 4 bits")
}
for name, ratio in ratios.items():
    print(f"{name}: {ratio:.0f} times numpy's time in one thread")
same = libraries and not any("openblas" in name for name in libraries) and ratios["mlx"] > 3 and ratios["mlx, 4 bits"] > ratios["mlx"]
raise SystemExit(0 if same else "something has changed")
PY
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
python "$scratch/run.py"
