"""Aligning faces as a differentiable batch: least-squares similarities and bilinear warps of tensors.

Points are in pixels, a pixel's centre at whole numbers, as OpenCV has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Left eye, right eye, nose tip, left and right mouth corner in a 112-pixel crop (insightface ``face_align.py``).
ARCFACE_POINTS = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarities(points: Tensor, targets: Tensor) -> Tensor:
    """The rotation, scale and shift that bring points (B, N, 2) closest to targets ((B, N, 2) or (N, 2)): (B, 2, 3).

    The closed form of Umeyama (1991) in the plane, without mirroring.
    """
    targets = targets.to(points).expand_as(points)
    centre, goal = points.mean(1, keepdim=True), targets.mean(1, keepdim=True)
    p, t = points - centre, targets - goal
    spread = p.square().sum((1, 2)).clamp(min=1e-8)
    a = (p * t).sum((1, 2)) / spread  # scale · cos
    b = (p[..., 0] * t[..., 1] - p[..., 1] * t[..., 0]).sum(1) / spread  # scale · sin
    linear = torch.stack([torch.stack([a, -b], 1), torch.stack([b, a], 1)], 1)  # (B, 2, 2)
    shift = goal.transpose(1, 2) - linear @ centre.transpose(1, 2)  # (B, 2, 1)
    return torch.cat([linear, shift], 2)


def transform(matrices: Tensor, points: Tensor) -> Tensor:
    """Points (B, N, 2) carried by (B, 2, 3)."""
    return points @ matrices[:, :, :2].transpose(1, 2) + matrices[:, None, :, 2]


def warp(images: Tensor, matrices: Tensor, size: int, padding: str = "zeros", mode: str = "bilinear") -> Tensor:
    """Crops (B, C, size, size) of images (B, C, H, W); ``matrices`` (B, 2, 3) carry image pixels to crop pixels.

    ``padding`` and ``mode`` are those of ``grid_sample``.
    """
    height, width = images.shape[-2:]
    linear, shift = matrices[:, :, :2], matrices[:, :, 2:]
    # Inverse of a 2 × 2 in closed form: a batched solver is much slower on a CPU.
    (a, b), (c, d) = linear[:, 0].unbind(1), linear[:, 1].unbind(1)
    determinant = a * d - b * c
    inverse = torch.stack([torch.stack([d, -b], 1), torch.stack([-c, a], 1)], 1) / determinant[:, None, None]
    origin = -inverse @ shift  # (B, 2, 1): the image pixel under crop pixel 0, 0
    places = torch.arange(size, device=images.device, dtype=images.dtype)
    x = inverse[:, 0, 0, None, None] * places + inverse[:, 0, 1, None, None] * places[:, None] + origin[:, 0, :, None]
    y = inverse[:, 1, 0, None, None] * places + inverse[:, 1, 1, None, None] * places[:, None] + origin[:, 1, :, None]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)  # (B, size, size, 2)
    return F.grid_sample(images, grid, mode=mode, padding_mode=padding, align_corners=False)


def aligned_crops(images: Tensor, points: Tensor, size: int = 112) -> Tensor:
    """ArcFace crops (B, C, size, size) of faces whose five points (B, 5, 2) are known; black outside the picture.

    Pictures in which every face is more than twice as large as its crop are made smaller first, so that no pixel is
    left out.
    """
    matrices = similarities(points, ARCFACE_POINTS * (size / 112))
    times = int(1 / matrices[:, :, 0].norm(dim=1).max().clamp(min=1e-3))
    if times >= 2:
        images = F.avg_pool2d(images, times, ceil_mode=True)
        matrices = similarities((points + 0.5) / times - 0.5, ARCFACE_POINTS * (size / 112))
    return warp(images, matrices, size)
