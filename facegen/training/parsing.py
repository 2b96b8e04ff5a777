"""The training of face parsing: which pixel is skin, hair, glasses …, from the world's exact answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.face.networks import ParsingNet
from facegen.face.warp import warp
from facegen.training.augment import USUAL, Wear, uniform, wear
from facegen.training.cache import Cache, shuffled
from facegen.training.loop import Objective


@dataclass(frozen=True)
class ParsingSettings:
    batch: int = 24
    wear: Wear = USUAL
    zoom: tuple[float, float] = (0.75, 1.3)
    seed: int = 0


def mirrored_classes(names: tuple[str, ...]) -> Tensor:
    """For each class the one it becomes in a mirrored picture, (classes,) int64."""
    swap = list(range(len(names)))
    for i, name in enumerate(names):
        other = f"r_{name[2:]}"
        if name.startswith("l_") and other in names:
            swap[i], swap[names.index(other)] = names.index(other), i
    return torch.tensor(swap)


class ParsingObjective(Objective):
    """Trains a :class:`ParsingNet` on whole pictures, turned, scaled, mirrored and worn."""

    name = "parsing"

    def __init__(self, net: ParsingNet, cache: Cache, held_out: Cache | None, settings: ParsingSettings) -> None:
        from facegen.world.render import PARSING

        self.cache, self.held_out, self.settings = cache, held_out, settings
        self.names: tuple[str, ...] = tuple(PARSING)
        self.swap = mirrored_classes(self.names)
        self.module: ParsingNet = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = shuffled(len(self.cache), self.settings.batch, step, self.settings.seed)
        pictures, classes = self.cache.rgb(rows), self.cache.field("parsing", rows)
        b, size = len(rows), 128
        middle = (pictures.shape[-1] - 1) / 2
        zoom = uniform((b,), *self.settings.zoom, generator) * (size / pictures.shape[-1])
        turn = 0.2 * torch.randn(b, generator=generator)
        linear = torch.stack(
            [torch.stack([turn.cos(), -turn.sin()], 1), torch.stack([turn.sin(), turn.cos()], 1)], 1
        ) * zoom.view(b, 1, 1)
        shift = (size - 1) / 2 - linear.sum(2) * middle + 0.05 * size * torch.randn(b, 2, generator=generator)
        matrices = torch.cat([linear, shift[:, :, None]], 2)
        # One-hot classes would be twenty planes to warp: nearest neighbours of the index keep classes whole.
        moved = _nearest(classes, matrices, size)
        pictures = warp(pictures, matrices, size, padding="border")
        flip = torch.rand(b, generator=generator) < 0.5
        pictures = torch.where(flip[:, None, None, None], pictures.flip(3), pictures)
        moved = torch.where(flip[:, None, None], self.swap[moved.flip(2)], moved)
        pictures = wear(pictures, self.settings.wear, generator) * 2 - 1
        return {"pictures": pictures.contiguous(memory_format=torch.channels_last), "classes": moved}

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        logits = self.module(batch["pictures"]).float()
        loss = F.cross_entropy(logits, batch["classes"])
        right = (logits.argmax(1) == batch["classes"]).float().mean()
        return {"loss": loss, "right": right.detach()}

    def figures(self) -> dict[str, float]:
        return {} if self.held_out is None else parsing_figures(self.module, self.held_out, self.names)


def _nearest(classes: Tensor, matrices: Tensor, size: int) -> Tensor:
    """(B, H, W) uint8 warped without mixing, (B, size, size) int64; the nearest border pixel outside."""
    doubled = warp(classes[:, None].float(), matrices, size, padding="border", mode="nearest")
    return doubled[:, 0].round().long()


@torch.no_grad()
def parsing_figures(net: ParsingNet, cache: Cache, names: tuple[str, ...], batch: int = 64) -> dict[str, float]:
    """Intersection over union of each class over all of the cache's pictures, and their mean over classes there."""
    both = torch.zeros(len(names))
    either = torch.zeros(len(names))
    right = total = 0.0
    device = next(net.parameters()).device
    for rows in torch.arange(len(cache)).split(batch):
        found = net((cache.rgb(rows) * 2 - 1).to(device)).argmax(1).cpu()
        truth = cache.field("parsing", rows).long()
        right += (found == truth).float().sum().item()
        total += truth.numel()
        for i in range(len(names)):
            a, b = found == i, truth == i
            both[i] += (a & b).sum()
            either[i] += (a | b).sum()
    there = either > 0
    ious = both[there] / either[there]
    figures = {f"iou_{names[i]}": float(both[i] / either[i]) for i in there.nonzero()[:, 0].tolist()}
    figures |= {"mean_iou": ious.mean().item(), "pixel_accuracy": right / total}
    return {name: round(value, 4) for name, value in figures.items()}
