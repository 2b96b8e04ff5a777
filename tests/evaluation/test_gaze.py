"""The measured gaze goes with the drawn one, and is unknown where there is no face."""

from __future__ import annotations

from pathlib import Path

import torch

from facegen.evaluation.gaze import gaze, iris
from facegen.evaluation.judges import load_judges
from facegen.face.landmarks import LandmarkFinder
from facegen.world.render import render
from facegen.world.sampling import scenes_for


def test_eyes_that_look_further_right_are_measured_further_right(mini: Path) -> None:
    scene = scenes_for(0, [900_001], [0]).with_values(
        eye_close_left=0.05, eye_close_right=0.05, glasses=0.0, yaw=0.0, pitch=0.0, zoom=1.2
    )
    made = [render(scene.with_values(gaze_x=value), 128) for value in (-0.9, 0.0, 0.9)]
    known = torch.cat([iris(one.rgb.mean(1, keepdim=True), one.landmarks68) for one in made])
    judges, finder = load_judges(mini), LandmarkFinder.from_pretrained(mini)
    with torch.no_grad():
        found = torch.cat([gaze(judges, finder, one.rgb) for one in made])
        assert bool(gaze(judges, finder, torch.ones(1, 3, 128, 128)).isnan())
    for measured in (known, found):
        assert measured[0] + 0.1 < measured[1] < measured[2] - 0.1
        assert measured[0] < 0 < measured[2]
