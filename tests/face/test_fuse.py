from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from facegen.errors import NoFaceFound
from facegen.face.fuse import fuse
from facegen.face.types import Array, Face, unit

DIM = 128
POINTS = np.zeros((5, 2), np.float32)


def faces(*people: int, noise: float = 0.6, common: float = 0.0, seed: int = 0) -> list[Face]:
    """One face per entry; equal numbers are one person. `common` makes all faces alike."""
    generator = np.random.default_rng(seed)
    centres = {person: unit(generator.standard_normal(DIM)) for person in sorted(set(people))}
    shared = unit(generator.standard_normal(DIM))
    found = []
    for person in people:
        vector: Array = unit(centres[person] + noise * unit(generator.standard_normal(DIM)) + common * shared)
        found.append(
            Face(
                np.array([0, 0, 9, 9], np.float32),
                POINTS,
                0.9,
                (20 * vector).astype(np.float32),
                Image.new("RGB", (8, 8)),
            )
        )
    return found


def test_the_mean_is_nearer_to_the_person_than_each_photo() -> None:
    group = faces(*[1] * 6)
    fused = fuse(group)
    assert fused.warning is None
    assert fused.kept == tuple(range(6))
    assert np.isclose(np.linalg.norm(fused.embedding), 20, rtol=1e-4)
    assert np.isclose(np.linalg.norm(fused.unit), 1, rtol=1e-5)
    held_out = faces(*[1] * 9)[6:]
    for other in held_out:
        assert other.unit @ fused.unit > max(float(other.unit @ face.unit) for face in group) - 0.05


def test_one_face_is_itself() -> None:
    face = faces(1)[0]
    fused = fuse([face])
    assert np.allclose(fused.embedding, face.embedding, rtol=1e-4, atol=1e-5)
    assert fused.face is face
    assert fused.warning is None


def test_an_outlier_is_left_out_and_named() -> None:
    fused = fuse(faces(1, 1, 2, 1, 1))
    assert fused.kept == (0, 1, 3, 4)
    assert fused.warning is not None
    assert "photo 3 is left out" in fused.warning


def test_two_people_are_noticed() -> None:
    fused = fuse(faces(1, 1, 2, 1, 2))
    assert fused.kept == (0, 1, 3)
    assert fused.warning is not None
    assert "more than one person" in fused.warning
    assert "photos 3 and 5 are left out" in fused.warning
    pair = fuse(faces(1, 2))
    assert pair.kept == (0, 1)
    assert pair.warning is not None
    assert "two people" in pair.warning
    assert fuse(faces(1, 1)).warning is None


def test_a_gap_tells_where_everybody_is_alike() -> None:
    alike = faces(1, 1, 1, 2, 2, noise=0.25, common=1.0)
    cosines = np.stack([face.unit for face in alike]) @ np.stack([face.unit for face in alike]).T
    assert cosines.min() > 0.35  # far above chance: only the gap can tell
    assert fuse(alike).kept == (0, 1, 2)
    assert fuse(faces(1, 1, 1, 1, noise=0.25, common=1.0)).warning is None


def test_a_given_threshold_wins() -> None:
    group = faces(1, 1, 1)
    assert fuse(group, same_person=0.99).warning is not None
    assert fuse(faces(1, 2, 3), same_person=-1.0).warning is None


def test_strangers() -> None:
    warning = fuse(faces(1, 2, 3)).warning
    assert warning is not None
    assert "different people" in warning


def test_nothing_to_fuse() -> None:
    with pytest.raises(NoFaceFound):
        fuse([])


@pytest.mark.parametrize("seed", range(5))
def test_no_false_alarm_over_seeds(seed: int) -> None:
    assert fuse(faces(*[1] * 5, seed=seed)).warning is None


def test_few_photos_are_not_split_by_a_recogniser_that_mumbles() -> None:
    """Cosines of one real person as the embedded recogniser, taught on drawings, gives them."""
    from facegen.face.fuse import _groups, _threshold

    cosines = np.array([[1, 0.3, 0.27, 0.62], [0.3, 1, 0.55, 0.11], [0.27, 0.55, 1, 0.07], [0.62, 0.11, 0.07, 1]])
    assert len(_groups(cosines, _threshold(cosines, 128))) == 1
