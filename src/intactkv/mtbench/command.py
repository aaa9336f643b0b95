"""What `intactkv mtbench answer`, `judge` and `show` do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from intactkv.artifact import IntactKV
from intactkv.capturing.live import check_tokenizer, tokenizer_digest
from intactkv.checkpoint.load import load_model_on, load_tokenizer
from intactkv.checkpoint.source import checkpoint_digest
from intactkv.error import IntactKVError
from intactkv.evaluating.markdown import append_rows
from intactkv.mtbench.answer import Answerer, AnswerSettings, answers, check_prefix
from intactkv.mtbench.files import AnswerFile, answers_of, judgment_path
from intactkv.mtbench.judge import Endpoint
from intactkv.mtbench.judge import judge as run_judge
from intactkv.mtbench.prompts import OURS, read_prompts
from intactkv.mtbench.questions import Question, read_questions
from intactkv.mtbench.scores import read_grades, summarize
from intactkv.mtbench.tables import differences_table, markdown_rows, means_table
from intactkv.provenance import made_by, write_json
from intactkv.screen import working

ARMS = ("full", "own", "intact")


@dataclass(frozen=True)
class Models:
    """The quantized and the full model, the intact KV, the quantized one's name in files, and where they run."""

    model: str
    full: str
    kv: Path
    name: str | None
    device: str
    dtype: str = "auto"

    def model_id(self, arm: str) -> str:
        """An arm's name in FastChat's files: the full model's own, or the quantized one's with the arm's."""
        if arm == "full":
            return Path(self.full).name or self.full
        return f"{self.name or Path(self.model).name or self.model}-{arm}"


def answer(
    models: Models,
    questions_file: Path,
    out: Path,
    *,
    arms: Sequence[str],
    settings: AnswerSettings,
    first: int | None,
    console: Console,
) -> None:
    """Let the arms answer the questions, one model in memory at a time; what is answered already is skipped."""
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise IntactKVError(f"--arms names {unknown[0]!r}; use {', '.join(ARMS)}, or some of them")
    if models.name and (Path(models.name).name != models.name or models.name.startswith(".")):
        raise IntactKVError(f"--name {models.name} is no name of a file in {out}; leave slashes and a first dot out")
    questions, kv = read_questions(questions_file, first=first), IntactKV.from_pretrained(models.kv)
    tokenizer = load_tokenizer(models.full)
    check_tokenizer(kv, tokenizer, models.full)
    tokenizer.name_or_path = models.full
    if "intact" in arms:
        check_prefix(tokenizer, kv, questions, system=settings.system)  # before the other arms take their hours
    how = {
        **{name: value for name, value in asdict(settings).items() if name != "batch_size"},
        "tokenizer": tokenizer_digest(tokenizer),
        "template": str(tokenizer.chat_template),
        "device": models.device,
        "dtype": models.dtype,
        "versions": {name: version(name) for name in ("intactkv", "torch", "transformers")},
    }
    for source, wanted in ((models.full, ("full",)), (models.model, ("own", "intact"))):
        chosen = [arm for arm in wanted if arm in arms]
        if not chosen:
            continue
        made = {**how, "checkpoint": checkpoint_digest(source)}
        files = {}
        for arm in chosen:
            arm_kv = kv.digest if arm == "intact" else None
            files[arm] = AnswerFile(out, models.model_id(arm), {**made, "kv": arm_kv})
        opened = {arm: file.open(questions) for arm, file in files.items()}
        if all(question.id in known for known in opened.values() for question in questions):
            console.print(f"{source}: all {len(questions)} questions are answered in {out}", highlight=False)
            continue
        with console.status(f"loading {source}"):
            model = load_model_on(source, models.device, dtype=models.dtype)
        for arm in chosen:
            answerer = Answerer(model, tokenizer, settings, kv if arm == "intact" else None)
            _answer_arm(answerer, questions, files[arm], opened[arm], console)


def _answer_arm(
    answerer: Answerer, questions: list[Question], file: AnswerFile, known: dict[int | str, Any],
    console: Console,
) -> None:  # fmt: skip
    answerer.check(questions)
    before = len(known)
    with working(console, file.model_id) as show:
        for batch in answers(answerer, questions, set(known), progress=show):
            for question, turns in batch:
                file.add(known, question, turns)
            file.write(known)
    console.print(f"{file.path}: {len(known) - before} questions answered, {before} were there", highlight=False)
    for sentence in _about_prefix(answerer):
        console.print(sentence, style="yellow", highlight=False)


def _about_prefix(answerer: Answerer) -> Iterator[str]:
    """Prompts that begin with a part of the intact prefix only: said aloud."""
    whole = 0 if answerer.kv is None else len(answerer.kv)
    for shared, count in sorted(answerer.shared.items()):
        if shared < whole:
            yield (
                f"{count} prompts share only the first {shared} of the {whole} prefix tokens: no more were intact; "
                "capture with --prefix chat and the same --system"
            )


def judge(
    folder: Path, questions_file: Path, endpoint: Endpoint, *, prompts: Path | None, references: Path | None,
    console: Console,
) -> None:  # fmt: skip
    """Let the endpoint grade what is in the folder; grades that are there for the same prompt are kept."""
    with working(console, f"{endpoint.model} grades") as show:
        outcome = run_judge(
            folder, endpoint, read_questions(questions_file),
            prompts=OURS if prompts is None else read_prompts(prompts),
            references={} if references is None else answers_of(references),
            progress=show,
        )  # fmt: skip
    console.print(
        f"{judgment_path(folder, endpoint.model)}: {outcome.graded} answers graded, {outcome.there} were there",
        highlight=False,
    )
    if outcome.stale:
        console.print(f"{outcome.stale} grades of other answers or prompts were asked for again", highlight=False)
    if outcome.without_reference:
        names = ", ".join(outcome.without_reference)
        console.print(f"graded without a reference, as none was given: questions {names}", highlight=False)
    if outcome.malformed:
        console.print(
            f"left out, for {endpoint.asks} replies without one rating: {len(outcome.malformed)} answers "
            f"({'; '.join(outcome.malformed)}); run the same command again to ask again",
            style="yellow", highlight=False, markup=False,
        )  # fmt: skip


def show(
    folder: Path, questions_file: Path, judge_name: str, *, out: Path | None, markdown: str | None, console: Console
) -> None:
    """Mean grades by category and the arms' paired differences: tables, JSON, Markdown rows."""
    questions, path = read_questions(questions_file), judgment_path(folder, judge_name)
    found = summarize(read_grades(path, questions), questions)
    console.print(means_table(found, title=f"{judge_name} on {len(questions)} questions: mean grade"))
    if found["pairs"]:
        console.print(differences_table(found, title="difference on the same questions [95 %]"))
        console.print("Each interval stands alone: where nothing differs, one in twenty leaves 0 out.", highlight=False)
    for model, names in found["ungraded"].items():
        if names:
            some = ", ".join(map(str, names[:10])) + (", …" if len(names) > 10 else "")
            console.print(f"{model}: {len(names)} questions do not count, a grade is missing: {some}", style="yellow")
    if out is not None:
        files = {"questions": questions_file, "judgments": path}
        digests = {name: sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
        write_json(
            out, {"judge": judge_name, "files": {n: str(f) for n, f in files.items()}, "digests": digests, **found}
        )
    if markdown is not None:
        head, rows = markdown_rows(found, judge=judge_name, commit=made_by()["commit"])
        if markdown == "-":
            console.print("\n".join((*head, *rows)), markup=False, highlight=False, soft_wrap=True)
        else:
            append_rows(Path(markdown), rows, head=head)
