"""Where a calibration stands, as one file that is written whole: parameters, moments, the best so far, the readings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from intactkv.error import IntactKVError
from intactkv.files import write_atomically
from intactkv.lines import from_json

_VERSION = 1


@dataclass
class State:
    """After `step` steps: what is trained, AdamW's state, and held-out KL at the steps where it was read.

    `tensors` are the trained keys and values by name, `best` those of the best reading. `readings` are
    (step, held-out KL in nats) in order, `losses` the training loss of every step.
    """

    tensors: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    step: int = 0
    readings: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def best_step(self) -> int:
        """The step of the lowest reading; the earliest of several."""
        return min(self.readings, key=lambda reading: reading[1])[0]

    def stopped(self, patience: int) -> bool:
        """Whether the last `patience` readings were all no better than the best before them."""
        best = [step for step, _ in self.readings].index(self.best_step) if self.readings else 0
        return len(self.readings) - 1 - best >= patience


def save_state(state: State, path: Path, *, job: str) -> None:
    """Write `state` to `path`, whole or not at all; `job` tells the run it belongs to.

    Raises `IntactKVError` where the disk refuses; what the file held before is then still there.
    """
    moments = state.optimizer.state_dict()["state"]
    tensors = {
        **{f"tensor.{name}": tensor.detach() for name, tensor in state.tensors.items()},
        **{f"best.{name}": tensor for name, tensor in state.best.items()},
        **{f"moment.{i}.{name}": value for i, of in moments.items() for name, value in of.items()},
    }
    header = {"version": _VERSION, "job": job, "step": state.step, "readings": state.readings, "losses": state.losses}
    content = save(
        {name: t.cpu().contiguous().clone() for name, t in tensors.items()},
        metadata={"calibration": json.dumps(header)},
    )
    write_atomically(path, content)


def load_state_(state: State, path: Path, *, job: str) -> None:
    """Bring `state` to where the file at `path` says.

    Raises `IntactKVError` for a file that is no checkpoint, or one of another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: Any = from_json((file.metadata() or {})["calibration"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header["version"] != _VERSION or header["job"] != job:
            raise IntactKVError(
                f"{path} is the checkpoint of another calibration (other data, settings, models or intact KV); name "
                "another file or remove it"
            )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("moment."):
                _, i, part = name.split(".")
                moments.setdefault(int(i), {})[part] = tensor
        with torch.no_grad():
            for name, tensor in state.tensors.items():
                tensor.copy_(tensors[f"tensor.{name}"])
        state.best = {name: tensors[f"best.{name}"].to(tensor) for name, tensor in state.tensors.items()}
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        state.step, state.losses = int(header["step"]), list(header["losses"])
        state.readings = [(int(step), float(kl)) for step, kl in header["readings"]]
    except IntactKVError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise IntactKVError(f"{path} is no checkpoint of a calibration ({error}); remove it") from error
