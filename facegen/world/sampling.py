"""Who lives in the face world, and what their pictures look like: natural random draws of its parameters.

Every draw is a pure function of uniform numbers, one row of them per picture. Two ways lead to those numbers: a
generator (``sample_people``, ``sample_scenes``), or the name of a picture (``scenes_for(seed, people, pictures)``),
whose row depends only on the world's seed, the person's number and the picture's number. With names, a dataset comes
out the same in any order, on any number of workers, and person 17 is the same person in every dataset of that seed.

People numbered ``HELD_OUT_FROM`` and up are never trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from facegen.world.parameters import (
    ATTRIBUTES,
    BACKGROUNDS,
    CLOTHES,
    COLORS,
    EXPRESSION,
    GLASSES,
    HAIR_COLORS,
    HAIR_STYLES,
    HATS,
    IDENTITY,
    LIGHT,
    POSE,
    Parameter,
    Scenes,
)

HELD_OUT_FROM = 100_000
Split = Literal["train", "held_out"]
PictureGroup = Literal["expression", "pose", "attributes", "light"]
PICTURE_GROUPS: tuple[PictureGroup, ...] = ("expression", "pose", "attributes", "light")

# Every group reads its own row of this many uniform numbers, so that one more draw at the end of a group
# changes nothing that was drawn before it.
_WIDTH = 96
_STREAMS: Mapping[str, int] = {"identity": 1, "expression": 2, "pose": 3, "attributes": 4, "light": 5, "caption": 6}


# -- by generator ------------------------------------------------------------------------------------------------


def sample_people(count: int, generator: torch.Generator) -> Tensor:
    """``count`` people, shape (count, len(IDENTITY)), every value inside its parameter's range."""
    return _people(_Draws.fresh(count, generator))


def sample_expression(identity: Tensor, generator: torch.Generator) -> Tensor:
    """One expression per person, shape (B, len(EXPRESSION)): a quarter neutral, the rest coherent mixtures."""
    return _expression(_Draws.fresh(len(identity), generator)).to(identity.device)


def sample_pose(identity: Tensor, generator: torch.Generator) -> Tensor:
    """One pose per person, shape (B, len(POSE)); the yaw's standard deviation is about 0.28 radians."""
    return _pose(_Draws.fresh(len(identity), generator)).to(identity.device)


def sample_attributes(identity: Tensor, generator: torch.Generator) -> Tensor:
    """Hair, beard, age, glasses, hat, clothes and background per person, shape (B, len(ATTRIBUTES))."""
    return _attributes(identity.cpu(), _Draws.fresh(len(identity), generator)).to(identity.device)


def sample_light(identity: Tensor, generator: torch.Generator) -> Tensor:
    """One light per person, shape (B, len(LIGHT))."""
    return _light(_Draws.fresh(len(identity), generator)).to(identity.device)


def sample_scenes(identity: Tensor, generator: torch.Generator) -> Scenes:
    """One picture of each person: identity (B, len(IDENTITY)) → B scenes."""
    return Scenes(
        identity=identity,
        expression=sample_expression(identity, generator),
        pose=sample_pose(identity, generator),
        attributes=sample_attributes(identity, generator),
        light=sample_light(identity, generator),
    )


def vary(scenes: Scenes, generator: torch.Generator, groups: Sequence[PictureGroup] = PICTURE_GROUPS) -> Scenes:
    """The same people, with the named groups drawn anew; by default everything but who they are."""
    unknown = set(groups) - set(PICTURE_GROUPS)
    if unknown:
        raise ValueError(f"Only {', '.join(PICTURE_GROUPS)} can vary, not {', '.join(sorted(unknown))}.")
    fresh = sample_scenes(scenes.identity, generator)
    return Scenes(
        identity=scenes.identity,
        **{group: getattr(fresh if group in groups else scenes, group) for group in PICTURE_GROUPS},
    )


# -- by name -----------------------------------------------------------------------------------------------------


def is_held_out(person: int) -> bool:
    """Whether this person is kept away from training."""
    return person >= HELD_OUT_FROM


def people_numbers(split: Split, count: int) -> range:
    """The numbers of the first ``count`` people of a split."""
    if split == "held_out":
        return range(HELD_OUT_FROM, HELD_OUT_FROM + count)
    if count > HELD_OUT_FROM:
        raise ValueError(f"The training split has {HELD_OUT_FROM} people, {count} were asked for.")
    return range(count)


def people_for(seed: int, people: Sequence[int]) -> Tensor:
    """The identities of these numbered people of the world ``seed``, shape (len(people), len(IDENTITY))."""
    return _people(_Draws.named(seed, "identity", [(person, 0) for person in people]))


def scenes_for(seed: int, people: Sequence[int], pictures: Sequence[int]) -> Scenes:
    """Picture ``pictures[i]`` of person ``people[i]``, for every i, in the world ``seed``."""
    names = list(zip(people, pictures, strict=True))
    identity = people_for(seed, people)
    return Scenes(
        identity=identity,
        expression=_expression(_Draws.named(seed, "expression", names)),
        pose=_pose(_Draws.named(seed, "pose", names)),
        attributes=_attributes(identity, _Draws.named(seed, "attributes", names)),
        light=_light(_Draws.named(seed, "light", names)),
    )


def scene_for(seed: int, person: int, picture: int) -> Scenes:
    """One picture of one person: a batch of one."""
    return scenes_for(seed, [person], [picture])


def named_generator(seed: int, stream: str, person: int, picture: int) -> torch.Generator:
    """The generator that belongs to one picture and one use: a group of parameters, or "caption"."""
    return torch.Generator().manual_seed(_mix(seed, _STREAMS[stream], person, picture))


# -- uniform numbers ---------------------------------------------------------------------------------------------


class _Draws:
    """Reads a matrix of uniform numbers column by column; every method returns shape (B,) unless it says more."""

    def __init__(self, uniforms: Tensor) -> None:
        self.uniforms = uniforms  # (B, _WIDTH)
        self.column = 0

    @classmethod
    def fresh(cls, rows: int, generator: torch.Generator) -> _Draws:
        # Drawn on the generator's device and read on the CPU, where the tables of weights are.
        return cls(torch.rand(rows, _WIDTH, generator=generator, device=generator.device).cpu())

    @classmethod
    def named(cls, seed: int, group: str, names: Sequence[tuple[int, int]]) -> _Draws:
        rows = [torch.rand(_WIDTH, generator=named_generator(seed, group, *name)) for name in names]
        return cls(torch.stack(rows) if rows else torch.empty(0, _WIDTH))

    def unit(self) -> Tensor:
        column = self.uniforms[:, self.column]
        self.column += 1
        return column

    def between(self, low: float | Tensor, high: float | Tensor) -> Tensor:
        return low + (high - low) * self.unit()

    def normal(self, std: float = 1.0, limit: float = 2.5) -> Tensor:
        """Normal numbers cut off at ``limit`` standard deviations, without a heap at the edge."""
        tail = 0.5 * math.erfc(limit / math.sqrt(2))
        return std * torch.special.ndtri(tail + (1 - 2 * tail) * self.unit().double()).float().clamp(-limit, limit)

    def chance(self, probability: float | Tensor) -> Tensor:
        return self.unit() < probability

    def amount(self, probability: float | Tensor, low: float, high: float) -> Tensor:
        """0 where it is absent, and between low and high where it is there."""
        present = self.chance(probability)
        return torch.where(present, self.between(low, high), 0.0)

    def choice(self, weights: Tensor) -> Tensor:
        """Indices (B,) int64 drawn with these weights, (K,) or (B, K); they need not sum to one."""
        edges = weights.expand(len(self.uniforms), -1).double().cumsum(1)  # (B, K)
        point = self.unit().double()[:, None] * edges[:, -1:]
        return (point >= edges[:, :-1]).sum(1)


def _mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers, by splitmix64 (Steele, Lea and Flood 2014)."""
    mask = (1 << 64) - 1
    state = 0
    for number in numbers:
        state = (state + (number & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def _collect(parameters: tuple[Parameter, ...], values: Mapping[str, Tensor]) -> Tensor:
    """Named columns → (B, len(parameters)), each held inside its range; a missing or unknown name is our mistake."""
    assert set(values) == {parameter.name for parameter in parameters}, set(values)
    columns = [values[p.name].float().clamp(p.low, p.high) for p in parameters]
    return torch.stack(columns, 1)


# -- people ------------------------------------------------------------------------------------------------------


def _people(draws: _Draws) -> Tensor:
    values: dict[str, Tensor] = {}
    for parameter in IDENTITY:
        if parameter.spread == "normal":
            values[parameter.name] = draws.normal(1.0, parameter.high)
        else:
            values[parameter.name] = draws.between(parameter.low, parameter.high)
    # Two overlapping humps, as in any population, instead of one: about one person in eight looks neither.
    side = torch.where(draws.chance(0.5), 1.0, -1.0)
    values["masculinity"] = 1.05 * side + 0.6 * values["masculinity"]
    # Dark skin goes with brown eyes mostly, yet every colour occurs with every skin.
    values["eye_color"] = values["eye_color"] ** (1.0 + 1.2 * values["skin_tone"])
    return _collect(IDENTITY, values)


def _manly(identity: Tensor) -> Tensor:
    """How masculine a face looks, from 0 to 1, shape (B,)."""
    return torch.sigmoid(3.0 * identity[:, 0])


# -- expression --------------------------------------------------------------------------------------------------

# Ranges of the action units that make up an expression; what is not named stays at rest.
_Recipe = Mapping[str, tuple[float, float]]
_RECIPES: tuple[tuple[str, float, _Recipe], ...] = (
    ("neutral", 25.0, {}),
    ("smile", 15.0, {
        "smile": (0.55, 1.0), "cheek_raise": (0.1, 0.7), "upper_lip_raise": (0.0, 0.35), "jaw_open": (0.0, 0.14),
    }),
    ("laugh", 8.0, {
        "smile": (0.7, 1.0), "jaw_open": (0.4, 0.85), "upper_lip_raise": (0.3, 0.8), "cheek_raise": (0.6, 1.0),
        "brow_raise": (0.0, 0.3),
    }),
    ("sad", 6.5, {
        "frown": (0.6, 1.0), "brow_inner_raise": (0.6, 1.0), "brow_lower": (0.0, 0.3), "gaze_y": (-0.6, 0.1),
    }),
    ("angry", 4.5, {
        "brow_lower": (0.7, 1.0), "frown": (0.2, 0.6), "lip_press": (0.3, 0.9), "eyes_wide": (0.0, 0.5),
        "nose_wrinkle": (0.0, 0.3),
    }),
    ("shouting", 2.5, {
        "brow_lower": (0.7, 1.0), "jaw_open": (0.5, 0.9), "upper_lip_raise": (0.4, 0.8), "lip_stretch": (0.2, 0.6),
        "nose_wrinkle": (0.0, 0.4),
    }),
    ("surprised", 6.5, {
        "brow_raise": (0.7, 1.0), "eyes_wide": (0.5, 1.0), "jaw_open": (0.4, 0.95),
    }),
    ("disgusted", 5.5, {
        "nose_wrinkle": (0.65, 1.0), "upper_lip_raise": (0.5, 0.95), "brow_lower": (0.2, 0.55), "frown": (0.0, 0.5),
        "cheek_raise": (0.0, 0.5),
    }),
    ("kiss", 5.5, {"pucker": (0.7, 1.0), "brow_raise": (0.0, 0.3)}),
    ("worried", 5.5, {
        "brow_inner_raise": (0.65, 1.0), "lip_stretch": (0.55, 1.0), "eyes_wide": (0.35, 0.9), "jaw_open": (0.0, 0.3),
    }),
    ("puffed", 5.0, {"cheek_puff": (0.7, 1.0), "lip_press": (0.0, 0.4), "eyes_wide": (0.0, 0.3)}),
    ("winking", 5.0, {"smile": (0.1, 0.9), "upper_lip_raise": (0.0, 0.2)}),
    ("other", 5.0, {}),
)  # fmt: skip

_MIXABLE = tuple(p.name for p in EXPRESSION if not p.name.startswith(("gaze", "eye_close")))


def _expression(draws: _Draws) -> Tensor:
    rows = len(draws.uniforms)
    names = [name for name, _, _ in _RECIPES]
    which = draws.choice(torch.tensor([weight for _, weight, _ in _RECIPES]))
    strength = [draws.unit() for _ in EXPRESSION]
    values: dict[str, Tensor] = {}
    for parameter, unit in zip(EXPRESSION, strength, strict=True):
        ranges = torch.tensor([recipe.get(parameter.name, (0.0, 0.0)) for _, _, recipe in _RECIPES])  # (kinds, 2)
        low, high = ranges[which].unbind(1)
        values[parameter.name] = low + (high - low) * unit

    # Faces at rest are never quite still.
    neutral, other = which == names.index("neutral"), which == names.index("other")
    for name in ("smile", "frown", "brow_raise", "brow_lower", "lip_press", "jaw_open"):
        values[name] = torch.where(neutral, 0.1 * draws.unit() * draws.chance(0.4), values[name])
    # Expressions without a name: a few action units at any strength.
    for name in _MIXABLE:
        values[name] = torch.where(other, draws.amount(0.2, 0.2, 1.0), values[name])

    # Looking into the camera most of the time, elsewhere now and then.
    away = draws.chance(0.25)
    values["gaze_x"] = torch.where(away, draws.normal(0.5, 1.9), draws.normal(0.12))
    wander = torch.where(away, draws.normal(0.35), draws.normal(0.08))
    values["gaze_y"] = torch.where(which == names.index("sad"), values["gaze_y"], wander)

    # Lids: both at rest, one closed for a wink, both closed in some pictures of nearly any expression.
    droop = 0.12 * draws.unit()
    laughing = which == names.index("laugh")
    droop = torch.where(laughing, 0.35 * draws.unit(), droop)
    wide = torch.tensor([recipe.get("eyes_wide", (0.0, 0.0))[1] > 0 for _, _, recipe in _RECIPES])[which]
    shut = draws.chance(0.08) & ~wide & ~(which == names.index("winking"))
    both = torch.where(shut, draws.between(0.93, 1.0), droop)
    wink_left = draws.chance(0.5)
    closed = draws.between(0.9, 1.0)
    winking = which == names.index("winking")
    values["eye_close_left"] = torch.where(winking & wink_left, closed, both)
    values["eye_close_right"] = torch.where(winking & ~wink_left, closed, both)
    assert draws.uniforms.shape == (rows, _WIDTH)
    return _collect(EXPRESSION, values)


# -- pose, light -------------------------------------------------------------------------------------------------


def _pose(draws: _Draws) -> Tensor:
    return _collect(POSE, {
        "yaw": draws.normal(0.29, 3.0),
        "pitch": draws.normal(0.13, 3.0),
        "roll": draws.normal(0.08, 3.0),
        "shift_x": draws.normal(0.03, 3.0),
        "shift_y": draws.normal(0.03, 3.0),
        # A close-up now and then.
        "zoom": torch.exp(draws.normal(0.07)) * torch.where(draws.chance(0.08), draws.between(1.15, 1.35), 1.0),
    })  # fmt: skip


def _light(draws: _Draws) -> Tensor:
    return _collect(LIGHT, {
        "light_x": draws.between(-1.0, 1.0),
        "light_y": 0.4 + draws.normal(0.25),
        "key": draws.between(0.8, 1.2),
        "fill": draws.between(0.25, 0.65),
        "warmth": draws.normal(0.42, 2.3),
        "rim": draws.amount(0.4, 0.2, 1.0),
    })  # fmt: skip


# -- attributes --------------------------------------------------------------------------------------------------

# Weights for the most feminine and the most masculine faces, in the order of the tables in parameters.py.
_STYLE_WEIGHTS: Mapping[str, tuple[float, float]] = {
    "bald": (1.0, 11.0), "buzz cut": (2.0, 13.0), "short": (5.0, 15.0), "side part": (4.0, 14.0),
    "quiff": (2.0, 12.0), "bob": (13.0, 2.0), "bangs": (12.0, 3.0), "long straight": (15.0, 4.0),
    "long wavy": (15.0, 4.0), "curly": (9.0, 8.0), "afro": (7.0, 7.0), "bun": (10.0, 3.0), "ponytail": (10.0, 3.0),
}  # fmt: skip
_COLOR_WEIGHTS: Mapping[str, float] = {
    "black": 17, "brown": 18, "blond": 17, "red": 15, "gray": 10, "white": 8, "blue": 7.5, "pink": 7.5,
}  # fmt: skip
_CLOTHES_WEIGHTS: Mapping[str, float] = {"t-shirt": 24, "shirt": 20, "turtleneck": 18, "hoodie": 20, "suit": 18}
_BACKGROUND_WEIGHTS: Mapping[str, float] = {"plain": 35, "gradient": 30, "bokeh": 20, "stripes": 15}
_WITH_HAT = ("bald", "buzz cut", "short", "bob", "bangs", "long straight", "long wavy", "curly", "ponytail")


def _table(weights: Mapping[str, float], names: Sequence[str]) -> Tensor:
    return torch.tensor([float(weights[name]) for name in names])


def _attributes(identity: Tensor, draws: _Draws) -> Tensor:
    manly = _manly(identity)
    womanly = 1.0 - manly
    skin = identity[:, [p.name for p in IDENTITY].index("skin_tone")]
    age = draws.unit()

    values: dict[str, Tensor] = {"age": age}
    hat = draws.choice(torch.tensor([90.0, 5.0, 5.0]))
    assert HATS == ("none", "beanie", "cap")
    style = draws.choice(_style_weights(manly, age, skin, hat))
    color = draws.choice(_hair_color_weights(age, skin))
    values.update(hat=hat, hair_style=style, hair_color=color)
    values.update(_hair_paint(color, draws))
    values["hair_length"] = draws.unit()
    values["hair_volume"] = draws.unit()
    values["hair_part"] = torch.where(draws.chance(0.5), 1.0, -1.0) * draws.between(0.15, 1.0)

    values.update(_facial_hair(manly, draws))
    values["glasses"] = draws.choice(_glasses_weights(age))
    values["glasses_color"] = draws.choice(_color_weights(black=9.0, brown=4.0))
    values["hat_color"] = draws.choice(_color_weights())
    values["earrings"] = draws.chance(0.05 + 0.4 * womanly)
    values["lipstick"] = draws.amount(0.015 + 0.4 * womanly, 0.55, 1.0)
    values["eye_makeup"] = draws.amount(0.015 + 0.35 * womanly, 0.5, 1.0)

    clothes = draws.choice(_table(_CLOTHES_WEIGHTS, CLOTHES))
    suit = (clothes == CLOTHES.index("suit"))[:, None]
    casual, formal = _color_weights(), _color_weights(black=6.0, gray=5.0, blue=4.0, brown=3.0, white=2.0)
    values["clothes"] = clothes
    values["clothes_color"] = draws.choice(torch.where(suit, formal, casual))
    values["background"] = draws.choice(_table(_BACKGROUND_WEIGHTS, BACKGROUNDS))
    values["background_color"] = draws.choice(_color_weights(gray=2.0, white=1.6, blue=1.3, teal=1.2))
    values["background_seed"] = draws.unit()
    return _collect(ATTRIBUTES, values)


def _style_weights(manly: Tensor, age: Tensor, skin: Tensor, hat: Tensor) -> Tensor:
    """(B, styles): feminine and masculine habits mixed, bald with age, and what fits under a hat."""
    feminine = torch.tensor([_STYLE_WEIGHTS[name][0] for name in HAIR_STYLES])
    masculine = torch.tensor([_STYLE_WEIGHTS[name][1] for name in HAIR_STYLES])
    weights = feminine + (masculine - feminine) * manly[:, None]
    weights[:, HAIR_STYLES.index("bald")] *= 0.5 + age
    weights[:, HAIR_STYLES.index("afro")] *= 0.5 + skin
    fits = torch.tensor([1.0 if name in _WITH_HAT else 0.0 for name in HAIR_STYLES])
    return torch.where((hat > 0)[:, None], weights * fits, weights)


def _hair_color_weights(age: Tensor, skin: Tensor) -> Tensor:
    """(B, colours): gray and white come with age, dark hair goes with dark skin more often."""
    weights = _table(_COLOR_WEIGHTS, tuple(HAIR_COLORS)).repeat(len(age), 1)
    names = list(HAIR_COLORS)
    weights[:, names.index("gray")] *= 0.15 + 4.2 * (age - 0.4).clamp(min=0)
    weights[:, names.index("white")] *= 0.15 + 6.0 * (age - 0.5).clamp(min=0)
    for name, tilt in (("black", 0.9), ("brown", 0.5), ("blond", -0.8), ("red", -0.8)):
        weights[:, names.index(name)] *= 1.0 + tilt * (skin - 0.5)
    return weights


def _hair_paint(color: Tensor, draws: _Draws) -> dict[str, Tensor]:
    """The colour as drawn: the named one, a little lighter or darker, a little warmer or cooler."""
    rgb = torch.tensor(list(HAIR_COLORS.values()))[color]  # (B, 3)
    brightness, warmth = torch.exp(draws.normal(0.14, 2.0)), draws.normal(0.05, 2.0)
    channels = {
        "hair_r": rgb[:, 0] * brightness * (1 + warmth),
        "hair_g": rgb[:, 1] * brightness,
        "hair_b": rgb[:, 2] * brightness * (1 - warmth),
    }
    return {name: channel.clamp(0.0, 0.95) for name, channel in channels.items()}


def _facial_hair(manly: Tensor, draws: _Draws) -> dict[str, Tensor]:
    """None, stubble, full beard, goatee or moustache; on masculine faces, and there less than two in three."""
    grows = (2.0 * manly - 1.0).clamp(min=0.0)
    weights = torch.stack([1.0 - 0.66 * grows, *(part * grows for part in (0.16, 0.23, 0.12, 0.15))], 1)
    kind = draws.choice(weights)
    stubble, beard, goatee, moustache = (kind == place for place in range(1, 5))
    amount, second = draws.between(0.6, 1.0), draws.between(0.6, 1.0)
    with_moustache = beard & draws.chance(0.85) | goatee & draws.chance(0.5) | moustache
    return {
        "stubble": torch.where(stubble, draws.between(0.5, 1.0), 0.0),
        "beard": torch.where(beard, amount, 0.0),
        "goatee": torch.where(goatee, amount, 0.0),
        "moustache": torch.where(with_moustache, second, 0.0),
    }


def _glasses_weights(age: Tensor) -> Tensor:
    """(B, kinds): a quarter of all pictures, a little likelier with age."""
    assert GLASSES == ("none", "round", "square", "sunglasses")
    reading = 0.07 + 0.05 * age
    sun = torch.full_like(age, 0.065)
    return torch.stack([1.0 - 2 * reading - sun, reading, reading, sun], 1)


def _color_weights(**weights: float) -> Tensor:
    """(colours,): one for each colour, or as named."""
    return torch.tensor([weights.get(name, 1.0) for name in COLORS])
