"""How each published system wants a face prepared: `assets/preprocessing.toml` read into frozen dataclasses."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

FILE = Path(__file__).parent / "assets" / "preprocessing.toml"

Triple = tuple[float, float, float]
Template = Literal["arcface", "ffhq", "facexlib", "whole"]
Embedding = Literal["raw", "unit", "code", "none"]
Which = Literal["largest", "best", "only"]
Channels = Literal["rgb", "bgr"]


@dataclass(frozen=True, kw_only=True)
class View:
    """What an image encoder or network sees; the fields are told of in assets/preprocessing.toml."""

    template: Template
    side: int
    seen: int
    channels: Channels
    mean: Triple
    std: Triple

    def normal(self, pixels: Tensor) -> Tensor:
        """Pixels (…, 3, H, W) in [0, 1], channels as they come -> as the network wants them."""
        if set(self.mean) == set(self.std) == {0.5}:
            return pixels * 2 - 1
        mean, deviation = (pixels.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (pixels - mean) / deviation

    def __post_init__(self) -> None:
        for value, kind in ((self.template, Template), (self.channels, Channels)):
            _among(value, kind)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0 or min(self.side, self.seen) <= 0:
            raise ValueError("A view has three means, three deviations above 0 and sides above 0.")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """One system; the fields are told of in assets/preprocessing.toml."""

    source: str
    pack: str = ""
    embedding: Embedding = "none"
    face: Which = "only"
    det: int = 640
    view: View | None = None

    @property
    def sight(self) -> View:
        """The view of a system that has one."""
        assert self.view is not None, "asked of a system that looks at no picture"
        return self.view

    def __post_init__(self) -> None:
        _among(self.embedding, Embedding)
        _among(self.face, Which)


@cache
def _all() -> Mapping[str, Preprocessing]:
    with FILE.open("rb") as file:
        return {name: _one(table) for name, table in tomllib.load(file).items()}


def _one(table: Mapping[str, Any]) -> Preprocessing:
    rest: dict[str, Any] = dict(table)
    if (seen := rest.pop("view", None)) is None:
        return Preprocessing(**rest)
    fields: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in seen.items()}
    return Preprocessing(**rest, view=View(**fields))


def preprocessing(name: str) -> Preprocessing:
    """That of a system, by the name of its adapter or network."""
    return _all()[name]


def names() -> tuple[str, ...]:
    """Every system that has one."""
    return tuple(_all())


def _among(value: str, kind: object) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{value!r} is not among {', '.join(get_args(kind))}.")
