"""The side of the light, read off drawings whose light is known; mirrored with the picture; differentiable."""

from __future__ import annotations

import torch

from facegen.face.light import lean, side
from facegen.face.types import Detection
from facegen.images import to_pil
from facegen.world.render import render
from facegen.world.sampling import HELD_OUT_FROM, scenes_for


def test_light_from_the_left_and_from_the_right_are_told_apart() -> None:
    scenes = scenes_for(0, range(HELD_OUT_FROM, HELD_OUT_FROM + 3), [0] * 3)
    found = {}
    for light in (-0.9, 0.9):
        drawn = render(scenes.with_values(light_x=light, key=1.2), 96, supersample=1)
        found[light] = torch.tensor([
            side(to_pil(drawn.rgb[row]), Detection(drawn.box[row].numpy(), 1.0, drawn.landmarks5[row].numpy()))
            for row in range(3)
        ])  # fmt: skip
    assert (found[0.9] > found[-0.9] + 0.4).all()
    assert float(found[0.9].mean()) > 0.3
    assert float(found[-0.9].mean()) < -0.3


def test_a_mirrored_face_leans_the_other_way_and_gradients_flow() -> None:
    drawn = render(scenes_for(0, [HELD_OUT_FROM], [0]).with_values(light_x=0.8), 96, supersample=1)
    points = drawn.landmarks5
    mirrored = torch.stack([95 - points[..., 0], points[..., 1]], 2)[:, [1, 0, 2, 4, 3]]
    plain, other = lean(drawn.rgb, points), lean(drawn.rgb.flip(3), mirrored)
    assert torch.allclose(plain, -other, atol=0.02)
    pictures = drawn.rgb.clone().requires_grad_()
    lean(pictures, points).sum().backward()
    assert pictures.grad is not None
    assert float(pictures.grad.abs().sum()) > 0
    brighter = (drawn.rgb - 1e-2 * pictures.grad / pictures.grad.abs().max()).clamp(0, 1)
    assert float(lean(brighter, points)) < float(plain)
