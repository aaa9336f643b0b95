"""Run a method's recipe on a model in memory, in place, and show it in between: transformed, not yet rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from intactkv.error import IntactKVError, first_line
from intactkv.quantizing.aware import PrefixAware
from intactkv.quantizing.causal import causal
from intactkv.quantizing.methods import AWQ, Method, fitted
from intactkv.quantizing.quiet import patched

# A transform must leave the function alone. Of the logits' spread, float32 leaves 1e-5 and bfloat16 some hundredths; an
# architecture whose norms or residuals a recipe misjudges is off by about 1.
_SAME = 0.1
_TOKENS_AT_ONCE = 4096


def compress_(
    full: PreTrainedModel,
    method: Method,
    calibration: Int[Tensor, "window token"] | None = None,
    *,
    aware: PrefixAware | None = None,
    transformed: Callable[[PreTrainedModel], Any] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Method:
    """Transform and round `full` by `method`, in place; its weights are rounded, not yet packed.

    Returns `method` as it was done, with its group size where it was "auto". `transformed` is called once with the
    model after the transforms and before any rounding, which is switched off for it; there `aware`, which says what
    steps are shown of the calibration, is given the intact KV. `aware` must have been made for
    `batches(calibration, method)`. `device` None is an accelerator if there is one. `progress(done, total)` counts
    blocks.

    Raises IntactKVError where the method does not fit the model.
    """
    from llmcompressor import oneshot
    from llmcompressor.core import LifecycleCallbacks, create_session
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.pipelines.cache import IntermediatesCache

    from intactkv.quantizing.steps import Callback, in_float32

    linearize_moe(full)  # experts kept in one tensor become Linear layers; a dense model is left alone
    widths, ignore = _targets(full)
    method = fitted(method, widths)
    if aware is not None and isinstance(method, AWQ) and any(isinstance(m, LinearExperts2D) for m in full.modules()):
        raise IntactKVError(
            f"AWQ cannot leave prefix tokens out on {type(full).__name__}, whose experts get tokens without their "
            "places; use GPTQ, or prefix_weight=1"
        )
    probe, before = _probe(full, calibration), None
    if method.basis != "full":
        with in_float32(full):
            before = _logits(full, probe)

    def look(model: PreTrainedModel) -> None:
        if before is None and transformed is None:
            return  # a model in half precision takes its room again in float32
        with in_float32(model):
            if before is not None:
                _check_same(before, _logits(model, probe), method, model)
            if transformed is not None:
                transformed(model)

    try:
        steps = [*method.transforms(full), Callback(function=unrounded(look)), *method.rounding(full, ignore)]
        count = _ticker(LifecycleCallbacks.sequential_epoch_end, steps, full, progress)
        no_tokenizer: Any = object()  # without one oneshot looks for its own, and fails where there is none
        # A method that learns nothing is shown something all the same: llm-compressor wants data to set up a KV cache.
        shown = calibration if calibration is not None and method.needs_calibration else probe
        masks = aware.masks if aware is not None and isinstance(method, AWQ) else None
        with (
            create_session(),
            causal(full),
            nullcontext() if aware is None else aware.opened(full),
            patched(IntermediatesCache, "pin_memory", _pin(IntermediatesCache)),
            patched(LifecycleCallbacks, "sequential_epoch_end", count),
            nullcontext() if device is None else _on(torch.device(device)),
        ):
            data = _loader(batches(shown, method), masks)
            oneshot(model=full, recipe=steps, dataset=data, processor=no_tokenizer, use_loss_mask=masks is not None)
    except IntactKVError:
        raise
    except (Exception, SystemExit) as error:  # llm-compressor raises whatever its parts do, AutoRound even exits
        raise IntactKVError(
            f"llm-compressor's {type(method).__name__} fails on {type(full).__name__} ({first_line(error)}); "
            "use RTN or another model"
        ) from error
    return method


def unrounded(function: Callable[[PreTrainedModel], Any]) -> Callable[[PreTrainedModel], None]:
    """`function`, called with all rounding of its model switched off, which is afterwards as it was."""

    def call(model: PreTrainedModel) -> None:
        from compressed_tensors.quantization import disable_quantization

        modules: list[Any] = [module for module in model.modules() if hasattr(module, "quantization_enabled")]
        before = [module.quantization_enabled for module in modules]
        model.apply(disable_quantization)
        try:
            function(model)
        finally:
            for module, enabled in zip(modules, before, strict=True):
                module.quantization_enabled = enabled

    return call


def _targets(full: PreTrainedModel) -> tuple[dict[str, int], list[str]]:
    """The input widths of the Linear layers to round, by name, and the names of those *not* to: the output head's.

    Raises where there is nothing to round.
    """
    head = full.get_output_embeddings()
    layers = [(name, module) for name, module in full.named_modules() if type(module) is nn.Linear]
    widths = {name: layer.in_features for name, layer in layers if layer is not head}
    if not widths:
        raise IntactKVError(f"{type(full).__name__} has no torch.nn.Linear to quantize; use another model")
    return widths, [name for name, layer in layers if layer is head]


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """llm-compressor's pipelines and AutoRound compute on `device`, where they would take any accelerator there is."""
    from llmcompressor.modifiers.autoround import AutoRoundModifier
    from llmcompressor.pipelines.data_free import pipeline as data_free
    from llmcompressor.pipelines.sequential import pipeline as sequential

    def map_(modifier: AutoRoundModifier, settings: dict[str, Any]) -> None:
        if device.type == "cpu" or device.index is not None:
            settings["device_map"] = str(device)

    with ExitStack() as stack:
        for pipeline in (data_free, sequential):
            stack.enter_context(patched(pipeline, "get_main_device", lambda: device))
        stack.enter_context(patched(AutoRoundModifier, "_update_device_map_for_dp", map_))
        yield


def _pin(cache: Any) -> Callable[..., None]:
    """Memory can be pinned for an accelerator only; without one AWQ would fail in trying."""
    return cache.pin_memory if torch.accelerator.is_available() else lambda *args, **kwargs: None


def batches(calibration: Int[Tensor, "window token"], method: Method) -> tuple[Int[Tensor, "window token"], ...]:
    """The windows as `method` is shown them: at most so many tokens in a batch, or one window."""
    return calibration.split(1 if method.levels.one_by_one else max(1, _TOKENS_AT_ONCE // calibration.shape[1]))


def _loader(ids: Sequence[Tensor], masks: Sequence[Tensor] | None) -> DataLoader[Any]:
    """Batches as llm-compressor takes them, with AWQ's token masks beside them if there are any."""
    rows: Any = [{"input_ids": batch} for batch in ids]
    if masks is not None:
        rows = [{**row, "loss_mask": mask.long()} for row, mask in zip(rows, masks, strict=True)]
    return DataLoader(rows, batch_size=None)


def _probe(full: PreTrainedModel, calibration: Int[Tensor, "window token"] | None) -> Int[Tensor, "1 token"]:
    """A few tokens to compare logits on."""
    vocab = full.config.get_text_config(decoder=True).vocab_size
    return torch.arange(min(32, vocab))[None] if calibration is None else calibration[:1, :32]


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token vocab"]:
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def _check_same(before: Tensor, after: Tensor, method: Method, model: PreTrainedModel) -> None:
    off = float((after - before).std() / before.std())
    if not off < _SAME:
        raise IntactKVError(
            f"{method.basis} changes what {type(model).__name__} computes (its logits by {off:.2g} of their spread, "
            f"{_SAME} is allowed), so llm-compressor does not know this architecture; use RTN or GPTQ"
        )


def _ticker(
    event: Callable[..., Any], steps: list[Any], full: PreTrainedModel, progress: Callable[[int, int], None] | None
) -> Callable[..., Any]:
    """llm-compressor's end-of-block event, which also reports how many of all blocks of all steps are done."""
    blocks = full.config.get_text_config(decoder=True).num_hidden_layers + 1
    total = sum(blocks if step.requires_calibration_data else 1 for step in steps)
    done = 0

    def ended(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = event(*args, **kwargs)
        done = min(done + 1, total)
        if progress is not None:
            progress(done, total)
        return result

    return ended
