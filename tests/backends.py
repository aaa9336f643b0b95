"""Quantized formats as their own libraries write them and transformers loads them, on one tiny Llama; and their page.

A row is a function that quantizes the full model's folder and gives back how to load the result in a dtype, the way
users do. Its docstring is what the page says about how it was made.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf_model import write_gguf
from models import PREFIX, VOCAB, build, by_name
from transformers import AutoModelForCausalLM, PreTrainedModel

from intactkv.artifact.door import DOOR

Load = Callable[..., PreTrainedModel]  # of a dtype, and where the format allows of from_pretrained's arguments

# Every dimension suits every kernel: widths are multiples of 256, groups of 64 and 128 divide them.
DIMENSIONS = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.08}
GROUP = 64
ROWS: dict[str, dict[str, Any]] = {}  # what the tests measured, for the page
STEP = 0.05  # the change of a loss by which finite differences measure its slope


@dataclass(frozen=True)
class Backend:
    """One quantized format. `make(full, out)` writes it to folder `out` and returns how to load it."""

    name: str
    library: str  # the module that makes it, whose version the page gives
    make: Callable[[Path, Path], Load]
    needs: tuple[str, ...] = ()  # what must be importable beside it
    trap: str = ""
    error: str = ""  # what a row that does not run here says, as a regular expression
    rounds_activations: bool = False
    other_basis: bool = False  # K or V are not the full model's: attach refuses them unless told not to check
    mixes_rows: bool = False  # padding and neighbours change a row's logits, whatever is attached
    trainable: Callable[[Load], PreTrainedModel] | None = None  # the remedy where no gradient arrives

    @property
    def missing(self) -> str:
        """The first module it needs that is not installed, or nothing."""
        return next((module for module in (self.library, *self.needs) if not _found(module)), "")

    @property
    def how(self) -> str:
        make = self.make.func if isinstance(self.make, partial) else self.make
        return " ".join((make.__doc__ or "").split())


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def save_full(folder: Path) -> PreTrainedModel:
    """The full-precision model, saved with a tokenizer because some libraries ask for one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = build(by_name("llama-gqa"), **DIMENSIONS)
    model.save_pretrained(folder)
    words = WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), bos_token="w1", pad_token="w0")
    tokenizer.save_pretrained(folder)
    return model


def load(folder: Path, dtype: torch.dtype, **more: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **more)
    model.generation_config.eos_token_id = None  # some libraries write it back; a greedy run must not end early
    model.generation_config.pad_token_id = 0
    return model.eval()


def calibration(rows: int = 16, length: int = 64) -> list[list[int]]:
    """Random token ids that begin with the prefix."""
    ids = torch.randint(8, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
    ids[:, : len(PREFIX)] = torch.tensor(PREFIX)
    return ids.tolist()


# --- compressed-tensors, through llm-compressor


def round_to_nearest(full: Path, out: Path, *, symmetric: bool = True) -> Load:
    """`intactkv.quantizing`, `RTN(bits=4, group_size=64)`"""
    from intactkv.quantizing import RTN, quantize

    quantize(full, out, method=RTN(bits=4, group_size=GROUP, symmetric=symmetric))
    return partial(load, out)


def oneshot(full: Path, out: Path, *, recipe: Callable[[], list[Any]]) -> Load:
    """llm-compressor's `oneshot`"""
    from datasets import Dataset
    from llmcompressor import oneshot as run
    from llmcompressor.pipelines.cache import IntermediatesCache

    rows = calibration()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = AutoModelForCausalLM.from_pretrained(full)
    _register_metric_level()
    pin = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda *args, **kwargs: None  # it wants an accelerator
    try:
        run(model=model, recipe=recipe(), dataset=data, max_seq_length=64, num_calibration_samples=16,
            clear_sparse_session=True)  # fmt: skip
    finally:
        IntermediatesCache.pin_memory = pin
    model.save_pretrained(out, save_compressed=True)
    return partial(load, out)


def _register_metric_level() -> None:
    """llm-compressor's own log level, missing where it was first imported with its log disabled."""
    from loguru import logger

    try:
        logger.level("METRIC")
    except ValueError:
        logger.level("METRIC", no=38)


def _scheme(scheme: str, **more: Any) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"], **more)]


def _gptq() -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return [GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])]


def _awq() -> list[Any]:
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(), *_scheme("W4A16_ASYM")]


def _int8_kv() -> list[Any]:
    kv = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
    return _scheme("W4A16", kv_cache_scheme=kv)


def _rotated(*rotations: str) -> list[Any]:
    from llmcompressor.modifiers.transform import SpinQuantModifier

    hadamard = {"transform_block_size": 64, "transform_type": "hadamard"}
    return [SpinQuantModifier(rotations=list(rotations), **hadamard), *_scheme("W4A16")]


def rotated_online(full: Path, out: Path) -> Load:
    """llm-compressor's `oneshot`, loaded by `intactkv.checkpoint.load.load_model`"""
    from intactkv.checkpoint.load import load_model

    oneshot(full, out, recipe=partial(_rotated, "R1", "R2", "R4"))
    return lambda dtype: load_model(out, dtype=dtype)


# --- GPTQModel, AutoRound


def gptqmodel(full: Path, out: Path, **settings: Any) -> Load:
    """`GPTQModel.load(…).quantize(…)`"""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(full), QuantizeConfig(bits=4, group_size=GROUP, device="cpu", **settings))
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration()], batch_size=1)
    model.save(str(out))
    return partial(load, out)


def auto_round(full: Path, out: Path, *, form: str) -> Load:
    """`AutoRound(…, iters=2).quantize_and_save(…)`"""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    data = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))} for row in calibration()]
    AutoRound(
        AutoModelForCausalLM.from_pretrained(full), AutoTokenizer.from_pretrained(full), scheme="W4A16",
        group_size=GROUP, iters=2, nsamples=16, seqlen=64, batch_size=4, enable_torch_compile=False, device_map="cpu",
        dataset=torch.utils.data.DataLoader(data, batch_size=None),
    ).quantize_and_save(str(out), format=form)  # fmt: skip
    return partial(load, next(path.parent for path in sorted(out.rglob("config.json"))))


# --- quantized by transformers while it loads


def _saved(full: Path, out: Path, config: Callable[[torch.dtype], Any]) -> Load:
    """Quantized and saved in a dtype, then loaded from there."""

    def reload(dtype: torch.dtype) -> PreTrainedModel:
        load(full, dtype, quantization_config=config(dtype)).save_pretrained(out / str(dtype))
        return load(out / str(dtype), dtype)

    return reload


def bitsandbytes(full: Path, out: Path, *, config: Callable[[Any, torch.dtype], Any]) -> Load:
    """`BitsAndBytesConfig` while loading, saved, loaded"""
    return _saved(full, out, lambda dtype: config(transformers.BitsAndBytesConfig, dtype))


def torchao(full: Path, out: Path, *, config: Callable[[Any], Any]) -> Load:
    """`TorchAoConfig` while loading, saved, loaded"""
    from torchao import quantization

    return _saved(full, out, lambda dtype: transformers.TorchAoConfig(config(quantization)))


def torchao_unsaved(full: Path, out: Path) -> Load:
    """`TorchAoConfig` while loading"""
    return lambda dtype: load(full, dtype, quantization_config=transformers.TorchAoConfig(_prototype_int4()))


def _prototype_int4(*_: Any) -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP)


def quanto(full: Path, out: Path, *, weights: str) -> Load:
    """`QuantoConfig` while loading"""
    return lambda dtype: load(full, dtype, quantization_config=transformers.QuantoConfig(weights=weights))


def quanto_saved(full: Path, out: Path) -> Load:
    """`QuantoConfig` while loading, saved, loaded"""
    return _saved(full, out, lambda dtype: transformers.QuantoConfig(weights="int8"))


def hqq(full: Path, out: Path) -> Load:
    """hqq's own `AutoHQQHFModel.quantize_model` on the loaded full model"""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    def quantized(dtype: torch.dtype) -> PreTrainedModel:
        model, config = load(full, dtype), BaseQuantizeConfig(nbits=4, group_size=GROUP)
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=dtype, device="cpu")
        return model.eval()

    return quantized


def hqq_config(full: Path, out: Path) -> Load:
    """`HqqConfig` while loading"""
    config = transformers.HqqConfig(nbits=4, group_size=GROUP)
    return lambda dtype: load(full, dtype, quantization_config=config)


def fine_grained_fp8(full: Path, out: Path) -> Load:
    """`FineGrainedFP8Config` while loading"""
    return lambda dtype: load(full, dtype, quantization_config=transformers.FineGrainedFP8Config())


# --- GGUF


def gguf(full: Path, out: Path, *, kind: str) -> Load:
    """`gguf.GGUFWriter`, `from_pretrained(gguf_file=…)`"""
    out.mkdir()
    write_gguf(load(full, torch.float32), out / "model.gguf", kind, vocabulary=False)

    def dequantized(dtype: torch.dtype) -> PreTrainedModel:
        return load(out, dtype, gguf_file="model.gguf")

    return dequantized


def _unrounded(load: Load) -> PreTrainedModel:
    from compressed_tensors.quantization import disable_quantization

    return load(torch.float32).apply(disable_quantization)


def _gptq_torch(load: Load) -> PreTrainedModel:
    config = transformers.GPTQConfig(bits=4, group_size=GROUP, backend="gptq_torch")
    return load(torch.float32, quantization_config=config)


def _awq_torch(load: Load) -> PreTrainedModel:
    config = transformers.AwqConfig(bits=4, group_size=GROUP, backend="torch_awq")
    return load(torch.float32, quantization_config=config)


def _unpacked(load: Load) -> PreTrainedModel:
    from bitsandbytes.nn import Linear4bit

    model = load(torch.float32)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


_CT: dict[str, Any] = {"library": "llmcompressor", "needs": ("datasets",)}
_CT_ROUNDING: dict[str, Any] = {
    **_CT, "rounds_activations": True, "trainable": _unrounded,
    "trap": "no gradient through rounded activations; remedy: "
            "`model.apply(compressed_tensors.quantization.disable_quantization)`, which keeps the rounded weights",
}  # fmt: skip
_ATEN = (
    "the default CPU kernel has no backward pass, after a forward in eval mode not even with `model.train()`; remedy: "
    '`quantization_config={}(…, backend="{}")`'
)
_GPTQ: dict[str, Any] = {
    "needs": ("gptqmodel", "optimum"), "trainable": _gptq_torch, "trap": _ATEN.format("GPTQConfig", "gptq_torch")
}  # fmt: skip
_ASYMMETRIC = "transformers 5.23 loads asymmetric weights only with `CompressedTensorsConfig(dequantize=True)`"
_ROTATED = "**R2 rotates V, so the full model's V makes it worse: attach refuses it**, measured here with `check=False`"
_NF4 = (
    "with AVX512-BF16 the first forward in eval mode packs the weights for a kernel without a backward pass; "
    "remedy: `support_avx512bf16_for_cpu = False` on every `Linear4bit` before it"
)

BACKENDS = [
    Backend("compressed-tensors RTN W4", make=round_to_nearest, **_CT),
    Backend("compressed-tensors RTN W4 asymmetric", make=partial(round_to_nearest, symmetric=False),
            trap=_ASYMMETRIC, **_CT),
    Backend("compressed-tensors GPTQ W4", make=partial(oneshot, recipe=_gptq), **_CT),
    Backend("compressed-tensors AWQ W4", make=partial(oneshot, recipe=_awq), trap=_ASYMMETRIC, **_CT),
    Backend("compressed-tensors W8A8", make=partial(oneshot, recipe=partial(_scheme, "W8A8")), **_CT_ROUNDING),
    Backend("compressed-tensors FP8", make=partial(oneshot, recipe=partial(_scheme, "FP8_DYNAMIC")), **_CT_ROUNDING),
    Backend("compressed-tensors W4, int8 KV", make=partial(oneshot, recipe=_int8_kv), rounds_activations=True,
            trap="K and V are rounded before `Cache.update`, so the intact rows stay exact", **_CT),
    Backend("compressed-tensors SpinQuant R1 R2 W4", make=partial(oneshot, recipe=partial(_rotated, "R1", "R2")),
            trap=_ROTATED, other_basis=True, **_CT),
    Backend("compressed-tensors SpinQuant R1 R2 R4 W4", make=rotated_online,
            trap=f"`from_pretrained` drops R4 and says so only in its report; {_ROTATED}", other_basis=True, **_CT),
    Backend("GPTQ by GPTQModel", "gptqmodel", gptqmodel, **_GPTQ),
    Backend("AutoRound", "auto_round", partial(auto_round, form="auto_round"),
            trap="float32 is asked for and float16 comes"),
    Backend("GPTQ format by AutoRound", "auto_round", partial(auto_round, form="auto_gptq"), **_GPTQ),
    Backend("AWQ GEMM format by AutoRound", "auto_round", partial(auto_round, form="auto_awq"), ("gptqmodel",),
            trap=_ATEN.format("AwqConfig", "torch_awq"), trainable=_awq_torch),
    Backend("compressed-tensors by AutoRound", "auto_round", partial(auto_round, form="llm_compressor"),
            ("compressed_tensors",)),
    Backend("bitsandbytes nf4", "bitsandbytes", partial(bitsandbytes, config=lambda config, dtype: config(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)),
            trap=_NF4, trainable=_unpacked),
    Backend("bitsandbytes int8", "bitsandbytes", partial(bitsandbytes, config=lambda config, dtype: config(
        load_in_8bit=True)), rounds_activations=True, mixes_rows=True,
            trap="its outlier columns are chosen over the whole batch, so a row's logits depend on its neighbours and "
                 "on padding, attached or not; remedy: `llm_int8_threshold=0`"),
    Backend("bitsandbytes int8, no outliers", "bitsandbytes", partial(bitsandbytes, config=lambda config, dtype: config(
        load_in_8bit=True, llm_int8_threshold=0.0)), rounds_activations=True),
    Backend("HQQ 4-bit", "hqq", hqq, trap="transformers' own integration raises, see below"),
    Backend("torchao int8", "torchao", partial(torchao, config=lambda ao: ao.Int8WeightOnlyConfig())),
    Backend("torchao W8A8", "torchao", partial(torchao, config=lambda ao: ao.Int8DynamicActivationInt8WeightConfig()),
            rounds_activations=True, trap="no backward pass; remedy: calibrate on the int8 weight-only form"),
    *(Backend(f"torchao int{bits} (intx)", "torchao", partial(torchao, config=lambda ao, bits=bits:
        ao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=ao.PerGroup(GROUP))))
      for bits in (4, 3, 2)),
    Backend("torchao float8", "torchao", partial(torchao, config=lambda ao: ao.Float8WeightOnlyConfig())),
    Backend("torchao int4 (prototype)", "torchao", torchao_unsaved, trap="cannot be saved; remedy: intx int4"),
    *(Backend(f"quanto {w}", "optimum.quanto", partial(quanto, weights=w), trap="cannot be saved through transformers")
      for w in ("int8", "int4", "int2", "float8")),
    *(Backend(f"GGUF {kind}", "gguf", partial(gguf, kind=kind))
      for kind in ("F16", "Q8_0", "Q5_0", "Q4_0")),
]  # fmt: skip

BROKEN = [
    Backend("AWQ by GPTQModel", "gptqmodel", partial(gptqmodel, quant_method="awq", format="gemm"),
            error="CUDA is not available", trap="loading AWQ runs, see AWQ GEMM above"),
    Backend("HQQ through transformers", "hqq", hqq_config, error="HQQ is not available yet", trap="HQQ's own API runs"),
    Backend("torchao int4", "torchao", partial(torchao, config=lambda ao: ao.Int4WeightOnlyConfig(group_size=GROUP)),
            error="issues during automatic conversion",
            trap="that report says `ImportError: Requires mslk >= 1.0.0`, a CUDA library"),
    Backend("torchao int4 (prototype), saved", "torchao", partial(torchao, config=_prototype_int4),
            error="Unsupported tensor type", trap="runs unsaved, see above"),
    Backend("quanto, saved", "optimum.quanto", quanto_saved, error="is not serializable",
            trap="runs unsaved, see above"),
    Backend("GGUF Q4_K by gguf-py", "gguf", partial(gguf, kind="Q4_K"), error="NotImplementedError",
            trap="gguf-py dequantizes K-quants and does not write them; llama.cpp does"),
    Backend("FP8 in blocks by transformers", "transformers", fine_grained_fp8, error="A GPU or XPU is needed",
            trap="compressed-tensors FP8 and torchao float8 run"),
]  # fmt: skip


# --- the page

_INSTALLED = ("bitsandbytes", "gguf", "gptqmodel", "hqq", "optimum", "optimum.quanto", "torchao")


def page() -> str:
    """docs/backends.md, from what the tests measured."""
    others = ", ".join(f"{module} {version(module)}" for module in ("accelerate", "compressed-tensors", "numpy"))
    pins = " ".join(f"{module.replace('.', '-')}=={version(module)}" for module in _INSTALLED)
    return f"""# Backends

Made by the last of these commands; do not edit. GPTQModel wants numpy 2.2, hence the filtered constraints, and
`torch` comes first so that nothing brings CUDA. On other machines take torch's CPU wheel.

<!-- run elsewhere: tests/backends.py takes an environment of its own -->
```sh
python3 -m venv .venv-backends && . .venv-backends/bin/activate
grep -v '^numpy==' constraints.txt > "$VIRTUAL_ENV/constraints.txt"
pip install torch=={torch.__version__.partition("+")[0]}
pip install -c "$VIRTUAL_ENV/constraints.txt" -e '.[test]'
pip install -c "$VIRTUAL_ENV/constraints.txt" {pins}
OMP_NUM_THREADS=1 python -m pytest tests/test_backends.py --regenerate
```

Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, {others};
one thread of {_machine()}.

Each row is a checkpoint that the named library made of one random Llama (hidden {DIMENSIONS["hidden_size"]},
{DIMENSIONS["num_hidden_layers"]} layers, 4 heads on 2 of K and V, logits with a standard deviation of 1.2), loaded
twice, in float32 and in bfloat16, and held against the same model with the {len(PREFIX)} tokens of the prefix put
into its cache by hand. With every one of them, in both types, an attached model equals that **bit for bit** when both
compute in the same shape (the same left- or right-padded batch; only bitsandbytes int8 is not a function of the row
alone), its cache holds the artifact's rows bit for bit, removing the handle leaves no trace, and greedy generation
from a left-padded batch gives the tokens of each row alone, up to the first where two are as good within the error.

- *off*: the relative error of the model's own keys and values on the prefix, what the artifact replaces; *door*: that
  of the closest layer, the larger of K's and V's, which attach refuses above {DOOR}.
- *effect*: the largest change of any logit by attaching, in float32: how much there was to get wrong.
- *error (noise)*: the largest difference of any logit between an attached batch (left- and right-padded, with and
  without cache, generating) and each row alone with a cache filled by hand; in brackets, the largest difference
  between the same two shapes in the plain model, which is the kernel's own. Above float32's rounding it comes from
  16-bit kernels and from rounded activations.
- *gradient*: whether a loss reaches the attached keys and values, after a forward in eval mode, as calibration
  needs; the number is the slope by finite differences over autograd's, at a {STEP:g} change of the loss, in float32.
- *calibrates*: whether `calibrate` trains through the kernel's own gradient, or through the effective weights of how
  many layers where it has none, and the loss after 8 steps over that before, learning three rows in float32.
- *runs as*: the class of a layer or of its weight after loading, and its type where it is not the one asked for.

{_table(_row(backend) for backend in BACKENDS)}

## Does not run here

| backend | library | made by | error | note |
|---|---|---|---|---|
{chr(10).join(_broken_row(backend) for backend in BROKEN)}
"""


def _table(rows: Iterable[str]) -> str:
    columns = ["backend", "library", "made by", "runs as", "K off", "V off", "door", "effect", "error (noise) float32",
               "error (noise) bfloat16", "gradient", "calibrates", "trap and remedy"]  # fmt: skip
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows])


def _row(backend: Backend) -> str:
    row, runs = ROWS[backend.name], ROWS[backend.name]["runs as float32"]
    errors = [f"{row[f'error {d}']:.0e} ({row[f'noise {d}']:.0e})" for d in ("float32", "bfloat16")]
    off = [f"{row[f'{name} float32']:.2g}" for name in ("K off", "V off", "door")]
    cells = [backend.name, _library(backend), backend.how, runs, *off, f"{row['effect float32']:.2g}", *errors]
    trained = [row["gradient float32"], row["calibrates float32"]]
    return f"| {' | '.join([*cells, *trained, backend.trap])} |"


def _broken_row(backend: Backend) -> str:
    cells = [backend.name, _library(backend), backend.how, f"`{ROWS[backend.name]['error']}`", backend.trap]
    return f"| {' | '.join(cells)} |"


def _library(backend: Backend) -> str:
    return f"{re.sub('[._]', '-', backend.library)} {version(backend.library)}"


def _machine() -> str:
    """The processor's name and the instructions that kernels choose by."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    fast = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f" {flag} " in text]
    return f"{name[1] if name else platform.machine()} ({', '.join(fast)})"
