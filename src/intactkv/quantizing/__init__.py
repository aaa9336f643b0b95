"""Quantize a full model into a checkpoint that transformers and vLLM load, with the intact KV that fits it."""

from intactkv.artifact.hub import FILE as PREFIX_KV
from intactkv.artifact.served import RECIPE
from intactkv.quantizing.checkpoint import quantize
from intactkv.quantizing.choice import method_named
from intactkv.quantizing.methods import AWQ, GPTQ, RTN, AutoRound, Method, Rotated, SmoothQuant

__all__ = [
    "AWQ",
    "GPTQ",
    "PREFIX_KV",
    "RECIPE",
    "RTN",
    "AutoRound",
    "Method",
    "Rotated",
    "SmoothQuant",
    "method_named",
    "quantize",
]
