"""The training of the 68 points: gray crops about five points that are somewhat wrong, worn, to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.face.landmarks import MIRROR, LandmarkFinder, crop_matrices
from facegen.face.networks import KeypointNet
from facegen.face.warp import transform, warp
from facegen.training.augment import ROUGH, Wear
from facegen.training.cache import Cache, shuffled
from facegen.training.loop import Objective
from facegen.training.points import mirrored_and_worn
from facegen.world.landmarks import landmarks5


@dataclass(frozen=True)
class Points68Settings:
    """wrong: how far the five points lie from the true ones, in eye distances, standard deviation; turn: radians."""

    batch: int = 64
    wear: Wear = ROUGH
    wrong: float = 0.08
    turn: float = 0.1
    seed: int = 0


class Points68Objective(Objective):
    """Trains a :class:`KeypointNet` of 68 points."""

    name = "points68"

    def __init__(self, net: KeypointNet, cache: Cache, held_out: Cache | None, settings: Points68Settings) -> None:
        self.cache, self.held_out, self.settings = cache, held_out, settings
        self.size: int = net.config["size"]
        self.module: KeypointNet = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if int(net.state_dict()["mix.1.num_batches_tracked"]) == 0:  # never trained: it begins with the average face
            with torch.no_grad():
                net.head.weight *= 0.1
                net.head.bias.copy_(self._average().flatten() - 0.5)

    def _average(self) -> Tensor:
        """The points (68, 2) in crop sides, mean of some pictures."""
        rows = torch.arange(0, len(self.cache), max(1, len(self.cache) // 256))
        matrices = crop_matrices(self.cache.field("landmarks5", rows).float(), self.size)
        return transform(matrices, self.cache.field("landmarks68", rows).float()).mean(0) / self.size

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        settings, size = self.settings, self.size
        rows = shuffled(len(self.cache), settings.batch, step, settings.seed)
        matrices = crop_matrices(self._five(self.cache, rows, generator), size)
        crops = warp(self.cache.rgb(rows), matrices, size, padding="border").mean(1, keepdim=True)
        points = transform(matrices, self.cache.field("landmarks68", rows).float())
        return mirrored_and_worn(crops, points, MIRROR, settings.wear, generator)

    def _five(self, cache: Cache, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Five points (B, 5, 2) as a detector finds them: shifted each on its own, and turned all together."""
        points = cache.field("landmarks5", rows).float()
        apart = (points[:, 0] - points[:, 1]).norm(dim=1).clamp(min=4.0)
        moved = points + self.settings.wrong * apart[:, None, None] * torch.randn(points.shape, generator=generator)
        angle = self.settings.turn * torch.randn(len(rows), generator=generator)
        cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
        x, y = (moved - moved.mean(1, keepdim=True)).unbind(2)
        return torch.stack([cosine * x - sine * y, sine * x + cosine * y], 2) + moved.mean(1, keepdim=True)

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        found = self.module(batch["crops"])
        error = (found - batch["points"]).norm(dim=2).mean()
        return {"loss": 100 * F.smooth_l1_loss(found, batch["points"], beta=0.02), "error": error.detach()}

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """The mean error as a share of the eye distance on people who were never trained on, found in two rounds from
        five points that are somewhat wrong.
        """
        if self.held_out is None:
            return {}
        finder, cache = LandmarkFinder(self.module), self.held_out
        generator = torch.Generator().manual_seed(self.settings.seed)
        errors = []
        for rows in torch.arange(len(cache)).split(64):
            gray = cache.rgb(rows).mean(1, keepdim=True)
            found = finder.located(gray, self._five(cache, rows, generator))
            true = cache.field("landmarks68", rows).float()
            apart = (landmarks5(true)[:, 0] - landmarks5(true)[:, 1]).norm(dim=1).clamp(min=4.0)
            errors.append((found - true).norm(dim=2).mean(1) / apart)
        error = torch.cat(errors)
        return {
            "error_of_eye_distance": round(error.mean().item(), 4),
            "median_of_eye_distance": round(error.median().item(), 4),
            "within_tenth_of_eye_distance": round((error < 0.1).float().mean().item(), 4),
        }
