"""Example people for whoever has no photo at hand: `example:1` … `example:999`, drawn by the face world.

They are people that mini was never trained on, looking into the camera; the same name is the same photo everywhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from facegen.errors import WrongRequest

if TYPE_CHECKING:
    from PIL import Image

    from facegen.world.parameters import Scenes

PREFIX = "example:"
COUNT = 999
SIZE = 256
_SEED = 0
_FIRST = 5_000  # after the first held-out people, which the evaluation uses


def is_example(photo: object) -> bool:
    """Whether a photo is given by an example's name."""
    return isinstance(photo, str) and photo.startswith(PREFIX)


def number(name: str) -> int:
    """7 from "example:7"; raises :class:`WrongRequest` for what is no number from 1 to 999."""
    text = name.removeprefix(PREFIX)
    if not text.isdecimal() or not 1 <= int(text) <= COUNT:
        raise WrongRequest(f"There is no {name}; the example people are {PREFIX}1 to {PREFIX}{COUNT}.")
    return int(text)


def scene(name: str, picture: int = 0) -> Scenes:
    """The scene of an example's passport photo (picture 0), or of a snapshot of the same person (1, 2, …)."""
    from facegen.world.parameters import BACKGROUNDS
    from facegen.world.sampling import HELD_OUT_FROM, scene_for

    drawn = scene_for(_SEED, HELD_OUT_FROM + _FIRST + number(name), picture)
    if picture:
        return drawn
    calm = drawn.with_values(hat=0, glasses=0, background=BACKGROUNDS.index("gradient"), zoom=1.0)
    expression = calm.expression.new_zeros(calm.expression.shape)
    return type(calm)(
        identity=calm.identity,
        expression=expression,
        pose=calm.with_values(yaw=0.0, pitch=0.0, roll=0.0, shift_x=0.0, shift_y=0.0).pose,
        attributes=calm.attributes,
        light=calm.with_values(light_x=-0.4, light_y=0.5, key=1.0, fill=0.5, warmth=0.1, rim=0.2).light,
    ).with_values(smile=0.15)


def photo(name: str, picture: int = 0) -> Image.Image:
    """A drawn photo of an example person, 256 x 256 RGB."""
    return _drawn(name, picture).copy()


@lru_cache(maxsize=64)
def _drawn(name: str, picture: int) -> Image.Image:
    from facegen.images import to_pil
    from facegen.world.render import render

    return to_pil(render(scene(name, picture), SIZE).rgb)
