"""The methods: each a frozen dataclass whose fields are its settings, and a short llm-compressor recipe.

A recipe has two parts. `transforms` rewrite the full model into an equal one that rounds better: AWQ's and
SmoothQuant's scales, rotations. `rounding` then rounds it, weights and perhaps activations and the KV cache. Between
the two, and only there, stands the model whose keys and values are intact *in the quantized model's basis*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from transformers import PreTrainedModel

from intactkv.error import IntactKVError

_BITS = (2, 3, 4, 8)

# The scale of all tokens' inputs with the least mean squared error, a batch's share being 0.1: a third of the KL of the
# largest input's scale. llm-compressor's own settings search no further down than 0.8 of that, too little for integers.
_LEAST_SQUARES = {
    "observer": "mse",
    "observer_kwargs": {"norm": 2.0, "maxshrink": 0.98, "patience": 20, "averaging_constant": 0.1},
}


@dataclass(frozen=True)
class _Levels:
    """What is rounded, and to how many levels. RTN is the plainest of those who use it, see there."""

    bits: int = 4
    group_size: int | Literal["auto"] | None = 128
    symmetric: bool = True
    activation_bits: int | None = None
    kv_bits: int | None = None
    static_activations: bool = False
    float8: bool = False

    basis: ClassVar[str] = "full"
    learns: ClassVar[bool] = False  # do the weights' levels depend on what is shown?
    one_by_one: ClassVar[bool] = False  # must it be shown one window at a time?

    def __post_init__(self) -> None:
        for name in ("bits", "activation_bits", "kv_bits"):
            if (value := getattr(self, name)) not in _BITS and (value is not None or name == "bits"):
                raise IntactKVError(f"{name}={value} is not supported; use one of {', '.join(map(str, _BITS))}")
        if self.group_size not in (None, "auto") and (isinstance(self.group_size, str) or self.group_size < 1):
            raise IntactKVError(
                f'group_size={self.group_size} must be positive; 128 is usual, None is one whole row, "auto" what fits'
            )
        if self.static_activations and self.activation_bits is None:
            raise IntactKVError("static_activations=True says how inputs are rounded; give activation_bits, 8 is usual")
        if self.float8 and (self.bits, self.activation_bits) not in ((8, None), (8, 8)):
            raise IntactKVError(
                f"float8=True is 8 bits, not bits={self.bits}, activation_bits={self.activation_bits}; use 8"
            )

    @property
    def levels(self) -> _Levels:
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is learned from text: weights' levels, or the ranges of inputs."""
        return self.learns or self.static_activations

    @property
    def weighs(self) -> bool:
        """Whether a window can count in part, as in a mean; ranges and AutoRound's own batches know all or none."""
        return self.learns and not self.static_activations

    def fitted(self, widths: dict[str, int]) -> _Levels:
        """These settings for layers of these input widths, with "auto" groups of the largest size that fits them all.

        Sizes are powers of two up to 128, which engines have kernels for. Raises IntactKVError naming the first layer
        that cannot be cut into groups, and the sizes that fit all.
        """
        fitting = [size for size in (128, 64, 32, 16) if not any(width % size for width in widths.values())]
        if self.group_size == "auto":
            return replace(self, group_size=fitting[0] if fitting else None)
        for name, width in widths.items():
            if self.group_size is not None and width % self.group_size:
                fit = (
                    f"{', '.join(map(str, fitting))} fit every layer" if fitting else "no power of two from 16 on fits"
                )
                raise IntactKVError(
                    f"group_size={self.group_size} does not divide in_features={width} of {name}; {fit}, "
                    '"auto" takes the largest'
                )
        return self

    def transforms(self, full: PreTrainedModel) -> list[Any]:
        return []

    def rounding(self, full: PreTrainedModel, ignore: Sequence[str]) -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return [QuantizationModifier(**self._scheme(full, ignore))]

    def _scheme(self, full: PreTrainedModel, ignore: Sequence[str]) -> dict[str, Any]:
        """The same for every modifier that rounds: Linear layers but the ignored, their inputs, the KV cache."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        grid = {"strategy": "channel"} if self.group_size is None else {"group_size": self.group_size}
        number = "float" if self.float8 else "int"
        weights = QuantizationArgs(num_bits=self.bits, type=number, symmetric=self.symmetric, **grid)
        inputs = kv_cache = None
        if self.activation_bits is not None:
            scales = {"strategy": "token", "dynamic": True}
            if self.static_activations:
                observer = {"observer": "static_minmax"} if self.float8 else _LEAST_SQUARES
                scales = {"strategy": "tensor", "dynamic": False, **observer}
            inputs = QuantizationArgs(num_bits=self.activation_bits, type=number, symmetric=True, **scales)
        if self.kv_bits is not None:
            # One scale for each head of each token. Strategy "token" would give one to all tokens of a head: its
            # dimensions are (batch, token, hidden), the cache's (batch, head, token, dim).
            one_head = {"strategy": "group", "group_size": head_dim(full)}
            kv_cache = QuantizationArgs(num_bits=self.kv_bits, symmetric=False, dynamic=True, **one_head)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
        return {"config_groups": {"group_0": scheme}, "kv_cache_scheme": kv_cache, "ignore": list(ignore)}


@dataclass(frozen=True)
class RTN(_Levels):
    """Round every weight to the nearest of 2^bits levels, spaced evenly over `group_size` weights of its row.

    Symmetric levels are centred on zero: scale = max|w| / ((2^bits - 1) / 2). Asymmetric ones run from
    min(w, 0) to max(w, 0) and keep a zero point: about 10 % less error, but transformers 5.23 loads them only
    with `quantization_config=CompressedTensorsConfig(dequantize=True)`; 5.17 needs no flag for either.
    `group_size=None` is one group for a whole row. With `activation_bits`, the inputs of every quantized layer are
    rounded too when the model runs, symmetrically, each token on its own; with `static_activations`, all tokens with
    one scale, that of the least squared error in calibration (of float8, of the largest input). `float8` rounds to
    floating-point numbers (E4M3) instead of integers.
    With `kv_bits`, keys and values are rounded as they enter the cache, asymmetrically, each head of each token on its
    own.
    """


@dataclass(frozen=True)
class GPTQ(_Levels):
    """Round column after column, each time moving the error into the columns still to come.

    Columns go by falling activation size. `damping` is the share of the Hessian's mean diagonal added to it.
    Other settings as in `RTN`. Needs calibration.

    Source: Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323.
    """

    damping: float = 0.01

    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping < 1:
            raise IntactKVError(f"damping={self.damping} must lie between 0 and 1; 0.01 is usual")

    def rounding(self, full: PreTrainedModel, ignore: Sequence[str]) -> list[Any]:
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(dampening_frac=self.damping, **self._scheme(full, ignore))]


@dataclass(frozen=True)
class AWQ(_Levels):
    """Scale up the weights that large activations meet, then round to nearest.

    Each scale is the best of `grid` powers of the mean activation. Where a model has as many value as query heads,
    v_proj is scaled against o_proj: its values are then the full model's divided by a scale per channel.
    Other settings as in `RTN`. Needs calibration.

    Source: Lin et al., "AWQ", MLSys 2024, arXiv 2306.00978.
    """

    symmetric: bool = False
    grid: int = 20

    basis: ClassVar[str] = "awq"
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid < 3:
            raise IntactKVError(f"grid={self.grid} leaves nothing to choose from; use 3 or more, 20 is usual")

    def transforms(self, full: PreTrainedModel) -> list[Any]:
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier(n_grid=self.grid)]


@dataclass(frozen=True)
class AutoRound(_Levels):
    """Learn, block after block, by how much each weight is rounded up or down: `iterations` steps of signed descent.

    The maintained successor of learned clipping (OmniQuant). It works in bfloat16, and so is its checkpoint. Only
    symmetric levels: llm-compressor 0.14 loses the zero points of asymmetric ones. Other settings as in `RTN`.
    Needs calibration.

    Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", 2023, arXiv 2309.05516.
    """

    iterations: int = 200

    learns: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True

    @property
    def weighs(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.symmetric:
            raise IntactKVError("symmetric=False would lose AutoRound's zero points in llm-compressor; use True")
        if self.iterations < 1:
            raise IntactKVError(f"iterations={self.iterations} must be positive; 200 is usual")

    def rounding(self, full: PreTrainedModel, ignore: Sequence[str]) -> list[Any]:
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        from intactkv.quantizing.steps import Callback, cast_

        # AutoRound would turn the blocks alone into bfloat16, and the next float32 input would not fit them.
        types = {name.rpartition(".")[0]: torch.bfloat16 for name, _ in full.named_parameters()}
        cast = Callback(function=partial(cast_, types=types))
        tune = AutoRoundModifier(iters=self.iterations, enable_torch_compile=False, **self._scheme(full, ignore))
        return [cast, tune]


@dataclass(frozen=True)
class SmoothQuant:
    """Move the range of activations into weights, `strength` of it, then round both; W8A8 unless told otherwise.

    Needs calibration. Keys and values stay as they are: what is scaled are the norms before and the weights after.

    Source: Xiao et al., "SmoothQuant", ICML 2023, arXiv 2211.10438, equation 4.
    """

    levels: RTN | GPTQ = RTN(8, None, activation_bits=8)
    strength: float = 0.5

    basis: ClassVar[str] = "smoothquant"
    learns: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    weighs: ClassVar[bool] = False  # it learns ranges

    def __post_init__(self) -> None:
        _check_levels(self.levels)
        if not 0 <= self.strength <= 1:
            raise IntactKVError(f"strength={self.strength} must lie between 0 and 1; 0.5 is usual")

    def transforms(self, full: PreTrainedModel) -> list[Any]:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        return [SmoothQuantModifier(smoothing_strength=self.strength)]

    def rounding(self, full: PreTrainedModel, ignore: Sequence[str]) -> list[Any]:
        return self.levels.rounding(full, ignore)


@dataclass(frozen=True)
class Rotated:
    """Rotate by Hadamard matrices, which spreads outliers over all channels, then round; W4A4 unless told otherwise.

    R1 turns the residual stream, R2 the values of each head, and both vanish into the weights; R4 turns the input
    of the down projection while the model runs, and transformers drops it on loading: use
    `intactkv.checkpoint.load.load_model`, which puts it back. Matrices are block-diagonal in blocks of `block_size`, by
    default the largest power of two that divides both widths. Needs calibration if its `levels` do.

    Source: Ashkboos et al., "QuaRot", 2024, arXiv 2404.00456; Liu et al., "SpinQuant", 2024, arXiv 2405.16406.
    """

    levels: RTN | GPTQ = RTN(4, None, activation_bits=4)
    rotations: tuple[str, ...] = ("R1", "R2", "R4")
    block_size: int | None = None

    def __post_init__(self) -> None:
        _check_levels(self.levels)
        if not self.rotations or not set(self.rotations) <= {"R1", "R2", "R4"}:
            raise IntactKVError(f"rotations={self.rotations} must be some of 'R1', 'R2', 'R4'; all three is usual")
        if self.block_size is not None and not _is_power_of_two(self.block_size):
            raise IntactKVError(f"block_size={self.block_size} must be a power of two, or None for the largest")

    @property
    def basis(self) -> str:
        return " ".join(["rotated", *self.rotations])

    @property
    def learns(self) -> bool:
        return self.levels.learns

    @property
    def needs_calibration(self) -> bool:
        return self.levels.needs_calibration

    @property
    def weighs(self) -> bool:
        return self.levels.weighs

    def transforms(self, full: PreTrainedModel) -> list[Any]:
        from intactkv.quantizing.steps import Callback, Rotate, widen_

        if "R2" in self.rotations and not _is_power_of_two(head_dim(full)):
            raise IntactKVError(f"head_dim={head_dim(full)} is no power of two, which R2 needs; leave R2 out")
        settings: dict[str, Any] = {
            "rotations": list(self.rotations),
            "transform_block_size": self._block(full),
            "precision": torch.float32,  # of R4, in the model's forward; R1 and R2 are fused in float64
        }
        # in float32, or each rotation would round the weights to the stored type once more
        return [Callback(function=widen_), Rotate(**settings)]

    def rounding(self, full: PreTrainedModel, ignore: Sequence[str]) -> list[Any]:
        from intactkv.quantizing.steps import Callback, cast_

        types = {name.rpartition(".")[0]: parameter.dtype for name, parameter in full.named_parameters()}
        return [Callback(function=partial(cast_, types=types)), *self.levels.rounding(full, ignore)]

    def _block(self, full: PreTrainedModel) -> int:
        """The largest power of two in both widths, or the block asked for if it divides them."""
        config = full.config.get_text_config(decoder=True)
        widths = config.hidden_size, getattr(config, "intermediate_size", config.hidden_size)
        largest = min(width & -width for width in widths)
        if self.block_size is not None and largest % self.block_size:
            raise IntactKVError(
                f"block_size={self.block_size} does not divide the widths {widths[0]} and {widths[1]}; "
                f"use {largest} or a smaller power of two"
            )
        return self.block_size or largest


Method: TypeAlias = RTN | GPTQ | AWQ | AutoRound | SmoothQuant | Rotated


def fitted(method: Method, widths: dict[str, int]) -> Method:
    """`method` with group sizes for layers of these input widths; raises as `_Levels.fitted` does."""
    levels: Any = method.levels.fitted(widths)
    return replace(method, levels=levels) if isinstance(method, SmoothQuant | Rotated) else levels


def recipe(method: Method | _Levels) -> dict[str, Any]:
    """The method's name and settings as plain data for JSON."""
    settings = {field.name: getattr(method, field.name) for field in fields(method)}
    plain = {name: recipe(value) if isinstance(value, _Levels) else value for name, value in settings.items()}
    return {"method": type(method).__name__, **plain}


def head_dim(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check_levels(levels: Any) -> None:
    if type(levels) not in (RTN, GPTQ):
        raise IntactKVError(f"levels={levels!r} must be RTN(…) or GPTQ(…), the method that rounds after the transform")


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
