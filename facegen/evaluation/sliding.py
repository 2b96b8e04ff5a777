"""Sliders measured: what each of them moves, what it leaves alone, and whether the person stays.

What the judge of attributes sees badly is read off the picture instead: hair and skin are as light as the pixels are
that the parsing says show them, hair is as long as much of it lies beside and below the chin, and eyes look where the
iris is between their corners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.evaluation.gaze import gaze
from facegen.face.landmarks import LandmarkFinder
from facegen.images import to_tensor
from facegen.models.sliders import words
from facegen.world.facts import Fact, probability
from facegen.world.parameters import GLASSES
from facegen.world.shading import PARSING
from facegen.world.words import parse_prompt

if TYPE_CHECKING:
    from PIL import Image

    from facegen.evaluation.edits import Bench, Drawn
    from facegen.evaluation.judges import Judges

# slider → the column of the table that it is to move, and whether up (1) or down (-1)
OWN: Mapping[str, tuple[str, int]] = {
    "age": ("age", 1),
    "smile": ("smile", 1),
    "mouth_open": ("mouth open", 1),
    "beard": ("beard", 1),
    "glasses": ("glasses", 1),
    "hair_length": ("hair length", 1),
    "blond": ("hair light", 1),
    "skin": ("skin light", -1),
    "masculine": ("masculine", 1),
    "turn": ("turned right", 1),
    "gaze": ("looks right", 1),
}
_JUDGED = {
    "age": "age", "smile": "smile", "mouth open": "jaw_open", "beard": "beard", "masculine": "masculinity",
    "turned right": "yaw",
}  # fmt: skip
COLUMNS = (
    "age", "smile", "mouth open", "beard", "glasses", "hair length", "hair light", "skin light", "masculine",
    "turned right", "looks right",
)  # fmt: skip
PROMPT = "a portrait of a person"
_BELOW = 0.6  # of the picture's height: in a portrait the chin is about there
_STILL = 4 / 255  # a pixel that differs by less from the plain picture counts as the same
_BARELY = 0.1  # of a column's spread over people: less is no move


def read(judges: Judges, pictures: Sequence[Image.Image]) -> Tensor:
    """The columns of the table, (N, columns): as the judges say, lightness as the logarithm of linear light."""
    rows, finder = [], LandmarkFinder.from_pretrained()
    for picture in pictures:
        pixels = to_tensor(picture)[None]
        seen, parts = judges.attributes(pixels), judges.parse(pixels)[0].cpu()
        light = (pixels[0].clamp(min=1e-4) ** 2.2 * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(0)
        hair, skin = (torch.isin(parts, torch.tensor([PARSING.index(one) for one in names])) for names in _PARTS)
        told = {name: float(seen[own]) for name, own in _JUDGED.items()}
        told["glasses"] = 1 - float(seen["glasses"][0, GLASSES.index("none")])
        told["hair length"] = float(hair[round(_BELOW * len(hair)) :].float().mean())
        told["hair light"], told["skin light"] = _light(light, hair), _light(light, skin)
        told["looks right"] = float(gaze(judges, finder, pixels))
        rows.append([told[name] for name in COLUMNS])
    return torch.tensor(rows)


_PARTS = (("hair",), ("skin", "nose"))


def _light(light: Tensor, where: Tensor) -> float:
    """Of the median pixel; NaN where there is none."""
    return float(light[where].median().clamp(min=0.01).log()) if bool(where.any()) else float("nan")


def _spread(found: Tensor) -> Tensor:
    """How much each column (N, columns) varies over people, (columns,), leaving NaN out."""
    return (found - found.nanmean(0)).square().nanmean(0).sqrt().clamp(min=1e-3)


def _asked(name: str) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """What a picture shows according to a slider's words: at -1, and at 1."""
    more, less = (parse_prompt(told) for told in words(name))
    return less or tuple(replace(fact, wanted=False) for fact in more), more


def _hit(judges: Judges, ends: Sequence[Sequence[Image.Image]], asked: Sequence[Sequence[Fact]]) -> float:
    """The share of the facts, those of each end asked of its pictures, that the judge finds."""
    found = []
    for pictures, facts in zip(ends, asked, strict=True):
        for picture in pictures:
            seen = judges.facts(to_tensor(picture)[None])
            found += [float(probability(fact, seen[fact.kind][0]) > 0.5) for fact in facts]
    return sum(found) / len(found)


def matrix(bench: Bench, first: Drawn, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """A row a slider, from -1 to 1: by how many times its spread over people each column moved, and

    monotone: share of people with whom its own column never went back, and went on; hit, hit at rest: share of the
    pictures at both ends in which the judge finds what the slider's words say, and of the plain ones; same person:
    cosine to the plain picture, counted as same: share that the judge takes for one person; likeness: to the photo;
    pixels still: share of them that are as in the plain picture.
    """
    bench.total = len(first.photos) * (1 + 2 * len(names))
    made: dict[tuple[str, float], list[Image.Image]] = {}
    for photo in first.photos:  # one person after the other: a photo is read once
        for name, strength in [("", 0.0), *((name, strength) for name in names for strength in (-1.0, 1.0))]:
            sliders: dict[str, Any] = {"sliders": {name: strength}} if name else {}
            out = bench.make("generate", faces=(photo,), prompt=PROMPT, select="largest", **sliders)
            made.setdefault((name, strength), []).append(out.images[0])
    plain = made["", 0.0]
    rest, who, pixels = read(bench.judges, plain), bench.who(plain), torch.stack([to_tensor(one) for one in plain])
    spread = _spread(read(bench.judges, first.photos))
    rows: dict[str, dict[str, float]] = {
        "none": {"likeness": float(F.cosine_similarity(who, first.judged).mean())},
    }
    for name in names:
        column, sign = OWN[name]
        place = COLUMNS.index(column)
        ends = [made[name, strength] for strength in (-1.0, 1.0)]
        low, high = (read(bench.judges, one) for one in ends)
        down, up = (sign * (b - a)[:, place] / spread[place] for a, b in ((low, rest), (rest, high)))
        onward = (down >= -_BARELY) & (up >= -_BARELY) & (down + up > _BARELY)
        people = torch.cat([bench.who(one) for one in ends])
        both = torch.cat([torch.stack([to_tensor(one) for one in pictures]) for pictures in ends])
        same = F.cosine_similarity(people, who.repeat(2, 1))
        still = (both - pixels.repeat(2, 1, 1, 1)).abs().amax(1) < _STILL
        rows[name] = {
            **{one: float(value) for one, value in zip(COLUMNS, ((high - low) / spread).nanmean(0), strict=True)},
            "monotone": float(onward.float().mean()),
            "hit": _hit(bench.judges, ends, _asked(name)),
            "hit at rest": _hit(bench.judges, [plain, plain], _asked(name)),
            "same person": float(same.mean()),
            "counted as same": float((same > bench.judges.same_person).float().mean()),
            "likeness": float(F.cosine_similarity(people, first.judged.repeat(2, 1)).mean()),
            "pixels still": float(still.float().mean()),
        }
    return rows
