"""68 points of a face in a photo, in iBUG's order, by the embedded pack's small net (pack/points68)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from facegen.face.networks import KeypointNet
from facegen.face.parse import small_net
from facegen.face.types import Array, Detection, Face
from facegen.face.warp import ARCFACE_POINTS, similarities, transform, warp
from facegen.hub import resolve
from facegen.world.landmarks import landmarks5

NAME = "points68"
# The square that the net looks at, in pixels of ArcFace's 112-pixel crop: chin and jaw of turned heads lie in it.
CENTRE, SIDE = (56.0, 78.0), 140.0
# Which point is which in a mirror image: jaw, brows, nose, nostrils, eyes, outer and inner lips.
MIRROR: tuple[int, ...] = (
    *range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, *range(35, 30, -1),
    45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
    *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1),
)  # fmt: skip


def crop_matrices(points: Tensor, size: int) -> Tensor:
    """Matrices (B, 2, 3) that carry pixels to the net's crops of faces whose five points (B, 5, 2) are known."""
    target = (ARCFACE_POINTS - torch.tensor(CENTRE)) * (size / SIDE) + (size - 1) / 2
    return similarities(points, target)


@dataclass(frozen=True, eq=False)
class LandmarkFinder:
    """The net, ready to be used. `from_pretrained` is the way in."""

    net: KeypointNet

    @classmethod
    def from_pretrained(cls, assets: Path | None = None) -> LandmarkFinder:
        """The embedded model's, or that of another model laid out like it. Raises WeightsMissing, CheckpointBroken."""
        why = f"so 68 points cannot be found in a photo; train it: facegen train mini --stages {NAME}"
        return cls(cast(KeypointNet, small_net((assets or resolve("mini")) / "pack" / NAME, why)))

    @torch.no_grad()
    def find(self, photo: Image.Image, face: Detection | Face) -> Array:
        """Points (68, 2) float32 in pixels of the photo, for one of its faces whose five points are known."""
        assert face.points is not None
        pixels = torch.from_numpy(np.asarray(photo.convert("RGB"), np.float32)).mean(2)[None, None] / 255
        points = torch.from_numpy(np.asarray(face.points, np.float32))[None]
        return self.located(pixels, points)[0].numpy()

    def located(self, pixels: Tensor, points: Tensor) -> Tensor:
        """As `refined`, and once more about the points that were found."""
        return self.refined(pixels, landmarks5(self.refined(pixels, points)))

    def refined(self, pixels: Tensor, points: Tensor) -> Tensor:
        """Points (B, 68, 2) of gray pictures (B, 1, H, W) in [0, 1] about five points (B, 5, 2), of picture and mirror
        image together.
        """
        size: int = self.net.config["size"]
        matrices = crop_matrices(points, size)
        cut = crops(pixels, matrices, size) * 2 - 1
        plain, mirrored = (self.net(one) * size for one in (cut, cut.flip(3)))
        other = torch.stack([size - 1 - mirrored[..., 0], mirrored[..., 1]], 2)[:, MIRROR]
        return transform(_inverse(matrices), (plain + other) / 2)


def crops(pixels: Tensor, matrices: Tensor, size: int) -> Tensor:
    """As `warp`; large faces are made smaller first, so that no pixel is left out."""
    times = int(1 / matrices[:, :, 0].norm(dim=1).max().clamp(min=1e-3))
    if times < 2:
        return warp(pixels, matrices, size, padding="border")
    linear = matrices[:, :, :2] * times
    shift = matrices[:, :, 2] + (matrices[:, :, :2] * ((times - 1) / 2)).sum(2)
    smaller = F.avg_pool2d(pixels, times, ceil_mode=True, count_include_pad=False)
    return warp(smaller, torch.cat([linear, shift[:, :, None]], 2), size, padding="border")


def _inverse(matrices: Tensor) -> Tensor:
    """Of similarities (B, 2, 3)."""
    linear = torch.linalg.inv(matrices[:, :, :2])
    return torch.cat([linear, -linear @ matrices[:, :, 2:]], 2)
