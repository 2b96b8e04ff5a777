"""Where eyes look, measured on the picture: how far the iris lies from the middle of the eye towards a corner.

The judge of attributes does not see it (its correlation with the drawn gaze is about 0), but the iris is the darkest
thing between two corners, which the 68 points tell: of 60 drawn people the measure goes with the gaze at r = .89, and
at r = .85 after mini's autoencoder, which therefore holds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facegen.face.landmarks import LandmarkFinder
from facegen.face.warp import similarities, warp
from facegen.world.landmarks import landmarks5

if TYPE_CHECKING:
    from facegen.evaluation.judges import Judges

CORNERS = ((36, 39), (42, 45))  # of each eye, the picture's left first
_WIDTH, _HEIGHT = 40, 20  # pixels of the strip in which an eye is upright
_REACH = 0.7  # of the strip's width lies between the corners
_OPEN = 0.33  # of half the width, how high and low the lids reach at most


def gaze(judges: Judges, finder: LandmarkFinder, pictures: Tensor) -> Tensor:
    """How far to the picture's right the eyes of pictures (B, 3, H, W) in [0, 1] look, (B,): -1 and 1 are the corners,
    about ±0.33 the drawn gaze at its ends. NaN where no face is found.
    """
    points, found = judges.points(pictures)
    gray = pictures.mean(1, keepdim=True)
    corners = points.cpu()
    for _ in range(2):  # the second time about the points that were found the first time
        all_points = finder.refined(gray, corners)
        corners = landmarks5(all_points)
    return torch.where(found.cpu(), iris(gray, all_points), float("nan"))


def iris(gray: Tensor, points: Tensor) -> Tensor:
    """The same of gray pictures (B, 1, H, W) whose 68 points (B, 68, 2) are known, mean of both eyes."""
    target = torch.tensor([[(1 - side * _REACH) * _WIDTH / 2 - 0.5, _HEIGHT / 2 - 0.5] for side in (1, -1)])
    x = torch.linspace(-1, 1, _WIDTH) / _REACH  # -1 and 1 are the corners
    y = torch.linspace(-1, 1, _HEIGHT)[:, None] * _HEIGHT / _WIDTH / _REACH
    between = (x.abs() < 1) & (y.abs() < _OPEN * (1.15 - x.square()).clamp(min=0).sqrt())  # (height, width)
    places = []
    for pair in CORNERS:
        strips = warp(gray, similarities(points[:, list(pair)], target), _WIDTH, padding="border")[:, 0, :_HEIGHT]
        white = torch.where(between, strips, 0.0).flatten(1).quantile(0.9, dim=1)[:, None, None]
        dark = ((white - strips).clamp(min=0) * between).square()
        places.append((dark * x).sum((1, 2)) / dark.sum((1, 2)).clamp(min=1e-9))
    return torch.stack(places).mean(0)
