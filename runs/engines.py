"""docs/engines.md: what passes in which engine, from the tests' own notes.

INTACTKV_ENGINES=engines.jsonl pytest tests/test_llama_cpp.py tests/test_llama_serve.py   # and in other environments
python runs/engines.py engines.jsonl > docs/engines.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = """# Engines

Made by `runs/engines.py` from what the tests noted as they passed; do not edit. Every row: greedy tokens or
log-probabilities are those of transformers with the artifact's rows, in a case where the plain model's are others.

| engine | version | architecture | cache | how |
|---|---|---|---|---|"""


def main() -> None:
    """Print the page."""
    rows = {line for file in sys.argv[1:] for line in Path(file).read_text(encoding="utf-8").splitlines()}
    print(HEAD)
    for told in sorted((json.loads(row) for row in rows), key=lambda each: tuple(each.values())):
        name = Path(told["architecture"]).parent.name if "/" in told["architecture"] else told["architecture"]
        print(f"| {told['engine']} | {told['version']} | {name} | {told['cache']} | {told['how']} |")


if __name__ == "__main__":
    main()
