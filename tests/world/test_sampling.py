"""People and pictures are drawn naturally, and the same name always gives the same picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from facegen.world.facts import FACTS, labels
from facegen.world.parameters import BACKGROUNDS, CLOTHES, COLORS, GLASSES, GROUPS, HAIR_COLORS, HAIR_STYLES, Scenes
from facegen.world.sampling import (
    HELD_OUT_FROM,
    is_held_out,
    people_for,
    people_numbers,
    sample_people,
    sample_scenes,
    scene_for,
    scenes_for,
    vary,
)


@pytest.fixture(scope="module")
def many() -> Scenes:
    generator = torch.Generator().manual_seed(3)
    return sample_scenes(sample_people(12_000, generator), generator)


def _equal(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, group), getattr(b, group)) for group in GROUPS)


def _share(condition: Tensor) -> float:
    return float(condition.float().mean())


def test_every_value_lies_inside_its_range(many: Scenes) -> None:
    for group, parameters in GROUPS.items():
        values = getattr(many, group)
        for column, parameter in enumerate(parameters):
            assert values[:, column].min() >= parameter.low, parameter.name
            assert values[:, column].max() <= parameter.high, parameter.name


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("hair_style", len(HAIR_STYLES)),
        ("hair_color", len(HAIR_COLORS)),
        ("glasses", len(GLASSES)),
        ("hat", 3),
        ("clothes", len(CLOTHES)),
        ("clothes_color", len(COLORS)),
        ("background", len(BACKGROUNDS)),
        ("background_color", len(COLORS)),
    ],
)
def test_every_choice_is_common_enough_to_be_learnt(many: Scenes, name: str, count: int) -> None:
    shares = torch.bincount(many.column(name).long(), minlength=count) / len(many)
    assert shares.min() > 0.04


def test_every_expression_is_common_enough_to_be_learnt(many: Scenes) -> None:
    found = labels(many)
    for kind in ("expression", "eyes", "mouth", "looking", "tilt", "light", "light_color"):
        shares = torch.bincount(found[kind][found[kind] >= 0], minlength=len(FACTS[kind])) / len(many)
        assert shares.min() > 0.04, (kind, shares)
    assert 0.2 < _share(found["expression"] == 0) < 0.32


def test_nature_has_its_habits_without_being_strict(many: Scenes) -> None:
    man, woman = many.column("masculinity") > 0.5, many.column("masculinity") < -0.5
    bearded = many.column("beard") > 0.5
    assert _share(bearded[woman]) < 0.01
    assert 0.1 < _share(bearded[man]) < 0.4
    painted = many.column("lipstick") > 0.5
    assert _share(painted[woman]) > 5 * _share(painted[man]) > 0
    long_hair = many.column("hair_style") == HAIR_STYLES.index("long straight")
    assert _share(long_hair[woman]) > 2 * _share(long_hair[man]) > 0
    old, young = many.column("age") > 0.7, many.column("age") < 0.3
    white = many.column("hair_color") >= list(HAIR_COLORS).index("gray")
    white &= many.column("hair_color") <= list(HAIR_COLORS).index("white")
    assert _share(white[old]) > 5 * _share(white[young]) > 0
    assert 0.2 < _share(many.column("glasses") > 0) < 0.3
    assert 0.07 < _share(many.column("hat") > 0) < 0.13
    assert 0.25 < many.column("yaw").std() < 0.31


def test_skin_and_age_cover_their_whole_range_evenly(many: Scenes) -> None:
    for name in ("skin_tone", "age"):
        tenths = torch.histc(many.column(name), 10, 0, 1) / len(many)
        assert tenths.min() > 0.08
        assert tenths.max() < 0.12


def test_a_named_picture_does_not_depend_on_its_company() -> None:
    together = scenes_for(5, [7, 3, 7], [0, 2, 9])
    assert _equal(together[[1]], scene_for(5, 3, 2))
    assert _equal(together[[2]], scene_for(5, 7, 9))
    assert torch.equal(together.identity[0], together.identity[2])
    assert not torch.equal(together.attributes[0], together.attributes[2])
    assert torch.equal(together.identity[:1], people_for(5, [7]))
    assert not torch.equal(people_for(6, [7]), people_for(5, [7]))


def test_a_generator_gives_the_same_draw_again() -> None:
    first, second = (sample_people(4, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_vary_keeps_the_person_and_changes_the_named_groups_only() -> None:
    scenes = scenes_for(0, [1, 2], [0, 0])
    other = vary(scenes, torch.Generator().manual_seed(0))
    assert torch.equal(other.identity, scenes.identity)
    assert not any(torch.equal(getattr(other, g), getattr(scenes, g)) for g in ("expression", "pose", "attributes"))
    posed = vary(scenes, torch.Generator().manual_seed(0), groups=("pose",))
    assert torch.equal(posed.attributes, scenes.attributes)
    assert not torch.equal(posed.pose, scenes.pose)
    with pytest.raises(ValueError, match="identity"):
        vary(scenes, torch.Generator(), groups=("identity",))  # type: ignore[arg-type]


def test_held_out_people_are_never_training_people() -> None:
    train, held_out = people_numbers("train", 50), people_numbers("held_out", 50)
    assert not any(is_held_out(person) for person in train)
    assert all(is_held_out(person) for person in held_out)
    with pytest.raises(ValueError, match="100000"):
        people_numbers("train", HELD_OUT_FROM + 1)
