"""Parts of a face by name: on drawings as they are drawn, on anything else where five points say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from facegen import examples
from facegen.errors import NoFaceFound, WeightsMissing, WrongRequest
from facegen.face.align import ARCFACE_POINTS
from facegen.face.parse import CLASSES, REGIONS, FaceParser, usual
from facegen.face.types import Detection
from facegen.images import to_pil
from facegen.world.render import PARSING, render


@pytest.fixture(scope="module")
def parser(mini: Path) -> FaceParser:
    return FaceParser.from_pretrained(mini)


def test_the_classes_are_those_of_the_world() -> None:
    assert CLASSES == PARSING
    assert {name for names in REGIONS.values() for name in names} == set(CLASSES)


@pytest.mark.parametrize("name", ["face", "hair", "background"])
def test_on_a_drawing_parts_are_as_they_are_drawn(parser: FaceParser, name: str) -> None:
    drawn = render(examples.scene("example:4"), 128)
    photo, box, points = to_pil(drawn.rgb), drawn.box[0].numpy(), drawn.landmarks5[0].numpy()
    found = parser.region(photo, [Detection(box, 1.0, points)], name) > 0
    true = torch.stack([drawn.parsing == PARSING.index(one) for one in REGIONS[name]]).any(0)
    assert found.shape == (1, 128, 128)
    assert float((found & true).sum() / (found | true).sum()) > 0.6


def test_where_the_net_sees_nothing_points_say_where_a_part_is(parser: FaceParser) -> None:
    gray = to_pil(torch.full((3, 112, 112), 0.5))
    face = Detection(np.array([20, 10, 92, 110], np.float32), 1.0, ARCFACE_POINTS)
    for name in ("eyes", "mouth", "glasses"):
        assert parser.region(gray, [face], name).equal(usual(name, ARCFACE_POINTS, (112, 112)))
    with pytest.raises(NoFaceFound, match="There is no hair to be seen"):
        parser.region(gray, [face], "hair")


def test_usual_places_move_with_the_points() -> None:
    eyes = usual("eyes", ARCFACE_POINTS * 2 + 5, (300, 280))
    y, x = eyes[0].nonzero().float().mean(0)
    middle = ARCFACE_POINTS[:2].mean(0) * 2 + 5
    assert abs(float(x) - middle[0]) < 2
    assert abs(float(y) - middle[1]) < 2
    with pytest.raises(WrongRequest, match="differs from face to face"):
        usual("hair", ARCFACE_POINTS, (112, 112))


def test_what_cannot_be_found_is_one_sentence(parser: FaceParser, tmp_path: Path) -> None:
    gray = to_pil(torch.full((3, 64, 64), 0.5))
    with pytest.raises(WrongRequest, match="there are: face, skin"):
        parser.region(gray, [], "elbow")
    with pytest.raises(NoFaceFound, match="give a mask"):
        parser.region(gray, [], "eyes")
    with pytest.raises(WeightsMissing, match="give a mask"):
        FaceParser.from_pretrained(tmp_path)
