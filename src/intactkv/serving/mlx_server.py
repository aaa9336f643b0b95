"""mlx_lm.server, every prompt of which begins with the intact rows that it shares.

The server computes a prompt behind what its prompt cache holds of it. A prefix put there once is a conversation among
others: the eleventh drops it, and from then on answers are the plain model's, without a word. So here the cache itself
has the prefix: it hands out no beginning with fewer intact rows than prompt and prefix share, and keeps none whose rows
are others, bit by bit. Nothing of mlx-lm is changed: it takes a cache, a model and a handler from its caller.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Event
from typing import Any

from intactkv.error import IntactKVError, first_line

try:
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache, LRUPromptCache
    from mlx_lm.server import APIHandler, ModelProvider, ResponseGenerator, get_system_fingerprint
    from mlx_lm.utils import maybe_set_recommended_wired_limit
except ImportError as error:
    raise IntactKVError(
        f"serving an MLX model needs mlx-lm 0.32 (with mlx[cpu] on Linux), and {first_line(error)}; pip install mlx-lm"
    ) from error

from intactkv.artifact import IntactKV
from intactkv.serving.layout import common_prefix, rows_due
from intactkv.serving.mlx import filled, rows_for

_REFUSED = {
    "--model": "MODEL is", "--adapter-path": "an adapter's keys and values are not the intact ones",
    "--draft-model": "a draft model has no intact rows", "--num-draft-tokens": "a draft model has no intact rows",
    "--kv-bits": "it rounds the intact rows too", "--kv-group-size": "it rounds the intact rows too",
    "--quantized-kv-start": "it rounds the intact rows too", "--pipeline": "there is one process",
}  # fmt: skip


class PromptCache(LRUPromptCache):
    """The server's prompt cache, in which every prompt finds the intact rows that are due to it."""

    def __init__(self, ids: Sequence[int], size: int) -> None:
        super().__init__(size)
        self.ids = list(ids)
        self._model: Any = None
        self._rows: list[tuple[Any, Any]] = []

    def begin_with(self, rows: list[tuple[Any, Any]], model: Any) -> None:
        """Let prompts of `model` begin with these rows of the prefix."""
        self._rows, self._model = rows, model

    def due(self, tokens: Sequence[int]) -> int:
        """How many intact rows a prompt stands on; its last token is computed."""
        return rows_due(tokens, self.ids)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """What is held of a prompt, at least its intact rows, and the tokens that are left to compute, at least one."""
        held, rest = super().fetch_nearest_cache(model, tokens)
        due = self.due(tokens)
        if rest and len(tokens) - len(rest) >= due:
            return held, rest
        return (filled(self._model, self._rows, due) if due else None), tokens[due:]

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant"
    ) -> None:
        """Keep a conversation, unless the rows that it shares with the prefix are not the intact ones.

        They are not where a prompt ended inside the prefix: its last token was computed.
        """
        if self._intact(tokens, prompt_cache):
            super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)

    def _intact(self, tokens: Sequence[int], caches: Sequence[Any]) -> bool:
        if not (count := common_prefix(tokens, self.ids)):
            return True
        same = [
            mx.array_equal(held[:, :, :count], row[:, :, :count])
            for each, pair in zip(caches, self._rows, strict=True)
            if isinstance(each, KVCache) or each.offset <= each.max_size  # a window that has moved on holds no prefix
            for held, row in zip((each.keys, each.values), pair, strict=True)
        ]
        return bool(same) and bool(mx.all(mx.stack(same)))


class Provider(ModelProvider):
    """The one model that is served. Loaded in the server's own thread, in which MLX wants its arrays."""

    def __init__(self, given: argparse.Namespace, kv: IntactKV, cache: PromptCache, *, check: bool) -> None:
        super().__init__(given)
        self._kv, self._cache, self._check = kv, cache, check
        self._names = {"default_model", given.model, str(Path(given.model).resolve())}
        self.tried = Event()
        self.failed: Exception | None = None

    def load_default(self) -> None:
        """Load it, and its intact rows; what fails is in `failed`."""
        try:
            super().load_default()
            self._cache.begin_with(rows_for(self._kv, self.model, self.cli_args.model, check=self._check), self.model)
        except Exception as error:
            self.failed = error
        finally:
            self.tried.set()

    def reset(self) -> None:
        """Let go of them, and of all that is cached: in the same thread, as mlx-lm does with its own."""
        super().reset()
        self._cache.begin_with([], None)
        self._cache.trim_to(n_sequences=0)

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """The model, where a request asks for no other. Raises `IntactKVError` where it does."""
        if model_path not in self._names:
            raise IntactKVError(f"model={model_path!r} has no intact rows here; ask for {self.cli_args.model}")
        if adapter_path is not None or draft_model_path not in (None, "default_model"):
            raise IntactKVError("adapters and draft models have no intact rows; leave adapters and draft_model out")
        return super().load("default_model", None, "default_model")


class Generator(ResponseGenerator):
    """What answers requests; an answer that does not stand on its intact rows is none."""

    def __init__(self, provider: Provider, cache: PromptCache) -> None:
        self._due = cache.due
        super().__init__(provider, cache)

    def generate(self, request: Any, generation_args: Any, progress_callback: Any = None) -> tuple[Any, Iterator[Any]]:
        """mlx-lm's own, whose tokens wait until it says what came from the cache; `IntactKVError` for no prompt."""
        if request.request_type == "text" and not request.prompt and not self.model_provider.tokenizer.encode(""):
            raise IntactKVError("the prompt has no tokens; send a text")
        context, answers = super().generate(request, generation_args, progress_callback)
        return context, self._seen(context, answers)

    def _seen(self, context: Any, answers: Iterator[Any]) -> Iterator[Any]:
        for answer in answers:
            if context.prompt_cache_count < self._due(context.prompt):
                raise IntactKVError(
                    f"mlx-lm took {context.prompt_cache_count} tokens from its cache, of {self._due(context.prompt)} "
                    "intact ones; not served"
                )
            yield answer


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise IntactKVError(f"{message}; see mlx_lm.server --help")


def options(model: str, arguments: Sequence[str]) -> argparse.Namespace:
    """mlx_lm.server's options, with its defaults. Raises `IntactKVError` for others, and those that cannot be right."""
    for argument in arguments:
        if (why := _REFUSED.get(argument.partition("=")[0])) is not None:
            raise IntactKVError(f"{argument} cannot be given to mlx_lm.server here ({why}); leave it out")
    parser = _Parser(prog="mlx_lm.server", add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--allowed-origins", type=lambda said: said.split(","), default="*")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
    parser.add_argument("--chat-template", default="")
    parser.add_argument("--use-default-chat-template", action="store_true")
    parser.add_argument("--chat-template-args", type=json.loads, default="{}")
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--decode-concurrency", type=int, default=32)
    parser.add_argument("--prompt-concurrency", type=int, default=8)
    parser.add_argument("--prefill-step-size", type=int, default=2048)
    parser.add_argument("--prompt-cache-size", type=int, default=10)
    parser.add_argument("--prompt-cache-bytes", type=int)
    without = {"adapter_path": None, "draft_model": None, "num_draft_tokens": 0, "pipeline": False}
    rounded = {"kv_bits": None, "kv_group_size": 64, "quantized_kv_start": 0}
    return parser.parse_args(arguments, argparse.Namespace(model=model, **without, **rounded))


def serve(
    model: str, kv: IntactKV, arguments: Sequence[str], *, check: bool = True, said: Callable[[str], None] = print
) -> None:
    """Serve an MLX model until SIGINT or SIGTERM.

    Raises `IntactKVError` for a `kv` that is not `model`'s, options that cannot be right, several processes, and a port
    that is taken.
    """
    given = options(model, arguments)
    if mx.distributed.init().size() > 1:
        raise IntactKVError("several processes hold parts of keys and values; start one, without mlx.launch")
    logging.basicConfig(level=given.log_level, format="%(asctime)s - %(levelname)s - %(message)s")
    maybe_set_recommended_wired_limit()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    cache = PromptCache(kv.ids.tolist(), given.prompt_cache_size)
    provider = Provider(given, kv, cache, check=check)
    generator = Generator(provider, cache)
    try:
        provider.tried.wait()
        if provider.failed is not None:
            raise provider.failed
        handler = partial(APIHandler, generator, system_fingerprint=get_system_fingerprint())
        try:
            server = ThreadingHTTPServer((given.host, given.port), handler)
        except OSError as error:
            raise IntactKVError(
                f"cannot listen on {given.host}:{given.port} ({first_line(error)}); choose --port"
            ) from error
        with server:
            said(f"serving {model} with {len(kv)} intact tokens on http://{given.host}:{given.port}")
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        generator.stop_and_join()
        signal.signal(signal.SIGTERM, before)
