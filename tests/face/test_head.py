"""A head's shape and pose from 68 points: as the world knows them to be, and turned as the world turns it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from facegen.errors import WrongRequest
from facegen.face.head import FACES, HEADS, Head, fit, shapes
from facegen.models.geometry import posed_points
from facegen.world.landmarks import landmarks5
from facegen.world.render import render
from facegen.world.sampling import HELD_OUT_FROM, scenes_for

POSE = {"yaw": 0.5, "pitch": 0.1}


def test_a_head_is_found_and_turned_as_its_own() -> None:
    scenes = scenes_for(0, range(HELD_OUT_FROM, HELD_OUT_FROM + 4), [1] * 4)
    drawn = render(scenes, 48, supersample=1).landmarks68
    straight = scenes.with_values(yaw=0.5, pitch=0.1, roll=0.0, shift_x=0.0, shift_y=0.0, zoom=1.0)
    turned = render(straight, 48, supersample=1).landmarks68
    average = Head(torch.zeros(HEADS + FACES), 0.0, 0.0, 0.0, 0.0).seen(POSE, (48, 48))
    wrong, usual = [], []
    for row in range(4):
        head = fit(3 * drawn[row].numpy() + 20)  # where it is in the photo, and how large, is all the same
        found = torch.tensor([head.yaw, head.pitch, head.roll])
        true = torch.stack([scenes.column(name)[row] for name in ("yaw", "pitch", "roll")])
        assert float((found - true).abs().max()) < 0.06  # radians
        assert head.error < 0.05
        eyes = landmarks5(turned[row : row + 1])[0, :2]
        for kept, points in ((wrong, head.seen(POSE, (48, 48))), (usual, average)):
            away = np.linalg.norm(points - turned[row].numpy(), axis=1).mean()
            kept.append(float(away / (eyes[0] - eyes[1]).norm()))
    assert np.mean(wrong) < 0.5 * np.mean(usual)  # the person's own head, not anybody's


def test_what_is_no_pose_is_refused_and_pictures_may_be_oblong() -> None:
    head = Head(torch.zeros(HEADS + FACES), 0.0, 0.0, 0.0, 0.0)
    square, tall = head.seen({}, (64, 64)), head.seen({}, (128, 64))
    assert np.allclose(tall, square + np.array([0, 32]))
    assert posed_points({"zoom": 1.2}, (64, 64), head).shape == (5, 2)
    with pytest.raises(WrongRequest, match="There is no pose 'tilt'"):
        head.seen({"tilt": 1.0}, (64, 64))
    with pytest.raises(WrongRequest, match="yaw must be from"):
        head.seen({"yaw": 2.0}, (64, 64))


def test_components_are_deviations() -> None:
    model = shapes()
    assert model.mean.shape == (68, 3)
    assert model.components.shape == (HEADS + FACES, 68, 3)
    sizes = model.components.flatten(1).norm(dim=1)
    assert (sizes[:HEADS].diff() <= 0).all()
    assert (sizes[HEADS:].diff() <= 0).all()
    left, right = model.mean[36, 0], model.mean[45, 0]
    assert torch.allclose(left, -right, atol=0.02)
