"""One thing changed by degrees: a prompt moved along the way from one description to its opposite, or weights that
were taught a direction.

The direction is the difference of two encoded prompts, so a new slider needs two sentences and no labels; or it is
learnt and lies in a LoRA file (`facegen train slider`). Strength 0 is the plain run. The first part of the run stays
plain: who and where is decided there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facegen.checkpoints import SAFE
from facegen.conditions import TextCondition
from facegen.errors import WrongRequest

if TYPE_CHECKING:
    from facegen.models.base import Model

# name → (what more of it looks like, what less of it looks like); in the words of the embedded model's captions too
SLIDERS: Mapping[str, tuple[str, str]] = {
    "smile": ("a smiling person", "a sad person"),
    "surprise": ("a surprised person", "a person with a neutral expression"),
    "anger": ("an angry person", "a person with a neutral expression"),
    "mouth_open": ("a person with an open mouth", "a person with a closed mouth"),
    "age": ("an old person", "a young person"),
    "masculine": ("a man", "a woman"),
    "skin": ("a person with dark skin", "a person with light skin"),
    "beard": ("a person with a full beard", "a person without a beard"),
    "hair_length": ("a person with long straight hair", "a person with short hair"),
    "curls": ("a person with curly hair", "a person with long straight hair"),
    "blond": ("a person with blond hair", "a person with black hair"),
    "gray_hair": ("a person with gray hair", "a person with brown hair"),
    "glasses": ("a person with glasses", "a person without glasses"),
    "make_up": ("a person with lipstick and eye makeup", "a person without makeup"),
    "gaze": ("a person looking to the right", "a person looking to the left"),
}
APART = "|"
DELAY = 0.2


def files(sliders: Mapping[str, float]) -> dict[str, float]:
    """Those of the sliders that are weights in a file, not words."""
    return {name: strength for name, strength in sliders.items() if Path(name).suffix == SAFE}


def prompts(name: str) -> tuple[str, str]:
    """The two prompts of a slider by name, or of one given as `more of it|less of it`; raises WrongRequest."""
    if name in SLIDERS:
        return SLIDERS[name]
    more, apart, less = (part.strip() for part in name.partition(APART))
    if not apart or not more or not less:
        raise WrongRequest(
            f"There is no slider '{name}'; there are: {', '.join(SLIDERS)}; or give two prompts as"
            f" 'more{APART}less', or the {SAFE} file of one that was learnt."
        )
    return more, less


def moved(
    model: Model, text: TextCondition, sliders: Mapping[str, float], *, delay: float = DELAY
) -> list[TextCondition]:
    """The prompts to append to a run's conditions: `text` moved along each slider by its strength; [] for no move.

    Sliders in files are not its business. Only the conditional half moves. Raises WrongRequest for a slider that does
    not exist.
    """
    learnt = files(sliders)
    ways = [(*prompts(name), strength) for name, strength in sliders.items() if strength and name not in learnt]
    if not ways:
        return []
    embeds, pooled = text.embeds.clone(), None if text.pooled is None else text.pooled.clone()
    for more, less, strength in ways:
        ends = model.encode_text([more, less])
        embeds[1] = embeds[1] + strength * _step(ends.embeds).to(embeds)
        if pooled is not None and ends.pooled is not None:
            pooled[1] = pooled[1] + strength * _step(ends.pooled).to(pooled)
    return [replace(text, embeds=embeds, pooled=pooled, span=(delay, 1.0))]


def _step(ends: Tensor) -> Tensor:
    """From the second prompt of a Pair (2, 2, …) to the first, (1, …)."""
    with torch.no_grad():
        return ends[1, :1] - ends[1, 1:]
