from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from facegen.errors import Cancelled, WeightsMissing, WrongRequest
from facegen.training.cache import Cache, CachePlan, fill_cache, render_cache, shuffled
from facegen.world.sampling import scenes_for


def test_a_rendered_cache_holds_what_was_drawn_and_is_resumed(tmp_path: Path) -> None:
    plan = CachePlan(first=5, people=3, pictures=2, size=32, shard_people=2)
    assert render_cache(tmp_path, plan, worker=1, workers=2) == 1
    assert render_cache(tmp_path, plan) == 1
    assert render_cache(tmp_path, plan) == 0
    cache = Cache(tmp_path)
    assert len(cache) == 6
    assert cache.person.tolist() == [5, 5, 6, 6, 7, 7]
    assert cache.label.tolist() == [0, 0, 1, 1, 2, 2]
    rows = torch.tensor([5, 0])
    assert cache.rgb(rows).shape == (2, 3, 32, 32)
    assert 0.05 < float(cache.rgb(rows).std()) < 0.5
    assert cache.field("parsing", rows).max() < 20
    assert torch.equal(cache.scenes(rows).pose, scenes_for(0, [7, 5], [1, 0]).pose)
    assert cache.field("landmarks68", rows).shape == (2, 68, 2)


def test_several_processes_draw_the_same_pictures(tmp_path: Path) -> None:
    plan = CachePlan(first=5, people=5, pictures=1, size=16, shard_people=1)
    fill_cache(tmp_path / "apart", plan, workers=2)
    fill_cache(tmp_path / "apart", plan, workers=2)  # nothing is lacking
    fill_cache(tmp_path / "alone", plan, workers=1)
    apart, alone = Cache(tmp_path / "apart"), Cache(tmp_path / "alone")
    rows = torch.arange(5)
    assert torch.equal(apart.rgb(rows), alone.rgb(rows))
    assert sorted(path.name for path in (tmp_path / "apart").iterdir()) == [
        *(f"0000{i}" for i in range(5)),
        "plan.json",
    ]


def test_stopped_drawing_says_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("facegen.training.cache._draw", stop)
    with pytest.raises(Cancelled, match="goes on"):
        fill_cache(tmp_path, CachePlan(first=0, people=1, pictures=1, size=16), workers=1)


def test_a_folder_keeps_its_plan(tmp_path: Path) -> None:
    render_cache(tmp_path, CachePlan(first=0, people=1, pictures=1, size=16, shard_people=1))
    with pytest.raises(WrongRequest, match="size"):
        render_cache(tmp_path, CachePlan(first=0, people=1, pictures=1, size=24, shard_people=1))
    assert render_cache(tmp_path, CachePlan(first=0, people=2, pictures=1, size=16, shard_people=1)) == 1


def test_an_empty_folder_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"facegen\.training\.cache"):
        Cache(tmp_path)


def test_pairs_show_one_person_twice(draw_cache: Callable[..., Path], tmp_path: Path) -> None:
    cache = Cache(draw_cache(tmp_path, people=4, pictures=3))
    pairs = cache.same_person_pairs(torch.Generator().manual_seed(0), 64)
    assert pairs.shape == (64, 2)
    assert torch.equal(cache.person[pairs[:, 0]], cache.person[pairs[:, 1]])
    assert (pairs[:, 0] != pairs[:, 1]).all()


def test_an_epoch_shows_each_picture_once_and_needs_no_state() -> None:
    epoch = torch.cat([shuffled(12, 4, step, seed=1) for step in range(3)])
    assert sorted(epoch.tolist()) == list(range(12))
    assert torch.equal(shuffled(12, 4, 4, 1), shuffled(12, 4, 4, 1))
    assert not np.array_equal(shuffled(12, 12, 0, 1), shuffled(12, 12, 1, 1))
    assert len(shuffled(3, 8, 0, 0)) == 8
