"""One thing moved and the rest kept: what a slider's words change in a prediction, only where they change it most.

Each step asks the UNet once more, under the words (or the learnt weights) of each slider, and goes towards that answer
by the slider's strength where the two answers differ most; everywhere else the latents are those of the plain run, so
that hair, clothes and background are not painted anew for a smile. The difference of answers is SEGA's (arXiv
2301.12247) and Concept Sliders' (arXiv 2311.12092); keeping the plain run's latents outside is done here so that later
steps cannot drift.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.conditions import Condition, LoraCondition, TextCondition, in_span
from facegen.models.lora import Worn, wearing
from facegen.models.windows import OWN, StandIn

if TYPE_CHECKING:
    from facegen.models.base import Model

DELAY = 0.2  # of the run, in which composition and pose are settled, stays plain
# Of the largest difference: below the first nothing moves, above the second all of it. Words spill over the picture,
# and so do weights that were taught by words; pairs of pictures teach what stays, and nothing of it may be left out.
WORDS, PAIRS = (0.5, 0.8), (0.1, 0.3)


@dataclass(frozen=True, eq=False)
class Slide:
    """One slider of a run: how many times (gain; less than 0: away from it) the way to another answer is gone.

    toward: the prompt of that answer, in the conditional half alone, so that guidance multiplies the way as it does for
    any prompt; or low-rank weights that were taught the whole way, in both halves. limits: see most_changed.
    """

    toward: TextCondition | LoraCondition
    gain: float = 1.0
    limits: tuple[float, float] = WORDS


class Slid(StandIn):
    """Stands for the model in one run of `denoise`: the same calls, with a further UNet call for each slider.

    plain: the latents (B, C, h, w) after each step of the same run without sliders. mask (B, 1, h, w) in [0, 1], after
    the run: where the sliders acted, None where none did yet.
    """

    def __init__(self, model: Model, slides: Sequence[Slide], plain: Sequence[Tensor]) -> None:
        super().__init__(model)
        self.slides, self.plain = tuple(slides), tuple(plain)
        self.mask: Tensor | None = None
        self._where: list[Tensor | None] = [None] * len(self.slides)

    def prepare(self, conditions: Sequence[Condition], batch: int, guidance: bool) -> _Prepared:
        """See Model.prepare; `conditions` act under every slider, too."""
        shared = [one for one in conditions if not isinstance(one, OWN)]
        parts = []
        for slide in self.slides:
            own = [slide.toward] if isinstance(slide.toward, TextCondition) else []
            parts.append(self.model.prepare([*shared, *own], batch, False))
        return _Prepared(self, self.model.prepare(conditions, batch, guidance), parts, batch)

    def predict(self, sample: Tensor, timestep: Tensor | int, now: _Now) -> Tensor:
        """See Model.predict; how the conditional half differs is what counts."""
        output = self.model.predict(sample, timestep, now.whole)
        if not in_span((DELAY, 1.0), now.whole.index, now.whole.total):
            return output
        rows = now.prepared.batch
        ways = torch.zeros_like(output)
        for place, (slide, part) in enumerate(zip(self.slides, now.parts, strict=True)):
            with now.prepared.worn(place):
                way = slide.gain * (self.model.predict(sample[-rows:], timestep, part) - output[-rows:])
            mask = _widened(self._where[place], most_changed(way, slide.limits))
            self._where[place] = mask
            self.mask = _widened(self.mask, mask)
            if isinstance(slide.toward, LoraCondition):
                ways += (mask * way).repeat(len(output) // rows, 1, 1, 1)
            else:
                ways[-rows:] += mask * way
        return output + ways


class _Prepared:
    """The conditions of the plain run and of each slider, made ready."""

    def __init__(self, slid: Slid, whole: Any, parts: Sequence[Any], batch: int) -> None:
        self.slid, self.whole, self.parts, self.batch = slid, whole, tuple(parts), batch
        self._worn: dict[int, Worn] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Prepared:
        for prepared in (self.whole, *self.parts):
            self._stack.enter_context(prepared)
        for place, slide in enumerate(self.slid.slides):
            if isinstance(slide.toward, LoraCondition):
                hooks = wearing(self.slid.model.unet, [slide.toward.layers])
                self._worn[place] = self._stack.enter_context(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextmanager
    def worn(self, place: int) -> Iterator[None]:
        """Inside, the weights of a learnt slider act."""
        worn, toward = self._worn.get(place), self.slid.slides[place].toward
        if worn is not None:
            assert isinstance(toward.scale, (int, float)), "a slider's strength is one number"
            worn.strengths[:] = [float(toward.scale)]
        try:
            yield
        finally:
            if worn is not None:
                worn.strengths[:] = [0.0]

    def active(self, index: int, total: int) -> _Now:
        """See Prepared.active."""
        parts = tuple(part.active(index, total) for part in self.parts)
        return _Now(self, self.whole.active(index, total), parts)


@dataclass(frozen=True, eq=False)
class _Now:
    """What acts in one step: in the plain answer, and in each slider's."""

    prepared: _Prepared
    whole: Any
    parts: tuple[Any, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def blend(self, latents: Tensor, scheduler: Any, timesteps: Tensor) -> Tensor:
        """See Now.blend; where no slider acts the latents are those of the plain run."""
        latents = self.whole.blend(latents, scheduler, timesteps)
        slid = self.prepared.slid
        if slid.mask is None:
            return latents
        return slid.plain[self.whole.index].to(latents).lerp(latents, slid.mask.to(latents))


def most_changed(way: Tensor, limits: tuple[float, float] = WORDS) -> Tensor:
    """Where a difference (B, C, h, w) is large, in each picture against its own largest: (B, 1, h, w) in [0, 1], 0
    below the lower of these shares of it and 1 above the upper.
    """
    height, width = way.shape[-2:]
    reach = min(height, width) // 8
    size = way.abs().mean(1, keepdim=True).float()
    size = F.avg_pool2d(F.pad(size, (reach,) * 4, mode="replicate"), 2 * reach + 1, stride=1)
    size = size / size.amax((2, 3), keepdim=True).clamp(min=1e-12)
    low, high = limits
    return ((size - low) / (high - low)).clamp(0, 1).to(way.dtype)


def _widened(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else torch.maximum(mask, other)
