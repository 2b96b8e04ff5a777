"""What a prompt asked for and a picture lacks, and in which part of the picture it belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facegen.conditions import Condition, ControlCondition, TokenCondition
from facegen.errors import NoFaceFound
from facegen.world.captions import say
from facegen.world.words import parse_prompt

if TYPE_CHECKING:
    from PIL import Image

    from facegen.face.parse import FaceParser
    from facegen.face.types import Face
    from facegen.report import Obedience
    from facegen.world.facts import Fact

_MOUTH_HAIR = ("beard", "mouth")
# Kind of fact → the parts of a picture that show it. Who a person is (age, gender, skin) cannot be borrowed.
PARTS: Mapping[str, tuple[str, ...]] = {
    "hair_color": ("hair", "brows"),
    "hair_style": ("hair",),
    "glasses": ("glasses",),
    "hat": ("hat", "hair"),
    "hat_color": ("hat",),
    "beard": _MOUTH_HAIR,
    "goatee": _MOUTH_HAIR,
    "moustache": _MOUTH_HAIR,
    "stubble": _MOUTH_HAIR,
    "earrings": ("earrings",),
    "lipstick": ("mouth",),
    "eye_makeup": ("eyes", "brows"),
    "eye_color": ("eyes",),
    "eyes": ("eyes",),
    "mouth": ("mouth",),
    "expression": ("mouth", "eyes", "brows"),
    "clothes": ("clothes",),
    "clothes_color": ("clothes",),
    "background": ("background",),
    "background_color": ("background",),
}
# Parts inside the face, where the person goes on being brought in while they are painted anew.
INSIDE = frozenset({"eyes", "brows", "mouth"})
SHARED = 0.5  # how strongly the person acts in such a part where the prompt asks for something there


def missed(prompt: str, obedience: Obedience) -> list[Fact]:
    """The facts that a prompt asks for, a picture lacks, and the base model can be asked for."""
    lacking = set(obedience.missed)
    return [fact for fact in parse_prompt(prompt) if fact.kind in PARTS and say(fact) in lacking]


def parts_of(facts: Sequence[Fact]) -> tuple[str, ...]:
    """The parts that show these facts, each once."""
    return tuple(dict.fromkeys(part for fact in facts for part in PARTS[fact.kind]))


def region(parser: FaceParser, parts: Sequence[str], shown: Sequence[tuple[Image.Image, Sequence[Face]]]) -> Tensor:
    """Where the parts are in any of these pictures of one size with their faces, (1, H, W); empty where in none.

    Longer hair needs the place where it will be, shorter hair the place where it was.
    """
    width, height = shown[0][0].size
    mask = torch.zeros(1, height, width)
    for picture, faces in shown:
        for part in parts:
            try:
                mask = torch.maximum(mask, parser.region(picture, faces, part))
            except NoFaceFound:
                continue
    return mask


def without(conditions: Sequence[Condition], mask: Tensor) -> list[Condition]:
    """Conditions of a person that do not act where the mask (1, H, W) is 1."""
    rest = (1 - mask).clamp(0, 1)
    return [
        replace(one, mask=rest if one.mask is None else one.mask * rest)
        if isinstance(one, (TokenCondition, ControlCondition))
        else one
        for one in conditions
    ]


def confined(conditions: Sequence[Condition], person: Sequence[Condition], mask: Tensor) -> list[Condition]:
    """All conditions, those of the person acting only where the mask (1, H, W) is above 0, and as much as it says."""
    return [without([one], 1 - mask)[0] if one in person else one for one in conditions]


def visual(parser: FaceParser, prompt: str, picture: Image.Image, faces: Sequence[Face]) -> Tensor:
    """Where in a picture a person is recognised, (1, H, W) in [0, 1]: the largest face, without the parts for which a
    prompt asks and, softly, without those inside the face; everywhere where no face is seen.
    """
    width, height = picture.size
    if not faces:
        return torch.ones(1, height, width)
    face = max(faces, key=lambda one: one.area)
    mask = region(parser, ("face",), [(picture, (face,))])
    asked = parts_of([fact for fact in parse_prompt(prompt) if fact.kind in PARTS])
    for part in asked:
        left = SHARED if part in INSIDE else 0.0
        mask = torch.minimum(mask, 1 - (1 - left) * region(parser, (part,), [(picture, (face,))]))
    return mask
