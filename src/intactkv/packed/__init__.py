"""A packed low-bit KV cache whose first tokens stay intact."""

from intactkv.packed.cache import PackedCache
from intactkv.packed.packing import Packing
from intactkv.packed.reads import PackedReads, read_packed

__all__ = ["PackedCache", "PackedReads", "Packing", "read_packed"]
