"""IntactKV: quantized language models that keep their full-precision memory of the tokens that matter most."""

from intactkv.attach import Attachment, attach
from intactkv.capture import capture
from intactkv.kv import IntactKV, IntactKVError
from intactkv.packed import PackedCache, Packing, read_packed
from intactkv.prefix import bos, chat_prefix, text_prefix

__all__ = [
    "Attachment",
    "IntactKV",
    "IntactKVError",
    "PackedCache",
    "Packing",
    "attach",
    "bos",
    "capture",
    "chat_prefix",
    "read_packed",
    "text_prefix",
]
