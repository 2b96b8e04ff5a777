"""What is cut out, enlarged and put back: the way there and back, and bytes that stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.errors import WrongMask
from facegen.face import paste
from facegen.face.align import ARCFACE_POINTS
from facegen.images import to_tensor


@pytest.fixture
def photo() -> Image.Image:
    """A smooth picture, 90 × 70, that survives being enlarged and made smaller again."""
    y, x = np.mgrid[:70, :90]
    waves = [np.sin(x / 9 + k) * np.cos(y / (7 + k)) for k in range(3)]
    return Image.fromarray((np.stack(waves, -1) * 90 + 128).astype(np.uint8))


def _hole(height: int = 70, width: int = 90) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, 20:50, 30:60] = 1
    return mask


def test_a_crop_of_one_to_one_and_back_is_exact(photo: Image.Image) -> None:
    crop = paste.cut(photo, (10, 5, 74, 69), 64)
    assert np.array_equal(np.asarray(crop.image), np.asarray(photo)[5:69, 10:74])
    back = paste.paste(photo, crop, to_tensor(crop.image), torch.ones(1, 70, 90))
    assert np.array_equal(np.asarray(back), np.asarray(photo))


@pytest.mark.parametrize("size", [32, 128])
def test_enlarged_or_made_smaller_it_comes_back_to_its_place(photo: Image.Image, size: int) -> None:
    crop = paste.cut(photo, (20, 5, 80, 65), size)
    assert crop.enlarged == pytest.approx(size / 60)
    back = paste.paste(photo, crop, to_tensor(crop.image), torch.ones(1, 70, 90), soft=2)
    assert np.abs(np.asarray(back).astype(int) - np.asarray(photo)).mean() < 1.5


def test_an_aligned_crop_brings_points_to_the_template_and_back(photo: Image.Image) -> None:
    points = ARCFACE_POINTS * 0.4 + np.array([15, 8], np.float32)
    crop = paste.cut_aligned(photo, points, ARCFACE_POINTS, 112)
    assert np.allclose(crop.points(points), ARCFACE_POINTS, atol=1e-3)
    back = crop.back(to_tensor(crop.image))
    inside = crop.reach()[0] > 0
    assert inside.sum() > 1500
    assert (back - to_tensor(photo))[:, inside].abs().mean() < 0.01


def test_pixels_outside_the_mask_keep_their_bytes(photo: Image.Image) -> None:
    crop = paste.cut(photo, (15, 5, 75, 65), 100)
    made = torch.rand(3, 100, 100, generator=torch.Generator().manual_seed(1))
    for soft in (0.0, 5.0):
        after = paste.paste(photo, crop, made, _hole(), soft=soft)
        assert paste.changed_pixels(photo, after, _hole()) == 0
        assert paste.changed_pixels(photo, after, torch.zeros_like(_hole())) > 500


def test_an_empty_mask_changes_nothing(photo: Image.Image) -> None:
    crop = paste.cut(photo, (15, 5, 75, 65), 100)
    after = paste.paste(photo, crop, torch.zeros(3, 100, 100), torch.zeros(1, 70, 90), soft=3)
    assert np.array_equal(np.asarray(after), np.asarray(photo))
    with pytest.raises(WrongMask, match="empty"):
        paste.mask_box(torch.zeros(1, 4, 4))


def test_feathering_rises_inwards_only() -> None:
    soft = paste.feather(_hole(), 6)
    assert (soft[_hole() == 0] == 0).all()
    row = soft[0, 35, 30:45]
    assert (row.diff() >= 0).all()
    assert 0 < row[0] < 0.1
    assert row[-1] == 1
    assert paste.feather(torch.ones(1, 9, 9), 3).eq(1).all(), "the picture's edge is no edge of the mask"


def test_eroding_and_dilating_move_the_edge_by_the_radius() -> None:
    assert paste.mask_box(paste.erode(_hole(), 4)) == (34, 24, 56, 46)
    assert paste.mask_box(paste.dilate(_hole(), 4)) == (26, 16, 64, 54)
    assert paste.erode(torch.ones(1, 9, 9), 3).eq(1).all()


def test_the_square_stays_inside_the_photo() -> None:
    assert paste.square((0, 0, 20, 10), (90, 70), around=0.5) == (0, 0, 40, 40)
    assert paste.square((70, 60, 90, 70), (90, 70), around=0.5) == (50, 30, 90, 70)
    x0, y0, x1, y1 = paste.square((0, 0, 90, 70), (90, 70), around=0.0)
    assert (x1 - x0, y1 - y0) == (90, 90)
    assert y0 == -10
    assert x0 == 0


def test_a_colour_cast_is_taken_off(photo: Image.Image) -> None:
    true = to_tensor(photo)
    cast = true * 0.9 + torch.tensor([0.08, 0.0, -0.05])[:, None, None].clamp(min=0)
    matched = paste.match_colours(cast, true, 1 - _hole())
    assert (matched - true).abs().mean() < 0.005 < (cast - true).abs().mean()
    assert paste.match_colours(cast, true, torch.zeros(1, 70, 90)) is cast


def test_a_mask_of_another_size_is_named(photo: Image.Image) -> None:
    with pytest.raises(WrongMask, match=r"10×10.*90×70"):
        paste.blend(photo, to_tensor(photo), torch.ones(1, 10, 10))
