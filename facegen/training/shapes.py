"""What controls ask for, read off latents: the expression's coefficients and where the face is.

A velocity error hardly notices a raised brow. So whoever learns a control is also told, by a small net that learnt to
read clean latents, what its clean estimate shows; the net is a teacher and does not ship.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.training.cache import shuffled
from facegen.training.loop import STATE, Objective, wear_average
from facegen.training.reader import LatentNet, ReaderSettings, worn
from facegen.world.parameters import EXPRESSION

if TYPE_CHECKING:
    from facegen.training.cache import Cache
    from facegen.training.diffusion import Lessons

POINTS = 68
_SHARP = 0.05  # half sides of a picture: an error of a point that weighs as much as a unit's usual deviation


class ShapeReader(LatentNet):
    """Latents (B, C, 16, 16) to coefficients (B, units) and points (B, 68, 2), -1 to 1 across the picture."""

    def __init__(self, channels: int, spread: Tensor | None = None) -> None:
        super().__init__(channels, len(EXPRESSION) + 2 * POINTS)
        self.register_buffer("spread", torch.ones(len(EXPRESSION)) if spread is None else spread)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        answers = self.answers(latents)
        units = answers[:, : len(EXPRESSION)] * self.get_buffer("spread")
        return units, answers[:, len(EXPRESSION) :].unflatten(1, (POINTS, 2))

    def unlike(self, found: Tensor, wanted: Tensor) -> Tensor:
        """How far coefficients are off, each in its own usual deviations: (B,)."""
        return F.smooth_l1_loss(
            found / self.get_buffer("spread"), wanted / self.get_buffer("spread"), reduction="none"
        ).mean(1)


def apart(found: Tensor, wanted: Tensor) -> Tensor:
    """How far points (B, 68, 2) are off, in units of a twentieth of half a picture: (B,)."""
    return F.smooth_l1_loss(found / _SHARP, wanted / _SHARP, reduction="none").mean((1, 2))


def points_of(pictures: Cache, rows: Tensor) -> Tensor:
    """Where the 68 points of these pictures are, (B, 68, 2), -1 to 1 across the picture."""
    size = pictures.field("rgb", rows[:1]).shape[1]
    return (pictures.field("landmarks68", rows).float() + 0.5) * (2 / size) - 1


def new_reader(lessons: Lessons, start: Path | None = None) -> ShapeReader:
    """For these latents; it knows how much each coefficient varies.

    start: the run of the reader of people and facts, if there is one: what that sees is a good beginning.
    """
    spread = lessons.pictures.whole("expression").float().std(0).clamp(min=1e-3)
    reader = ShapeReader(lessons.latents.shape[1], spread)
    if start is not None and (start / STATE).exists():
        for part in ("body", "mix"):
            wear_average(nn.ModuleDict({"reader": reader}), start, only=f"reader.{part}.")
    return reader


def finished_reader(lessons: Lessons, run: Path) -> ShapeReader | None:
    """With the averaged weights of a run; None where there was none."""
    if not (run / STATE).exists():
        return None
    reader = new_reader(lessons)
    wear_average(nn.ModuleDict({"reader": reader}), run)
    return reader.eval().requires_grad_(False)


class ShapeReaderObjective(Objective):
    """Learn to read expressions and points from latents, also noisy and blurred ones."""

    name = "shapes"

    def __init__(
        self,
        reader: ShapeReader,
        lessons: Lessons,
        held_out: Lessons | None,
        settings: ReaderSettings,
    ) -> None:
        self.reader, self.lessons, self.held_out, self.settings = reader, lessons, held_out, settings
        self.module = nn.ModuleDict({"reader": reader})
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = shuffled(len(self.lessons.pictures), self.settings.batch, step, self.settings.seed)
        return {
            "latents": self.lessons.latents[rows].float(),
            "units": self.lessons.pictures.field("expression", rows).float(),
            "points": points_of(self.lessons.pictures, rows),
        }

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        units, points = self.reader(worn(batch["latents"], self.settings, generator))
        unlike, off = self.reader.unlike(units, batch["units"]).mean(), apart(points, batch["points"]).mean()
        return {"loss": 4 * unlike + off / 4, "unlike": unlike, "apart": off}  # about alike in size, once learnt

    def figures(self) -> dict[str, float]:
        """On clean held-out latents: correlation (mean over the units) and mean distance of the points in sides."""
        if self.held_out is None:
            return {}
        rows = torch.arange(len(self.held_out.pictures))
        pairs = [self.reader(part.float()) for part in self.held_out.latents.split(64)]
        units, points = (torch.cat(part) for part in zip(*pairs, strict=True))
        true = self.held_out.pictures.field("expression", rows).float()
        together = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(units.T, true.T, strict=True)])
        distance = (points - points_of(self.held_out.pictures, rows)).norm(dim=2).mean() / 2
        return {"correlation": round(float(together.nanmean()), 4), "distance": round(float(distance), 4)}
