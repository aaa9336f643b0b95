"""How a cache rounds tokens, and the bytes that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from intactkv.error import IntactKVError
from intactkv.packed.bits import BITS


@dataclass(frozen=True)
class Packing:
    """How tokens are rounded and which are not.

    `bits` 2, 3, 4 or 8. `keys` rounds keys with a scale `per_channel` over `token_group` tokens, as KIVI does, or
    `per_token` (and head), as the paper does: faster to read, and many times as far off, since keys have channels of
    unequal size, and a bias (Qwen2's) makes them more so. Values always have scales per token. `group_size` numbers of
    a head share a per-token scale (None: all). `residual` newest tokens stay in full precision, and up to as many more
    (or a `token_group`) until they are packed together. `hadamard` rotates heads before rounding. `keep` first tokens
    of every row stay in full precision. A call reads its own tokens in `full` precision (as KIVI and transformers do)
    or `rounded` (as the paper's evaluation does), by `own`; earlier tokens it reads as they are stored.
    """

    bits: int = 4
    keys: Literal["per_token", "per_channel"] = "per_channel"
    group_size: int | None = None
    token_group: int = 32
    residual: int = 0
    hadamard: bool = False
    keep: int = 0
    own: Literal["full", "rounded"] = "full"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise IntactKVError(f"bits={self.bits} is not supported; use one of {BITS}")
        for name, known in (("keys", ("per_token", "per_channel")), ("own", ("full", "rounded"))):
            if getattr(self, name) not in known:
                raise IntactKVError(f"{name}={getattr(self, name)!r} is unknown; use one of {known}")
        for name, least in (("residual", 0), ("keep", 0), ("token_group", 1)):
            if getattr(self, name) < least:
                raise IntactKVError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def together(self) -> int:
        """How many tokens are packed at a time."""
        return self.token_group if self.keys == "per_channel" else max(1, self.residual)


def expected_bytes(packing: Packing, shape: tuple[int, int, int, int]) -> float:
    """Bytes of packed keys and values `(batch, head, token, dim)`, idle capacity, kept and newest tokens left out.

    batch · head · token · (2 dim bits / 8 + 4 bytes for each scale and low: of values dim / group_size a token, of keys
    as many, or dim / token_group).
    """
    batch, head, tokens, dim = shape
    per_token = 4 * dim / (packing.group_size or dim)
    keys = 4 * dim / packing.token_group if packing.keys == "per_channel" else per_token
    return batch * head * tokens * (2 * dim * packing.bits / 8 + keys + per_token)
