"""Continue a prompt, for the command line and the demo."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from intactkv.artifact import IntactKV
from intactkv.attaching.handle import attach
from intactkv.decoder import input_device
from intactkv.error import IntactKVError, first_line
from intactkv.lines import check_unicode
from intactkv.positions import check_positions


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False, kv: IntactKV | None = None
) -> Int[Tensor, "1 token"]:
    """A prompt's ids, rendered by the chat template if `chat`.

    Where `kv` keeps the BOS token alone and the tokenizer does not add it itself, it is put in front, once. Raises
    `IntactKVError` where there is no template, or it refuses the prompt, and for a prompt without tokens.
    """
    check_unicode(prompt, "the prompt")
    if chat:
        prompt = _rendered(tokenizer, prompt)
    ids = tokenizer(prompt, add_special_tokens=not chat).input_ids
    if kv is not None and kv.ids.tolist() == [tokenizer.bos_token_id] and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise IntactKVError("the prompt has no tokens; give a text")
    return torch.tensor([ids])


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    if tokenizer.chat_template is None:
        raise IntactKVError(f"{tokenizer.name_or_path} has no chat template; leave --chat out")
    messages = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: whatever it raises, it refused this
        raise IntactKVError(
            f"the chat template of {tokenizer.name_or_path} refuses this prompt ({first_line(error)}); leave --chat out"
        ) from error


def continuation(
    model: Any,
    tokenizer: Any,
    ids: Int[Tensor, "1 token"],
    *,
    kv: IntactKV | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: BaseStreamer | None = None,
) -> str:
    """What `model` writes after `ids`, with `kv` attached meanwhile.

    At temperature 0 every token is the likeliest; above, it is sampled from the whole distribution. A `streamer` is
    shown the tokens as they come.
    """
    check_positions(model.config, ids.shape[1] + max_new_tokens, "the prompt with what is generated")
    ids = ids.to(input_device(model))
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = plain_generation(model, tokenizer, max_new_tokens=max_new_tokens, **sampling)
    with attach(model, kv) if kv is not None else nullcontext(), config as plain:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain, streamer=streamer)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@contextmanager
def plain_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, end: Collection[int] = (), **settings: Any
) -> Iterator[GenerationConfig]:
    """A configuration of `settings` alone, ending at the checkpoint's end-of-sequence ids or those of `end`.

    Nothing else of the checkpoint's own (top-p, penalties, …) creeps in meanwhile, as `generate` would let it.
    """
    kept: Any = model.generation_config
    own = kept.eos_token_id if kept is not None else tokenizer.eos_token_id
    ids = {*end, *([own] if isinstance(own, int) else own or ())}
    config: Any = GenerationConfig(
        num_beams=1, use_cache=True, eos_token_id=sorted(ids) or None, pad_token_id=padding(tokenizer), **settings
    )
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = kept


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with. Any id does, since it is masked."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in known if i is not None)
