"""A canvas larger than what a model was trained at: painted through windows of its own size that overlap.

Each window has conditions of its own (one person each), and what they say of a shared pixel is averaged in every step
(MultiDiffusion, arXiv 2302.08113), so the windows grow together into one picture. Whole pictures, not columns of
attention, are kept apart: a model that has only ever seen one person paints several.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from facegen.conditions import Condition, GuidanceCondition, KeepCondition, LoraCondition
from facegen.economy import Economy
from facegen.models.prepared import Now, Prepared

if TYPE_CHECKING:
    from facegen.models.base import Model

OWN = (KeepCondition, GuidanceCondition, LoraCondition)  # these are of the whole canvas, whatever the window


@dataclass(frozen=True, eq=False)
class Window:
    """box: x0, y0, x1, y1 in latents; conditions: what acts in it, beside what acts everywhere."""

    box: tuple[int, int, int, int]
    conditions: tuple[Condition, ...] = ()

    def part(self, latents: Tensor) -> Tensor:
        """(…, h, w) → its part."""
        x0, y0, x1, y1 = self.box
        return latents[..., y0:y1, x0:x1]

    def weight(self) -> Tensor:
        """(h, w): most in the middle, a little at the rim, so that windows fade into one another."""
        x0, y0, x1, y1 = self.box
        across, down = (_tent(end - begin) for begin, end in ((x0, x1), (y0, y1)))
        return down[:, None] * across


def _tent(length: int) -> Tensor:
    places = torch.arange(length) + 0.5
    return torch.minimum(places, length - places) / (length / 2)


class StandIn:
    """What stands for a model in `denoise`: the model itself, but for the calls that its heirs make otherwise."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def economy(self) -> Economy:
        """The model's, but every step is whole: several answers make one, and they must be of one kind."""
        return replace(self.model.economy, reuse=1)


class Windows(StandIn):
    """Stands for the model in `denoise`: the same calls, with one UNet call per window."""

    def __init__(self, model: Model, windows: Sequence[Window]) -> None:
        super().__init__(model)
        self.windows = tuple(windows)

    def prepare(self, conditions: Sequence[Condition], batch: int, guidance: bool) -> PreparedWindows:
        """See Model.prepare; `conditions` act in every window."""
        shared = [one for one in conditions if not isinstance(one, OWN)]
        parts = [self.model.prepare([*shared, *window.conditions], batch, guidance) for window in self.windows]
        return PreparedWindows(self.model.prepare(conditions, batch, guidance), parts)

    def predict(self, sample: Tensor, timestep: Tensor | int, now: NowWindows) -> Tensor:
        """See Model.predict; pixels that no window shows are predicted to be 0."""
        total, weights = torch.zeros_like(sample), torch.zeros(sample.shape[-2:], device=sample.device)
        for window, part in zip(self.windows, now.parts, strict=True):
            weight = window.weight().to(sample.device)
            found = self.model.predict(window.part(sample).contiguous(), timestep, part)
            window.part(total).add_(found * weight)
            window.part(weights).add_(weight)
        return total / weights.clamp(min=1e-6)


class PreparedWindows:
    """The conditions of each window, made ready, and those of the whole canvas."""

    def __init__(self, whole: Prepared, parts: Sequence[Prepared]) -> None:
        self.whole, self.parts = whole, tuple(parts)
        self._stack = ExitStack()

    def __enter__(self) -> PreparedWindows:
        self._stack.enter_context(self.whole)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def active(self, index: int, total: int) -> NowWindows:
        """See Prepared.active."""
        whole = self.whole.active(index, total)
        return NowWindows(whole, tuple(part.active(index, total) for part in self.parts))


@dataclass(frozen=True, eq=False)
class NowWindows:
    """What acts in one step: over the whole canvas, and in each window."""

    whole: Now
    parts: tuple[Now, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def spread(
    height: int, width: int, side: tuple[int, int], around: Sequence[tuple[float, float]]
) -> list[tuple[int, int, int, int]]:
    """Windows of `side` (h, w) latents on a canvas: one around each point (x, y), then as many as cover the rest."""
    tall, wide = min(side[0], height), min(side[1], width)
    boxes = []
    for x, y in around:
        left = min(max(round(x - wide / 2), 0), width - wide)
        top = min(max(round(y - tall / 2), 0), height - tall)
        boxes.append((left, top, left + wide, top + tall))
    seen = torch.zeros(height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        seen[y0:y1, x0:x1] = True
    while not bool(seen.all()):
        y, x = (int(value) for value in (~seen).nonzero()[0])
        left, top = min(x, width - wide), min(y, height - tall)
        boxes.append((left, top, left + wide, top + tall))
        seen[top : top + tall, left : left + wide] = True
    return boxes
