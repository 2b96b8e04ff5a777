"""The face detector's training: anchors by size, focal loss on scores, GIoU on boxes, smooth L1 on points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.face.networks import ANCHORS, STRIDES, DetectorNet
from facegen.training.augment import ROUGH, Wear, wear
from facegen.training.cache import Cache
from facegen.training.crowds import CROWDED, Crowd, CrowdSettings, crowds
from facegen.training.loop import Objective
from facegen.training.muon import muon_groups

# Longer sides of the faces that each (stride, anchor) answers for, in pixels; neighbours share a little.
RANGES: tuple[tuple[tuple[float, float], ...], ...] = (
    ((0.0, 26.0), (22.0, 52.0)),
    ((44.0, 84.0), (72.0, 132.0)),
    ((112.0, 210.0), (180.0, 1e6)),
)
_RADIUS = 0.22  # of the face's sides: anchors this near its centre answer for it
_OUTER = ("stem.0", "score", "box", "points")  # what Muon leaves to AdamW
_DOUBT = 0.5  # anchors nearer than this, but not near enough, are neither right nor wrong


@dataclass(frozen=True)
class DetectorSettings:
    batch: int = 12
    crowd: CrowdSettings = CROWDED
    wear: Wear = ROUGH
    seed: int = 0


def anchors(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres (N, 2) in pixels, strides (N,), and the range of sizes low (N,), high (N,) of all anchors."""
    centres, strides, lows, highs = [], [], [], []
    for stride, ranges in zip(STRIDES, RANGES, strict=True):
        cells = size // stride
        y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
        centre = torch.stack([x, y], -1).reshape(-1, 1, 2).expand(-1, ANCHORS, 2).reshape(-1, 2) * float(stride)
        centres.append(centre)
        strides.append(torch.full((len(centre),), float(stride)))
        low, high = torch.tensor(ranges).T
        lows.append(low.repeat(cells * cells))
        highs.append(high.repeat(cells * cells))
    return torch.cat(centres), torch.cat(strides), torch.cat(lows), torch.cat(highs)


def assign(crowd: Crowd, grid: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """For each anchor: score target (N,) 1, 0 or -1 (not asked), box (N, 4) and points (N, 10) in pixels."""
    centres, strides, low, high = grid
    n = len(centres)
    score, box, points = torch.zeros(n), torch.zeros(n, 4), torch.zeros(n, 10)
    nearest = torch.full((n,), torch.inf)
    for own_box, own_points in zip(torch.from_numpy(crowd.boxes), torch.from_numpy(crowd.points), strict=True):
        sides = own_box[2:] - own_box[:2]
        size = sides.amax()
        offset = (centres - (own_box[:2] + own_box[2:]) / 2).abs()
        # A cell at least must answer, however small the face.
        reach = torch.maximum(_RADIUS * sides, 0.51 * strides[:, None])
        near = (offset <= reach).all(1)
        fits = (size >= low) & (size <= high)
        doubt = (offset <= torch.maximum(_DOUBT * sides, reach)).all(1) & (size >= 0.6 * low) & (size <= 1.7 * high)
        score = torch.where(doubt & (score == 0), -1.0, score)
        distance = offset.square().sum(1)
        mine = near & fits & (distance < nearest)
        nearest = torch.where(mine, distance, nearest)
        score = torch.where(mine, 1.0, score)
        box = torch.where(mine[:, None], own_box, box)
        points = torch.where(mine[:, None], own_points.reshape(1, 10), points)
    return score, box, points


class DetectorObjective(Objective):
    """Trains a :class:`DetectorNet` on crowds."""

    name = "detector"

    def __init__(self, net: DetectorNet, cache: Cache, held_out: Cache | None, settings: DetectorSettings) -> None:
        self.cache, self.held_out, self.settings = cache, held_out, settings
        self.grid = anchors(settings.crowd.size)
        self.module: DetectorNet = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Muon moves the kernels between the first layer and the heads."""
        return muon_groups(self.module, _OUTER)

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        pictures, drawn = crowds(self.cache, self.settings.batch, self.settings.crowd, generator)
        pictures = wear(pictures, self.settings.wear, generator)
        answers = zip(*(assign(one, self.grid) for one in drawn), strict=True)
        scores, boxes, points = (torch.stack(parts) for parts in answers)
        pictures = (pictures * 255 - 127.5) / 128
        return {
            "pictures": pictures.contiguous(memory_format=torch.channels_last),
            "scores": scores,
            "boxes": boxes,
            "points": points,
        }

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        logits, distances, offsets = (torch.cat(part, 1).float() for part in self.module(batch["pictures"]))
        device = logits.device
        centres, strides = self.grid[0].to(device), self.grid[1].to(device)
        right = batch["scores"] == 1
        count = right.sum().clamp(min=1)
        score = focal(logits[..., 0], batch["scores"]) / count
        found = boxes_of(distances, centres, strides)
        box = (1 - giou(found[right], batch["boxes"][right])).sum() / count
        targets = (batch["points"].unflatten(2, (5, 2)) - centres[:, None]) / strides[:, None, None]
        sides = (batch["boxes"][..., 2:] - batch["boxes"][..., :2]).amax(2).clamp(min=1.0)
        error = (offsets.unflatten(2, (5, 2)) - targets)[right] * (strides / sides)[right][:, None, None]  # face sides
        points = F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.02, reduction="sum") / count
        return {"loss": score + 2 * box + points, "score": score, "box": box, "points": points}

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        return {} if self.held_out is None else detector_figures(self.module, self.held_out, self.settings)


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017), summed; anchors with the target -1 do not count."""
    asked = targets >= 0
    logits, targets = logits[asked], targets[asked]
    wrong = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = torch.where(targets > 0, 1 - logits.sigmoid(), logits.sigmoid())
    weight = torch.where(targets > 0, 0.4, 0.6)
    return (weight * miss.square() * wrong).sum()


def boxes_of(distances: Tensor, centres: Tensor, strides: Tensor) -> Tensor:
    """Distances (..., N, 4) in strides to boxes x0, y0, x1, y1 in pixels."""
    left_top, right_bottom = (distances * strides[:, None]).split(2, -1)
    return torch.cat([centres - left_top, centres + right_bottom], -1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes (N, 4), (N,) (Rezatofighi et al. 2019)."""
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    outer = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(min=1e-3).prod(1)
    union = (a[:, 2:] - a[:, :2]).clamp(min=0).prod(1) + (b[:, 2:] - b[:, :2]).clamp(min=0).prod(1) - inner
    return inner / union.clamp(min=1e-3) - (outer - union) / outer


def detector_figures(
    net: DetectorNet, cache: Cache, settings: DetectorSettings, pictures: int = 160, threshold: float = 0.5
) -> dict[str, float]:
    """Recall, false faces per picture and point error (of the box's larger side) on worn crowds of the cache."""
    generator = torch.Generator().manual_seed(20_000 + settings.seed)
    centres, strides = anchors(settings.crowd.size)[:2]
    found = faces = wrong = 0
    errors: list[float] = []
    for _ in range(pictures // 8):
        images, drawn = crowds(cache, 8, settings.crowd, generator)
        images = (wear(images, settings.wear, generator) * 255 - 127.5) / 128
        logits, distances, offsets = (torch.cat(part, 1).float() for part in net(images))
        for i, one in enumerate(drawn):
            boxes = boxes_of(distances[i], centres, strides)
            kept = suppress(boxes, logits[i, :, 0].sigmoid(), threshold)
            truth = torch.from_numpy(one.boxes)
            faces += len(truth)
            used: set[int] = set()
            for j in kept:
                overlaps = [float(giou(boxes[j][None], t[None])) for t in truth]
                best = int(np.argmax(overlaps)) if overlaps else -1
                if best < 0 or overlaps[best] < 0.4 or best in used:
                    wrong += 1
                    continue
                used.add(best)
                side = float((truth[best, 2:] - truth[best, :2]).amax())
                place = centres[j] + offsets[i, j].view(5, 2) * strides[j]
                errors.append(float((place - torch.from_numpy(one.points[best])).norm(dim=1).mean()) / side)
            found += len(used)
    return {
        "recall": round(found / max(1, faces), 4),
        "false_faces_per_picture": round(wrong / pictures, 4),
        "point_error_of_face": round(float(np.mean(errors)) if errors else 1.0, 4),
    }


def suppress(boxes: Tensor, scores: Tensor, threshold: float, overlap: float = 0.4) -> list[int]:
    """Indices of the boxes (N, 4) that remain after non-maximum suppression, best first."""
    order = [int(i) for i in scores.argsort(descending=True) if scores[i] > threshold][:200]
    kept: list[int] = []
    for i in order:
        if all(iou(boxes[i], boxes[j]) <= overlap for j in kept):
            kept.append(i)
    return kept


def iou(a: Tensor, b: Tensor) -> float:
    inner = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    areas: Sequence[Tensor] = [(box[2:] - box[:2]).clamp(min=0).prod() for box in (a, b)]
    return float(inner / (areas[0] + areas[1] - inner).clamp(min=1e-6))
