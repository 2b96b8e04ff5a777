"""What a portrait shows besides who it is: skin, hair, glasses, beard, mood and the turn of the head, as facts.

The small nets learnt from drawings, so on photographs each is asked where it is strongest: the parsing says which pixel
is skin or hair, and their colours are then measured, not guessed; the 68 points say how the head is turned; glasses,
beards and smiles are read by the judge of attributes in several framings of the face, set upright.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from facegen.face.head import fit
from facegen.face.landmarks import LandmarkFinder, crops
from facegen.face.networks import AttributeJudge
from facegen.face.parse import CLASSES, FaceParser, small_net
from facegen.face.types import Array, Detection, Face
from facegen.face.warp import ARCFACE_POINTS, similarities
from facegen.hub import resolve
from facegen.images import to_tensor
from facegen.world.facts import Fact
from facegen.world.parameters import GLASSES, HAIR_STYLES, HATS, POSE

SIDE = 128  # pixels; what the nets were trained on
_CENTRE = (56.0, 64.0)  # of ArcFace's 112-pixel crop; that of these crops
_SCALE = 0.68  # of ArcFace's crop; as large as faces of the drawings are
_FRAMINGS = (0.58, 0.64, 0.70, 0.76)
# Individual typology angle (Chardon et al. 1991): above 28° light or intermediate, below 10° brown or dark.
_LIGHT, _DARK = 28.0, 10.0
_TURNED, _TILTED = 0.2, 0.17  # radians
_LONG = 0.15  # share of the places beside the neck that hold the hair of the head; short hair holds next to none


@dataclass(frozen=True)
class Description:
    """facts: what is to be seen; turns: yaw, pitch and roll in radians, as in facegen.world.parameters."""

    facts: tuple[Fact, ...]
    turns: Mapping[str, float]

    def pose(self) -> dict[str, float]:
        """The turns as far as heads of the world go."""
        limits = {one.name: one for one in POSE}
        return {name: min(max(turn, limits[name].low), limits[name].high) for name, turn in self.turns.items()}

    def prompt(self, asked: tuple[Fact, ...] = ()) -> str:
        """The facts in the words of the captions, but for the kinds that are asked for otherwise."""
        from facegen.world.captions import say

        settled = {fact.kind for fact in asked}
        told = {fact.kind: fact for fact in self.facts if fact.kind not in settled}
        phrases = []
        # The embedded model hears the beard in "no beard" and draws one.
        if "beard" in told and told.pop("beard").value == "yes":
            phrases.append("with a beard")
        if "hair_style" in told or "hair_color" in told:
            phrases.insert(0, _hair(told.pop("hair_style", None), told.pop("hair_color", None)))
        return ", ".join([*phrases, *map(say, told.values())])


@dataclass(frozen=True, eq=False)
class Upright:
    """A face set upright: its picture (3, SIDE, SIDE) in [0, 1] and the class of each pixel (SIDE, SIDE)."""

    picture: Tensor
    classes: Tensor

    def of(self, *names: str) -> Tensor:
        """Where any of these classes is, (SIDE, SIDE)."""
        return torch.isin(self.classes, torch.tensor([CLASSES.index(name) for name in names]))


@dataclass(frozen=True, eq=False)
class Describer:
    """The nets, ready to be used. `from_pretrained` is the way in."""

    parser: FaceParser
    judge: AttributeJudge
    finder: LandmarkFinder

    @classmethod
    def from_pretrained(cls, assets: Path | None = None) -> Describer:
        """The embedded model's, or those of another model laid out like it. Raises WeightsMissing, CheckpointBroken."""
        stem = (assets or resolve("mini")) / "judges" / "attributes"
        judge = cast(AttributeJudge, small_net(stem, "so a photo cannot be described; say in the prompt what it shows"))
        return cls(FaceParser.from_pretrained(assets), judge, LandmarkFinder.from_pretrained(assets))

    @torch.no_grad()
    def describe(self, photo: Image.Image, face: Detection | Face) -> Description:
        """What the photo shows of one of its faces whose five points are known."""
        assert face.points is not None
        pixels = to_tensor(photo)[None]
        points = torch.from_numpy(face.points).float()[None]
        head = fit(self.finder.find(photo, face))
        seen = self.upright(pixels, points)
        answers = self._answers(pixels, points)
        facts = [
            skin(seen),
            *hair(seen, float(answers["hair_style"][HAIR_STYLES.index("bald")])),
            *self._worn(seen, answers),
            *_turned(head.yaw, head.pitch),
        ]
        return Description(tuple(facts), {"yaw": head.yaw, "pitch": head.pitch, "roll": head.roll})

    def upright(self, pixels: Tensor, points: Tensor) -> Upright:
        """The face of a picture (1, 3, H, W) with these points (1, 5, 2)."""
        picture = _framed(pixels, points, _SCALE)
        return Upright(picture[0], self.parser.chances(picture)[0].argmax(0))

    def _answers(self, pixels: Tensor, points: Tensor) -> dict[str, Tensor]:
        """The judge's mean answer over framings and their mirror images: chances (classes,) and amounts ()."""
        framed = torch.cat([_framed(pixels, points, scale) for scale in _FRAMINGS])
        answers = self.judge(torch.cat([framed, framed.flip(3)]) * 2 - 1)
        return {
            name: (one.softmax(1) if one.ndim == 2 else one.sigmoid()).mean(0)
            for name, one in answers.items()
            if not name.startswith("fact.")
        }

    def _worn(self, seen: Upright, answers: Mapping[str, Tensor]) -> list[Fact]:
        """Glasses, beard, hat and mood."""
        glasses, hat = answers["glasses"], answers["hat"]
        found = Fact("glasses", "none")
        # Ties, shadows, brows and collars look like beards and glasses to either net, but seldom to both.
        framed = _share(seen.of("eye_g"), _oval(56, 52, 40, 16)) > 0.01
        if framed and float(1 - glasses[GLASSES.index("none")]) > 0.5:
            dark = float(glasses[GLASSES.index("sunglasses")]) > 0.5
            found = Fact("glasses", "sunglasses" if dark else GLASSES[1 + int(glasses[1:3].argmax())])
        bearded = float(answers["beard"]) > 0.2 and _share(seen.of("beard"), _oval(56, 104, 34, 24)) > 0.15
        covered = float(1 - hat[HATS.index("none")]) > 0.7 and _share(seen.of("hat"), _oval(56, 0, 52, 26)) > 0.3
        facts = [found, Fact("beard", "yes" if bearded else "no")]
        facts += [Fact("hat", HATS[1 + int(hat[1:].argmax())])] if covered else []
        smiling = float(answers["smile"]) > 0.35
        laughing = smiling and float(answers["jaw_open"]) > 0.4
        return [*facts, Fact("expression", "laughing" if laughing else "smiling" if smiling else "neutral")]


def skin(seen: Upright) -> Fact:
    """Light, medium or dark: the typology angle of the lit skin of the face, shades and highlights left out."""
    colours = _lab(seen.picture)[:, seen.of("skin", "nose") & _oval(56, 72, 30, 38)]  # (3, P)
    if colours.shape[1] < 50:
        return Fact("skin", "medium")
    light, yellow = colours[0].quantile(0.6), colours[2].median()
    angle = float(torch.rad2deg(torch.atan2(light - 50, yellow)))
    return Fact("skin", "light" if angle > _LIGHT else "medium" if angle > _DARK else "dark")


def hair(seen: Upright, bald: float = 0.0) -> list[Fact]:
    """Length and colour; bald: how probably there is none."""
    top = seen.of("hair") & _oval(56, 50, 50, 75)
    top[int(_v(34)) :] = False
    if bald > 0.5 or int(top.sum()) < 150:
        return [Fact("hair_style", "bald")]
    colours = _lab(seen.picture)
    middle = colours[:, top].median(1).values
    length = "any long" if long(seen, top, middle) > _LONG else "any short"
    return [Fact("hair_style", length), Fact("hair_color", hair_colour(*middle.tolist()))]


def hair_colour(lightness: float, red: float, yellow: float) -> str:
    """The name of a colour of hair, CIE Lab: the world's palette as lamps and shade leave it in photos."""
    chroma = (red**2 + yellow**2) ** 0.5
    if chroma < 8:
        return "black" if lightness < 38 else "gray" if lightness < 70 else "white"
    if yellow < -8:
        return "blue"
    if red > 25 and yellow < 10:
        return "pink"
    if lightness < 15:
        return "black"
    if red > 18 and red > 0.7 * yellow:
        return "red"
    return "brown" if lightness < 48 else "blond"


def long(seen: Upright, top: Tensor, colour: Tensor) -> float:
    """How far the hair of the head, of its own colour (3,) and joined to its top (SIDE, SIDE), hangs down beside chin
    and neck: share of the fuller side.
    """
    import cv2  # type: ignore[import-not-found, unused-ignore]

    light, red, yellow = _lab(seen.picture) - colour[:, None, None]
    # Hair lies in its own shade beside a neck; what is lighter than the top of the head is something else.
    away = torch.where(light > 0, 0.5, 0.1) * light.square() + red.square() + yellow.square()
    alike = seen.of("hair") & (away.sqrt() < 16)
    labels = torch.from_numpy(cv2.connectedComponents(alike.byte().numpy())[1])
    kept = labels[top & alike].unique()
    own = torch.isin(labels, kept[kept > 0])
    rows = slice(int(_v(98)), int(_v(122)))
    half = SIDE // 2
    sides = [own[rows, half - 46 : half - 20], own[rows, half + 20 : half + 46]]
    return max(float(side.float().mean()) for side in sides)


def _turned(yaw: float, pitch: float) -> list[Fact]:
    facts = [Fact("looking", "left" if yaw < -_TURNED else "right" if yaw > _TURNED else "ahead")]
    return facts + ([Fact("tilt", "down" if pitch < 0 else "up")] if abs(pitch) > _TILTED else [])


def _hair(style: Fact | None, colour: Fact | None) -> str:
    """As captions say it: "short black hair"."""
    if style is not None and style.value == "bald":
        return "a bald head"
    length = "" if style is None else style.value.removeprefix("any ") + " "
    return f"{length}{colour.value + ' ' if colour else ''}hair"


def _framed(pixels: Tensor, points: Tensor, scale: float) -> Tensor:
    """(1, 3, SIDE, SIDE): upright, `scale` times as large as in ArcFace's crop."""
    target = (ARCFACE_POINTS - torch.tensor(_CENTRE)) * scale + SIDE / 2
    return crops(pixels, similarities(points, target), SIDE)


def _v(y: float) -> float:
    """Row of an upright crop where ArcFace's has row y."""
    return (y - _CENTRE[1]) * _SCALE + SIDE / 2


def _oval(x: float, y: float, across: float, down: float) -> Tensor:
    """An ellipse given in ArcFace's crop, (SIDE, SIDE)."""
    v, u = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    middle = (x - _CENTRE[0]) * _SCALE + SIDE / 2
    return ((u - middle) / (across * _SCALE)) ** 2 + ((v - _v(y)) / (down * _SCALE)) ** 2 <= 1


def _share(found: Tensor, place: Tensor) -> float:
    return float((found & place).sum() / place.sum())


def _lab(picture: Tensor) -> Tensor:
    """sRGB (3, H, W) in [0, 1] to CIE Lab, (3, H, W) float32."""
    from skimage.color import rgb2lab

    values: Array = rgb2lab(picture.clamp(0, 1).permute(1, 2, 0).numpy())
    return torch.from_numpy(values).permute(2, 0, 1).float()
