"""Rewards the model for what it paints by itself: the recogniser looks, and says whether it is the person.

The long lesson shows noised pictures, in which the right face is there already. Here the model walks from noise in a
few guided steps; at one of the places that it comes by, its estimate is decoded, the face aligned, and the recogniser's
cosine to the person asked for is the reward, through which gradients reach the weights in that one step (ReFL, Xu et
al., arXiv 2304.05977; an accurate identity loss on pictures of a few steps: PuLID, Guo et al., arXiv 2404.16022). The
long lesson goes on beside it, in each step, so that what pleases the recogniser stays a picture of this world. The
judges of the evaluation are other nets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.face.networks import DetectorNet, RecogniserNet
from facegen.face.warp import aligned_crops
from facegen.models.norms import quicken
from facegen.training.loop import Objective
from facegen.training.reader import disobedience
from facegen.training.walks import LEVELS, guided, plain, rows_of, unasked, walk

if TYPE_CHECKING:
    from facegen.training.diffusion import Batch, DiffusionObjective


@dataclass(frozen=True)
class RewardSettings:
    """lessons: batch of the lessons beside; painted: pictures that are painted in each step.

    walks: how many steps a walk may have; guidance: theirs.
    likeness, obedience: weights of how unlike the person the recogniser finds the estimate, and of how far from the
    prompt the reader of latents finds it.
    """

    lessons: int = 16
    painted: int = 8
    walks: tuple[int, ...] = (3, 4, 5)
    guidance: float = 3.0
    likeness: float = 1.0
    obedience: float = 0.2


class RewardObjective(Objective):
    """The lessons of :class:`DiffusionObjective`, and beside them the reward of the model's own pictures."""

    name = "reward"

    def __init__(
        self,
        teaching: DiffusionObjective,
        recogniser: RecogniserNet,
        detector: DetectorNet,
        settings: RewardSettings = RewardSettings(),
    ) -> None:
        from facegen.evaluation.judges import strongest

        self.teaching, self.settings, self.module = teaching, settings, teaching.module
        self.recogniser, self.points = recogniser, lambda images: strongest(detector, images)
        quicken(teaching.model.vae)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.teaching.parameter_groups()

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        return self.teaching.batch(step, generator)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        losses = dict(self.teaching.loss(batch, step, generator))
        some = self._chosen(batch)
        if len(some.latents):
            unlike, amiss = self.reward(some, generator)
            losses["loss"] = losses["loss"] + self.settings.likeness * unlike + self.settings.obedience * amiss
            losses |= {f"painted_{batch.way}": unlike.detach(), "painted_amiss": amiss.detach()}
        return losses

    def _chosen(self, batch: Batch) -> Batch:
        """The first rows that ask for somebody."""
        rows = (batch.who != 0).any(1).nonzero()[: self.settings.painted, 0]
        return rows_of(batch, rows)

    def reward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """How unlike the people (1 - cosine) and how disobedient the pictures are that the model paints of a batch."""
        settings, teaching = self.settings, self.teaching
        roll = torch.rand(2, generator=generator, device=generator.device).tolist()
        count = settings.walks[int(roll[0] * len(settings.walks))]
        noise = torch.randn(batch.latents.shape, generator=generator, device=generator.device)
        with torch.no_grad():
            low = unasked(teaching, batch)
            way = guided(plain(teaching.model, teaching.conditions(batch)), low, settings.guidance)
            places, end = walk(way, teaching.velocity, noise, LEVELS, count)
            points, found = self.points(teaching.model.decode(end))
            place = places[1 + int(roll[1] * (count - 1))]  # at the first there is only noise
            without = low(place.noisy, place.steps)
        with_all = teaching.answered(lambda: teaching.conditions(batch), place.noisy, place.steps).float()
        velocity = without + settings.guidance * (with_all - without)
        clean, certain = teaching.velocity.clean(velocity, place.noisy, place.steps)
        crops = aligned_crops(teaching.model.decode(clean), points, self.recogniser.config["size"])
        who = self.recogniser(crops * 2 - 1).float()
        counts = certain * found
        unlike = (counts * (1 - F.cosine_similarity(who, batch.who))).sum() / counts.sum().clamp_min(1e-6)
        amiss = torch.zeros(())
        if teaching.reader is not None:
            what = teaching.reader(clean.contiguous(memory_format=torch.channels_last))[1]
            amiss = (certain * disobedience(what, batch.wanted)).mean()
        return unlike, amiss

    def figures(self) -> dict[str, float]:
        return self.teaching.figures()
