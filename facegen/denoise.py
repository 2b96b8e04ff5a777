"""The one loop, and guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from facegen.conditions import Condition, ControlCondition, GuidanceCondition
from facegen.errors import WrongRequest
from facegen.models.base import Model
from facegen.models.shortcut import Shortcut
from facegen.schedulers import from_clean, levels, to_clean, walk


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: u + scale·(c − u).

    scale: 1 or less runs the conditional half alone. rescale in [0, 1]: how much of the guided prediction's contrast
    is set back to the conditional one's (arXiv 2305.08891, section 3.4).
    """

    scale: float = 7.5
    rescale: float = 0.0

    @property
    def on(self) -> bool:
        """Whether both halves are needed."""
        return self.scale > 1.0

    def __call__(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """Both (B, 4, h, w)."""
        guided = uncond + self.scale * (cond - uncond)
        if self.rescale > 0.0:
            axes = tuple(range(1, cond.ndim))
            matched = guided * (cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
            guided = self.rescale * matched + (1 - self.rescale) * guided
        return guided


@dataclass(frozen=True, eq=False)
class Step:
    """One finished step: its number from 0, of how many, its timestep, the latents (B, 4, h, w) after it.

    predicted_x0 (B, 4, h, w): the clean latents as this step saw them coming; `Model.decode` makes a preview of it.
    """

    index: int
    total: int
    timestep: Tensor
    latents: Tensor
    predicted_x0: Tensor


OnStep = Callable[[Step], None]


def denoise(
    model: Model,
    latents: Tensor,
    scheduler: Any,
    conditions: Sequence[Condition],
    guidance: Guidance | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Walk from noise to clean latents (B, 4, h, w).

    latents: where to start, at the scheduler's first level (`facegen.schedulers.start`); scheduler: fresh, with its
    timesteps set (`facegen.schedulers.build`); generator: for schedulers that draw noise; with one per picture, a
    picture does not depend on its batch. on_step is called after each step and may raise Cancelled (or anything): the
    model is left as it was. `model.economy` says what may be left out.
    """
    guidance = guidance or Guidance()
    timesteps = walk(scheduler)
    total = len(timesteps)
    batch = latents.shape[0]
    drawing = list(generator) if isinstance(generator, Sequence) else generator
    if isinstance(drawing, list) and len(drawing) != batch:
        raise WrongRequest(f"There are {batch} pictures but {len(drawing)} generators.")
    extra = {"generator": drawing} if _draws(scheduler) else {}
    latents = latents.to(model.device)
    economy = model.economy.over(total)
    conditions = economy.shorten(conditions)
    shortcut = Shortcut(model) if economy.reuse > 1 else None
    guided = [guidance.on and economy.guides(index, total) for index in range(total)]
    # ControlNets work in every step beside the UNet: lent once, not from step to step.
    networks = [model.unet, *(one.controlnet for one in conditions if isinstance(one, ControlCondition))]
    with model.busy, torch.no_grad(), model.memory.using(*networks):
        # Nearly always one stretch: the rows of a call change only where guidance is confined to a part of the run.
        for both, stretch in groupby(range(total), guided.__getitem__):
            with model.prepare(conditions, batch, both) as prepared:
                for index in stretch:
                    timestep = timesteps[index]
                    now = prepared.active(index, total)
                    noisy = torch.cat([latents] * 2) if both else latents
                    scaled = scheduler.scale_model_input(noisy, timestep)
                    if shortcut is None:
                        output = model.predict(scaled, timestep, now)
                    else:
                        output = shortcut.predict(scaled, timestep, now, whole=economy.is_whole(index, total))
                    if both:
                        output = guidance(*output.chunk(2))
                    losses = now.of(GuidanceCondition)
                    clean = None
                    if losses or on_step is not None:
                        level = levels(scheduler, index, timestep)
                        clean = to_clean(scheduler, output, latents, level)
                        if losses:
                            clean = steer(clean, timestep, losses)
                            output = from_clean(scheduler, clean, latents, level)
                    latents = scheduler.step(output, timestep, latents, return_dict=False, **extra)[0]
                    latents = now.blend(latents, scheduler, timesteps)
                    if on_step is not None and clean is not None:
                        on_step(Step(index, total, timestep, latents, clean))
    return latents


def part_of_runs(step: Step, place: int, runs: int) -> Step:
    """A step of the run number `place`, from 0, as one of several runs of one length that make a picture together."""
    return replace(step, index=place * step.total + step.index, total=runs * step.total)


def steer(clean: Tensor, timestep: Tensor, losses: Sequence[tuple[GuidanceCondition, float]]) -> Tensor:
    """x0 − Σ strength·∂loss/∂x0; each picture's gradient comes from its own loss."""
    moved = clean
    for condition, strength in losses:
        with torch.enable_grad():
            x = clean.detach().float().requires_grad_()
            loss = condition.loss(x, timestep)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        moved = moved - strength * gradient.to(clean.dtype)
    return moved


def noise(
    shape: tuple[int, ...],
    generators: Sequence[torch.Generator],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit-variance noise (B, *shape), picture i from generator i alone: the same seed gives the same picture in any
    batch.
    """
    drawn = [torch.randn(shape, generator=one, device=one.device, dtype=dtype) for one in generators]
    return torch.stack([one.to(device) for one in drawn])


def _draws(scheduler: Any) -> bool:
    """Whether the scheduler's step takes a generator."""
    return "generator" in inspect.signature(scheduler.step).parameters
