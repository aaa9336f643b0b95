"""Continue a prompt, for the command line and the demo."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from intactkv.attachment import attach
from intactkv.kv import IntactKV


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False, kv: IntactKV | None = None
) -> Int[Tensor, "1 token"]:
    """A prompt's ids, rendered by the chat template if `chat`.

    Where `kv` keeps the BOS token alone and the tokenizer does not add it itself, it is put in front, once.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(prompt, add_special_tokens=not chat).input_ids
    if kv is not None and kv.ids.tolist() == [tokenizer.bos_token_id] and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return torch.tensor([ids])


def continuation(
    model: Any, tokenizer: Any, ids: Int[Tensor, "1 token"], *, kv: IntactKV | None = None, **settings: Any
) -> str:
    """What `model` writes after `ids`, with `kv` attached meanwhile; `settings` go to `generate`."""
    ids = ids.to(model.device)
    with attach(model, kv) if kv is not None else nullcontext():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
