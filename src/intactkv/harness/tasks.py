"""lm-eval tasks that read a folder of local files, for machines without a hub."""

from __future__ import annotations

import logging
import lzma
import re
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

import yaml

from intactkv.error import IntactKVError, first_line
from intactkv.files import write_atomically
from intactkv.lines import read_lines

log = logging.getLogger(__name__)

_ACC: list[dict[str, Any]] = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
]
_CHOICES: dict[str, Any] = {"output_type": "multiple_choice", "metric_list": _ACC}
_ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}

# The fields of a row → what lm-eval does with it. The first that a file's rows have counts.
SCHEMAS: dict[frozenset[str], dict[str, Any]] = {
    frozenset({"context", "continuation"}): {  # LAMBADA
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    frozenset({"context_options", "continuation", "gold"}): {  # WinoGrande: the same ending after two contexts
        **_CHOICES,
        "doc_to_text": "gold",
        "doc_to_target": "continuation",
        "doc_to_choice": "context_options",
        "metric_list": _ACC[:1],
    },
    frozenset({"query", "choices", "gold"}): {  # a query that ends in a question is followed by where the answer goes
        **_CHOICES,
        "doc_to_text": "{{query}}{{'\nAnswer:' if query.split('\n')[-1].startswith('Question:') else ''}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
    },
    frozenset({"question", "choices", "answerKey"}): {  # ARC as the Hub has it
        **_CHOICES,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
    },
    frozenset({"text"}): _ROLLING,
}
_MMLU = {
    "dataset_path": "csv",
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "output_type": "multiple_choice",
    "doc_to_text": "{{question|trim}}\nA. {{a}}\nB. {{b}}\nC. {{c}}\nD. {{d}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "answer",
    "metric_list": _ACC[:1],
}


def write_tasks(data: Path, out: Path) -> list[str]:
    """Write an lm-eval task for every file in `data` that can be read to `out`; returns the names of tasks and groups.

    For `lm_eval --include_path OUT --tasks NAMES`. A `.txt` is one document; what a `.jsonl` is, its rows' fields say
    (`SCHEMAS`), and one that has others is left out with a warning. FILE becomes the task FILE_local. MMLU is a folder
    `mmlu` with `dev` and `test`, a headless csv a subject, or `mmlu.tar.xz` of that, which is unpacked to `out`.
    Raises `IntactKVError` where nothing is left, two files would be one task, an archive cannot be unpacked, or the
    rows of a file are not all of one schema; nothing is written then.
    """
    if not data.is_dir():
        raise IntactKVError(f"{data} is no folder; give one with test sets as files")
    files = sorted(path for path in data.iterdir() if path.suffix in (".jsonl", ".txt"))
    found = {path: task for path in files if (task := _ROLLING if path.suffix == ".txt" else _task(path)) is not None}
    named: dict[str, Path] = {}
    for path in found:
        name = f"{re.sub(r'[^0-9A-Za-z]+', '_', path.stem)}_local"
        if name in named:
            raise IntactKVError(f"{named[name]} and {path} would both be the task {name}; rename one")
        named[name] = path
    subjects = _mmlu(data, out)
    if not named and subjects is None:
        schemas = "; ".join(", ".join(sorted(fields)) for fields in SCHEMAS)
        raise IntactKVError(
            f"{data} holds no task; give a folder with mmlu, mmlu.tar.xz, .txt, or .jsonl whose rows have the fields "
            f"{schemas}"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, path in named.items():
        _write(out / f"{name}.yaml", {"task": name, **_source(path), **found[path]})
    return [*named, *([] if subjects is None else [_write_mmlu(subjects, out)])]


def _task(path: Path) -> dict[str, Any] | None:
    """What lm-eval does with a file's rows, None where their fields are no task's."""
    rows = read_lines(path, needed=())
    for needed, task in SCHEMAS.items():
        if not rows or not needed <= rows[0].keys():
            continue
        other = next((row for row in rows if not needed <= row.keys()), None)
        if other is not None:
            raise IntactKVError(
                f"{path} has a row with the fields {', '.join(other)} and rows with {', '.join(sorted(needed))}; "
                "give all rows of a task the same fields"
            )
        return task
    fields = f"rows with the fields {', '.join(rows[0])}" if rows else "no rows"
    log.warning("%s is left out: it has %s, which are no task's", path, fields)
    return None


def _source(path: Path) -> dict[str, Any]:
    """How lm-eval's `datasets` reads one file; a text file is one document."""
    text = path.suffix == ".txt"
    files: dict[str, Any] = {"data_files": {"test": str(path.resolve())}}
    return {
        "dataset_path": "text" if text else "json",
        "dataset_kwargs": {**files, "sample_by": "document"} if text else files,
        "test_split": "test",
        "metadata": {"version": 1.0},
    }


def _mmlu(data: Path, out: Path) -> Path | None:
    """MMLU's folder, unpacked to `out` where it is an archive; None where there is none."""
    if (data / "mmlu").is_dir():
        return _with_subjects(data / "mmlu", data / "mmlu")
    packed = data / "mmlu.tar.xz"
    if not packed.is_file():
        return None
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".mmlu-") as scratch:
        try:
            with tarfile.open(packed) as archive:
                archive.extractall(scratch, filter="data")  # refuses what would lie elsewhere
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError) as error:
            raise IntactKVError(f"{packed} cannot be unpacked to {out} ({first_line(error)}); get it again") from error
        _with_subjects(Path(scratch), packed)
        shutil.copytree(scratch, out / "mmlu", dirs_exist_ok=True)
    return out / "mmlu"


def _with_subjects(folder: Path, source: Path) -> Path:
    """`folder`, which must have a test of some subject."""
    if not any((folder / "test").glob("*_test.csv")):
        raise IntactKVError(f"{source} holds no test/*_test.csv; give MMLU's folders dev and test, or leave it out")
    return folder


def _write_mmlu(folder: Path, out: Path) -> str:
    names = []
    for test in sorted((folder / "test").glob("*_test.csv")):
        subject = test.name.removesuffix("_test.csv")
        files = {"test": str(test.resolve()), "dev": str((folder / "dev" / f"{subject}_dev.csv").resolve())}
        columns = ["question", "a", "b", "c", "d", "answer"]
        about = subject.replace("_", " ")
        names.append(f"mmlu_{subject}_local")
        _write(
            out / f"{names[-1]}.yaml",
            {
                **_MMLU,
                "task": names[-1],
                "dataset_kwargs": {"data_files": files, "column_names": columns, "keep_default_na": False},
                "description": f"The following are multiple choice questions (with answers) about {about}.\n\n",
                "metadata": {"version": 1.0},
            },
        )
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "mmlu_local", "task": names, "aggregate_metric_list": [mean], "metadata": {"version": 1.0}}
    _write(out / "mmlu_local.yaml", group)
    return "mmlu_local"


def _write(path: Path, task: dict[str, Any]) -> None:
    write_atomically(path, yaml.safe_dump(task, sort_keys=False, allow_unicode=True).encode())
