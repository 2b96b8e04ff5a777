"""Expressions and poses as the judge of attributes reads them."""

from __future__ import annotations

from pathlib import Path

import torch

from facegen.evaluation.judges import load_judges
from facegen.evaluation.shape import difference, shapes
from facegen.images import to_pil
from facegen.report import MiniShape
from facegen.world.render import render
from facegen.world.sampling import scenes_for


def test_a_turned_head_and_an_open_mouth_are_seen(mini: Path) -> None:
    judges = load_judges(mini)
    still = scenes_for(0, [100_003], [0]).with_values(yaw=0.0, jaw_open=0.0, glasses=0.0, zoom=1.0)
    moved = still.with_values(yaw=0.6, jaw_open=0.9)
    pictures = [to_pil(render(scene, 128).rgb) for scene in (still, moved)]
    units, turns = shapes(judges, pictures)
    assert units.shape[0] == turns.shape[0] == 2
    assert turns[1, 0] - turns[0, 0] > 15
    assert float((units[1] - units[0]).nan_to_num().max()) > 0.3
    judge = MiniShape(nets=judges)
    assert set(judge.apart(pictures[0], pictures[0]).values()) == {0.0}
    assert judge.apart(*pictures)["pose error, degrees"] == difference(turns[0], turns[1])


def test_what_is_unknown_does_not_count() -> None:
    found, true = torch.tensor([1.0, float("nan"), 0.0]), torch.tensor([0.5, 2.0, 0.5])
    assert difference(found, true) == 0.5
