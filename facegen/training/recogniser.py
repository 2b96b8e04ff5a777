"""The recogniser's training, and the judge of likeness', which is the same with another net, seed and wear.

ArcFace over the people of the cache, with the people's true parameters as a second target: the world knows what a face
is made of, and an embedding from which that can be read linearly tells strangers apart far better than labels alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.face.warp import ARCFACE_POINTS, aligned_crops, similarities, warp
from facegen.training.augment import USUAL, Wear, uniform, wear
from facegen.training.cache import Cache, shuffled
from facegen.training.loop import Objective
from facegen.training.objectives.arcface import ArcFaceMargin
from facegen.world.parameters import IDENTITY, locate

_MOLE, _MOLE_X, _MOLE_Y = (locate(name)[1] for name in ("mole", "mole_x", "mole_y"))
_VISIBLE = 0.7  # freckles and moles appear above this value


@dataclass(frozen=True)
class RecogniserSettings:
    """The recipe; ``steps`` is the length of the schedule."""

    steps: int
    batch: int = 96
    margin: float = 0.3
    scale: float = 24.0
    regression: float = 15.0  # weight of the true parameters at the start; it falls to 0.3 of that
    wear: Wear = USUAL
    jitter: float = 1.5  # pixels of the crop: the points that a detector finds are not the true ones
    seed: int = 0


class RecogniserObjective(Objective):
    """Trains ``net``: aligned crops to raw embeddings."""

    name = "recogniser"

    def __init__(self, net: nn.Module, cache: Cache, held_out: Cache | None, settings: RecogniserSettings) -> None:
        self.net, self.cache, self.held_out, self.settings = net, cache, held_out, settings
        dim, size = net.config["dim"], net.config["size"]  # type: ignore[index]
        self.size = int(size)
        torch.manual_seed(settings.seed)
        self.margin = ArcFaceMargin(dim, len(cache.people), settings.scale)  # type: ignore[arg-type]
        self.reading = nn.Linear(dim, len(IDENTITY))  # type: ignore[arg-type]
        self.module = nn.ModuleDict({"net": net, "margin": self.margin, "reading": self.reading})
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compiled(self) -> tuple[nn.Module, ...]:
        return (self.net,)

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        settings, cache = self.settings, self.cache
        rows = shuffled(len(cache), settings.batch, step, settings.seed)
        identity = cache.field("identity", rows)
        crops = self._crops(cache.rgb(rows), cache.field("landmarks5", rows).float(), generator)
        # The mole's side is part of who one is: mirror only those without one.
        mirrored = (torch.rand(len(rows), generator=generator) < 0.5) & (identity[:, _MOLE] <= _VISIBLE)
        crops = torch.where(mirrored[:, None, None, None], crops.flip(3), crops)
        crops = wear(crops, settings.wear, generator) * 2 - 1
        targets, weights = identity_targets(identity)
        return {
            "crops": crops.contiguous(memory_format=torch.channels_last),
            "labels": cache.label[rows],
            "targets": targets,
            "weights": weights,
        }

    def _crops(self, pictures: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
        """Crops by points that are a little wrong, in each point and as a whole."""
        b, jitter = len(pictures), self.settings.jitter
        scale = self.size / 112
        own = jitter * scale * torch.randn(b, 5, 2, generator=generator)
        shared = 1.5 * jitter * scale * torch.randn(b, 1, 2, generator=generator)
        size = 1 + uniform((b, 1, 1), -0.05, 0.05, generator)
        targets = ARCFACE_POINTS * scale
        centre = targets.mean(0)
        return warp(pictures, similarities(points, (targets - centre) * size + centre + own + shared), self.size)

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        settings = self.settings
        done = min(1.0, step / max(1, settings.steps))
        embeddings = self.net(batch["crops"]).float()
        recognition, right = self.margin(embeddings, batch["labels"], settings.margin * min(1.0, 2 * done))
        error = (self.reading(embeddings).float() - batch["targets"]).square() * batch["weights"]
        regression = error.sum() / batch["weights"].sum()
        weight = settings.regression * (1 - 0.7 * done)
        return {
            "loss": recognition + weight * regression,
            "recognition": recognition,
            "regression": regression,
            "right": right,
        }

    def figures(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        return verification(embeddings_of(self.net, self.held_out, self.size), self.held_out.label)


def identity_targets(identity: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised parameters and their weights, both (B, len(IDENTITY)): a mole that is not there has no place."""
    middle = torch.tensor([0.0 if p.spread == "normal" else (p.low + p.high) / 2 for p in IDENTITY])
    spread = torch.tensor([1.0 if p.spread == "normal" else (p.high - p.low) / 12**0.5 for p in IDENTITY])
    weights = torch.ones_like(identity)
    unseen = identity[:, _MOLE] <= _VISIBLE
    weights[unseen, _MOLE_X] = 0.0
    weights[unseen, _MOLE_Y] = 0.0
    return (identity - middle) / spread, weights


@torch.no_grad()
def embeddings_of(net: nn.Module, cache: Cache, size: int = 112, batch: int = 128) -> Tensor:
    """Raw embeddings (N, D) of all pictures, aligned by their true points."""
    device = next(net.parameters()).device
    parts = []
    for rows in torch.arange(len(cache)).split(batch):
        crops = aligned_crops(cache.rgb(rows), cache.field("landmarks5", rows).float(), size)
        parts.append(net((crops * 2 - 1).to(device)).float().cpu())
    return torch.cat(parts)


def verification(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """How well (N, D) embeddings tell whether two of N pictures show one person: every pair is a trial.

    ``tar_1e2`` and ``tar_1e3`` are the fractions of same pairs above the cosine that 1 in 100 and 1 in 1000 pairs of
    different people reach; those cosines are ``threshold_…``.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    first, second = torch.triu_indices(len(unit), len(unit), 1)
    cosines = (unit @ unit.T)[first, second]
    same = labels[first] == labels[second]
    own, other = cosines[same], cosines[~same].sort()[0]
    below = torch.searchsorted(other, own).double()
    figures: dict[str, Any] = {"auc": (below.mean() / len(other)).item()}
    for name, rate in (("1e2", 1e-2), ("1e3", 1e-3)):
        threshold = other[min(len(other) - 1, int(len(other) * (1 - rate)))]
        figures[f"tar_{name}"] = (own > threshold).float().mean().item()
        figures[f"threshold_{name}"] = threshold.item()
    figures |= {"same_cosine": own.mean().item(), "other_cosine": other.mean().item()}
    figures["other_cosine_spread"] = other.std().item()
    return {name: round(value, 4) for name, value in figures.items()}
