"""A run with sliders: first as it would be without them, then with them, where they act."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Generator, Tensor

from facegen.denoise import Guidance, OnStep, Step, denoise, part_of_runs
from facegen.models.slid import Slid, Slide

if TYPE_CHECKING:
    from facegen.conditions import Condition


def denoise_slid(
    model: Any,
    slides: Sequence[Slide],
    latents: Tensor,
    scheduler: Any,
    conditions: Sequence[Condition],
    guidance: Guidance,
    generators: Sequence[Generator],
    on_step: OnStep | None = None,
) -> Tensor:
    """As `facegen.denoise.denoise` (B, C, h, w), moved by slides; without slides it is that.

    With them the steps of both runs are told to on_step, counted as those of one run twice as long.
    """
    if not slides:
        return denoise(model, latents, scheduler, conditions, guidance, generators, on_step)
    fresh, again = copy.deepcopy(scheduler), [one.clone_state() for one in generators]
    plain: list[Tensor] = []  # what no slider touches stays as in the plain run, which therefore comes first

    def first(step: Step) -> None:
        plain.append(step.latents)
        if on_step is not None:
            on_step(part_of_runs(step, 0, 2))

    def second(step: Step) -> None:
        if on_step is not None:
            on_step(part_of_runs(step, 1, 2))

    denoise(model, latents, scheduler, conditions, guidance, generators, first)
    slid: Any = Slid(model, slides, plain)
    return denoise(slid, latents, fresh, conditions, guidance, again, second)
