"""Random weights that follow from key names alone, and what the published code made of them.

Each tensor is drawn with its key's CRC-32 as seed, so that a network built anywhere gets the same weights. The figures
in reference.json were computed with the published code (torch 2.13, CPU, one thread): twelve values of the output,
evenly spread, and a digest of all keys and shapes of the full-size and of the tiny network.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REFERENCE: Mapping[str, Any] = json.loads(Path(__file__).with_name("reference.json").read_text())
COUNTER = "num_batches_tracked"


def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of a key."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()) & 0x7FFFFFFF))
    if key.endswith("running_var"):
        return (1 + 0.05 * value).abs()
    if len(shape) < 2:
        return 1 + 0.05 * value if len(shape) == 1 and key.endswith("weight") else 0.05 * value
    return value * (0.7 if len(shape) > 2 else 1.0) / torch.Size(shape[1:]).numel() ** 0.5


def weights(net: nn.Module) -> dict[str, Tensor]:
    """A state dict for a net, which may be on the meta device; spectral norms are those of the weights."""
    filled = {key: drawn(key, tuple(value.shape)) for key, value in net.state_dict().items() if COUNTER not in key}
    for key in [key for key in filled if key.endswith("weight_u")]:
        weight = filled[f"{key[:-2]}_orig"].flatten(1)
        left = F.normalize(torch.ones(len(weight)), dim=0)
        for _ in range(15):
            right = F.normalize(weight.T @ left, dim=0)
            left = F.normalize(weight @ right, dim=0)
        filled[key], filled[f"{key[:-1]}v"] = left, right
    return filled


def digest(net: nn.Module) -> str:
    """Of all keys with their shapes."""
    lines = sorted(f"{key} {list(value.shape)}" for key, value in net.state_dict().items() if COUNTER not in key)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def picture(side: int) -> Tensor:
    """Noise (1, 3, side, side) in [-1, 1]."""
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def difference(made: Tensor, name: str, figures: str = "values") -> float:
    """Largest difference from the published code's values, as a share of its output's largest value."""
    known = torch.tensor(REFERENCE[name][figures])
    flat = made.flatten()
    places = torch.linspace(0, len(flat) - 1, len(known)).long()
    return float((flat[places] - known).abs().max()) / REFERENCE[name]["largest"]
