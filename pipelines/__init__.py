"""One task per file: its request and its pipeline, imported when they are asked for."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from facegen.pipelines.avatar import AvatarPipeline as AvatarPipeline
    from facegen.pipelines.avatar import AvatarRequest as AvatarRequest
    from facegen.pipelines.generate import GeneratePipeline as GeneratePipeline
    from facegen.pipelines.generate import GenerateRequest as GenerateRequest
    from facegen.pipelines.inpaint import InpaintPipeline as InpaintPipeline
    from facegen.pipelines.inpaint import InpaintRequest as InpaintRequest
    from facegen.pipelines.swap import SwapPipeline as SwapPipeline
    from facegen.pipelines.swap import SwapRequest as SwapRequest
    from facegen.request import Person as Person


def _homes() -> dict[str, str]:
    """`GeneratePipeline` and `GenerateRequest` live in generate, and so on: the names follow from the files."""
    stems = [one.name for one in pkgutil.iter_modules(__path__) if not one.name.startswith("_")]
    camel = {stem: "".join(word.capitalize() for word in stem.split("_")) for stem in stems}
    return {f"{name}{kind}": stem for stem, name in camel.items() for kind in ("Pipeline", "Request")}


def __getattr__(name: str) -> Any:
    if name == "Person":
        from facegen.request import Person

        return Person
    home = _homes().get(name)
    if home is None:
        raise AttributeError(f"facegen.pipelines has no {name}; there are: {', '.join(_homes())}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_homes()]
