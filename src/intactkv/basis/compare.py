"""Are a quantized model's keys and values the full model's, and if not, what takes one to the other?

Quantizers may first rewrite a model into an equal one: AWQ moves a scale from v_proj into o_proj, SmoothQuant and
OmniQuant one between queries and keys, QuaRot and SpinQuant rotate. The function stays, keys and values do not, and
an intact KV in the wrong basis does harm. Every block of both models is given the same white noise, so that each
layer shows its own rounding only and no direction of the input counts more than another: then regressing keys and
values is regressing the rows of k_proj and v_proj, norms included. `relate.py` decides what the outcome means.

What this gives up against reading weight rows: a forward of the full model, and two of either up to each block's keys
and values. What it gains: it holds for any backend and architecture, fused projections, biases, MLA and online
rotations of keys, without dequantizing anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.artifact.door import errors_by_layer, refuse_other_basis
from intactkv.basis.relate import FLOOR, MIXED, REFUSE, Halves, Kind, nearest_rotation, relate, rescaled, slopes
from intactkv.capturing.record import recorded
from intactkv.checkpoint.stream import streamed
from intactkv.decoder import held, watched_inputs
from intactkv.error import IntactKVError


@dataclass(frozen=True)
class Relation:
    """How one head's keys or values in the quantized model follow from the full model's: `theirs = full @ transform`.

    `residual` is the share of energy that the relation leaves unexplained (0: none), which is the rounding's own
    doing if the relation is right; `as_is` the same if nothing is transformed. `transform` is `(dim, dim)`, None for
    "same" and "other".
    """

    layer: int
    part: Literal["key", "value"]
    head: int
    kind: Kind
    residual: float
    as_is: float
    transform: Float[Tensor, "dim dim"] | None = None


@dataclass(frozen=True, eq=False)
class Shown:
    """What `basis` needs of a full model, so that the model itself need not stay in memory beside the quantized one.

    `inputs` are the shape, size and dtype of what each block read, from which the noise is drawn again; `layers` the
    keys and values `(batch, head, token, dim)` that each layer made of either half of the noise; `embeddings` the
    first rows of the input embeddings. Keys and values take 8 · 128 tokens' cache twice over.
    """

    windows: Int[Tensor, "window token"]
    inputs: dict[int, tuple[torch.Size, float, torch.dtype]]
    layers: list[dict[int, tuple[Tensor, Tensor]]]
    embeddings: Float[Tensor, "vocab hidden"]


def show_noise(full: PreTrainedModel, *, windows: Int[Tensor, "window token"] | None = None) -> Shown:
    """Show the full model what `basis` compares models by; for where one model at a time fits in memory.

    `windows` are token ids that it is given to learn the shape and size of each block's input; by default 8 windows
    of 128 random ids, seed 0.
    """
    if windows is None:
        vocab = full.config.get_text_config(decoder=True).vocab_size
        windows = torch.randint(vocab, (8, 128), generator=torch.Generator().manual_seed(0))
    if (store := streamed(full)) is not None:
        store.begin(head=False, hashed=False)
    inputs: dict[int, tuple[torch.Size, float, torch.dtype]] = {}

    def look(i: int, x: Tensor) -> None:
        inputs[i] = (x.shape, float(x.float().square().mean().sqrt()), x.dtype)

    with torch.no_grad(), watched_inputs(full, look):
        recorded(full, windows)
    layers = []
    for half in (0, 1):
        layers.append(recorded(full, windows, inputs=lambda i, half=half: _noise(inputs[i], i, half)))  # type: ignore[misc]
    return Shown(windows, inputs, layers, _embeddings(full))


def basis(
    full: PreTrainedModel | Shown, model: PreTrainedModel, *, windows: Int[Tensor, "window token"] | None = None
) -> list[Relation]:
    """The relation of every layer's and head's keys and values in `model` to those in `full`.

    `windows` as in `show_noise`, whose result may stand for the full model. Raises `IntactKVError` where the two have
    different layers, heads or widths.
    """
    shown = full if isinstance(full, Shown) else show_noise(full, windows=windows)
    if (store := streamed(model)) is not None:
        store.begin(head=False, hashed=False)
    rotation = residual_rotation(shown.embeddings, _embeddings(model))
    theirs = []
    for half in (0, 1):

        def give(i: int, half: int = half) -> Tensor:
            noise = _noise(shown.inputs[i], i, half)
            return noise if rotation is None else (noise.double() @ rotation).to(noise.dtype)

        theirs.append(recorded(model, shown.windows, inputs=give))
    _check_shapes(shown.layers[0], theirs[0])
    relations = []
    for part, name in enumerate(("key", "value")):

        def rows(layer: int, part: int = part) -> tuple[Halves, Halves]:
            return _rows(shown.layers, layer, part), _rows(theirs, layer, part)

        layers = sorted(shown.layers[0])
        for layer, scaled in zip(layers, rescaled([slopes(*rows(i)) for i in layers]), strict=True):
            a, b = rows(layer)  # again: in float64 one layer's at a time
            for head in range(len(a[0])):
                kind, residual, as_is, transform = relate(a, b, head, scaled=scaled)
                relations.append(Relation(layer, name, head, kind, residual, as_is, transform))  # type: ignore[arg-type]
    return relations


def _noise(read: tuple[torch.Size, float, torch.dtype], layer: int, half: int) -> Tensor:
    """White noise of the shape and size of what a layer read, in one half of the hidden channels, 0 in the other."""
    shape, size, dtype = read
    white = torch.randn(shape, generator=torch.Generator().manual_seed(2 * layer + half)) * size
    middle = shape[-1] // 2
    white[..., middle:] *= half
    white[..., :middle] *= 1 - half
    return white.to(dtype)


def _rows(halves: list[dict[int, tuple[Tensor, Tensor]]], layer: int, part: int) -> Halves:
    """A layer's keys or values, batch and tokens in one axis, in float64."""
    first, second = (half[layer][part].double().transpose(0, 1).flatten(1, 2) for half in halves)
    return first, second


def _check_shapes(ours: dict[int, tuple[Tensor, Tensor]], theirs: dict[int, tuple[Tensor, Tensor]]) -> None:
    if ours.keys() != theirs.keys():
        raise IntactKVError(
            f"the full model has keys and values in layers {sorted(ours)}, the quantized one in {sorted(theirs)}; "
            "give the model it was quantized from"
        )
    for layer in sorted(ours):
        for part, a, b in zip(("key", "value"), ours[layer], theirs[layer], strict=True):
            if a.shape != b.shape:
                raise IntactKVError(
                    f"layer {layer}'s {part}s have shape {tuple(a.shape)} in the full model and {tuple(b.shape)} in "
                    "the quantized one; give the model it was quantized from"
                )


def refuse_foreign(model: PreTrainedModel, kv: IntactKV) -> None:
    """Raise `IntactKVError` where `kv` is plainly in another basis, or another model's: one forward of P tokens.

    Catches rotations, other models and strong rescaling at 2 to 8 bits; a mild rescaling cannot be told from rounding
    by so few tokens, for which there is `basis` (`intactkv check`). Of a checkpoint made for this prefix, whose own
    keys and values there no quantizer looked at, the artifact says how far off they are.
    """
    refuse_other_basis(kv, own_errors(model, kv))


def own_errors(model: PreTrainedModel, kv: IntactKV) -> dict[str, dict[int, float]]:
    """How far a model's own keys and values of the prefix are from the intact ones, by layer: ‖own − intact‖/‖intact‖.

    Raises `IntactKVError` where a layer has none, or of other shapes.
    """
    own = recorded(model, kv.ids[None])
    return errors_by_layer(kv, {i: (key[0], value[0]) for i, (key, value) in own.items()})


def align(kv: IntactKV, relations: Sequence[Relation]) -> IntactKV:
    """`kv` in the basis of the quantized model that `relations` were measured on; what is the same stays bit-equal.

    `provenance["basis"]` then says which parts were rescaled or rotated. Raises `IntactKVError` where a head has no
    usable relation: capture from the transformed full model instead (`intactkv quantize` does).
    """
    refused = [r for r in relations if r.kind == "other"]
    if refused:
        worst = max(refused, key=lambda r: r.residual)
        raise IntactKVError(
            f"the {worst.part}s of layer {worst.layer}, head {worst.head} are no scaled or rotated form of the full "
            f"model's ({100 * worst.residual:.0f} % of their energy stays unexplained, {100 * REFUSE:.0f} % is the "
            "limit); capture from the full model in the quantizer's own basis, or give the model it was quantized from"
        )
    layers = {i: [key.clone(), value.clone()] for i, (key, value) in kv.layers.items()}
    for r in relations:
        if r.transform is not None:
            tensor = layers[r.layer][0 if r.part == "key" else 1]
            tensor[r.head] = (tensor[r.head].double() @ r.transform.to(tensor.device)).to(tensor.dtype)
    if all(r.transform is None for r in relations):
        return kv
    provenance = {**kv.provenance, "basis": describe(relations)}
    return replace(kv, layers={i: (key, value) for i, (key, value) in layers.items()}, provenance=provenance)


def describe(relations: Sequence[Relation]) -> str:
    """What was done to the full model's keys and values, in a few words."""
    words = {"scale": "rescaled", "rotation": "rotated"}
    parts = []
    for part in ("key", "value"):
        for kind, word in words.items():
            layers = sorted({r.layer for r in relations if r.part == part and r.kind == kind})
            if layers:
                parts.append(f"{part}s {word} in {len(layers)} layers")
    return "full, " + ", ".join(parts) if parts else "full"


def residual_rotation(
    a: Float[Tensor, "vocab hidden"], b: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, "hidden hidden"] | None:
    """The rotation of the residual stream between two models, read off their input embeddings; None if there is none.

    Raises `IntactKVError` where the embeddings are neither the same nor rotated: another model. Warns where they are
    nearly so, by more than another dtype explains: another fine-tune of the same base, or rounded embeddings.
    """
    if a.shape != b.shape:
        raise IntactKVError(
            f"the models' embeddings have shapes {tuple(a.shape)} and {tuple(b.shape)}; give the model it was "
            "quantized from"
        )
    left, rotation = _changed(a, b), None
    if left > MIXED:
        rotation = nearest_rotation(a.double(), b.double())
        left = _changed(a, b, rotation)
    if left > MIXED:
        raise IntactKVError(
            f"the models' embeddings are neither equal nor rotated forms of each other ({100 * left:.0f} % "
            "unexplained); give the model it was quantized from, not another fine-tune"
        )
    if left > FLOOR:
        warnings.warn(
            f"{100 * left:.1g} % of the energy of the models' embeddings differ, more than another dtype explains: "
            "either they are quantized (GGUF does so), or this is another fine-tune of the same base, for which the "
            "full model's intact KV may do harm; make sure that the full model is the one it was quantized from",
            stacklevel=3,
        )
    return rotation


def embedding_change(full: PreTrainedModel, model: PreTrainedModel) -> float:
    """The share of energy by which the input embeddings of `model` differ from those of `full`."""
    return _changed(_embeddings(full), _embeddings(model))


def _embeddings(model: PreTrainedModel) -> Float[Tensor, "vocab hidden"]:
    """The first rows of the input embeddings: enough for a fit, and no more."""
    table: Any = model.get_input_embeddings()
    rows = slice(0, 4 * table.weight.shape[1])
    if (store := streamed(model)) is not None and (read := store.embeddings(rows)) is not None:
        return read
    return held(table)[rows].cpu().clone()  # a view would keep the whole table


def _changed(a: Tensor, b: Tensor, rotation: Tensor | None = None) -> float:
    """The share of energy by which rows of `b` differ from those of `a`, in float64, some rows at a time."""
    off = energy = 0.0
    for x, y in zip(a.split(1024), b.split(1024), strict=True):
        turned = x.double() if rotation is None else x.double() @ rotation
        off, energy = off + float((y.double() - turned).square().sum()), energy + float(turned.square().sum())
    return off / energy
