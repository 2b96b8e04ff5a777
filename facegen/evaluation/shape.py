"""Which expression and which turn of the head a picture shows, as the embedded judge of attributes reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facegen.images import to_tensor
from facegen.world.parameters import EXPRESSION

if TYPE_CHECKING:
    from PIL import Image

    from facegen.evaluation.judges import Judges

TURNS = ("yaw", "pitch", "roll")


def shapes(judges: Judges, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Coefficients (N, units), NaN for units that the judge does not know, and turns (N, 3) in degrees."""
    seen = [judges.attributes(to_tensor(one)[None]) for one in pictures]
    units = [[float(one[unit.name]) if unit.name in one else float("nan") for unit in EXPRESSION] for one in seen]
    turns = [[float(one[name]) for name in TURNS] for one in seen]
    return torch.tensor(units), torch.tensor(turns).rad2deg()


def difference(found: Tensor, true: Tensor) -> float:
    """Mean absolute difference where both are known."""
    return float((found - true).abs().nanmean())
