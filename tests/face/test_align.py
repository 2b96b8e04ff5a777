from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.face.align import ARCFACE_POINTS, crop_matrix, norm_crop, norm_crop_torch, similarity, template
from facegen.face.types import Array


def photo(seed: int = 0, width: int = 300, height: int = 220) -> Array:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def face_points(seed: int) -> Array:
    generator = np.random.default_rng(seed)
    angle, scale = generator.uniform(-0.7, 0.7), generator.uniform(0.5, 2.0)
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (ARCFACE_POINTS - 56) @ linear.T + generator.uniform(70, 150, 2) + generator.normal(0, 3, (5, 2))
    return moved.astype(np.float32)


@pytest.mark.parametrize("size", [112, 128, 224, 256])
def test_crops_are_insightfaces(size: int) -> None:
    from insightface.utils import face_align

    for seed in range(4):
        image, points = photo(seed), face_points(seed)
        theirs = face_align.norm_crop(image, points, size)
        ours = norm_crop(image, points, size)
        assert np.array_equal(crop_matrix(points, size), face_align.estimate_norm(points, size)), "to the bit"
        assert np.array_equal(ours, theirs)
        assert np.array_equal(np.asarray(norm_crop(Image.fromarray(image), points, size)), ours)


def test_the_torch_twin_agrees_with_opencv() -> None:
    images = np.stack([photo(seed) for seed in range(3)])
    points = np.stack([face_points(seed) for seed in range(3)])
    expected = np.stack([norm_crop(image, p, 112) for image, p in zip(images, points, strict=True)])
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    crops = norm_crop_torch(tensor, torch.from_numpy(points), 112).permute(0, 2, 3, 1).numpy()
    difference = np.abs(crops - expected)
    assert difference.mean() < 0.6  # OpenCV's weights are multiples of 1/32
    # At the photo's rim OpenCV blends with black along one more pixel; inside the photo the two agree closely.
    assert np.quantile(difference, 0.99) < 4


def test_gradients_reach_images_and_points() -> None:
    images = torch.from_numpy(photo()).permute(2, 0, 1)[None].double()
    points = torch.from_numpy(face_points(1))[None].double()
    small = torch.nn.functional.avg_pool2d(images, 4).requires_grad_()
    moved = (points / 4).requires_grad_()
    crop = norm_crop_torch(small, moved, 112)
    (crop**2).mean().backward()
    assert small.grad is not None
    assert moved.grad is not None
    assert small.grad.abs().sum() > 0
    assert moved.grad.abs().sum() > 0
    # Against differences: a step of a point changes the loss as its gradient says.
    step = torch.zeros_like(moved)
    step[0, 2, 0] = 1e-4
    with torch.no_grad():
        ahead = (norm_crop_torch(small, moved + step, 112) ** 2).mean()
        behind = (norm_crop_torch(small, moved - step, 112) ** 2).mean()
    assert torch.isclose((ahead - behind) / 2e-4, moved.grad[0, 2, 0], rtol=0.02)


def test_similarity_of_exact_points_is_exact() -> None:
    matrix = np.array([[0.8, -0.6, 12.0], [0.6, 0.8, -7.0]])
    moved = ARCFACE_POINTS @ matrix[:, :2].T + matrix[:, 2]
    assert np.allclose(similarity(ARCFACE_POINTS, moved), matrix, atol=1e-6)


def test_bad_sizes_and_points() -> None:
    with pytest.raises(ValueError, match="multiple of 112"):
        template(100)
    with pytest.raises(ValueError, match="coincide"):
        similarity(np.ones((5, 2)), ARCFACE_POINTS)
