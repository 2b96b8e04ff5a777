"""The training of the five points: gray crops of any face box, turned, moved and worn, to eyes, nose and mouth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.face.networks import KeypointNet
from facegen.face.warp import transform, warp
from facegen.training.augment import ROUGH, Wear, uniform, wear
from facegen.training.cache import Cache, shuffled
from facegen.training.loop import Objective

MARGIN = 1.4  # side of the crop, in larger sides of the face box
_MIRROR = (1, 0, 2, 4, 3)


@dataclass(frozen=True)
class PointsSettings:
    batch: int = 128
    wear: Wear = ROUGH
    turn: float = 0.35  # radians, standard deviation
    shift: float = 0.1  # of the crop's side
    zoom: tuple[float, float] = (0.75, 1.3)
    seed: int = 0


def box_crops(boxes: Tensor, size: int, margin: float = MARGIN) -> Tensor:
    """Matrices (B, 2, 3) that carry pixels to a square crop about face boxes (B, 4) x0, y0, x1, y1."""
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=1.0)
    scale = size / (margin * sides)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    shift = (size - 1) / 2 - scale[:, None] * centre
    return torch.cat([torch.eye(2) * scale.view(-1, 1, 1), shift[:, :, None]], 2)


def mirrored_and_worn(
    crops: Tensor, points: Tensor, mirror: Sequence[int], worn: Wear, generator: torch.Generator
) -> dict[str, Tensor]:
    """A batch from crops (B, 1, S, S) in [0, 1] and points (B, N, 2) in their pixels; half of them mirrored.

    mirror: which point is where each was, seen in the mirror. The crops come out in [-1, 1], the points in crop sides.
    """
    size = crops.shape[-1]
    flip = torch.rand(len(crops), generator=generator) < 0.5
    crops = torch.where(flip[:, None, None, None], crops.flip(3), crops)
    other = torch.stack([size - 1 - points[..., 0], points[..., 1]], 2)[:, mirror]
    points = torch.where(flip[:, None, None], other, points)
    crops = wear(crops, worn, generator) * 2 - 1
    return {"crops": crops.contiguous(memory_format=torch.channels_last), "points": points / size}


class PointsObjective(Objective):
    """Trains a :class:`KeypointNet`."""

    name = "points"

    def __init__(self, net: KeypointNet, cache: Cache, held_out: Cache | None, settings: PointsSettings) -> None:
        self.cache, self.held_out, self.settings = cache, held_out, settings
        self.size: int = net.config["size"]
        self.module: KeypointNet = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        settings, size = self.settings, self.size
        rows = shuffled(len(self.cache), settings.batch, step, settings.seed)
        b = len(rows)
        base = box_crops(self.cache.field("box", rows).float(), size)
        zoom = uniform((b,), *settings.zoom, generator)
        turn = settings.turn * torch.randn(b, generator=generator)
        linear = torch.stack(
            [torch.stack([turn.cos(), -turn.sin()], 1), torch.stack([turn.sin(), turn.cos()], 1)], 1
        ) * zoom.view(b, 1, 1)
        middle = (size - 1) / 2
        shift = middle - linear.sum(2) * middle + settings.shift * size * torch.randn(b, 2, generator=generator)
        matrices = torch.cat([linear @ base[:, :, :2], linear @ base[:, :, 2:] + shift[:, :, None]], 2)
        points = transform(matrices, self.cache.field("landmarks5", rows).float())
        crops = warp(self.cache.rgb(rows), matrices, size, padding="border").mean(1, keepdim=True)
        return mirrored_and_worn(crops, points, _MIRROR, settings.wear, generator)

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        found = self.module(batch["crops"])
        error = (found - batch["points"]).norm(dim=2).mean()
        loss = F.smooth_l1_loss(found, batch["points"], beta=0.02)
        return {"loss": 100 * loss, "error": error.detach()}

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        cache = self.held_out
        errors = []
        for rows in torch.arange(len(cache)).split(128):
            matrices = box_crops(cache.field("box", rows).float(), self.size)
            crops = warp(cache.rgb(rows), matrices, self.size, padding="border").mean(1, keepdim=True) * 2 - 1
            truth = transform(matrices, cache.field("landmarks5", rows).float())
            apart = (truth[:, 0] - truth[:, 1]).norm(dim=1).clamp(min=4.0)
            errors.append((self.module(crops) * self.size - truth).norm(dim=2).mean(1) / apart)
        error = torch.cat(errors)
        return {
            "error_of_eye_distance": round(error.mean().item(), 4),
            "within_tenth_of_eye_distance": round((error < 0.1).float().mean().item(), 4),
        }
