"""A method by the name it has on the command line."""

from __future__ import annotations

from typing import Any, Literal

from intactkv.error import IntactKVError
from intactkv.quantizing.methods import AWQ, GPTQ, RTN, AutoRound, Method, Rotated, SmoothQuant

_PLAIN = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ, "autoround": AutoRound}
_TRANSFORMED = {"smoothquant": SmoothQuant, "rotated": Rotated}


def method_named(
    name: str,
    *,
    bits: int,
    group_size: int | Literal["auto"],
    activation_bits: int | None = None,
    kv_bits: int | None = None,
    symmetric: bool | None = None,
    rounding: str | None = None,
    static_activations: bool = False,
    float8: bool = False,
) -> Method:
    """The method called `name`, such as "awq"; `group_size` 0 is one group for a whole row.

    `symmetric=None` is the method's own default. `rounding` says what "smoothquant" and "rotated" round with, "rtn"
    (the default) or "gptq". Raises `IntactKVError` for other names and for settings that a method refuses.
    """
    settings: dict[str, Any] = {"bits": bits, "group_size": None if group_size == 0 else group_size}
    settings |= {"activation_bits": activation_bits, "kv_bits": kv_bits}
    settings |= {"static_activations": static_activations, "float8": float8}
    if symmetric is not None:
        settings["symmetric"] = symmetric
    if name in _PLAIN:
        if rounding is not None:
            raise IntactKVError(f"--rounding {rounding} goes with smoothquant and rotated; --method {name} has its own")
        return _PLAIN[name](**settings)
    if name not in _TRANSFORMED:
        raise IntactKVError(f"--method {name} is unknown; use one of {', '.join([*_PLAIN, *_TRANSFORMED])}")
    if rounding not in (None, "rtn", "gptq"):
        raise IntactKVError(f"--rounding {rounding} is unknown; use rtn or gptq")
    return _TRANSFORMED[name](_PLAIN[rounding or "rtn"](**settings))
