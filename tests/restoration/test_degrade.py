"""The model of damage: seeded, each kind by itself, nothing at probability 0."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from facegen import examples
from facegen.restoration.degrade import LEVELS, NONE, Damage, between, degrade


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean())


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return examples.photo("example:4").crop((40, 30, 200, 150))


def test_probability_zero_is_the_photo_to_the_bit(photo: Image.Image) -> None:
    assert degrade(photo, NONE, seeded(1)).tobytes() == photo.tobytes()


def test_the_seed_decides(photo: Image.Image) -> None:
    first, again, other = (degrade(photo, Damage(), seeded(seed)) for seed in (1, 1, 2))
    assert first.size == photo.size
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("kind", ["blur", "shrink", "noise", "jpeg", "gray"])
def test_each_kind_does_something_by_itself(photo: Image.Image, kind: str) -> None:
    only = replace(NONE, **{kind: 1.0}, factor=(4.0, 4.0), level=(10.0, 10.0), quality=(30.0, 30.0), sigma=(5.0, 8.0))
    made = degrade(photo, only, seeded(1))
    assert error(made, photo) > 0.5
    red, green, blue = (np.asarray(channel, np.int16) for channel in made.split())
    assert (bool((red == green).all()) and bool((red == blue).all())) == (kind == "gray")


def test_a_kind_that_is_off_leaves_the_others_as_they_were(photo: Image.Image) -> None:
    """The same blur, with the chance of noise at 0 or at almost 0."""
    blur = replace(NONE, blur=1.0)
    assert degrade(photo, blur, seeded(5)).tobytes() == degrade(photo, replace(blur, noise=1e-9), seeded(5)).tobytes()


def test_three_levels_are_three_levels(photo: Image.Image) -> None:
    mean = {
        name: np.mean([error(degrade(photo, damage, seeded(seed)), photo) for seed in range(4)])
        for name, damage in LEVELS.items()
    }
    assert mean["light"] < mean["medium"] < mean["heavy"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="probability of blur"):
        Damage(blur=1.5)
    with pytest.raises(ValueError, match="range of quality"):
        Damage(quality=(80.0, 20.0))


def test_degrees_lie_between_the_levels() -> None:
    assert [between(degree) for degree in (0.0, 0.5, 1.0)] == [LEVELS[name] for name in ("light", "medium", "heavy")]
    assert between(0.25).factor == (2.25, 3.75)
    with pytest.raises(ValueError, match="degree of damage"):
        between(1.1)
