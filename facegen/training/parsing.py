"""The training of face parsing: which pixel is skin, hair, glasses …, from the world's exact answer.

The world draws nothing in front of a face; hands and things are laid over some pictures, as a class of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.face.networks import ParsingNet
from facegen.face.warp import warp
from facegen.training.augment import USUAL, Wear, uniform, wear
from facegen.training.cache import Cache, shuffled
from facegen.training.loop import Objective
from facegen.training.muon import muon_groups
from facegen.world.front import cover

_OUTER = ("down1.0.0", "out", "near", "mend.1")  # what Muon leaves to AdamW
_SAMPLED = 0.25  # pixels right of and below a pixel's middle: where the world looks up its class
_SIDE = 128
# Parts whose surface is changed in training, and how much of it at most.
_SURFACES = (
    (("background",), 1.0),
    (("cloth", "hat"), 1.0),
    (("hair",), 0.6),
    (("skin", "nose", "neck", "beard", "l_ear", "r_ear"), 0.25),
)
# A rectangle over a face is something in front of it: `cover` draws such things and says so.
_WEAR = replace(USUAL, erase=0.0)


@dataclass(frozen=True)
class ParsingSettings:
    batch: int = 16
    wear: Wear = _WEAR
    zoom: tuple[float, float] = (0.75, 1.3)
    straight: float = 0.5  # share of pictures that are not turned, so that their classes are exact
    covered: float = 0.35  # share of pictures with something in front
    retextured: float = 0.5  # share of pictures whose parts get other surfaces
    dice: float = 1.0  # weight of the loss in which small classes count as much as large ones
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

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Muon moves the kernels between the first layer and the last."""
        return muon_groups(self.module, _OUTER)

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = shuffled(len(self.cache), self.settings.batch, step, self.settings.seed)
        pictures, classes = self.cache.rgb(rows), self.cache.field("parsing", rows)
        matrices, mirrored = self._moves(len(rows), pictures.shape[-1], generator)
        pictures = warp(pictures, matrices, _SIDE, padding="border")
        # One-hot classes would be twenty planes to warp: nearest neighbours of the index keep classes whole.
        classes = _nearest(classes, matrices, _SIDE)
        classes = torch.where(mirrored[:, None, None], self.swap[classes], classes)
        pictures = self._retextured(pictures, classes, generator)
        pictures, classes = cover(pictures, classes, generator, chance=self.settings.covered)
        pictures = wear(pictures, self.settings.wear, generator) * 2 - 1
        return {"pictures": pictures.contiguous(memory_format=torch.channels_last), "classes": classes}

    def _moves(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """How each picture of so many pixels is turned, scaled, shifted and mirrored, (B, 2, 3); which are mirrored."""
        straight = torch.rand(count, generator=generator) < self.settings.straight
        mirrored = (torch.rand(count, generator=generator) < 0.5) & ~straight
        zoom = torch.where(straight, 1.0, uniform((count,), *self.settings.zoom, generator)) * (_SIDE / size)
        turn = torch.where(straight, 0.0, 0.2 * torch.randn(count, generator=generator))
        side = 1 - 2 * mirrored.float()
        linear = torch.stack(
            [torch.stack([turn.cos() * side, -turn.sin()], 1), torch.stack([turn.sin() * side, turn.cos()], 1)], 1
        ) * zoom.view(count, 1, 1)
        shift = 0.05 * _SIDE * torch.randn(count, 2, generator=generator) * ~straight[:, None]
        shift = (_SIDE - 1) / 2 - linear.sum(2) * (size - 1) / 2 + shift
        return torch.cat([linear, shift[:, :, None]], 2), mirrored

    def _retextured(self, pictures: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures (B, 3, S, S) whose background, clothes, hair and skin have got something of another surface.

        Photos show more than the world draws. Without this, whatever is unlike a drawing is taken for a thing in front.
        """
        count = len(pictures)
        chosen = torch.rand(count, generator=generator) < self.settings.retextured
        for names, most in _SURFACES:
            inside = torch.isin(classes, torch.tensor([self.names.index(name) for name in names]))
            amount = most * torch.rand(count, generator=generator) * chosen
            amount = (amount * (torch.rand(count, generator=generator) < 0.7)).view(-1, 1, 1, 1)
            mask = F.avg_pool2d(inside[:, None].float(), 3, 1, 1) * amount
            other = pictures[torch.randperm(count, generator=generator)]
            small = int(torch.randint(24, 100, (), generator=generator))
            top, left = torch.randint(_SIDE - small, (2,), generator=generator).tolist()
            rough = float(0.1 * torch.rand((), generator=generator))
            grain = rough * torch.randn(count, 1, _SIDE, _SIDE, generator=generator)
            texture = F.interpolate(
                other[:, :, top : top + small, left : left + small], (_SIDE, _SIDE), mode="bilinear"
            )
            pictures = torch.lerp(pictures, texture + grain, mask)
        return pictures.clamp(0, 1)

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        logs = self.module(batch["pictures"]).float().log_softmax(1)
        classes = batch["classes"]
        true = logs.gather(1, classes[:, None])[:, 0]  # (B, H, W)
        entropy, overlap = -true.mean(), _dice(logs.exp(), true.exp(), classes)
        loss = entropy + self.settings.dice * overlap
        return {"loss": loss, "entropy": entropy.detach(), "dice": overlap.detach()}

    def figures(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        covered = parsing_figures(self.module, self.held_out, self.names, covered=True)
        shown = ("mean_f1", "mean_iou", "pixel_accuracy", "f1_front")
        plain = parsing_figures(self.module, self.held_out, self.names)
        return plain | {f"covered_{name}": covered[name] for name in shown}


def _dice(chances: Tensor, true: Tensor, classes: Tensor) -> Tensor:
    """1 - the mean soft F1 over the classes that a batch shows (Milletari et al. 2016).

    chances (B, C, H, W); those of the true classes (B, H, W); the true classes (B, H, W) int64.
    """
    count = chances.shape[1]
    both = chances.new_zeros(count).index_add(0, classes.flatten(), true.flatten())
    there = torch.bincount(classes.flatten(), minlength=count)
    scores = (2 * both + 1) / (chances.sum((0, 2, 3)) + there + 1)
    return 1 - scores[there > 0].mean()


def _nearest(classes: Tensor, matrices: Tensor, size: int) -> Tensor:
    """(B, H, W) uint8 warped without mixing, (B, size, size) int64; the nearest border pixel outside.

    A class stands for a place beside its pixel's middle, before and after: else mirroring would move it to the other
    side of the pixel, and a lip of three pixels by a sixth of its height.
    """
    linear, shift = matrices[:, :, :2], matrices[:, :, 2]
    places = torch.cat([linear, (shift + _SAMPLED * (linear.sum(2) - 1))[:, :, None]], 2)
    moved = warp(classes[:, None].float(), places, size, padding="border", mode="nearest")
    return moved[:, 0].round().long()


@torch.no_grad()
def parsing_figures(
    net: ParsingNet, cache: Cache, names: tuple[str, ...], batch: int = 64, *, covered: bool = False
) -> dict[str, float]:
    """Intersection over union and F1 of each class over all pictures of the cache, and their means over classes there.

    With ``covered`` something stands in front of every face, the same at each call.
    """
    both, found, true = (torch.zeros(len(names)) for _ in range(3))
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(0)
    for rows in torch.arange(len(cache)).split(batch):
        pictures, truth = cache.rgb(rows), cache.field("parsing", rows).long()
        if covered:
            pictures, truth = cover(pictures, truth, generator)
        seen = net((pictures * 2 - 1).to(device)).argmax(1).cpu()
        both += torch.bincount(truth[seen == truth], minlength=len(names))
        found += torch.bincount(seen.flatten(), minlength=len(names))
        true += torch.bincount(truth.flatten(), minlength=len(names))
    there = true > 0
    ious, scores = both / (found + true - both).clamp(min=1), 2 * both / (found + true).clamp(min=1)
    kinds = there.nonzero()[:, 0].tolist()
    figures = {f"iou_{names[i]}": float(ious[i]) for i in kinds} | {f"f1_{names[i]}": float(scores[i]) for i in kinds}
    figures |= {"mean_iou": float(ious[there].mean()), "mean_f1": float(scores[there].mean())}
    figures["pixel_accuracy"] = float(both.sum() / true.sum())
    return {name: round(value, 4) for name, value in figures.items()}
