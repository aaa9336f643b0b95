"""lm-eval tasks that read a folder of local files, for machines without a hub."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import yaml

from intactkv.error import IntactKVError
from intactkv.files import write_atomically
from intactkv.lines import read_lines

_CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
}
_ACC: list[dict[str, Any]] = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
]
_LIKELIHOOD: list[dict[str, Any]] = [
    {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
]
_ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}
_ANSWER = "{{query}}\nAnswer:"

# File → task. A line is an object with `query`, `choices`, `gold` unless the task says otherwise.
TASKS: dict[str, dict[str, Any]] = {
    "lambada_openai.jsonl": {
        "task": "lambada_local",
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": _LIKELIHOOD,
    },
    "arc_easy.jsonl": {"task": "arc_easy_local", **_CHOICES, "doc_to_text": _ANSWER, "metric_list": _ACC},
    "arc_challenge.jsonl": {"task": "arc_challenge_local", **_CHOICES, "doc_to_text": _ANSWER, "metric_list": _ACC},
    "openbook_qa.jsonl": {"task": "openbookqa_local", **_CHOICES, "metric_list": _ACC},
    "boolq.jsonl": {"task": "boolq_local", **_CHOICES, "doc_to_text": _ANSWER, "metric_list": _ACC[:1]},
    "hellaswag_val_1000.jsonl": {"task": "hellaswag_local", **_CHOICES, "metric_list": _ACC},
    "winogrande.jsonl": {  # the same ending after two contexts: the context is what is chosen
        "task": "winogrande_local",
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_target": "continuation",
        "doc_to_choice": "context_options",
        "metric_list": _ACC[:1],
    },
    "c4_sample_500.jsonl": {"task": "c4_local", **_ROLLING},
    "wikitext2_test_raw.txt": {"task": "wikitext_local", **_ROLLING},
}
# ARC as the Hub has it: `question`, `choices` of `text` and `label`, `answerKey`.
_HUB_ARC = {
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices.text}}",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
}
_ARC_FIELDS = {"question", "choices", "answerKey"}
_FIELDS = {
    "lambada_openai.jsonl": {"context", "continuation"},
    "winogrande.jsonl": {"gold", "continuation", "context_options"},
    "c4_sample_500.jsonl": {"text"},
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
    """Write an lm-eval task file for every known file in `data` to `out`; returns the names of tasks and groups.

    For `lm_eval --include_path OUT --tasks NAMES`. MMLU is a folder `mmlu` with `dev` and `test`, a headless csv a
    subject, or `mmlu.tar.xz` of that, which is unpacked to `out`. Raises `IntactKVError` where nothing is known.
    """
    found = {name: _fitting(data / name, task) for name, task in TASKS.items() if (data / name).is_file()}
    out.mkdir(parents=True, exist_ok=True)
    for name, task in found.items():
        _write(out / f"{task['task']}.yaml", {**_source(data / name), **task})
    names = [task["task"] for task in found.values()]
    subjects = _mmlu(data, out)
    if subjects is not None:
        names.append(_write_mmlu(subjects, out))
    if not names:
        raise IntactKVError(
            f"{data} holds none of {', '.join(TASKS)}, mmlu, mmlu.tar.xz; give a folder with some of them"
        )
    return names


def _fitting(path: Path, task: dict[str, Any]) -> dict[str, Any]:
    """The task for the schema that a file's rows have. Raises `IntactKVError` for one that it does not read."""
    if path.suffix == ".txt":
        return task
    needed = _FIELDS.get(path.name, {"query", "choices", "gold"})
    rows = read_lines(path, needed=())
    other = next((row for row in rows if not needed <= row.keys()), None)
    if rows and other is None:
        return task
    if path.name.startswith("arc_") and rows and all(row.keys() >= _ARC_FIELDS for row in rows):
        return {**task, **_HUB_ARC}
    raise IntactKVError(
        f"{path} has {'a row with the fields ' + ', '.join(other) if other else 'no rows'}; its task reads "
        f"{', '.join(sorted(needed))}"
    )


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
    if (data / "mmlu").is_dir():
        return data / "mmlu"
    if not (data / "mmlu.tar.xz").is_file():
        return None
    target = out / "mmlu"
    with tarfile.open(data / "mmlu.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return target


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
