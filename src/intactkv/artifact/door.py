"""The door: a model's own keys and values of the prefix against the intact ones. Pure, for every engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from intactkv.error import IntactKVError

if TYPE_CHECKING:
    from intactkv.artifact.data import IntactKV

# In the layer where they are closest: rounding to 2 bits leaves 0.5 (of small values at [BOS]); rotated and foreign
# ones 1 and more.
DOOR = 0.75


def relative_error(own: Tensor, intact: Tensor) -> float:
    """‖own − intact‖ / ‖intact‖, in float64."""
    intact = intact.detach().double().cpu()
    return float((own.double().cpu() - intact).norm() / intact.norm().clamp(min=1e-30))


def errors_by_layer(kv: IntactKV, own: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, dict[int, float]]:
    """How far a model's own keys and values `(head, prefix, dim)` are from the intact ones, by part and layer.

    Raises `IntactKVError` where a layer has none, or of other shapes.
    """
    errors: dict[str, dict[int, float]] = {"keys": {}, "values": {}}
    for part, by_layer in enumerate(errors.values()):
        for layer, pair in kv.layers.items():
            if layer not in own or own[layer][part].shape != pair[part].shape:
                raise IntactKVError(
                    f"layer {layer} of the model hands other shapes to its cache than the intact KV holds; capture it "
                    "from this model's full-precision form"
                )
            by_layer[layer] = relative_error(own[layer][part], pair[part])
    return errors


def refuse_other_basis(kv: IntactKV, errors: Mapping[str, Mapping[int, float]]) -> None:
    """Raise `IntactKVError` for errors by layer that no rounding explains.

    Of a checkpoint made for this prefix, whose own keys and values there no quantizer looked at, the artifact says how
    far off they are.
    """
    made_for = kv.provenance.get("prefix_aware") or {}
    for name, by_layer in errors.items():
        closest = min(by_layer, key=by_layer.__getitem__)
        limit = max(DOOR, 1.25 * made_for.get("own_errors", {}).get(name, 0.0))
        if by_layer[closest] > limit:
            raise IntactKVError(
                f"the model's own {name} of the prefix differ from the intact ones by {100 * by_layer[closest]:.0f} % "
                f"even in the closest layer, {closest} (rounding leaves less than {100 * limit:.0f} %): another basis "
                "or model; see `intactkv check`, or pass check=False if you know better"
            )
