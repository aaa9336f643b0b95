"""IntactKV: quantized language models that keep their full-precision memory of the tokens that matter most.

Names are looked up when first asked for: importing torch and transformers takes seconds, which `intactkv --help` need
not wait for. No name here may be a module's too, or importing that module would put it in the name's place.
"""

import logging
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intactkv.artifact import IntactKV
    from intactkv.attaching.handle import Attachment, attach, detach
    from intactkv.calibrating import calibrate
    from intactkv.capturing.live import capture
    from intactkv.capturing.prefix import bos, chat_prefix, text_prefix
    from intactkv.checkpoint.load import load_model
    from intactkv.error import IntactKVError
    from intactkv.packed import PackedCache, Packing, read_packed
    from intactkv.pivots import discover
    from intactkv.quantizing import quantize

logging.getLogger(__name__).addHandler(logging.NullHandler())  # `logging.basicConfig(level="INFO")` shows what is done

_HOME = {
    "Attachment": "attaching.handle",
    "IntactKV": "artifact",
    "IntactKVError": "error",
    "PackedCache": "packed.cache",
    "Packing": "packed.packing",
    "attach": "attaching.handle",
    "bos": "capturing.prefix",
    "calibrate": "calibrating",
    "capture": "capturing.live",
    "chat_prefix": "capturing.prefix",
    "detach": "attaching.handle",
    "discover": "pivots",
    "load_model": "checkpoint.load",
    "quantize": "quantizing",
    "read_packed": "packed.reads",
    "text_prefix": "capturing.prefix",
}

__all__ = [
    "Attachment",
    "IntactKV",
    "IntactKVError",
    "PackedCache",
    "Packing",
    "attach",
    "bos",
    "calibrate",
    "capture",
    "chat_prefix",
    "detach",
    "discover",
    "load_model",
    "quantize",
    "read_packed",
    "text_prefix",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("intactkv")
        except PackageNotFoundError:  # run from a source tree
            return "unknown"
    if name not in _HOME:
        raise AttributeError(f"module 'intactkv' has no attribute {name!r}")
    return getattr(import_module(f"intactkv.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
