"""Requests: the one description of a task, from which everything that asks for it is derived.

A request is a frozen dataclass whose fields are made by the helpers below. Each field carries its kind, help text,
range and choices; from these come the checks at the door, the command-line flags, the controls of the demo, the JSON
saved in a picture's metadata and the table in the README. Nothing heavy is imported: ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import operator
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

from facegen.errors import WrongRequest

Kind = Literal[
    "text", "integer", "number", "switch", "choice", "photos", "photo", "mask", "people", "names", "strengths"
]
Curve = float | tuple[float, ...] | Callable[[float], float]
Strengths = Curve | Mapping[str, Curve]
CONTROL_KINDS = ("landmarks", "depth", "normals", "sketch")
Photo = Any  # whatever facegen.images.load_rgb reads: a path, bytes, PIL picture, array, tensor; or "example:3"

_KEY = "facegen"
_PICTURES = ("mask", "body", "clothes")  # of a Person, besides the photos


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is known about one field besides its name and type."""

    kind: Kind
    about: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    multiple: int = 1  # whole numbers must be a multiple of this
    choices: tuple[str, ...] = ()
    optional: bool = False  # None is a value, meaning "choose for me"
    alias: str = ""  # a shorter flag, like "steps"
    positional: bool = False  # on the command line also without its flag
    slider: tuple[float, float, float] | None = None  # lowest, highest, step shown in the demo; tighter than the range
    lines: int = 1  # height of the text box in the demo
    advanced: bool = False  # folded away in the demo
    of: str = ""  # a mask: the field of the photo over which it is drawn
    parts: bool = False  # strengths: one of them may again be numbers by name, as in down:0.5,mid:1


@dataclass(frozen=True, kw_only=True)
class Person:
    """One of several people in a picture.

    photos: of this person, one or more. box: the part meant for them, x0, y0, x1, y1 as shares of width and height; or
    mask: a picture of the made one's size or shape, white where they go; neither: an equal column, from left to right.
    strength: how strongly the adapters act, None for their own choice. body: a mask over the first photo, white where
    the person is; clothes: a picture of what they wear instead; both for adapters that look at more than faces
    (storymaker).
    """

    photos: tuple[Photo, ...]
    box: tuple[float, float, float, float] | None = None
    mask: Photo | None = None
    strength: float | None = None
    body: Photo | None = None
    clothes: Photo | None = None


def _field(**values: Any) -> Any:
    spec = Spec(**values)
    return dataclasses.field(default=spec.default, metadata={_KEY: spec})


def text(default: str, about: str, **more: Any) -> Any:
    """A string."""
    return _field(kind="text", default=default, about=about, **more)


def integer(default: int | None, about: str, **more: Any) -> Any:
    """A whole number, between `low` and `high` where given."""
    return _field(kind="integer", default=default, about=about, **more)


def number(default: float | None, about: str, **more: Any) -> Any:
    """A finite number, between `low` and `high` where given."""
    return _field(kind="number", default=default, about=about, **more)


def switch(default: bool, about: str, **more: Any) -> Any:
    """Yes or no."""
    return _field(kind="switch", default=default, about=about, **more)


def choice(default: str | None, about: str, choices: Sequence[str], **more: Any) -> Any:
    """One of a few names."""
    return _field(kind="choice", default=default, about=about, choices=tuple(choices), **more)


def photos(about: str, **more: Any) -> Any:
    """Any number of pictures; one picture alone is taken as a list of one."""
    return _field(kind="photos", default=(), about=about, **more)


def photo(about: str, **more: Any) -> Any:
    """One picture."""
    return _field(kind="photo", default=None, about=about, **{"optional": True, **more})


def mask(about: str, *, of: str, **more: Any) -> Any:
    """A picture of the same size as the photo in the field `of`, white where something happens."""
    return _field(kind="mask", default=None, about=about, of=of, optional=True, **more)


def people(about: str, **more: Any) -> Any:
    """Several people: a :class:`Person` each, or just their photo, or a list of their photos."""
    return _field(kind="people", default=(), about=about, **more)


def names(default: Sequence[str], about: str, **more: Any) -> Any:
    """A list of names or paths; one name alone is taken as a list of one."""
    return _field(kind="names", default=tuple(default), about=about, **more)


def strengths(default: float | Mapping[str, float] | None, about: str, **more: Any) -> Any:
    """A number, a curve over the steps (evenly spaced points, or a function of 0..1), or one of these by name."""
    if isinstance(default, Mapping):
        return dataclasses.field(
            default_factory=dict, metadata={_KEY: Spec(kind="strengths", default=dict(default), about=about, **more)}
        )
    return _field(kind="strengths", default=default, about=about, **more)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Base of all requests: checks every field when it is made.

    Raises :class:`WrongRequest` naming the field, what was given and what is allowed.
    """

    task: ClassVar[str] = ""  # one line: what the task does

    def __post_init__(self) -> None:
        for name, spec in specs(type(self)).items():
            object.__setattr__(self, name, _checked(name, spec, getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Fields that contradict one another; overridden where there are such."""


R = TypeVar("R", bound=Request)


def specs(request: type[Request]) -> dict[str, Spec]:
    """The fields of a request by name, in order."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(request) if _KEY in field.metadata}


def make(request: type[R], values: Mapping[str, Any]) -> R:
    """A request from field values; a name that does not exist is refused with the nearest one that does."""
    known = specs(request)
    for name in values:
        if name not in known:
            raise WrongRequest(f"There is no '{name}'{suggestion(name, known)}.")
    return request(**values)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The second half of a sentence about an unknown name: the nearest known one, or all that there are."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; perhaps you mean '{near[0]}'"
    return f"; there are: {', '.join(known)}" if known else ""


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}…"


def _range(spec: Spec) -> str:
    """`from 1 to 100`, `at least 1`, or nothing."""
    low, high = (None if edge is None else f"{edge:.15g}" for edge in (spec.low, spec.high))
    if low is not None and (high is None or float(high) > 1e9):
        return f"at least {low}"
    if low is not None:
        return f"from {low} to {high}"
    return f"at most {high}" if high is not None else ""


def _checked(name: str, spec: Spec, value: Any) -> Any:
    if value is None:
        if spec.optional:
            return None
        raise WrongRequest(f"{name} must be given: {spec.about[0].lower()}{spec.about[1:]}")
    check = _CHECKS[spec.kind]
    return check(name, spec, value)


def _check_text(name: str, spec: Spec, value: Any) -> str:
    if not isinstance(value, str):
        raise WrongRequest(f"{name} must be a text, not {_shown(value)}.")
    return value


def _in_range(name: str, spec: Spec, value: float) -> None:
    if (spec.low is not None and value < spec.low) or (spec.high is not None and value > spec.high):
        raise WrongRequest(f"{name} must be {_range(spec)}, not {value:g}.")


def _check_integer(name: str, spec: Spec, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        raise WrongRequest(f"{name} must be a whole number, not {_shown(value)}.") from None
    _in_range(name, spec, whole)
    if whole % spec.multiple:
        raise WrongRequest(f"{name} must be a multiple of {spec.multiple}, not {whole}.")
    return whole


def _check_number(name: str, spec: Spec, value: Any) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        real = float(value)
    except (TypeError, ValueError):
        raise WrongRequest(f"{name} must be a number, not {_shown(value)}.") from None
    if not math.isfinite(real):
        raise WrongRequest(f"{name} must be a finite number, not {real}.")
    _in_range(name, spec, real)
    return real


def _check_switch(name: str, spec: Spec, value: Any) -> bool:
    if not isinstance(value, bool):
        raise WrongRequest(f"{name} must be True or False, not {_shown(value)}.")
    return value


def _check_choice(name: str, spec: Spec, value: Any) -> str:
    if not isinstance(value, str) or value not in spec.choices:
        near = suggestion(value, spec.choices) if isinstance(value, str) else f"; there are: {', '.join(spec.choices)}"
        raise WrongRequest(f"{name} cannot be {_shown(value)}{near}.")
    return value


def _check_photo(name: str, spec: Spec, value: Any) -> Photo:
    if isinstance(value, (bool, int, float, Mapping)) or (isinstance(value, (str, bytes)) and not value):
        raise WrongRequest(f"{name} must be a picture or the path of one, not {_shown(value)}.")
    return value


def _check_photos(name: str, spec: Spec, value: Any) -> tuple[Photo, ...]:
    several = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_check_photo(name, spec, one) for one in several)


def _check_people(name: str, spec: Spec, value: Any) -> tuple[Person, ...]:
    several = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_check_person(f"person {place} of {name}", spec, one) for place, one in enumerate(several, 1))


def _check_person(name: str, spec: Spec, value: Any) -> Person:
    if isinstance(value, Mapping):
        known = {field.name: None for field in dataclasses.fields(Person)}
        if wrong := next((key for key in value if key not in known), None):
            raise WrongRequest(f"{name} has no '{wrong}'{suggestion(str(wrong), known)}.")
        value = Person(**{"photos": (), **value})
    elif not isinstance(value, Person):
        value = Person(photos=value)
    shown = _check_photos(f"photos of {name}", spec, value.photos)
    if not shown:
        raise WrongRequest(f"{name} needs at least one photo.")
    if value.box is not None and value.mask is not None:
        raise WrongRequest(f"{name} has both a box and a mask; give one of them.")
    strength = value.strength
    if strength is not None:
        strength = _check_number(f"strength of {name}", dataclasses.replace(spec, low=0, high=3), strength)
    for part in ("body", "clothes"):
        if getattr(value, part) is not None:
            _check_photo(f"{part} of {name}", spec, getattr(value, part))
    return dataclasses.replace(value, photos=shown, box=_check_box(name, spec, value.box), strength=strength)


def _check_box(name: str, spec: Spec, value: Any) -> tuple[float, float, float, float] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 4:
        raise WrongRequest(f"The box of {name} must be four numbers x0, y0, x1, y1, not {_shown(value)}.")
    x0, y0, x1, y1 = (_check_number(f"box of {name}", dataclasses.replace(spec, low=0, high=1), one) for one in value)
    if x0 >= x1 or y0 >= y1:
        raise WrongRequest(f"The box of {name} must be left, top, right, bottom as shares of the picture, not {value}.")
    return x0, y0, x1, y1


def _check_names(name: str, spec: Spec, value: Any) -> tuple[str, ...]:
    several = (value,) if isinstance(value, (str, Path)) else value
    if not isinstance(several, Sequence) or not all(isinstance(one, (str, Path)) and str(one) for one in several):
        raise WrongRequest(f"{name} must be a list of names or paths, not {_shown(value)}.")
    return tuple(str(one) for one in several)


def _check_curve(name: str, spec: Spec, value: Any) -> Curve:
    if callable(value):
        return cast(Callable[[float], float], value)
    if isinstance(value, (list, tuple)):
        if not value:
            raise WrongRequest(f"{name} is an empty curve; give at least one number.")
        return tuple(_check_number(name, spec, point) for point in value)
    return _check_number(name, spec, value)


def _check_strengths(name: str, spec: Spec, value: Any) -> Any:
    if isinstance(spec.default, Mapping) and isinstance(value, (str, Path)):
        value = {str(value): 1.0}
    elif isinstance(spec.default, Mapping) and not isinstance(value, Mapping):
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, (str, Path)) for one in value):
            raise WrongRequest(f"{name} must be names, or names with a strength each, not {_shown(value)}.")
        value = {str(one): 1.0 for one in value}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, Path)) or not str(key):
                raise WrongRequest(f"{name} must be keyed by name, not by {_shown(key)}.")
        return {str(key): _check_parts(f"{name} of {key}", spec, curve) for key, curve in value.items()}
    return _check_curve(name, spec, value)


def _check_parts(name: str, spec: Spec, value: Any) -> Curve | dict[str, Any]:
    if not spec.parts or not isinstance(value, Mapping):
        return _check_curve(name, spec, value)
    if not value or not all(isinstance(key, str) and key for key in value):
        raise WrongRequest(f"{name} must be numbers by name, such as down:0.5,mid:1, not {_shown(value)}.")
    found = {key: _check_curve(f"{name} in {key}", spec, one) for key, one in value.items()}
    if any(callable(one) for one in found.values()):
        raise WrongRequest(f"{name} cannot change over the steps where it has names of its own.")
    return found


_CHECKS: Mapping[Kind, Callable[[str, Spec, Any], Any]] = {
    "text": _check_text,
    "integer": _check_integer,
    "number": _check_number,
    "switch": _check_switch,
    "choice": _check_choice,
    "photo": _check_photo,
    "photos": _check_photos,
    "mask": _check_photo,
    "people": _check_people,
    "names": _check_names,
    "strengths": _check_strengths,
}


# JSON


def to_json(request: Request, photo_record: Callable[[Photo], Any] = str) -> dict[str, Any]:
    """Plain data from which :func:`from_json` makes the same request; `photo_record` says how a photo is written down.

    Raises :class:`WrongRequest` where a strength is a function: resolve it to its values per step first.
    """
    values: dict[str, Any] = {}
    for name, spec in specs(type(request)).items():
        value = getattr(request, name)
        if spec.kind == "photos":
            value = [photo_record(one) for one in value]
        elif spec.kind in ("photo", "mask"):
            value = None if value is None else photo_record(value)
        elif spec.kind == "people":
            value = [
                {
                    "photos": [photo_record(photo) for photo in one.photos],
                    "box": one.box,
                    **{part: None if (own := getattr(one, part)) is None else photo_record(own) for part in _PICTURES},
                    "strength": one.strength,
                }
                for one in value
            ]
        elif spec.kind == "strengths":
            curves = value.values() if isinstance(value, Mapping) else [value]
            if any(callable(curve) for curve in curves):
                raise WrongRequest(f"{name} is a function, which cannot be written down; give its values as a list.")
        values[name] = value
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def from_json(request: type[R], values: Mapping[str, Any], photo_read: Callable[[Any], Photo] = str) -> R:
    """The request that :func:`to_json` wrote down; fields it lacks keep their default, unknown ones are refused."""
    read = dict(values)
    for name, spec in specs(request).items():
        if spec.kind == "photos" and name in read:
            read[name] = tuple(photo_read(one) for one in read[name])
        elif spec.kind in ("photo", "mask") and read.get(name) is not None:
            read[name] = photo_read(read[name])
        elif spec.kind == "people" and name in read:
            read[name] = tuple(_person_read(one, photo_read) for one in read[name])
    return make(request, read)


def _person_read(values: Mapping[str, Any], photo_read: Callable[[Any], Photo]) -> Person:
    box = values.get("box")
    return Person(
        photos=tuple(photo_read(one) for one in values["photos"]),
        box=None if box is None else cast(tuple[float, float, float, float], tuple(box)),
        strength=values.get("strength"),
        **{part: photo_read(values[part]) for part in _PICTURES if values.get(part) is not None},
    )


def photos_of(request: Request) -> list[Photo]:
    """Every photo of a request: those of its fields, and those of its people."""
    found: list[Photo] = []
    for name, spec in specs(type(request)).items():
        value = getattr(request, name)
        if spec.kind == "photos":
            found += value
        elif spec.kind in ("photo", "mask") and value is not None:
            found.append(value)
        elif spec.kind == "people":
            for one in value:
                found += [*one.photos, *(own for part in _PICTURES if (own := getattr(one, part)) is not None)]
    return found


# Command line


def flag(name: str) -> str:
    """The command-line flag of a field: num_inference_steps → --num-inference-steps."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, request: type[Request], *, skip: Iterable[str] = ()) -> None:
    """Add one flag per field; what is not given stays out of the namespace: defaults live in the request alone."""
    left_out = set(skip)
    for name, spec in specs(request).items():
        if name in left_out:
            continue
        flags = [flag(name), *([f"{'-' if len(spec.alias) == 1 else '--'}{spec.alias}"] if spec.alias else [])]
        told = flag_help(spec).replace("%", "%%")
        metavar = _METAVARS[spec.kind]
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": told}
        several = spec.kind in ("photos", "people", "names", "strengths")
        if spec.positional:
            kind: dict[str, Any] = {"nargs": "*", "action": "extend"} if several else {"nargs": "?"}
            parser.add_argument(name, default=argparse.SUPPRESS, metavar=metavar, help=told, **kind)
            common["help"] = "the same, as a flag"
        if spec.kind == "switch":
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
        elif several:
            parser.add_argument(*flags, nargs="+", action="extend", metavar=metavar, **common)
        else:
            parser.add_argument(*flags, metavar=metavar, **common)


_METAVARS: Mapping[Kind, str] = {
    "text": "TEXT",
    "integer": "N",
    "number": "X",
    "switch": "",
    "choice": "NAME",
    "photo": "PHOTO",
    "photos": "PHOTO",
    "mask": "PICTURE",
    "people": "'PHOTO … [box=X,Y,X,Y] [mask=PICTURE] [strength=X]'",
    "names": "NAME",
    "strengths": "[NAME=]X[,X…]",
}


def flag_help(spec: Spec) -> str:
    """The help text with its range, choices and default."""
    notes = [f"one of {', '.join(spec.choices)}"] if spec.choices else []
    if spec.kind in ("integer", "number", "strengths") and (allowed := _range(spec)):
        notes.append(allowed)
    if spec.kind == "switch":
        notes.append(f"default {'yes' if spec.default else 'no'}")
    elif spec.default not in (None, (), "", {}):
        notes.append(f"default {spec.default}")
    told = spec.about.rstrip(".")
    return f"{told} ({'; '.join(notes)})" if notes else told


def from_flags(request: type[R], namespace: argparse.Namespace, base: R | None = None) -> R:
    """The request of a parsed command line; `base` gives the values of what was not said."""
    given: dict[str, Any] = {}
    for name, spec in specs(request).items():
        if hasattr(namespace, name):
            given[name] = parse(name, spec, getattr(namespace, name))
        elif base is not None:
            given[name] = getattr(base, name)
    return make(request, given)


def parse(name: str, spec: Spec, value: Any) -> Any:
    """The value of a field from the text (or list of texts) a person typed; raises :class:`WrongRequest`."""
    if not isinstance(value, (str, list)):
        return value
    if spec.kind in ("photos", "names"):
        return tuple(value) if isinstance(value, list) else tuple(value.split())
    if spec.kind == "strengths":
        return _parse_strengths(name, spec, value.split() if isinstance(value, str) else value)
    if spec.kind == "people":
        return tuple(_parse_person(name, one) for one in ([value] if isinstance(value, str) else value))
    assert isinstance(value, str), (name, value)
    if spec.kind == "integer":
        return _typed(name, int, value, "a whole number") if value or not spec.optional else None
    if spec.kind == "number":
        return _typed(name, float, value, "a number") if value or not spec.optional else None
    if spec.kind in ("photo", "mask") or (spec.kind == "choice" and spec.optional):
        return value or None
    return value


T = TypeVar("T")


def _parse_person(name: str, typed: str) -> dict[str, Any]:
    """`me.jpg again.jpg box=0,0,0.5,1 strength=0.8`; a name with spaces in quotes."""
    found: dict[str, Any] = {"photos": ()}
    for word in shlex.split(typed):
        key, equals, value = word.partition("=")
        if not equals or key not in ("box", "strength", *_PICTURES):
            found["photos"] += (word,)
        elif key == "box":
            found["box"] = tuple(_typed(f"box of {name}", float, one, "four numbers") for one in value.split(","))
        else:
            found[key] = value if key in _PICTURES else _typed(f"strength of {name}", float, value, "a number")
    return found


def person_words(person: Person) -> str:
    """A person as :func:`_parse_person` reads them."""
    words = [str(photo) for photo in person.photos]
    if person.box is not None:
        words.append("box=" + ",".join(f"{one:g}" for one in person.box))
    words += [f"{part}={own}" for part in _PICTURES if (own := getattr(person, part)) is not None]
    words += [] if person.strength is None else [f"strength={person.strength:g}"]
    return shlex.join(words)


def _typed(name: str, convert: Callable[[str], T], value: str, meant: str) -> T:
    try:
        return convert(value)
    except ValueError:
        raise WrongRequest(f"{name} must be {meant}, not {value!r}.") from None


def _parse_strengths(name: str, spec: Spec, words: Sequence[str]) -> Any:
    """`0.8` · `0,0.5,1` · `instantid=0.8 arc2face=0,1` · for names with strengths also a bare name."""
    named: dict[str, Any] = {}
    plain: list[Any] = []
    for word in words:
        key, equals, value = word.rpartition("=")
        if not equals and isinstance(spec.default, Mapping):
            named[word] = 1.0
            continue
        if spec.parts and equals and ":" in value:
            named[key] = _parse_parts(name, value)
            continue
        curve = _parse_curve(name, value.split(","))
        if equals:
            named[key] = curve
        else:
            plain.append(curve)
    if named and plain:
        raise WrongRequest(f"{name} is given both by name and without; use one of the two.")
    if len(plain) > 1:
        raise WrongRequest(f"{name} takes one number, or one curve like 0,0.5,1, not {' '.join(words)}.")
    return plain[0] if plain else named


def _parse_curve(name: str, words: Sequence[str]) -> float | tuple[float, ...]:
    points = tuple(_typed(name, float, point, "a number, or numbers with commas") for point in words)
    return points[0] if len(points) == 1 else points


def _parse_parts(name: str, value: str) -> dict[str, float | tuple[float, ...]]:
    """`down:0.5,mid:1,up:0.3` · `up:0.3,0.2,0` · `lbw:1,0,…`: numbers without a name belong to the one before."""
    words: dict[str, list[str]] = {}
    last = ""
    for word in value.split(","):
        part, colon, number = word.rpartition(":")
        last = part if colon else last
        words.setdefault(last, []).append(number)
    return {part: _parse_curve(f"{name} in {part}", numbers) for part, numbers in words.items()}


def parts_words(parts: Mapping[str, Any]) -> str:
    """Numbers by name as :func:`parse` reads them."""
    shown = {part: value if isinstance(value, (tuple, list)) else (value,) for part, value in parts.items()}
    return ",".join(f"{part}:{','.join(map(str, values))}" for part, values in shown.items())


# Demo and README


@dataclass(frozen=True)
class Control:
    """How one field is shown in a form: enough for a demo to build the widget without knowing the task."""

    name: str
    label: str
    about: str
    widget: Literal[
        "photos", "photo", "mask", "people", "text", "slider", "number", "checkbox", "dropdown", "names", "strengths"
    ]
    value: Any
    low: float | None
    high: float | None
    step: float | None
    choices: tuple[str, ...]
    lines: int
    optional: bool
    advanced: bool
    of: str = ""


_WIDGETS: Mapping[Kind, Any] = {
    "text": "text",
    "integer": "number",
    "number": "number",
    "switch": "checkbox",
    "choice": "dropdown",
    "photos": "photos",
    "photo": "photo",
    "mask": "mask",
    "people": "people",
    "names": "names",
    "strengths": "strengths",
}


def controls(request: type[Request]) -> list[Control]:
    """The controls of a form for this request, in the order of its fields."""
    made = []
    for name, spec in specs(request).items():
        low, high, step = spec.slider or (spec.low, spec.high, None)
        single = spec.kind in ("integer", "number", "strengths") and not isinstance(spec.default, Mapping)
        made.append(
            Control(
                name=name,
                label=name.replace("_", " ").replace("num ", "").capitalize(),
                about=spec.about,
                widget="slider" if spec.slider and single else _WIDGETS[spec.kind],
                value=spec.default,
                low=low,
                high=high,
                step=step if step is not None else (spec.multiple if spec.kind == "integer" else None),
                choices=spec.choices,
                lines=spec.lines,
                optional=spec.optional,
                advanced=spec.advanced,
                of=spec.of,
            )
        )
    return made


def table(request: type[Request]) -> str:
    """The fields as a Markdown table."""
    rows = ["| field | flag | default | meaning |", "|---|---|---|---|"]
    for name, spec in specs(request).items():
        default = "" if spec.default in (None, (), "", {}) else f"`{spec.default}`"
        meaning = (
            spec.about.rstrip(".") if spec.kind == "switch" else flag_help(dataclasses.replace(spec, default=None))
        )
        flags = f"`{flag(name)}`" + (f" `--{spec.alias}`" if spec.alias else "")
        rows.append(f"| `{name}` | {flags} | {default} | {meaning} |")
    return "\n".join(rows)
