"""Geometry controls: drawn from the truth, zero at first, followed where they are asked to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.errors import WeightsMissing, WrongRequest
from facegen.images import to_pil
from facegen.models.base import Model
from facegen.models.geometry import ALL, KINDS, Geometry, drawn, is_map, posed_points, read
from facegen.world.render import render
from facegen.world.sampling import scene_for


def test_maps_are_drawn_from_the_truth() -> None:
    made = render(scene_for(0, 1, 1), 64)
    maps = {kind: drawn(kind, made) for kind in KINDS}
    assert all(one.shape == (3, 64, 64) and 0 <= one.min() <= one.max() <= 1 for one in maps.values())
    background = made.parsing[0] == 0
    assert (maps["depth"][:, background] == 0).float().mean() > 0.9
    assert maps["depth"].max() == 1
    x, y = made.landmarks68[0, 30].round().long().tolist()  # the nose tip
    assert maps["landmarks"][:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max() > 0.3
    assert torch.allclose(maps["normals"][2, background], torch.tensor(1.0))


def test_lines_on_black_are_a_map_and_photos_are_not() -> None:
    made = render(scene_for(0, 1, 1), 128)
    lines, sketch, photo = drawn("landmarks", made), drawn("sketch", made), made.rgb[0]
    assert lines.amax(0).gt(0.5).float().mean() < 0.2
    shown = {tuple(color) for color in lines.gt(0.7).flatten(1).T.tolist()}
    assert shown >= {(False, False, False), (True, False, False), (False, True, False), (True, True, False)}
    assert is_map(to_pil(lines))
    assert is_map(to_pil(lines.amax(0, keepdim=True)))  # white ones are lines too
    assert is_map(to_pil(sketch))
    assert not is_map(to_pil(photo))
    alone = photo * (made.parsing[0] > 0)
    assert not is_map(to_pil(torch.nn.functional.pad(alone, (64, 64, 64, 64))))  # a face before nothing but black


def test_a_turned_head_has_other_points() -> None:
    ahead, right, tall = posed_points({}, (64, 64)), posed_points({"yaw": 0.6}, (64, 64)), posed_points({}, (64, 128))
    assert ahead.shape == (5, 2)
    apart = [points[1, 0] - points[0, 0] for points in (ahead, right)]
    assert apart[1] < apart[0]
    assert right[2, 0] > ahead[2, 0] + 2
    assert np.allclose(tall, ahead + np.array([32, 0]))
    with pytest.raises(WrongRequest, match="There is no pose 'tilt'"):
        posed_points({"tilt": 1}, (64, 64))
    with pytest.raises(WrongRequest, match="yaw must be from"):
        posed_points({"yaw": 2}, (64, 64))


@pytest.mark.parametrize("base", ["tiny_sd15", "tiny_sdxl"])
def test_fresh_it_changes_nothing_and_at_strength_0_never(base: str, request: pytest.FixtureRequest) -> None:
    model = Model.from_pretrained(request.getfixturevalue(base), device="cpu", dtype=torch.float32)
    geometry = Geometry.fresh("sketch", model)
    picture = read("sketch", Image.fromarray(np.eye(64, dtype=np.uint8) * 255).convert("RGB"), (64, 64))
    assert picture.any()
    text = model.encode_text(["a face"])
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def call(*conditions: object) -> torch.Tensor:
        with torch.no_grad(), model.prepare([text, *conditions], 1, True) as prepared:  # type: ignore[list-item]
            return model.predict(noisy, 500, prepared.throughout())

    plain = call()
    assert torch.allclose(call(geometry.condition(picture)), plain, atol=1e-5)
    with torch.no_grad():
        for parameter in geometry.net.controlnet_mid_block.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(call(geometry.condition(picture)), plain, atol=1e-3)
    assert torch.equal(call(geometry.condition(picture, scale=0.0)), plain)
    assert torch.equal(call(geometry.condition(picture, mask=torch.zeros(1, 64, 64))), plain)


def test_a_fresh_net_tells_drawings_apart(tiny_sd15: Path) -> None:
    model = Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)
    lines = torch.stack([drawn("landmarks", render(scene_for(0, 1, number), 64)) for number in (1, 2)])
    with torch.no_grad():
        seen = Geometry.fresh(ALL, model).net.controlnet_cond_embedding(lines)
    assert (seen[0] - seen[1]).std() > 0.01


def test_what_is_not_there_is_named(tiny_sd15: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)
    with pytest.raises(WrongRequest, match="no control 'mesh'"):
        Geometry.fresh("mesh", model)
    with pytest.raises(WeightsMissing):
        Geometry.from_pretrained(tmp_path / "depth", model)
