"""A drawn face with a hand in front of it, and what of it is hand and skin."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from facegen import examples
from facegen.face.parse import CLASSES, REGIONS, FaceParser
from facegen.face.types import Face
from facegen.images import to_pil
from facegen.world.front import cover
from facegen.world.render import Rendering, render

SEEDS = (5, 18, 21)  # hands from all sides, over a sixth to a quarter of the face


@dataclass(frozen=True, eq=False)
class Handed:
    """The photo, its face, and where hand and face are to be seen, (H, W) bool each."""

    photo: Image.Image
    face: Face
    hand: np.ndarray
    skin: np.ndarray

    def changed(self, after: Image.Image) -> np.ndarray:
        differ: np.ndarray = (np.asarray(self.photo) != np.asarray(after)).any(-1)
        return differ

    def check(self, after: Image.Image) -> None:
        """The face is another one; the hand is not, but for specks of its rim that the net does not see."""
        differ = self.changed(after)
        inner = -torch.nn.functional.max_pool2d(-torch.from_numpy(self.hand)[None].float(), 7, 1, 3)[0].numpy() > 0
        assert differ[self.hand].mean() < 0.015
        assert differ[inner].mean() < 0.002
        assert differ[self.skin].mean() > 0.6


@cache
def _drawn() -> Rendering:
    return render(examples.scene("example:4"), 256)


def behind_a_hand(parser: FaceParser, seed: int) -> Handed:
    """The example person 4 at 256 pixels behind a hand."""
    if parser.net.config["classes"] < len(CLASSES):
        pytest.skip("the embedded net was trained before hands were drawn")
    drawn = _drawn()
    pictures, classes = cover(drawn.rgb, drawn.parsing, torch.Generator().manual_seed(seed), kind="hand")
    photo = to_pil(pictures)
    face = Face(drawn.box[0].numpy(), drawn.landmarks5[0].numpy(), 1.0, np.ones(16, np.float32), photo)
    hand, skin = (
        torch.isin(classes[0], torch.tensor([CLASSES.index(one) for one in REGIONS[name]])).numpy()
        for name in ("front", "face")
    )
    return Handed(photo, face, hand, skin)
