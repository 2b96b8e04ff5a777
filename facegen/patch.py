"""A part of a picture painted anew by the one loop: outside the part the picture's own latents stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen import schedulers
from facegen.conditions import ChannelsCondition, Condition, KeepCondition, pair
from facegen.denoise import Guidance, OnStep, noise
from facegen.errors import WrongRequest
from facegen.given_noise import instead
from facegen.models.base import Model
from facegen.models.slid import Slide
from facegen.sliding import denoise_slid

_MARKED = 0.02  # below this a mask is only the soft edge of one that was cut out and resized


@dataclass(frozen=True)
class Run:
    """How a picture is made: the scheduler's name, how many steps, which guidance.

    change: 1 starts from noise alone, less from the picture with less noise on it, 0 changes nothing.
    noise: of unit variance (B, C, h, w), in place of what the generators draw. slides: what sliders do meanwhile.
    """

    scheduler: str = schedulers.OWN
    steps: int = 30
    guidance: Guidance = field(default_factory=Guidance)
    change: float = 1.0
    noise: Tensor | None = None
    slides: tuple[Slide, ...] = ()


def latent_mask(model: Model, hole: Tensor) -> Tensor:
    """(1, H, W) in picture space → (1, 1, h, w): 1 for every latent that shows a marked pixel."""
    _, height, width = model.latent_shape(hole.shape[-2], hole.shape[-1])
    return (F.adaptive_max_pool2d(hole[None], (height, width)) > _MARKED).float()


def hole_conditions(model: Model, picture: Tensor, hole: Tensor, start: Tensor) -> list[Condition]:
    """What keeps a picture (3, H, W) outside a hole (1, H, W); start: the run's first noise (B, 4, h, w).

    Inpainting UNets are also told what lies around the hole.
    """
    latents, marked = model.encode_image(picture[None]), latent_mask(model, hole)
    kept = latents.expand(len(start), -1, -1, -1)
    conditions: list[Condition] = [KeepCondition(latents=kept, mask=marked, noise=start)]
    if model.extra_channels:
        if model.extra_channels != 1 + model.latent_channels:
            raise WrongRequest(
                f"The loaded UNet takes {model.extra_channels} channels beside the latents; an inpainting model takes"
                f" {1 + model.latent_channels}."
            )
        gray = torch.where(hole > 0.5, 0.5, picture)
        told = torch.cat([marked.to(latents), model.encode_image(gray[None])], dim=1)  # (1, 1 + 4, h, w)
        conditions.append(ChannelsCondition(channels=pair(told, told)))
    return conditions


def repaint(
    model: Model,
    picture: Tensor,
    hole: Tensor,
    conditions: Sequence[Condition],
    run: Run,
    generators: Sequence[torch.Generator],
    on_step: OnStep | None = None,
    begin: Tensor | None = None,
) -> Tensor:
    """A picture (3, H, W) in [0, 1] with what lies in the hole (1, H, W) painted anew → (B, 3, H, W), one a generator.

    begin: latents (1, C, h, w) from which a change below 1 begins, in place of the picture's own.
    Around the hole it is the picture as the autoencoder renders it: paste the hole alone back.
    """
    if run.change <= 0.0 or not bool(hole.any()):
        return picture.expand(len(generators), -1, -1, -1)
    height, width = picture.shape[-2:]
    if int(run.steps * run.change) < 1:
        raise WrongRequest(f"A change of {run.change:g} in {run.steps} steps leaves no step; raise one of them.")
    scheduler = schedulers.build(
        run.scheduler, model.scheduler_config, run.steps, strength=run.change, device=model.device
    )
    drawn = noise(model.latent_shape(height, width), generators, device=model.device, dtype=model.dtype)
    start = instead(drawn, run.noise)
    kept = hole_conditions(model, picture, hole, start)
    photo = None
    if run.change < 1.0:
        photo = (model.encode_image(picture[None]) if begin is None else begin).expand(len(start), -1, -1, -1)
    latents = denoise_slid(
        model,
        run.slides,
        schedulers.start(scheduler, start, photo),
        scheduler,
        [*conditions, *kept],
        run.guidance,
        generators,
        on_step,
    )
    return model.decode(latents)
