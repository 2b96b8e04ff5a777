"""The aligned face of restoration networks, and what is kept of a damaged one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.errors import NoFaceFound
from facegen.restoration.faces import BORDER, FFHQ_POINTS, blur_width, blurred, cut_ffhq, gray, is_gray, with_coarse


def noise(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_a_face_on_the_template_is_its_own_crop() -> None:
    photo = noise(1, 128)
    crop = cut_ffhq(photo, FFHQ_POINTS / 4, 128)
    assert np.abs(np.asarray(crop.image, int) - np.asarray(photo, int)).max() <= 1
    moved = cut_ffhq(photo, FFHQ_POINTS / 4 + 40, 128)
    assert moved.image.getpixel((127, 127)) == BORDER[::-1]
    assert np.allclose(moved.points(FFHQ_POINTS / 4 + 40), FFHQ_POINTS / 4, atol=1e-3)


def test_one_bad_point_does_no_harm() -> None:
    points = FFHQ_POINTS / 4
    bad = points.copy()
    bad[4] += (30, -25)
    assert np.abs(cut_ffhq(noise(1), bad, 128).matrix - cut_ffhq(noise(1), points, 128).matrix).max() < 0.1


def test_points_that_say_nothing() -> None:
    with pytest.raises(NoFaceFound):
        cut_ffhq(noise(1), np.full((5, 2), 7.0))


def test_gray_stays_gray() -> None:
    assert not is_gray(noise(1))
    assert is_gray(noise(1).convert("L").convert("RGB"))
    generator = torch.Generator().manual_seed(1)
    made, seen = torch.rand(3, 32, 32, generator=generator), 0.3 + 0.2 * torch.rand(3, 32, 32, generator=generator)
    seen = seen[:1].expand_as(seen)
    light = gray(made, seen)
    assert torch.equal(light[0], light[2])
    assert float(light.mean()) == pytest.approx(float(seen.mean()), abs=1e-3)
    assert float(light[0].std()) == pytest.approx(float(seen[0].std()), rel=0.02)


def test_what_is_coarse_comes_from_the_damaged_face() -> None:
    generator = torch.Generator().manual_seed(1)
    fine = 0.1 * torch.randn(3, 64, 64, generator=generator)
    seen = torch.full((3, 64, 64), 0.5)
    kept = with_coarse(0.2 + fine, seen, 4.0)
    assert float(kept.mean()) == pytest.approx(0.5, abs=0.01)
    assert float((kept - kept.mean()).std()) == pytest.approx(0.1, rel=0.15)
    assert torch.allclose(with_coarse(seen, seen, 2.0), seen, atol=1e-6)
    assert torch.allclose(with_coarse(0.2 + fine, seen, 0.0), seen, atol=1e-6)


@pytest.mark.parametrize("noisy", [0.0, 0.01])
def test_how_blurred_a_picture_is(noisy: float) -> None:
    generator = torch.Generator().manual_seed(1)
    drawing = (
        (torch.rand(3, 16, 16, generator=generator) > 0.5).float().repeat_interleave(16, 1).repeat_interleave(16, 2)
    )
    grain = noisy * torch.randn(3, 256, 256, generator=generator)
    found = [blur_width(blurred(drawing, sigma) + grain) for sigma in (1.0, 2.0, 3.0, 5.0)]
    assert found == pytest.approx([1.0, 2.0, 3.0, 5.0], rel=0.35)
