"""What the judge is asked: our own words, or a file in the schema of FastChat's judge_prompts.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from intactkv.error import IntactKVError
from intactkv.lines import read_lines
from intactkv.mtbench.questions import Question

# Categories whose answers are right or wrong: the judge is shown reference answers, where there are any (FastChat's).
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")

_SYSTEM = (
    "You grade the replies of AI assistants. Be strict, be fair, and let nothing but the content of the reply that you "
    "are asked to grade decide: neither its length nor its tone."
)
_GRADE = (
    "First say in a few sentences what is good and what is wrong or missing: is it correct, does it do what was asked, "
    "is it useful, well ordered and as detailed as it should be? Then give one whole number from 1 (useless) to 10 "
    "(nothing could be better) on a line of its own, in double square brackets, like this: [[5]]"
)
_COMPARE = "The reference answers are correct. A reply that contradicts them is wrong, whatever it argues.\n\n"


@dataclass(frozen=True)
class Prompt:
    """One question to the judge: its name in the results, its system prompt, and its template."""

    name: str
    system: str
    template: str

    def fill(self, values: Mapping[str, str]) -> str:
        """The template with its placeholders filled. Raises `IntactKVError` for one that is not known."""
        try:
            return self.template.format(**values)
        except (LookupError, ValueError, AttributeError) as error:
            raise IntactKVError(
                f"the judge prompt {self.name} cannot be filled ({error!r}); the names in braces may be "
                f"{', '.join(values)}, and any other brace must be doubled"
            ) from error


def _own(name: str, shown: str, which: str, remark: str = "") -> Prompt:
    return Prompt(name, _SYSTEM, f"{shown}\n{remark}Grade {which}. {_GRADE}")


_FIRST = "<question>\n{question}\n</question>\n<reply>\n{answer}\n</reply>\n"
_BOTH = (
    "<question_1>\n{question_1}\n</question_1>\n<reply_1>\n{answer_1}\n</reply_1>\n"
    "<question_2>\n{question_2}\n</question_2>\n<reply_2>\n{answer_2}\n</reply_2>\n"
)
_ONE_REFERENCE = "<reference>\n{ref_answer_1}\n</reference>\n"
_TWO_REFERENCES = "<reference_1>\n{ref_answer_1}\n</reference_1>\n<reference_2>\n{ref_answer_2}\n</reference_2>\n"
_SECOND = "the second reply, to the second question; the first is there only so that you can follow the conversation"

# FastChat's names for the four kinds, and ours for them.
KINDS = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
OURS = {
    "single-v1": _own("intactkv-single", _FIRST, "the reply"),
    "single-v1-multi-turn": _own("intactkv-single-multi-turn", _BOTH, _SECOND),
    "single-math-v1": _own("intactkv-reference", _FIRST + _ONE_REFERENCE, "the reply", _COMPARE),
    "single-math-v1-multi-turn": _own(
        "intactkv-reference-multi-turn", _BOTH + _TWO_REFERENCES, _SECOND, _COMPARE
    ),
}  # fmt: skip


def read_prompts(path: Path) -> dict[str, Prompt]:
    """The four single-answer prompts of a file in FastChat's schema.

    Raises `IntactKVError` where one is missing or asks for something else than [[rating]].
    """
    found = {}
    for row in read_lines(path, needed=("name", "system_prompt", "prompt_template")):
        if row["name"] in KINDS:
            if row.get("output_format", "[[rating]]") != "[[rating]]":
                raise IntactKVError(
                    f"{row['name']} of {path} asks for {row['output_format']!r}, not for [[rating]]; give prompts that "
                    "grade one answer"
                )
            found[row["name"]] = Prompt(row["name"], str(row["system_prompt"]), str(row["prompt_template"]))
    if missing := [kind for kind in KINDS if kind not in found]:
        raise IntactKVError(f"{path} lacks the prompt {missing[0]}; it must have {', '.join(KINDS)}")
    return found


def ask(
    prompts: Mapping[str, Prompt], question: Question, turn: int, turns: Sequence[str], reference: Sequence[str]
) -> tuple[Prompt, str]:
    """The prompt for the answer to `turn` (1 or 2) and its text; `reference` is empty where none is shown."""
    kind = ("single-math-v1" if reference else "single-v1") + ("" if turn == 1 else "-multi-turn")
    values = {"question": question.turns[0], "answer": turns[0]} if turn == 1 else {}
    if turn == 2:
        values = {f"question_{i}": text for i, text in enumerate(question.turns[:2], start=1)}
        values |= {f"answer_{i}": text for i, text in enumerate(turns[:2], start=1)}
    values |= {f"ref_answer_{i}": text for i, text in enumerate(reference[:2], start=1)}
    return prompts[kind], prompts[kind].fill(values)
