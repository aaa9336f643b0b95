#!/usr/bin/env bash
# triton 3.8.0 and 3.9.0 make x * y + z one instruction with one rounding; 3.9.0 says that 3.10 will not. Its interpreter never did.
#
# Guess before running: whether a compiler may fuse products and sums is no business of a kernel's author: the default
# stays, nothing is said, and what Triton's interpreter computes on a processor is what the compiled kernel computes.
# Seen: 3.8.0 compiles fma.rn.f32 and says nothing. 3.9.0 compiles the same and warns that the default will be two
# instructions in 3.10; with TRITON_DEFAULT_FP_FUSION=0 it is mul and add already. In both the interpreter rounds twice,
# so that a test under it and a card can differ in last bits. Kernels that pass enable_fp_fusion have the same
# instructions in both, and no warning. No card is needed to see it: the compiler is given the target's name.
# Exits with 1 if that changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cat > "$scratch/run.py" <<'PY'
import os
import sys
import warnings

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def both(x, y, z, out):
    tl.store(out, tl.load(x) * tl.load(y) + tl.load(z))


if os.environ.get("TRITON_INTERPRET") == "1":
    x = np.float32(1 + 2**-12)
    numbers = [torch.tensor([v], dtype=torch.float32) for v in (x, x, -1.0)]
    out = torch.empty(1)
    both[(1,)](*numbers, out)
    once, twice = np.float32(np.float64(x) ** 2 - 1), np.float32(x * x) - np.float32(1)
    print("  interpreter:", "two roundings" if out.item() == twice else "one rounding", out.item(), "one would be", once)
    sys.exit(0 if out.item() == twice != once else "the interpreter has changed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

source = ASTSource(both, {name: "*fp32" for name in ("x", "y", "z", "out")}, {})


def compiled(**options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return "fused" if "fma.rn.f32" in ptx else "two", any("3.10" in str(warning.message) for warning in said)


told = compiled(enable_fp_fusion=True), compiled(enable_fp_fusion=False)
found = compiled()
print("  told to fuse, and not:", told, " not told:", found)
default, new = os.environ.get("TRITON_DEFAULT_FP_FUSION"), triton.__version__.startswith("3.9")
expected = ("fused", new) if default is None else ("two", False)
sys.exit(0 if told == (("fused", False), ("two", False)) and found == expected else "the compiler has changed")
PY
python3 -m venv "$scratch/venv"
. "$scratch/venv/bin/activate"
pip install -q torch==2.13.0
pip install -q numpy==2.3.5
for version in 3.8.0 3.9.0; do
    pip install -q --no-deps "triton==$version"
    echo "triton $version"
    for settings in TRITON_INTERPRET=1 TRITON_INTERPRET=0 TRITON_DEFAULT_FP_FUSION=0; do
        test "$version $settings" = "3.8.0 TRITON_DEFAULT_FP_FUSION=0" && continue
        env TRITON_CACHE_DIR="$scratch/cache-$version-$settings" "$settings" python "$scratch/run.py"
    done
done
