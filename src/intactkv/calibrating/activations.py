"""Does a micro-batch's graph fit into its bound? If it does, blocks need not be computed twice.

What autograd would keep for the backward is counted while the forward runs, and the forward is given up as soon as it
passes the bound, so that asking never takes more memory than the bound allows. Weights are not counted: they are
there anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.artifact import IntactKV
from intactkv.attaching.handle import attach
from intactkv.calibrating.objective import Objective
from intactkv.calibrating.outputs import Outputs, batched, outputs
from intactkv.calibrating.samples import Sample


class _TooMuch(Exception):
    """The graph passed its bound."""


def activations_fit(
    kv: IntactKV, model: PreTrainedModel, rows: Sequence[Sample], goal: Objective, *, most_bytes: int
) -> bool:
    """Whether the graph of one forward of `rows` and its loss, blocks not checkpointed, takes at most `most_bytes`.

    Where the forward itself fails, the answer is no: what is wrong with it is found where gradients are tried.
    """
    known, left = {_address(tensor) for tensor in [*model.parameters(), *model.buffers()]}, most_bytes

    def pack(tensor: Tensor) -> Tensor:
        nonlocal left
        if _address(tensor) not in known:
            known.add(_address(tensor))  # views of one storage count once
            left -= tensor.untyped_storage().nbytes()
        if left < 0:
            raise _TooMuch
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    try:
        with hooks, torch.enable_grad(), attach(model, kv, check=False):
            own = outputs(model, batched(rows, prefix=kv.ids.cpu()), blocks=goal.blocks > 0, logits=goal.kl > 0)
            logits = None if own.logits is None else own.logits.detach()
            goal.sums(Outputs(tuple(block.detach() for block in own.blocks), logits), own)
    except (_TooMuch, RuntimeError):
        return False
    return True


def _address(tensor: Tensor) -> int:
    """Where a tensor's numbers lie; of a tensor that wraps others (torchao, quanto), which object it is."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return -id(tensor)
