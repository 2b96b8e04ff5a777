"""What is read off a portrait, on drawings whose truth is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from facegen.face.describe import Describer, Description, hair_colour
from facegen.face.types import Detection
from facegen.images import to_pil
from facegen.world.facts import Fact
from facegen.world.parameters import GLASSES, HAIR_COLORS, HAIR_STYLES, Scenes
from facegen.world.render import render
from facegen.world.sampling import HELD_OUT_FROM, scenes_for
from facegen.world.words import parse_prompt

PEOPLE = 4


@pytest.fixture(scope="module")
def describer(mini: Path) -> Describer:
    return Describer.from_pretrained()


@pytest.fixture(scope="module")
def plain() -> Scenes:
    """Portraits of different people with nothing on their heads, at rest, looking ahead."""
    scenes = scenes_for(3, range(HELD_OUT_FROM, HELD_OUT_FROM + PEOPLE), [0] * PEOPLE)
    quiet = dict.fromkeys(("hat", "glasses", "beard", "goatee", "moustache", "stubble", "yaw", "pitch", "roll"), 0.0)
    still = Scenes(scenes.identity, 0 * scenes.expression, scenes.pose, scenes.attributes, scenes.light)
    return still.with_values(**quiet, light_x=0.0, warmth=0.0, key=1.0, fill=0.5, zoom=1.0)


def described(describer: Describer, scenes: Scenes) -> list[dict[str, str]]:
    found = []
    for row in range(len(scenes)):
        drawn = render(scenes[[row]], 160)
        face = Detection(drawn.box[0].numpy(), 1.0, drawn.landmarks5[0].numpy())
        found.append({fact.kind: fact.value for fact in describer.describe(to_pil(drawn.rgb), face).facts})
    return found


def of_hair(scenes: Scenes, style: str, colour: str) -> Scenes:
    red, green, blue = HAIR_COLORS[colour]
    place = float(list(HAIR_COLORS).index(colour))
    return scenes.with_values(
        hair_style=float(HAIR_STYLES.index(style)),
        hair_color=place,
        hair_length=1.0,
        hair_r=red,
        hair_g=green,
        hair_b=blue,
    )


@pytest.mark.parametrize(
    ("style", "colour", "length"), [("short", "black", "any short"), ("long straight", "blond", "any long")]
)
def test_hair_is_measured(describer: Describer, plain: Scenes, style: str, colour: str, length: str) -> None:
    seen = described(describer, of_hair(plain, style, colour))
    assert sum(one.get("hair_style") == length for one in seen) >= PEOPLE - 1
    assert sum(one.get("hair_color") == colour for one in seen) >= PEOPLE - 1


def test_skin_glasses_beard_smile_and_turn(describer: Describer, plain: Scenes) -> None:
    light = of_hair(plain, "short", "brown").with_values(skin_tone=0.1)
    other = light.with_values(
        skin_tone=0.95, glasses=float(GLASSES.index("square")), beard=1.0, moustache=1.0, masculinity=1.0, smile=1.0,
        yaw=0.5,
    )  # fmt: skip
    first, second = described(describer, light[:3]), described(describer, other[:3])

    def common(rows: list[dict[str, str]], kind: str) -> str:
        values = [row[kind] for row in rows]
        return max(values, key=values.count)

    assert [common(first, kind) for kind in ("skin", "glasses", "beard", "expression", "looking")] == [
        "light", "none", "no", "neutral", "ahead",
    ]  # fmt: skip
    assert [common(second, kind) for kind in ("skin", "beard", "expression", "looking")] == [
        "dark", "yes", "smiling", "right",
    ]  # fmt: skip
    assert common(second, "glasses") != "none"


@pytest.mark.parametrize("colour", sorted(HAIR_COLORS))
def test_the_worlds_colours_have_their_names(colour: str) -> None:
    from skimage.color import rgb2lab

    linear = torch.tensor(HAIR_COLORS[colour])
    srgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert hair_colour(*rgb2lab(srgb.numpy()[None, None])[0, 0].tolist()) == colour


def test_the_prompt_comes_first() -> None:
    facts = (
        Fact("hair_style", "any short"), Fact("hair_color", "red"), Fact("glasses", "none"),
        Fact("expression", "smiling"), Fact("looking", "left"),
    )  # fmt: skip
    shown = Description(facts, {"yaw": -1.4, "pitch": 0.1, "roll": 0.0})
    told = shown.prompt()
    assert set(parse_prompt(told)) >= {Fact("hair_color", "red"), Fact("looking", "left"), Fact("glasses", "none")}
    asked = parse_prompt("a person with glasses and long hair")
    assert {fact.kind for fact in parse_prompt(shown.prompt(asked))} == {"hair_color", "expression", "looking"}
    assert shown.pose() == {"yaw": -0.9, "pitch": 0.1, "roll": 0.0}
    assert Description((Fact("hair_style", "bald"),), {}).prompt() == "a bald head"
    assert Description((Fact("beard", "yes"),), {}).prompt() == "with a beard"
    assert Fact("beard", "yes") in parse_prompt("a person, with a beard, smiling")
    assert not Description((Fact("beard", "no"),), {}).prompt()  # said, it would be drawn
