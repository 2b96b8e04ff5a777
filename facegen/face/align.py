"""From five points to the crop that recognisers were trained on, as arrays and as differentiable tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from facegen.face.types import Array
from facegen.images import from_bgr, to_bgr

if TYPE_CHECKING:
    from torch import Tensor

Picture = TypeVar("Picture", Image.Image, Array)

# Left eye, right eye, nose tip, left and right mouth corner in a 112-pixel crop (insightface `utils/face_align.py`).
ARCFACE_POINTS: Array = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float32,
)


def template(size: int) -> Array:
    """Where the five points go in a crop of `size` pixels, (5, 2) float32; multiples of 128 leave a rim left and right.

    Raises ValueError for a size that is a multiple of neither 112 nor 128.
    """
    if size <= 0 or (size % 112 and size % 128):
        raise ValueError(f"A crop's size must be a multiple of 112 or 128, not {size}.")
    if size % 112 == 0:
        return ARCFACE_POINTS * np.float32(size / 112)
    return ARCFACE_POINTS * np.float32(size / 128) + np.array([8 * size / 128, 0], dtype=np.float32)


def similarity(points: Array, targets: Array) -> Array:
    """The rotation, scale and shift (2, 3) float64 that bring points (N, 2) closest to targets (N, 2).

    Umeyama 1991, in the precision of the points and in scikit-image's order of operations, on which insightface relies:
    so crops agree to the bit. Raises ValueError when all points coincide.
    """
    p, t = (one if one.dtype.kind == "f" else one.astype(np.float64) for one in map(np.asarray, (points, targets)))
    centre, goal = p.mean(axis=0), t.mean(axis=0)
    source, target = p - centre, t - goal
    spread = source.var(axis=0).sum()
    if not float(spread) * len(p) > 1e-9:
        raise ValueError("The points of a face coincide; they do not say where it is.")
    covariance = target.T @ source / len(p)
    left, values, right = np.linalg.svd(covariance)
    signs = np.ones(2)
    if np.linalg.det(left) * np.linalg.det(right) < 0:  # a turn, not a mirror image
        signs[1] = -1
    turn = np.eye(2)
    turn[:] = left @ np.diag(signs) @ right
    scale = 1.0 / spread * (values @ signs)
    shift = goal - scale * (turn @ centre.T)
    matrix: Array = np.concatenate([turn * scale, shift[:, None]], axis=1)
    return matrix


def crop_matrix(points: Array, size: int = 112) -> Array:
    """(2, 3) float64: pixels of the photo to pixels of the aligned crop."""
    return similarity(points, template(size))


def norm_crop(image: Picture, points: Array, size: int = 112) -> Picture:
    """The aligned crop, of the same kind and channel order as `image`; black where the photo ends.

    The same pixels as insightface's `norm_crop`, for sizes that are multiples of 112 or 128.
    """
    import cv2  # type: ignore[import-not-found, unused-ignore]

    matrix = crop_matrix(points, size)
    if isinstance(image, Image.Image):
        return from_bgr(cv2.warpAffine(to_bgr(image), matrix, (size, size), borderValue=0.0))
    warped: Array = cv2.warpAffine(image, matrix, (size, size), borderValue=0.0)
    return warped


def norm_crop_torch(images: Tensor, points: Tensor, size: int = 112) -> Tensor:
    """Aligned crops (B, C, size, size) of images (B, C, H, W) with points (B, 5, 2) in pixels.

    Gradients flow into the images and, through the similarity, into the points. Agrees with `norm_crop` to a grey level
    (OpenCV rounds its weights to 1/32 pixel).
    """
    import torch

    from facegen.face.warp import similarities, warp

    return warp(images, similarities(points, torch.from_numpy(template(size))), size)


def ffhq_crop(image: Image.Image, points: Array, side: int = 256) -> Image.Image:
    """The face as FFHQ shows it: eyes level, both eyes and mouth in the picture's middle; white beyond the photo.

    points (5, 2); the square is max(2 · eye distance, 1.8 · eyes-to-mouth) to each side, its centre a tenth of the way
    from the eyes to the mouth. Source: github NVlabs/ffhq-dataset `download_ffhq.py`.
    """
    eyes, mouth = points[:2].mean(axis=0), points[3:5].mean(axis=0)
    across, down = points[1] - points[0], mouth - eyes
    x = across - np.array([-down[1], down[0]])
    x *= max(np.hypot(*across) * 2.0, np.hypot(*down) * 1.8) / np.hypot(*x)
    y = np.array([-x[1], x[0]])
    centre = eyes + down * 0.1
    corners = np.concatenate([centre - x - y, centre - x + y, centre + x + y, centre + x - y])
    # Supersampled, for PIL's transform looks at single pixels.
    large = image.transform(
        (side * 4, side * 4), Image.Transform.QUAD, corners.tolist(), Image.Resampling.BILINEAR, fillcolor="white"
    )
    return large.resize((side, side), Image.Resampling.LANCZOS)
