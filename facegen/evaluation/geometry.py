"""How closely a picture follows the geometry asked for: measured on the picture, against the drawn world's truth.

68 points by the embedded finder, the head's turn and the parts of the picture by the judges, edges as a sketch has
them. Nothing of this takes part when a picture is made, but that a photo's landmarks come from the same finder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.face.landmarks import LandmarkFinder
from facegen.face.types import Detection
from facegen.images import to_tensor
from facegen.models.geometry import draw_sketch

if TYPE_CHECKING:
    from PIL import Image

    from facegen.evaluation.judges import Judges
    from facegen.world.render import Rendering

_EYES = (36, 45)  # outer corners of both eyes
_TURNS = ("yaw", "pitch", "roll")


@dataclass(frozen=True, eq=False)
class Goal:
    """One drawn picture as it should come out, and the turn of its head (3,) in degrees."""

    rendering: Rendering
    turn: Tensor


def points_error(found: Tensor, true: Tensor) -> float:
    """Mean distance of points (68, 2) in the same pixels, in distances between the outer corners of the true eyes."""
    eyes = (true[_EYES[1]] - true[_EYES[0]]).norm()
    return float((found - true).norm(dim=1).mean() / eyes)


def overlap(found: Tensor, true: Tensor) -> float:
    """Intersection over union of classes (H, W), mean over those that the truth has at least 1 % of."""
    shares = []
    for one in true.unique():
        here, there = found == one, true == one
        if there.float().mean() >= 0.01:
            shares.append(float((here & there).sum() / (here | there).sum()))
    return sum(shares) / len(shares)


def edges_found(found: Tensor, true: Tensor, reach: int = 2) -> float:
    """Share of the edges of a picture (3, H, W) that another has too, at most `reach` pixels away, and the other way
    round: their harmonic mean (F1).
    """
    one, two = (draw_sketch(picture)[:1] for picture in (found, true))

    def near(edges: Tensor) -> Tensor:
        return F.max_pool2d(edges[None], 2 * reach + 1, 1, reach)[0]

    right = float((one * near(two)).sum() / one.sum().clamp(min=1))
    seen = float((two * near(one)).sum() / two.sum().clamp(min=1))
    return 2 * right * seen / max(right + seen, 1e-6)


@torch.no_grad()
def followed(
    judges: Judges, finder: LandmarkFinder, pictures: Sequence[Image.Image], goals: Sequence[Goal]
) -> dict[str, float]:
    """Means over pictures: error of the points (% of the eyes' distance), of yaw, pitch and roll (degrees), overlap of
    the parts, edges, and the share in which a face is found; points of the others do not count.
    """
    errors, turns, parts, edges, faces = [], [], [], [], 0
    for picture, goal in zip(pictures, goals, strict=True):
        truth = goal.rendering
        side = truth.rgb.shape[-1]
        pixels = to_tensor(picture.resize((side, side)) if picture.size != (side, side) else picture)[None]
        five, seen = judges.points(pixels)
        if bool(seen[0]):
            faces += 1
            detection = Detection(np.zeros(4, np.float32), 1.0, five[0].cpu().numpy())
            found = torch.from_numpy(finder.find(picture.resize((side, side)), detection))
            errors.append(100 * points_error(found, truth.landmarks68[0]))
        read = judges.attributes(pixels)
        turn = torch.tensor([float(read[name]) for name in _TURNS]).rad2deg()
        turns.append(float((turn - goal.turn).abs().mean()))
        parts.append(overlap(judges.parse(pixels)[0].cpu(), truth.parsing[0].long()))
        edges.append(edges_found(pixels[0], truth.rgb[0]))
    row = {"points, % of eyes": sum(errors) / len(errors)} if errors else {}
    means = {"pose, degrees": turns, "parts": parts, "edges": edges}
    return {
        **row,
        **{name: sum(values) / len(values) for name, values in means.items()},
        "faces": faces / len(pictures),
    }
