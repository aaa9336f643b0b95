"""Continue a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intactkv.cli.options import Device, DType, Model, Seed, console


def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    kv: Annotated[Path | None, typer.Option("--kv", help="An intact KV to attach.", metavar="KV")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to generate.", min=1)] = 50,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template as the user's message.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="0 chooses the likeliest token; above, tokens are sampled.", min=0.0)
    ] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Continue a prompt with MODEL, with an intact KV attached if one is given; tokens are shown as they come."""
    import torch
    from transformers import TextStreamer

    from intactkv.artifact import IntactKV
    from intactkv.checkpoint.load import load_model_on, load_tokenizer
    from intactkv.generate import continuation, encode

    tokenizer = load_tokenizer(model)
    artifact = None if kv is None else IntactKV.from_pretrained(kv)
    with console.status(f"loading {model}"):
        loaded = load_model_on(model, device, dtype=dtype)
    ids = encode(tokenizer, prompt, chat=chat, kv=artifact)
    torch.manual_seed(seed)
    shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    continuation(
        loaded, tokenizer, ids, kv=artifact, max_new_tokens=max_new_tokens, temperature=temperature, streamer=shown
    )
