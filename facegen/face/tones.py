"""The tones that skin has in a photo, given to what was painted into it.

A model that knows neither the light nor the camera of a photograph paints a pale or a glaring mask into it. Pictures
are (3, S, S) in [0, 1] and of the same place; chances of skin and masks (1, S, S).
"""

from __future__ import annotations

import torch
from torch import Tensor

from facegen.face.parse import CLASSES, REGIONS, FaceParser
from facegen.face.paste import match_colours

_SKIN = [CLASSES.index(name) for name in REGIONS["skin"]]


@torch.no_grad()
def skin(parser: FaceParser, *pictures: Tensor) -> tuple[Tensor, ...]:
    """The chance of skin in each picture."""
    return tuple(one[_SKIN].sum(0, keepdim=True) for one in parser.chances(torch.stack(pictures)))


def same_skin(made: Tensor, seen: Tensor, hole: Tensor, chances: tuple[Tensor, ...]) -> Tensor:
    """What was made with the skin tones of the photo that is seen, where skin is: for the same person in that light.

    chances: of skin, in what was made and in the photo.
    """
    new, old = chances
    return made.lerp(_toned(made, seen, hole, chances), torch.maximum(new, old))


def near_skin(made: Tensor, seen: Tensor, hole: Tensor, chances: tuple[Tensor, ...], *, much: float) -> Tensor:
    """What was made that `much` nearer to the photo's skin tones: for another person, whose skin is theirs.

    All of the face moves alike, or lips and teeth would stay behind; much: 0 leaves it as it is, 1 goes the whole way.
    """
    return made.lerp(_toned(made, seen, hole, chances), much)


def _toned(made: Tensor, seen: Tensor, hole: Tensor, chances: tuple[Tensor, ...]) -> Tensor:
    """As skin in the hole came out, so it becomes as all skin in the photo is: neck and ears count as well."""
    new, old = chances
    return match_colours(made, seen, new * old * hole, old)
