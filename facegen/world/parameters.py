"""The parameters of the face world: who a person is, and everything else about one picture of them.

A picture is ``person + expression + pose + attributes + light``. Each group is a float tensor of shape
(B, number of columns) whose columns are named here; :class:`Scenes` holds the five groups of a batch.
Everything that learns from the world, judges by it, or describes it in words reads these names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

Spread = Literal["normal", "uniform"]


@dataclass(frozen=True)
class Parameter:
    """One named column: its spread over people, its range, and what moving it up does."""

    name: str
    low: float
    high: float
    meaning: str
    spread: Spread = "uniform"


def _normal(name: str, meaning: str) -> Parameter:
    return Parameter(name, -2.5, 2.5, meaning, "normal")


IDENTITY: tuple[Parameter, ...] = (
    _normal("masculinity", "feminine to masculine: brow ridge, jaw, neck, lips together"),
    _normal("face_width", "wider skull and face"),
    _normal("face_length", "longer face"),
    _normal("forehead_height", "higher hairline"),
    _normal("temple_width", "wider temples"),
    _normal("cheekbone_width", "more prominent cheekbones"),
    _normal("cheek_fullness", "fuller cheeks"),
    _normal("jaw_width", "wider, squarer jaw"),
    _normal("chin_length", "longer chin"),
    _normal("chin_width", "wider chin"),
    _normal("chin_projection", "chin further forward"),
    _normal("nose_length", "longer nose"),
    _normal("nose_width", "wider nostrils"),
    _normal("nose_bridge", "higher and wider bridge"),
    _normal("nose_hump", "convex nose profile"),
    _normal("nose_tip", "bigger tip"),
    _normal("nose_tip_up", "tip turned up"),
    _normal("eye_spacing", "eyes further apart"),
    _normal("eye_size", "bigger eyes"),
    _normal("eye_tilt", "outer corners higher"),
    _normal("eye_height", "eyes higher in the face"),
    _normal("eye_depth", "deeper set eyes"),
    _normal("eye_hood", "heavier upper lid"),
    _normal("brow_height", "brows higher above the eyes"),
    _normal("brow_thickness", "thicker brows"),
    _normal("brow_arch", "more arched brows"),
    _normal("brow_tilt", "outer brow ends higher"),
    _normal("mouth_width", "wider mouth"),
    _normal("mouth_height", "mouth higher in the face"),
    _normal("upper_lip", "fuller upper lip"),
    _normal("lower_lip", "fuller lower lip"),
    _normal("ear_size", "bigger ears"),
    _normal("ear_stickout", "ears stick out more"),
    _normal("neck_width", "wider neck"),
    Parameter("skin_tone", 0.0, 1.0, "lightest to darkest skin"),
    Parameter("skin_undertone", 0.0, 1.0, "cool to warm skin"),
    Parameter("eye_color", 0.0, 1.0, "dark brown, brown, hazel, green, blue, gray"),
    Parameter("freckles", 0.0, 1.0, "freckles appear above 0.7"),
    Parameter("blush", 0.0, 1.0, "redder cheeks, nose and ears"),
    Parameter("mole", 0.0, 1.0, "a beauty mark appears above 0.7"),
    Parameter("mole_x", -1.0, 1.0, "where the beauty mark is, right to left of the face"),
    Parameter("mole_y", -1.0, 1.0, "where the beauty mark is, chin to forehead"),
)

EXPRESSION: tuple[Parameter, ...] = (
    Parameter("smile", 0.0, 1.0, "lip corners pulled up (AU 12)"),
    Parameter("frown", 0.0, 1.0, "lip corners pulled down (AU 15)"),
    Parameter("jaw_open", 0.0, 1.0, "jaw dropped (AU 26)"),
    Parameter("upper_lip_raise", 0.0, 1.0, "upper lip raised, teeth shown (AU 10)"),
    Parameter("pucker", 0.0, 1.0, "lips puckered (AU 18)"),
    Parameter("lip_stretch", 0.0, 1.0, "mouth stretched sideways (AU 20)"),
    Parameter("lip_press", 0.0, 1.0, "lips pressed thin (AU 24)"),
    Parameter("cheek_raise", 0.0, 1.0, "cheeks raised, eyes narrowed (AU 6)"),
    Parameter("cheek_puff", 0.0, 1.0, "cheeks blown up (AD 34)"),
    Parameter("nose_wrinkle", 0.0, 1.0, "nose wrinkled (AU 9)"),
    Parameter("brow_raise", 0.0, 1.0, "brows raised (AU 1 and 2)"),
    Parameter("brow_inner_raise", 0.0, 1.0, "inner brow ends raised, worried (AU 1)"),
    Parameter("brow_lower", 0.0, 1.0, "brows lowered and drawn together (AU 4)"),
    Parameter("eyes_wide", 0.0, 1.0, "upper lids raised (AU 5)"),
    Parameter("eye_close_left", 0.0, 1.0, "eye at the picture's left closed (AU 43)"),
    Parameter("eye_close_right", 0.0, 1.0, "eye at the picture's right closed (AU 43)"),
    Parameter("gaze_x", -1.0, 1.0, "eyes to the picture's right"),
    Parameter("gaze_y", -1.0, 1.0, "eyes up"),
)

POSE: tuple[Parameter, ...] = (
    Parameter("yaw", -0.9, 0.9, "head turned to the picture's right, radians"),
    Parameter("pitch", -0.5, 0.5, "head turned up, radians"),
    Parameter("roll", -0.5, 0.5, "head tilted clockwise in the picture, radians"),
    Parameter("shift_x", -0.4, 0.4, "head moved right, in half picture widths"),
    Parameter("shift_y", -0.4, 0.4, "head moved up, in half picture heights"),
    Parameter("zoom", 0.5, 1.6, "size of the head, 1 is a portrait"),
)

LIGHT: tuple[Parameter, ...] = (
    Parameter("light_x", -1.0, 1.0, "key light from the picture's left (-1) to right (1)"),
    Parameter("light_y", -0.3, 1.0, "key light from below to above"),
    Parameter("key", 0.5, 1.4, "strength of the key light"),
    Parameter("fill", 0.1, 0.8, "strength of the fill light"),
    Parameter("warmth", -1.0, 1.0, "cool to warm key light"),
    Parameter("rim", 0.0, 1.0, "strength of the light from behind"),
)

HAIR_STYLES: tuple[str, ...] = (
    "bald", "buzz cut", "short", "side part", "quiff", "bob", "bangs", "long straight", "long wavy",
    "curly", "afro", "bun", "ponytail",
)  # fmt: skip
HAIR_COLORS: Mapping[str, tuple[float, float, float]] = {  # linear RGB
    "black": (0.030, 0.026, 0.028),
    "brown": (0.150, 0.070, 0.032),
    "blond": (0.600, 0.400, 0.165),
    "red": (0.430, 0.105, 0.028),
    "gray": (0.360, 0.360, 0.375),
    "white": (0.780, 0.775, 0.760),
    "blue": (0.060, 0.170, 0.520),
    "pink": (0.740, 0.210, 0.400),
}
GLASSES: tuple[str, ...] = ("none", "round", "square", "sunglasses")
HATS: tuple[str, ...] = ("none", "beanie", "cap")
CLOTHES: tuple[str, ...] = ("t-shirt", "shirt", "turtleneck", "hoodie", "suit")
BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "bokeh", "stripes")
COLORS: Mapping[str, tuple[float, float, float]] = {  # linear RGB, for clothes, hats, glasses, backgrounds
    "red": (0.560, 0.050, 0.050),
    "orange": (0.740, 0.260, 0.040),
    "yellow": (0.780, 0.600, 0.090),
    "green": (0.080, 0.330, 0.110),
    "teal": (0.040, 0.330, 0.340),
    "blue": (0.060, 0.160, 0.560),
    "purple": (0.260, 0.090, 0.430),
    "pink": (0.760, 0.310, 0.430),
    "brown": (0.220, 0.110, 0.055),
    "black": (0.022, 0.022, 0.026),
    "gray": (0.250, 0.255, 0.265),
    "white": (0.840, 0.840, 0.830),
}

ATTRIBUTES: tuple[Parameter, ...] = (
    Parameter("hair_style", 0, len(HAIR_STYLES) - 1, "index into HAIR_STYLES"),
    Parameter("hair_color", 0, len(HAIR_COLORS) - 1, "index into HAIR_COLORS"),
    Parameter("hair_r", 0.0, 1.0, "hair colour as drawn, linear red"),
    Parameter("hair_g", 0.0, 1.0, "hair colour as drawn, linear green"),
    Parameter("hair_b", 0.0, 1.0, "hair colour as drawn, linear blue"),
    Parameter("hair_length", 0.0, 1.0, "short to long within the style"),
    Parameter("hair_volume", 0.0, 1.0, "flat to voluminous"),
    Parameter("hair_part", -1.0, 1.0, "where the parting is"),
    Parameter("beard", 0.0, 1.0, "full beard; 0 is none, from 0.5 clearly there"),
    Parameter("goatee", 0.0, 1.0, "chin beard; 0 is none"),
    Parameter("moustache", 0.0, 1.0, "moustache; 0 is none"),
    Parameter("stubble", 0.0, 1.0, "stubble; 0 is none"),
    Parameter("age", 0.0, 1.0, "20 to 80 years: lines, sagging, hollows"),
    Parameter("glasses", 0, len(GLASSES) - 1, "index into GLASSES"),
    Parameter("glasses_color", 0, len(COLORS) - 1, "index into COLORS"),
    Parameter("hat", 0, len(HATS) - 1, "index into HATS"),
    Parameter("hat_color", 0, len(COLORS) - 1, "index into COLORS"),
    Parameter("earrings", 0, 1, "0 or 1"),
    Parameter("lipstick", 0.0, 1.0, "lipstick; 0 is none"),
    Parameter("eye_makeup", 0.0, 1.0, "eye shadow and liner; 0 is none"),
    Parameter("clothes", 0, len(CLOTHES) - 1, "index into CLOTHES"),
    Parameter("clothes_color", 0, len(COLORS) - 1, "index into COLORS"),
    Parameter("background", 0, len(BACKGROUNDS) - 1, "index into BACKGROUNDS"),
    Parameter("background_color", 0, len(COLORS) - 1, "index into COLORS"),
    Parameter("background_seed", 0.0, 1.0, "layout of bokeh and stripes"),
)

GROUPS: Mapping[str, tuple[Parameter, ...]] = {
    "identity": IDENTITY,
    "expression": EXPRESSION,
    "pose": POSE,
    "attributes": ATTRIBUTES,
    "light": LIGHT,
}
_PLACE: Mapping[str, tuple[str, int]] = {
    parameter.name: (group, column)
    for group, parameters in GROUPS.items()
    for column, parameter in enumerate(parameters)
}


@dataclass(frozen=True, eq=False)
class Scenes:
    """A batch of B pictures to be drawn; each field is float32 of shape (B, columns of its group)."""

    identity: Tensor
    expression: Tensor
    pose: Tensor
    attributes: Tensor
    light: Tensor

    def __post_init__(self) -> None:
        for group, parameters in GROUPS.items():
            tensor: Tensor = getattr(self, group)
            if tensor.ndim != 2 or tensor.shape != (len(self.identity), len(parameters)):
                raise ValueError(
                    f"{group} must have shape ({len(self.identity)}, {len(parameters)}), not {tuple(tensor.shape)}."
                )

    def __len__(self) -> int:
        return len(self.identity)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    def column(self, name: str) -> Tensor:
        """The values of one parameter, shape (B,)."""
        group, place = locate(name)
        values: Tensor = getattr(self, group)[:, place]
        return values

    def with_values(self, **values: float | Tensor) -> Scenes:
        """A copy in which the named parameters have these values (a number, or a tensor of shape (B,))."""
        groups = {field.name: getattr(self, field.name).clone() for field in fields(self)}
        for name, value in values.items():
            group, place = locate(name)
            groups[group][:, place] = value
        return replace(self, **groups)

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))

    def repeat_interleave(self, repeats: int) -> Scenes:
        return Scenes(*(getattr(self, field.name).repeat_interleave(repeats, 0) for field in fields(self)))

    @staticmethod
    def cat(batches: Sequence[Scenes]) -> Scenes:
        return Scenes(*(torch.cat([getattr(batch, group) for batch in batches]) for group in GROUPS))


def locate(name: str) -> tuple[str, int]:
    """Group and column of a parameter; raises ValueError for a name that does not exist."""
    if name not in _PLACE:
        raise ValueError(f"There is no parameter '{name}'; the parameters are: {', '.join(_PLACE)}.")
    return _PLACE[name]
