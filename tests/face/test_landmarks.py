"""68 points in a photo: as many, in iBUG's order, carried along with the face; nothing without the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.errors import WeightsMissing
from facegen.face.landmarks import MIRROR, LandmarkFinder
from facegen.face.networks import KeypointNet
from facegen.face.types import Detection
from facegen.images import to_pil
from facegen.training.cache import Cache, CachePlan, render_cache
from facegen.training.export import export
from facegen.training.loop import Budget, LoopSettings, run
from facegen.training.points68 import Points68Objective, Points68Settings
from facegen.world.landmarks import landmarks5
from facegen.world.render import render
from facegen.world.sampling import scene_for

Draw = Callable[..., Path]


def new(cache: Cache, held_out: Cache | None = None) -> Points68Objective:
    torch.manual_seed(0)
    net = KeypointNet(widths=(8, 8, 16, 16), size=48, count=68)
    return Points68Objective(net, cache, held_out, Points68Settings(batch=8))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("drawn")
    render_cache(folder, CachePlan(0, 4, 2, size=48, shard_people=4))
    return Cache(folder)


def test_the_mirror_names_each_point_once_and_back() -> None:
    assert sorted(MIRROR) == list(range(68))
    assert all(MIRROR[MIRROR[place]] == place for place in range(68))
    straight = scene_for(0, 1, 1).with_values(yaw=0.0, roll=0.0, shift_x=0.0, mole=0.0)
    even = straight.with_values(eye_close_left=0.0, eye_close_right=0.0)
    points = render(even, 64, supersample=1).landmarks68[0]
    mirrored = torch.stack([64 - points[:, 0], points[:, 1]], 1)[list(MIRROR)]
    assert (mirrored - points).norm(dim=1).max() < 0.5


def test_an_untaught_net_begins_with_the_average_face_and_learns(cache: Cache, tmp_path: Path) -> None:
    objective = new(cache, cache)
    before = objective.figures()
    assert before["error_of_eye_distance"] < 0.4

    def error() -> float:
        same = torch.Generator().manual_seed(1)
        return float(objective.loss(objective.batch(0, same), 0, same)["error"])

    first = error()
    run(objective, tmp_path / "run", Budget(20), LoopSettings(learning_rate=3e-3, warmup=2, average=0.5))
    assert error() < 0.9 * first
    (path,) = export("points68", objective.module, tmp_path)
    assert path == tmp_path / "pack" / "points68.safetensors"
    again = LandmarkFinder.from_pretrained(tmp_path)
    crops = torch.rand(2, 1, 48, 48, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(again.net(crops), objective.module.eval()(crops), atol=1e-5)
    trained = torch.nn.Module.state_dict(objective.module)
    new_head = Points68Objective(objective.module, cache, None, Points68Settings()).module.head.bias
    assert torch.equal(new_head, trained["head.bias"])  # a taught net keeps what it knows


@pytest.mark.parametrize("times", [1, 3])
def test_points_follow_the_photo(cache: Cache, times: int) -> None:
    finder = LandmarkFinder(new(cache).module.eval())
    drawn = render(scene_for(0, 2, 1), 96)
    photo = to_pil(drawn.rgb)
    large = photo.resize((96 * times, 96 * times), Image.Resampling.BICUBIC)
    five = landmarks5(drawn.landmarks68)[0].numpy()
    box = drawn.box[0].numpy()
    found = finder.find(large, Detection(box * times, 1.0, (five + 0.5) * times - 0.5))
    assert found.shape == (68, 2)
    away = np.linalg.norm((found + 0.5) / times - 0.5 - drawn.landmarks68[0].numpy(), axis=1).mean()
    assert away < 0.35 * np.linalg.norm(five[0] - five[1])


def test_without_weights_it_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="facegen train mini --stages points68"):
        LandmarkFinder.from_pretrained(tmp_path)
