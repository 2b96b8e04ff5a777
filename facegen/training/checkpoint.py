"""Training state in one safetensors file: weights, averages, optimiser, random state and step; written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from facegen.checkpoints import write_safetensors
from facegen.errors import CheckpointBroken
from facegen.files import atomic


@dataclass(frozen=True, eq=False)
class TrainingState:
    """What a killed run needs to go on as if nothing had happened."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def flatten_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments as ``{index}.{key}``; learning rates are left out: they follow from the step."""
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, moments in optimiser.state_dict()["state"].items()
        for key, value in moments.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`flatten_optimiser`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def save_tensors(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file whose place either holds the old file or the whole new one.

    Raises :class:`OutputUnwritable` when the folder cannot be written.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        write_safetensors(own, temporary, {"facts": json.dumps(dict(facts or {}))})


def load_tensors(path: Path) -> TrainingState:
    """Read what :func:`save_tensors` wrote; raises :class:`CheckpointBroken` for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return TrainingState({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointBroken(f"{path} is not a readable checkpoint ({error}); delete it to start anew.") from error


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
