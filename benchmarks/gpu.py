"""What attach and the packed cache cost on a GPU: builds, checks and times in one call of under ten minutes.

    python benchmarks/gpu.py --out DIR          # one table at the end, all figures in DIR/gpu.json
    python benchmarks/gpu.py --only packed --tune

The parts are `gpu_packed.py` (one layer: packed and stock), `gpu_decode.py` (a whole model) and `gpu_attach.py` (attach
and prefill). They need torch, triton, transformers and this project's source. Without a GPU they run the same code at
toy size, the kernel under Triton's interpreter (set TRITON_INTERPRET=1): that shows that it works, and nothing else.
Ways that are compared take turns; a ratio is taken within a round, and the median over the rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_attach import attach_figures, prefill_figures
from gpu_clock import CUDA, where
from gpu_decode import decode_figures
from gpu_llama import FULL, TOY
from gpu_packed import packed_figures, stock_figures


def main() -> None:
    """Run the parts asked for, write all figures, and print a short table last."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, default=Path("gpu"), help="the folder for gpu.json")
    options.add_argument("--only", choices=("attach", "prefill", "packed", "stock", "decode"), help="one part")
    options.add_argument("--tune", action="store_true", help="try the kernel's sizes first")
    asked, size = options.parse_args(), FULL if CUDA else TOY
    asked.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"where": where()}
    parts: dict[str, Callable[[], Any]] = {
        "packed": lambda: packed_figures(size, asked.tune),
        "stock": lambda: stock_figures(size),
        "decode": lambda: decode_figures(size),
        "attach": lambda: attach_figures(size),
        "prefill": lambda: prefill_figures(size),
    }
    for name, part in parts.items():
        if asked.only == name or (asked.only is None and name != "prefill"):  # which is a part of attach
            began = time.perf_counter()
            figures[name] = part()
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            (asked.out / "gpu.json").write_text(json.dumps(figures, indent=1))
    for name in parts:
        for row in figures.get(name, {}).get("rows", []):
            print(" | ".join(str(cell) for cell in row.values()))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
