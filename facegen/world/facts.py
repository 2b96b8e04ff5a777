"""What can be said about a picture in words, and whether it is true.

A fact is a kind and a value: ``Fact("hair_color", "red")``. ``FACTS`` lists, for each kind, the values that exclude one
another; they are the classes which an attribute judge predicts. ``labels(scenes)`` gives the true class of each kind,
or ``UNKNOWN`` where a picture does not settle it: the colour of a bald man's hair, the age of somebody of thirty-three.

Facts are also read from what a judge saw in a picture (``seen_facts``); there every kind is decided, because a picture
that was asked for red hair and shows something between red and brown has to be told one or the other.

A word often fits several values ("hat" is a beanie or a cap, "happy" is smiling or laughing). Such a value of a fact
stands in ``LOOSE``, and ``accepted(fact)`` gives the values of the kind that make a fact true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from facegen.world.parameters import (
    BACKGROUNDS,
    CLOTHES,
    COLORS,
    EXPRESSION,
    GLASSES,
    GROUPS,
    HAIR_COLORS,
    HAIR_STYLES,
    HATS,
    Scenes,
)

UNKNOWN = -1

_NO_YES = ("no", "yes")
FACTS: Mapping[str, tuple[str, ...]] = {
    "gender": ("woman", "man"),
    "age": ("young", "middle-aged", "old"),
    "skin": ("light", "medium", "dark"),
    "freckles": _NO_YES,
    "eye_color": ("brown", "hazel", "green", "blue", "gray"),
    "hair_style": HAIR_STYLES,
    "hair_color": tuple(HAIR_COLORS),
    "beard": _NO_YES,
    "goatee": _NO_YES,
    "moustache": _NO_YES,
    "stubble": _NO_YES,
    "glasses": GLASSES,
    "hat": HATS,
    "hat_color": tuple(COLORS),
    "earrings": _NO_YES,
    "lipstick": _NO_YES,
    "eye_makeup": _NO_YES,
    "expression": (
        "neutral", "smiling", "laughing", "sad", "angry", "surprised", "disgusted", "worried", "kissing",
        "puffed cheeks",
    ),
    "eyes": ("open", "closed", "winking"),
    "mouth": ("closed", "open"),
    "looking": ("left", "ahead", "right"),
    "tilt": ("down", "level", "up"),
    "clothes": CLOTHES,
    "clothes_color": tuple(COLORS),
    "background": BACKGROUNDS,
    "background_color": tuple(COLORS),
    "light": ("left", "front", "right"),
    "light_color": ("cool", "neutral", "warm"),
}  # fmt: skip

# Drawn so faintly that nobody can tell (from coolest to warmest the red of a picture changes by 2 %, and a judge that
# learnt it is right in 59 % of three values): captions do not tell of it, and no judge is asked.
UNSEEN: frozenset[str] = frozenset({"light_color"})

LOOSE: Mapping[str, Mapping[str, frozenset[str]]] = {
    "hair_style": {
        "any long": frozenset({"long straight", "long wavy", "ponytail"}),
        "any short": frozenset({"buzz cut", "short", "side part", "quiff"}),
        "any curly": frozenset({"curly", "afro"}),
        "tied": frozenset({"bun", "ponytail"}),
    },
    "hair_color": {"dark": frozenset({"black", "brown"}), "dyed": frozenset({"blue", "pink"})},
    "glasses": {"glasses": frozenset({"round", "square"})},
    "hat": {"hat": frozenset({"beanie", "cap"})},
    "expression": {"happy": frozenset({"smiling", "laughing"})},
}


@dataclass(frozen=True)
class Fact:
    """Something said about a picture. ``wanted=False`` says that it is not so ("not smiling")."""

    kind: str
    value: str
    wanted: bool = True

    def __post_init__(self) -> None:
        if self.kind not in FACTS:
            raise ValueError(f"There is no kind of fact '{self.kind}'; the kinds are: {', '.join(FACTS)}.")
        if self.value not in FACTS[self.kind] and self.value not in LOOSE.get(self.kind, {}):
            known = ", ".join((*FACTS[self.kind], *LOOSE.get(self.kind, {})))
            raise ValueError(f"'{self.value}' is no value of '{self.kind}'; its values are: {known}.")

    def __str__(self) -> str:
        return f"{self.kind.replace('_', ' ')}: {'' if self.wanted else 'not '}{self.value}"


def accepted(fact: Fact) -> frozenset[str]:
    """The values of the fact's kind that make it true."""
    values = LOOSE.get(fact.kind, {}).get(fact.value, frozenset({fact.value}))
    return values if fact.wanted else frozenset(FACTS[fact.kind]) - values


def probability(fact: Fact, classes: Tensor) -> Tensor:
    """How probable a fact is, given the probabilities (…, len(FACTS[kind])) of its kind: shape (…)."""
    places = [place for place, value in enumerate(FACTS[fact.kind]) if value in accepted(fact)]
    return classes[..., places].sum(-1)


def seen_facts(asked: Sequence[Fact], judged: Mapping[str, Tensor]) -> list[dict[Fact, bool]]:
    """Which of the asked facts each judged picture shows; facts which the judge does not look at are left out.

    judged: a judge's answers by parameter name for B pictures: probabilities (B, classes) or values (B,).
    """
    batch = len(next(iter(judged.values())))
    blank = Scenes(*(torch.zeros(batch, len(parameters)) for parameters in GROUPS.values()))
    columns = {name: answer.argmax(1) if answer.ndim == 2 else answer for name, answer in judged.items()}
    look = _Look(blank.with_values(**{name: column.cpu().float() for name, column in columns.items()}), decided=True)
    rows: list[dict[Fact, bool]] = [{} for _ in range(batch)]
    for fact in asked:
        if _NEEDS.get(fact.kind, fact.kind) in judged:
            for row, label in zip(rows, _LABELS[fact.kind](look).tolist(), strict=True):
                row[fact] = label != UNKNOWN and FACTS[fact.kind][label] in accepted(fact)
    return rows


def labels(scenes: Scenes) -> dict[str, Tensor]:
    """The true class of each kind, (B,) int64 index into ``FACTS[kind]``; UNKNOWN where it is not clear or seen."""
    look = _Look(scenes)
    return {kind: _LABELS[kind](look) for kind in FACTS}


def describe(scenes: Scenes, row: int) -> tuple[Fact, ...]:
    """Every fact that is true of one picture, loose ones included."""
    facts = []
    for kind, label in labels(scenes[[row]]).items():
        if int(label) != UNKNOWN:
            value = FACTS[kind][int(label)]
            facts.append(Fact(kind, value))
            facts += [Fact(kind, loose) for loose, values in LOOSE.get(kind, {}).items() if value in values]
    return tuple(facts)


def fact_holds(fact: Fact, scenes: Scenes, row: int) -> bool | None:
    """Whether a fact is true of one picture; None where the picture does not settle it."""
    label = int(labels(scenes[[row]])[fact.kind])
    return None if label == UNKNOWN else FACTS[fact.kind][label] in accepted(fact)


# -- how each kind is read from the parameters --------------------------------------------------------------------


class _Look:
    """A batch of scenes, read column by column; ``decided`` where an unclear value goes to the nearest class."""

    def __init__(self, scenes: Scenes, *, decided: bool = False) -> None:
        self.scenes = scenes
        self.decided = decided

    def __getitem__(self, name: str) -> Tensor:
        return self.scenes.column(name)

    def isin(self, name: str, table: tuple[str, ...], *values: str) -> Tensor:
        wanted = torch.tensor([table.index(value) for value in values], device=self[name].device)
        return torch.isin(self[name].long(), wanted)


_Label = Callable[[_Look], Tensor]


def _only(*cases: Tensor) -> Tensor:
    """The index of the one case that is true; UNKNOWN where none or several are."""
    stacked = torch.stack(cases)  # (cases, B)
    return torch.where(stacked.sum(0) == 1, stacked.int().argmax(0), UNKNOWN)


def _bands(name: str, *bands: tuple[float, float]) -> _Label:
    """Class i where the parameter lies in band i; of the nearest band where all is decided."""

    def label(look: _Look) -> Tensor:
        value = look[name]
        beyond = torch.stack([torch.maximum(low - value, value - high).clamp(min=0) for low, high in bands])
        return beyond.argmin(0) if look.decided else _only(*(beyond == 0))

    return label


def _there(name: str, absent: float = 0.1, present: float = 0.4) -> _Label:
    return _bands(name, (-1.0, absent), (present, 1.0))


def _index(name: str) -> _Label:
    return lambda look: look[name].long()


def _where(label: _Label, seen: Callable[[_Look], Tensor]) -> _Label:
    """The label where it can be seen, UNKNOWN elsewhere."""
    return lambda look: torch.where(seen(look), label(look), UNKNOWN)


def _bare_head(look: _Look) -> Tensor:
    return look["hat"] == 0


def _eyes_seen(look: _Look) -> Tensor:
    return ~look.isin("glasses", GLASSES, "sunglasses")


def _style_seen(look: _Look) -> Tensor:
    return _bare_head(look) | look.isin("hair_style", HAIR_STYLES, "bob", "long straight", "long wavy", "curly")


def _hair_seen(look: _Look) -> Tensor:
    hidden = look.isin("hair_style", HAIR_STYLES, "buzz cut", "short", "bun")
    return ~look.isin("hair_style", HAIR_STYLES, "bald") & (_bare_head(look) | ~hidden)


def _ears_seen(look: _Look) -> Tensor:
    over = look.isin("hair_style", HAIR_STYLES, "bob", "bangs", "long straight", "long wavy", "curly", "afro")
    return (look["earrings"] < 0.5) | ~over & (look["yaw"].abs() < 0.45) | look.decided


def _one_eye_seen(look: _Look) -> Tensor:
    """Eyes are coloured dots: they must be open, not behind dark glass."""
    return _eyes_seen(look) & (look["eye_close_left"] < 0.4) & (look["eye_close_right"] < 0.4)


def _full_beard(look: _Look) -> Tensor:
    return look["beard"] > 0.1


def _eyes(look: _Look) -> Tensor:
    left, right = look["eye_close_left"], look["eye_close_right"]
    most, least = torch.maximum(left, right), torch.minimum(left, right)
    if look.decided:
        return (most > 0.6).long() + ((most > 0.6) & (most - least > 0.4)).long()
    return _only(most < 0.45, least > 0.8, (most > 0.8) & (least < 0.45))


# What shows an expression most, in the order of FACTS["expression"] from its second value.
_SIGNS: tuple[tuple[str, ...], ...] = (
    ("smile",), ("smile", "jaw_open"), ("frown", "brow_inner_raise"), ("brow_lower",), ("brow_raise", "jaw_open"),
    ("nose_wrinkle", "upper_lip_raise"), ("brow_inner_raise", "lip_stretch"), ("pucker",), ("cheek_puff",),
)  # fmt: skip
_AGAINST: Mapping[int, str] = {0: "jaw_open", 3: "nose_wrinkle"}
_BARELY = 0.35


def _strongest_expression(look: _Look) -> Tensor:
    scores = torch.stack([torch.stack([look[sign] for sign in signs]).mean(0) for signs in _SIGNS])  # (9, B)
    for place, sign in _AGAINST.items():
        scores[place] *= 1 - look[sign]
    return torch.where(scores.amax(0) < _BARELY, 0, scores.argmax(0) + 1)


def _expression(look: _Look) -> Tensor:
    if look.decided:
        return _strongest_expression(look)
    smile, jaw, frown, inner = look["smile"], look["jaw_open"], look["frown"], look["brow_inner_raise"]
    lower, wrinkle = look["brow_lower"], look["nose_wrinkle"]
    still = torch.stack([look[p.name] for p in EXPRESSION if not p.name.startswith(("eye_close", "gaze"))])
    glad = (frown < 0.25) & (lower < 0.35) & (inner < 0.35) & (wrinkle < 0.45) & (look["pucker"] < 0.3)
    glad &= (look["cheek_puff"] < 0.4) & (look["lip_stretch"] < 0.5)
    return _only(
        still.amax(0) < 0.2,
        glad & (smile > 0.4) & (jaw < 0.25),
        glad & (smile > 0.5) & (jaw > 0.35),
        (frown > 0.45) & (inner > 0.4) & (smile < 0.2) & (wrinkle < 0.4) & (jaw < 0.3),
        (lower > 0.6)
        & (inner < 0.3)
        & (smile < 0.2)
        & (wrinkle < 0.5)
        & ((frown + look["lip_press"] > 0.4) | (jaw > 0.4)),
        (look["brow_raise"] > 0.5) & (jaw > 0.3) & (smile < 0.25) & (lower < 0.3) & (look["eyes_wide"] > 0.25),
        (wrinkle > 0.55) & (look["upper_lip_raise"] > 0.4) & (smile < 0.3) & (jaw < 0.4),
        (inner > 0.55) & (look["lip_stretch"] > 0.45) & (smile < 0.2) & (frown < 0.4) & (jaw < 0.4),
        (look["pucker"] > 0.6) & (jaw < 0.3) & (smile < 0.3),
        (look["cheek_puff"] > 0.6) & (jaw < 0.2) & (smile < 0.3),
    )


def _mouth(look: _Look) -> Tensor:
    if look.decided:
        return (look["jaw_open"] > 0.27).long()
    together = (look["upper_lip_raise"] < 0.3) & (look["lip_stretch"] < 0.4) & (look["smile"] < 0.6)
    return _only((look["jaw_open"] < 0.12) & together, look["jaw_open"] > 0.35)


_LABELS: Mapping[str, _Label] = {
    "gender": _bands("masculinity", (-9.0, -0.35), (0.35, 9.0)),
    "age": _bands("age", (0.0, 0.27), (0.37, 0.60), (0.70, 1.0)),
    "skin": _bands("skin_tone", (0.0, 0.32), (0.42, 0.60), (0.70, 1.0)),
    "freckles": _bands("freckles", (0.0, 0.68), (0.80, 1.0)),
    "eye_color": _where(
        _bands("eye_color", (0.0, 0.27), (0.34, 0.47), (0.54, 0.67), (0.73, 0.86), (0.93, 1.0)), _one_eye_seen
    ),
    "hair_style": _where(_index("hair_style"), _style_seen),
    "hair_color": _where(_index("hair_color"), _hair_seen),
    "beard": _there("beard"),
    "goatee": _where(_there("goatee"), lambda look: ~_full_beard(look)),
    "moustache": _there("moustache"),
    "stubble": _where(_there("stubble"), lambda look: ~_full_beard(look)),
    "glasses": _index("glasses"),
    "hat": _index("hat"),
    "hat_color": _where(_index("hat_color"), lambda look: look["hat"] > 0),
    "earrings": _where(_there("earrings"), _ears_seen),
    "lipstick": _there("lipstick"),
    "eye_makeup": _where(_there("eye_makeup"), _eyes_seen),
    "expression": _expression,
    "eyes": _where(_eyes, _eyes_seen),
    "mouth": _mouth,
    "looking": _bands("yaw", (-1.0, -0.28), (-0.13, 0.13), (0.28, 1.0)),
    "tilt": _bands("pitch", (-1.0, -0.17), (-0.08, 0.08), (0.17, 1.0)),
    "clothes": _index("clothes"),
    "clothes_color": _index("clothes_color"),
    "background": _index("background"),
    "background_color": _index("background_color"),
    "light": _bands("light_x", (-1.0, -0.45), (-0.22, 0.22), (0.45, 1.0)),
    "light_color": _bands("warmth", (-1.0, -0.45), (-0.22, 0.22), (0.45, 1.0)),
}
# The parameter without which a kind cannot be told, where it has another name.
_NEEDS: Mapping[str, str] = {
    "gender": "masculinity", "skin": "skin_tone", "expression": "smile", "eyes": "eye_close_left", "mouth": "jaw_open",
    "looking": "yaw", "tilt": "pitch", "light": "light_x", "light_color": "warmth",
}  # fmt: skip
assert set(_LABELS) == set(FACTS)
