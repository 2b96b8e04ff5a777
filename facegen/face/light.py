"""From which side the light on a face comes, from the shading of the face itself.

The face is taken for an ellipsoid in ArcFace's crop and its brightness for the first spherical harmonics of its
normals, a + b·n (Basri & Jacobs 2003), of which the part along x is told: light from above and the light's colour
cannot be told apart from the relief of a face and the colour of its skin.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor

from facegen.face.align import norm_crop_torch
from facegen.face.types import Detection, Face
from facegen.face.warp import ARCFACE_POINTS, similarities, transform
from facegen.images import to_tensor

_CENTRE, _HALF = (56.0, 68.0), (38.0, 46.0)  # pixels of ArcFace's crop
_EDGE = 0.9  # of the ellipsoid's radius; normals further out are too uncertain
_EYES = 35.2  # pixels of that crop
# From the lean of the shading and of the nose (a turned head leans by itself) to the world's light_x: least squares
# over 300 drawings of people of the world.
_SHADING, _NOSE = 1.8, 1.95


def lean(pictures: Tensor, points: Tensor) -> Tensor:
    """How much brighter faces become towards the picture's right, as a share of their mean brightness, (B,).

    pictures (B, 3, H, W) in [0, 1], their faces' five points (B, 5, 2) in pixels; differentiable.
    """
    crops = norm_crop_torch(pictures, points).clamp(min=1e-4) ** 2.2  # light adds up in linear values
    inside, solve = _fit(pictures.device)
    bright = crops.mean(1)[:, inside]  # (B, P)
    found = bright @ solve.T  # (B, 4): a, b
    return found[:, 1] / bright.mean(1).clamp(min=1e-4)


@torch.no_grad()
def side(photo: Image.Image, face: Detection | Face) -> float:
    """From the picture's left (-1) to its right (1), for a face of a photo whose five points are known."""
    assert face.points is not None
    points = torch.from_numpy(face.points)[None].float()
    upright = transform(similarities(points, ARCFACE_POINTS), points)[0]
    nose = float(upright[2, 0] - (upright[0, 0] + upright[1, 0]) / 2) / _EYES
    return max(-1.0, min(1.0, _SHADING * float(lean(to_tensor(photo)[None], points)) + _NOSE * nose))


def lean_of(side: float) -> float:
    """The lean that a face looking ahead has when the light comes from this side."""
    return side / _SHADING


@lru_cache(maxsize=4)
def _fit(device: torch.device) -> tuple[Tensor, Tensor]:
    """Which pixels (112, 112) count, and the least squares (4, P) of their brightness by 1 and the normals."""
    v, u = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")
    x, y = (u - _CENTRE[0]) / _HALF[0], (_CENTRE[1] - v) / _HALF[1]
    inside = x * x + y * y < _EDGE**2
    x, y = x[inside], y[inside]
    design = torch.stack([torch.ones_like(x), x, y, (1 - x * x - y * y).sqrt()], 1)
    return inside.to(device), torch.linalg.pinv(design).to(device)
