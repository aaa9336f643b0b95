"""What several commands take, and how they speak."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intactkv.error import IntactKVError
from intactkv.screen import Screen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

console = Screen()

Model = Annotated[str, typer.Argument(help="The model: a folder, a name on the Hub, or a GGUF file.", metavar="MODEL")]
Full = Annotated[str, typer.Option("--full", help="The full-precision model it was quantized from.", metavar="MODEL")]
Device = Annotated[str, typer.Option(help="Where models run: auto (the accelerator if there is one), cpu, cuda, …")]
DType = Annotated[
    str,
    typer.Option(help="auto (as stored, float32 where that is slow), float32, bfloat16 or float16.", metavar="TYPE"),
]
KV = Annotated[
    Path,
    typer.Option(
        "--kv", help="The intact KV: a file, a folder that `quantize` wrote, or a name on the Hub.", metavar="KV"
    ),
]
System = Annotated[str | None, typer.Option(help="The system prompt, with `--prefix chat`.")]
Seed = Annotated[int, typer.Option(help="The seed of whatever is drawn.", min=0, max=2**32 - 1)]
Ids = Annotated[str | None, typer.Option(help="Explicit token ids instead, such as `1,887,526`.")]


def warn(sentence: str) -> None:
    """Say what the user should know before relying on a result."""
    Screen(stderr=True).print(f"warning: {sentence}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def prefix_ids(
    tokenizer: PreTrainedTokenizerBase, prefix: str | None, system: str | None, ids: str | None = None
) -> list[int]:
    """The ids that --prefix with --system names, or --ids gives."""
    from intactkv.capturing.prefix import bos, chat_prefix, text_prefix

    check_prefix(prefix, system, ids)
    if ids is not None:
        return listed(ids)
    prefix = "bos" if prefix is None else prefix
    if prefix == "auto":
        raise IntactKVError("--prefix auto goes with `intactkv capture`, which shows the prefix it finds; name one")
    if prefix == "bos":
        return bos(tokenizer)
    return chat_prefix(tokenizer, system=system) if prefix == "chat" else text_prefix(tokenizer, prefix)


def check_prefix(prefix: str | None, system: str | None, ids: str | None) -> None:
    """Raise `IntactKVError` where --prefix, --system and --ids do not go together."""
    if ids is not None and (prefix is not None or system is not None):
        raise IntactKVError(f"--ids {ids} is the whole prefix; leave --prefix and --system out, or --ids")
    if system is not None and prefix != "chat":
        raise IntactKVError(
            f"--system goes with --prefix chat, not with --prefix {prefix or 'bos'!r}; add --prefix chat"
        )


def listed(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise IntactKVError(f"--ids {text!r} is no list of numbers; write it like 1,887,526") from None


def markdown_file(name: str | None) -> Path | None:
    """The file that --markdown names, where it does not ask for printing."""
    return None if name in (None, "-") else Path(str(name))
