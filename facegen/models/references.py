"""A picture that may be looked at while another one is made: its self-attention at the levels of noise of the run."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from facegen.conditions import ReferenceCondition, Scale, TextCondition
from facegen.errors import WrongRequest
from facegen.schedulers import walk

if TYPE_CHECKING:
    from facegen.models.base import Model

PARTS = 4


def look_at(
    model: Model,
    latents: Tensor,
    text: TextCondition,
    scheduler: Any,
    start: Tensor,
    *,
    scale: Scale = 1.0,
    mask: Tensor | None = None,
    parts: int = PARTS,
) -> list[ReferenceCondition]:
    """Conditions that let a run look at a picture, whose latents are (1, 4, h, w).

    The run is cut into `parts`; in each the picture is seen with as much of the run's own noise (`start`, (1, 4, h, w))
    as in its middle. scheduler: set to the run's steps; mask (1, H, W): where the made picture may look.
    """
    if latents.shape != start.shape:
        raise WrongRequest(
            f"The picture to look at has latents {tuple(latents.shape)}, the noise of the run {tuple(start.shape)}."
        )
    steps = walk(scheduler)
    total = len(steps)
    bounds = sorted({round(part * total / parts) for part in range(parts + 1)})
    found = []
    with model.busy, torch.no_grad():
        for first, last in itertools.pairwise(bounds):
            timestep = steps[(first + last) // 2]
            noisy = scheduler.add_noise(latents.to(start), start, timestep.reshape(1))
            states = model.reference_states(_scaled(scheduler, noisy, timestep), timestep, text)
            found.append(ReferenceCondition(states=states, scale=scale, mask=mask, span=(first / total, last / total)))
    return found


def _scaled(scheduler: Any, noisy: Tensor, timestep: Tensor) -> Tensor:
    """As the UNet wants it; the scheduler's counter, which some of them keep, is put back."""
    before = getattr(scheduler, "_step_index", None)
    scaled: Tensor = scheduler.scale_model_input(noisy, timestep)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = before
    return scaled
