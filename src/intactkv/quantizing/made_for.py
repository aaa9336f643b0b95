"""How much prefix tokens count while a method learns, and what the checkpoint then loses without its intact KV.

With weight 0 they do not, with 1 the checkpoint is the ordinary one, which is not made for any prefix. A weight in
between is the share of calibration windows that are shown the ordinary way. Since a prefix's activations are the same
in every window that begins with it, this is its tokens' weight against their ordinary one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.attaching.coverage import uncovered_layers
from intactkv.basis.compare import own_errors
from intactkv.capturing.live import capture
from intactkv.checkpoint.load import device_named
from intactkv.error import IntactKVError
from intactkv.evaluating.compare import Arm, perplexity
from intactkv.evaluating.windows import scored_after
from intactkv.files import json_data
from intactkv.pivots.classify import without_pivot
from intactkv.quantizing.aware import PrefixAware
from intactkv.quantizing.compress import batches
from intactkv.quantizing.methods import Method

_JUDGED = 8  # windows
WEIGHT = 1 / 16  # with the KV as good as 0, and a fifth to a third less lost without it (docs/prefix-aware.md)


@dataclass(frozen=True, eq=False)
class MadeFor:
    """The prefix that a checkpoint is made for, its tokens' weight below 1, and perplexities with and without its KV.

    `own_errors` are those of its own keys and values at the prefix, by part, in the layer where they are smallest.
    """

    prefix: Int[Tensor, "prefix"]
    weight: float
    aware: PrefixAware
    perplexity: dict[str, Any] = field(default_factory=dict)
    own_errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def decide(
        cls,
        full: PreTrainedModel,
        prefix: Int[Tensor, "prefix"],
        method: Method,
        windows: Int[Tensor, "window token"],
        asked: float | None,
        said: list[str],
    ) -> MadeFor | None:
        """What `method` is shown of calibration `windows`; None where the checkpoint is the ordinary one.

        Adds to `said` what a user should know. Raises IntactKVError for windows that do not begin with the prefix or
        are no longer than it, and for a weight below 1 where later tokens read prefix tokens in states that no KV
        covers.
        """
        _check_windows(windows, prefix)
        uncovered = uncovered_layers(capture(full, prefix), full.config)
        if uncovered:
            state = (
                f"layers {uncovered} of {full.config.model_type} keep a state that no intact KV covers, through which "
                "later tokens read prefix tokens"
            )
            if asked is not None and asked < 1:
                raise IntactKVError(f"{state}: these must count; leave prefix_weight={asked} out, or use 1")
            said.append(f"{state}: these count as in an ordinary checkpoint")
        idle = without_pivot(full, windows[:4, :256], size=len(prefix)) if windows.shape[1] > len(prefix) + 32 else None
        if idle:
            said.append(idle)
        weight = _default_weight(method, bool(uncovered)) if asked is None else float(asked)
        if weight == 1:
            return None
        counts = torch.arange(len(windows) + 1, dtype=torch.float64) * weight
        ordinary = (counts + 1e-9).floor().diff() > 0  # evenly spread over the windows
        sizes = [len(batch) for batch in batches(windows, method)]
        return cls(prefix, weight, PrefixAware(len(prefix), windows.shape[1], list(ordinary.split(sizes))))

    def see(
        self, full: PreTrainedModel, windows: Int[Tensor, "window token"], device: torch.device | str | None
    ) -> None:
        """Note the full model's perplexity on the last few `windows`."""
        self.perplexity["full"] = self._perplexity(full, windows, device)

    def measure(
        self,
        quantized: PreTrainedModel,
        kv: IntactKV,
        windows: Int[Tensor, "window token"],
        device: torch.device | str | None,
    ) -> None:
        """Note the quantized model's perplexities on the same windows, and how far off its own keys and values are."""
        self.perplexity["with_kv"] = self._perplexity(quantized, windows, device, kv)
        self.perplexity["without_kv"] = self._perplexity(quantized, windows, device)
        self.own_errors.update({name: min(errors.values()) for name, errors in own_errors(quantized, kv).items()})

    def _perplexity(
        self,
        model: PreTrainedModel,
        windows: Int[Tensor, "window token"],
        device: torch.device | str | None,
        kv: IntactKV | None = None,
    ) -> float:
        """On the last few windows, computed on `device` as long as the whole model fits there."""
        judged = scored_after(windows[-_JUDGED:], len(self.prefix))
        where = device_named("auto") if device is None else torch.device(device)
        fits = where.type == "cuda" and 2 * model.get_memory_footprint() < torch.cuda.mem_get_info(where)[0]
        moved: Any = model
        self.perplexity["windows"] = len(judged)
        try:
            return perplexity(Arm("model", moved.to(where) if fits else model, kv), judged)
        finally:
            if fits:
                moved.to("cpu")

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "weight": self.weight,
            "prefix": self.prefix.tolist(),
            "perplexity": json_data(self.perplexity),
            "own_errors": json_data(self.own_errors),
        }


def _default_weight(method: Method, uncovered: bool) -> float:
    """1 where later tokens read the prefix in states that no KV covers; else `WEIGHT`, or 0 if there is no part."""
    if uncovered:
        return 1.0
    return WEIGHT if method.weighs else 0.0


def check_weight(weight: float | None, method: Method, prefix: Sequence[int] | Tensor | None) -> None:
    """Raise IntactKVError for a weight that is none, that says nothing, or that the method cannot give."""
    if weight is None:
        return
    if not 0 <= weight <= 1:
        raise IntactKVError(
            f"prefix_weight={weight} must lie between 0 (prefix tokens do not count) and 1 (the ordinary checkpoint)"
        )
    if prefix is None:
        raise IntactKVError(
            f"prefix_weight={weight} is how much prefix tokens count, but no prefix is given; give its ids"
        )
    if not method.needs_calibration and weight < 1:
        raise IntactKVError(
            f"{type(method).__name__} learns nothing from text, so that no token counts (prefix_weight={weight}); "
            "leave it out, or use a method that learns"
        )
    if 0 < weight < 1 and not method.weighs:
        raise IntactKVError(
            f"{type(method).__name__} cannot let prefix tokens count in part (prefix_weight={weight}): it learns "
            "ranges, or from batches of its own; use 0 or 1"
        )


def _check_windows(windows: Int[Tensor, "window token"], prefix: Int[Tensor, "prefix"]) -> None:
    if windows.shape[1] < len(prefix) + 2:
        raise IntactKVError(
            f"the prefix of {len(prefix)} tokens leaves nothing to learn from in calibration windows of "
            f"{windows.shape[1]}; give windows of {len(prefix) + 2} or more"
        )
    differ = (windows[:, : len(prefix)] != prefix).any(1)
    if bool(differ.any()):
        row = int(differ.nonzero()[0])
        raise IntactKVError(
            f"calibration window {row} begins with {windows[row, : len(prefix)][:8].tolist()}, not with the prefix "
            f"{prefix[:8].tolist()}; cut the text with prefixed_windows(tokens, prefix=…, window=…).ids"
        )
