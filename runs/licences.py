"""Under which licences the dependencies stand, as their own metadata say: a Markdown table; exit 1 at an unknown one.

python runs/licences.py    # in an environment that has what `.[dev]` installs
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import PackageMetadata, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

KNOWN = re.compile(r"\b(0?BSD|MIT|Apache|ISC|PSF|Python|MPL|LGPL|Lesser|CC0|Zlib|BSL|LLVM|CNRI)\b")
SHORT = {
    "MIT License": "MIT",
    "The MIT License (MIT)": "MIT",
    "Apache Software License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "BSD License": "BSD",
    "3-Clause BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


def needed(extras: Iterable[str]) -> dict[str, str]:
    """Every installed package that `intactkv[extras]` needs, however indirectly, and its licence."""
    found: dict[str, str] = {}
    asked, done = [("intactkv", frozenset(extras))], set()
    while asked:
        name, more = asked.pop()
        if (name, more) in done:
            continue
        done.add((name, more))
        try:
            package = distribution(name)
        except PackageNotFoundError:  # an extra that is not installed here
            continue
        found[name] = licence(package.metadata)
        for text in package.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *more)):
                asked.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    del found["intactkv"]
    return found


def licence(metadata: PackageMetadata) -> str:
    """The expression where a package gives one, else its classifiers, else the first line of its licence's text."""
    if expression := metadata.get_all("License-Expression"):
        return str(expression[0])
    told = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if c.startswith("License :: ")]
    told = [each for each in told if each != "OSI Approved"] or [
        (metadata.get_all("License") or ["none named"])[0].splitlines()[0]
    ]
    return " AND ".join(dict.fromkeys(SHORT.get(each, each) for each in told))


def main() -> None:
    """Print the table: what everybody gets, and what extras add."""
    always, with_extras = needed(()), needed(["dev"])
    rows: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name, terms in sorted(with_extras.items()):
        rows[terms][name not in always].append(name)
    print("| licence | `pip install intactkv` | extras add |\n|---|---|---|")
    for terms, columns in sorted(rows.items(), key=lambda row: -sum(map(len, row[1]))):
        print(f"| {terms} | {' | '.join(', '.join(column) or '–' for column in columns)} |")
    unknown = [terms for terms in rows if not KNOWN.search(terms)]
    unknown += [terms for terms, (core, _) in rows.items() if core and "GPL" in terms]
    if unknown:
        sys.exit(f"look at these yourself: {unknown}")


if __name__ == "__main__":
    main()
