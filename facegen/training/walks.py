"""Walks of a few steps from noise to a picture, in training: where a model comes by when it paints by itself.

A model that only ever sees noised pictures finds the right face in them already; on its own way it must bring it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facegen.attention.backends import for_training
from facegen.conditions import Condition
from facegen.training.loop import step_seed

if TYPE_CHECKING:
    from facegen.models.base import Model
    from facegen.training.diffusion import Batch, DiffusionObjective
    from facegen.training.objectives.velocity import VelocityObjective

LEVELS = 1000
Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a walk comes by: noisy latents (B, C, h, w), their timesteps (B,), and the velocity found there."""

    noisy: Tensor
    steps: Tensor
    found: Tensor


def walk(
    velocity: Velocity,
    levels: VelocityObjective,
    noisy: Tensor,
    begin: int,
    count: int,
    anew: torch.Generator | None = None,
) -> tuple[list[Place], Tensor]:
    """The places of `count` even steps from level `begin` (in 1 to 1000) on, and the clean latents at the end.

    anew: draws new noise between the steps; None keeps what is left of the noise (DDIM).
    """
    places = []
    clean = noisy
    stops = [begin * (count - place) // count - 1 for place in range(count + 1)]
    for level, after in pairwise(stops):
        steps = torch.full((len(noisy),), level, device=noisy.device)
        found = velocity(noisy, steps)
        places.append(Place(noisy, steps, found))
        clean = levels.clean(found, noisy, steps)[0]
        if after < 0:
            break
        signal, rest = levels.levels(steps, noisy)
        noise = rest * noisy + signal * found
        if anew is not None:
            noise = torch.randn(noise.shape, generator=anew, device=noise.device)
        noisy = levels.noisy(clean, noise, torch.full_like(steps, after))
        noisy = noisy.contiguous(memory_format=torch.channels_last)
    return places, clean


def plain(model: Model, asked: Sequence[Condition]) -> Velocity:
    """What the model says under these conditions by itself, without guidance; gradients reach what they came from."""

    def predicted(noisy: Tensor, steps: Tensor) -> Tensor:
        backend = for_training(noisy.device)
        with model.prepare(asked, len(noisy), guidance=False, backend=backend) as prepared:
            return model.predict(noisy, steps, prepared.throughout()).float()

    return predicted


def guided(with_all: Velocity, without: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6, with 1 for none)."""

    def both(noisy: Tensor, steps: Tensor) -> Tensor:
        low = without(noisy, steps)
        return low + guidance * (with_all(noisy, steps) - low)

    return both


def unasked(teaching: DiffusionObjective, batch: Batch) -> Velocity:
    """What the model says with neither prompt nor face, as guidance leans on it."""
    blank = replace(batch, prompts=[""] * len(batch.prompts), embeddings=torch.zeros_like(batch.embeddings))
    return plain(teaching.model, teaching.conditions(blank))


@torch.no_grad()
def painted(teaching: DiffusionObjective, count: int, guidance: float = 3.0, seed: int = 0) -> Tensor:
    """Latents (count, C, h, w) float16 that the model paints by what its lessons ask for, in four to six steps."""
    from tqdm import tqdm

    teaching.module.eval()
    found: list[Tensor] = []
    with tqdm(total=count, desc="painted", mininterval=20.0, leave=False) as bar:
        while bar.n < count:
            generator = torch.Generator().manual_seed(step_seed(seed, len(found)))
            batch = teaching.batch(len(found), generator)
            noise = torch.randn(batch.latents.shape, generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                way = guided(plain(teaching.model, teaching.conditions(batch)), unasked(teaching, batch), guidance)
                found.append(walk(way, teaching.velocity, noise, LEVELS, 4 + len(found) % 3)[1].half())
            bar.update(min(len(found[-1]), count - bar.n))
    return torch.cat(found)[:count]


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """These rows of a batch, each as often as it is named."""
    return replace(
        batch,
        latents=batch.latents[rows],
        prompts=[batch.prompts[row] for row in rows.tolist()],
        embeddings=batch.embeddings[rows],
        control=None if batch.control is None else batch.control[rows],
        who=batch.who[rows],
        wanted=batch.wanted[rows],
        weights=batch.weights[rows],
        given=None if batch.given is None else batch.given[rows],
    )
