"""Let a model read a packed cache as it is, and tell the cache where padded rows begin."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from intactkv.attaching.locate import NEVER
from intactkv.attaching.masks import as_tensor, real_tokens
from intactkv.decoder import given_cache
from intactkv.error import IntactKVError
from intactkv.packed.attention import Partial, attend, dense_step, empty_partial, merged, packed_attention
from intactkv.packed.bits import hadamard
from intactkv.packed.cache import PackedCache
from intactkv.packed.fused import fused_attention, fused_step
from intactkv.packed.graphs import Graphs
from intactkv.packed.lazy import LazyStates
from intactkv.packed.readable import Stored
from intactkv.packed.steady import on_gpu
from intactkv.packed.store import Packed

NAME, COMPILED, UNBIASED = "intactkv_packed", "intactkv_packed_compiled", "intactkv_packed_unbiased"
FEW = 16  # queries a row that are worth reading block by block; more are a chunk of a prompt


def read_packed(
    model: PreTrainedModel, *, compile: bool = False, graphs: bool = False, unbiased: bool = False
) -> PackedReads:
    """Make `model` read packed caches block by block until the handle is removed; use it with `with`.

    It sets the model's attention implementation, which is exact with and without a packed cache, and tells a
    `PackedCache` where each row begins. `compile` compiles a layer's read, or its work on one block (it takes a C++
    compiler on CPUs). `graphs` replays decoding steps on a GPU from a CUDA graph, which is captured once for each
    cache: for many tokens it saves most of a step's time, for a few it costs more than it saves. Models that do not
    call transformers' attention interface still get dense keys and values: right, and slower.

    `unbiased` gives tokens in full precision the attention that rounded keys take from them: errors of scores raise
    the weights of rounded tokens on average, by what their scales tell (Tuncer et al., 2026, arXiv 2605.26266). PyTorch
    reads then, block by block, on a GPU too, the chunks of a prompt after the first as well.

    Raises `IntactKVError` for a model that already reads so, with `graphs` for one that is not on one GPU, and with
    `unbiased` beside `compile` or `graphs` and for a model that does not give its cache's keys to transformers'
    attention interface.
    """
    if unbiased and (compile or graphs):
        raise IntactKVError("unbiased=True is read by PyTorch, neither compiled nor from graphs; give one of them")
    latent = getattr(model.config, "kv_lora_rank", None) is not None  # keys are made of what the cache gives (MLA)
    if unbiased and (latent or not getattr(model, "_supports_attention_backend", False)):
        raise IntactKVError(
            "unbiased=True takes a model that gives its cache's keys to transformers' attention interface; "
            f"{type(model).__name__} does not; leave it out"
        )
    if graphs and not on_gpu(next(model.parameters())):
        raise IntactKVError(
            f"graphs=True takes a model on an NVIDIA or AMD GPU and Triton; this one is on {model.device}; leave it out"
        )
    places = sorted({str(parameter.device) for parameter in model.parameters()}) if graphs else []
    if len(places) > 1:
        raise IntactKVError(f"graphs=True takes a model on one GPU; this one is on {', '.join(places)}; leave it out")
    if model.config._attn_implementation in (NAME, COMPILED, UNBIASED):
        raise IntactKVError("the model already reads packed caches; call .remove() on that handle first")
    return PackedReads(model, COMPILED if compile else UNBIASED if unbiased else NAME, graphs=graphs)


class PackedReads:
    """The handle of one `read_packed`."""

    def __init__(self, model: PreTrainedModel, name: str, *, graphs: bool = False) -> None:
        for each, function in ((NAME, forward), (COMPILED, compiled_forward), (UNBIASED, unbiased_forward)):
            AttentionInterface.register(each, function)
            AttentionMaskInterface.register(each, sdpa_mask)
        self._model: PreTrainedModel | None = model
        self._before = model.config._attn_implementation
        self._signature = inspect.signature(model.forward)
        model.set_attn_implementation(name)
        self._hook = model.register_forward_pre_hook(self._tell, with_kwargs=True)
        self._graphs = Graphs(model) if graphs else None

    def remove(self) -> None:
        """Give the model its own attention back; may be called twice."""
        if self._model is not None:
            self._hook.remove()
            if self._graphs is not None:
                self._graphs.remove()
            self._model.set_attn_implementation(self._before)
            self._model = None

    def __enter__(self) -> PackedReads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @torch.compiler.disable
    def _tell(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook: nothing is left to say once every row has begun and holds what it keeps."""
        if kwargs.get("output_attentions") or model.config.output_attentions:
            raise IntactKVError(
                "output_attentions=True asks for maps that reading in blocks never forms; leave it out, or call "
                ".remove() on the handle of read_packed first"
            )
        cache = given_cache(kwargs)
        if not isinstance(cache, PackedCache):
            return
        past, rows = cache.get_seq_length(), cache.rows
        if rows.padding_known and past >= rows.until and rows.until < NEVER:
            return
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        ids = arguments.get("input_ids")
        if ids is None:
            embeds = arguments.get("inputs_embeds")
            if embeds is None:
                return
            ids = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        rows.set_padding(real_tokens(as_tensor(arguments.get("attention_mask")), ids, past), past)


def forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Attention over what `PackedLayer.update` gave back, in transformers' form; dense keys go to SDPA."""
    return _forward(module, (query, key, value), attention_mask, more)


def compiled_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """`forward` with its work compiled."""
    return _forward(module, (query, key, value), attention_mask, more, compile=True)


def unbiased_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """`forward` with what rounding adds to weights on average taken off."""
    return _forward(module, (query, key, value), attention_mask, more, unbiased=True)


@torch.compiler.disable
def _forward(
    module: nn.Module,
    states: Any,
    mask: Tensor | None,
    more: dict[str, Any],
    *,
    compile: bool = False,
    unbiased: bool = False,
) -> tuple[Tensor, None]:
    query, key, value = states
    softcap, sinks = more.pop("softcap", None), more.pop("s_aux", None)
    scaling = query.shape[-1] ** -0.5 if more.get("scaling") is None else more["scaling"]
    plain, few = not more.get("dropout") and more.get("position_bias") is None, query.shape[2] <= FEW
    lazy = isinstance(key, LazyStates) and isinstance(value, LazyStates)
    if lazy and unbiased and (parts := key.stored.in_parts()).runs:
        if not plain:
            raise IntactKVError("unbiased=True knows neither dropout nor a position bias; leave it out")
        return _attend_stored(query * scaling, parts, mask=mask, softcap=softcap, sinks=sinks, unbiased=True), None
    if lazy and plain and few:
        stored = key.stored
        quick = stored.in_place(query, mask, scaling=scaling, softcap=softcap, sinks=sinks)
        if quick is None:
            parts = stored.in_parts()
            quick = _attend_stored(query * scaling, parts, mask=mask, softcap=softcap, sinks=sinks, compile=compile)
        return quick, None
    key, value = (x.stored.dense(x.which) if isinstance(x, LazyStates) else x for x in (key, value))
    if softcap is None and sinks is None:
        return sdpa_attention_forward(module, query, key, value, mask, **more)
    only_tail = Stored((), (key, value), 0, None, None, None, (0, 0), False)
    return _attend_stored(query * scaling, only_tail, mask=mask, softcap=softcap, sinks=sinks), None


def _attend_stored(
    query: Tensor,
    stored: Stored,
    *,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    compile: bool = False,
    unbiased: bool = False,
) -> Tensor:
    """Attention `(batch, token, head, dim)` of scaled queries `(batch, head, token, dim)` over all stored tokens."""
    batch, heads, tokens, dim = query.shape
    if compile and tokens == 1 and query.device.type == "cpu" and mask is None and softcap is None and sinks is None:
        quick = fused_attention(query, stored)
        if quick is not None:
            return quick
    kv_heads, dtype = stored.tail[0].shape[1], query.dtype
    rows = query.to(torch.promote_types(dtype, torch.float32)).reshape(batch, kv_heads, -1, dim)
    mask = _by_rows(mask, stored, query, kv_heads)
    begin = None
    if stored.start is not None and stored.count is not None:
        begin = torch.where(stored.count > 0, stored.start + stored.count, 0)
    parts = [_full_part(rows, stored, mask, softcap)]
    turned = rows @ hadamard(dim, rows.dtype, rows.device) if stored.rotated else rows
    for run, key, value in stored.runs:
        cut, hides = 0, begin
        if stored.uniform is not None and not key.token_group:  # cut off what is kept elsewhere, and mask nothing
            start, count = stored.uniform
            cut, hides = (min(max(start + count - run.column, 0), run.length) if count else 0), None
        at = slice(run.column + cut, run.column + run.length)
        key, value = key.slice(cut, run.length), value.slice(cut, run.length)
        exact = dtype == torch.float32
        part = _reader(turned, key, value, compile=compile, exact=exact, unbiased=unbiased)(
            turned,
            key,
            value,
            begin=None if hides is None else hides - run.column,
            mask=None if mask is None else mask[..., at],
            softcap=softcap,
        )
        if stored.rotated:
            part = part._replace(acc=part.acc @ hadamard(value.dim, rows.dtype, rows.device))
        parts.append(part)
    if sinks is not None:  # a learned score that draws attention and gives nothing
        peak = sinks.to(rows.dtype).view(1, kv_heads, -1, 1, 1).expand(batch, -1, -1, tokens, 1).flatten(2, 3)
        parts.append(Partial(torch.zeros_like(parts[0].acc), peak, torch.ones_like(peak)))
    all_ = merged(parts)
    out = all_.acc / all_.total.clamp(min=torch.finfo(rows.dtype).tiny)  # a row of padding sees nothing: zeros
    return out.view(batch, heads, tokens, -1).transpose(1, 2).to(dtype).contiguous()


def _reader(
    query: Tensor, key: Packed, value: Packed, *, compile: bool, exact: bool, unbiased: bool
) -> Callable[..., Partial]:
    """The Triton kernel on a GPU, where Triton is installed and serves these shapes; else PyTorch, block by block."""
    if query.is_cuda and query.dtype == torch.float32 and len(key) and not unbiased and find_spec("triton"):
        from intactkv.packed.kernel import fits, packed_attention_gpu

        if fits(key, value, query.shape[2]):
            return partial(packed_attention_gpu, exact=exact)
    step = fused_step(query, key, value) if compile and query.device.type == "cpu" else None
    return partial(packed_attention, step=step or dense_step(key, compile=compile, unbiased=unbiased))


def _full_part(rows: Tensor, stored: Stored, mask: Tensor | None, softcap: float | None) -> Partial:
    """Attention over the kept and the newest tokens, all in full precision."""
    key, value = stored.tail
    if mask is None and stored.kept is not None and stored.uniform is not None:  # all of both are seen: one product
        key, value = (
            torch.cat([x[:, :, : stored.uniform[1]], y], 2) for x, y in zip(stored.kept, (key, value), strict=True)
        )
        return attend(rows, key, value, None, empty_partial(rows, value.shape[-1]), softcap)
    seen = None if mask is None else mask[..., stored.tail_column :]
    state = empty_partial(rows, value.shape[-1])
    if key.shape[2]:
        state = attend(rows, key, value, seen, state, softcap)
    if stored.kept is None or stored.start is None or stored.count is None:
        return state
    if stored.uniform is not None:
        start, count = stored.uniform
        kept = stored.kept[0][:, :, :count], stored.kept[1][:, :, :count]
        return attend(rows, *kept, None if mask is None else mask[..., start : start + count], state, softcap)
    index = torch.arange(stored.kept[0].shape[2], device=rows.device)
    seen = (index < stored.count[:, None])[:, None, None]
    if mask is not None:
        column = (stored.start[:, None] + index).clamp(0, mask.shape[-1] - 1)
        picked = mask.expand(len(rows), -1, -1, -1).gather(3, column[:, None, None].expand(-1, *mask.shape[1:3], -1))
        seen = seen & picked if mask.dtype == torch.bool else picked.masked_fill(~seen, -torch.inf)
    return attend(rows, *stored.kept, seen, state, softcap)


def _by_rows(mask: Tensor | None, stored: Stored, query: Tensor, kv_heads: int) -> Tensor | None:
    """The mask `(batch, 1 or kv_head, 1 or row, column)` for queries whose heads are folded into rows."""
    heads, tokens = query.shape[1:3]
    columns = stored.tail_column + stored.tail[0].shape[2]
    if mask is None:
        if tokens == 1:
            return None
        at = torch.arange(columns, device=query.device)
        mask = (at <= at[columns - tokens :, None])[None, None]
    mask = mask[..., :columns]
    if mask.shape[1] == 1:
        return mask if tokens == 1 else mask.repeat(1, 1, heads // kv_heads, 1)
    return mask.reshape(mask.shape[0], kv_heads, -1, columns)
