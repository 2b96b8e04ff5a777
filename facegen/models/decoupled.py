"""Person and prompt kept apart: where the face is the person's adapters act, elsewhere the prompt has its say alone.

After DP-Adapter (arXiv 2502.13999), whose two branches a mask of the visually sensitive region blends. Here the mask
blends two predictions of each step, so that any adapter takes part, also one that writes the prompt or wears a LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from facegen.conditions import Condition
from facegen.errors import WrongMask
from facegen.models.windows import OWN, NowWindows, PreparedWindows, StandIn

if TYPE_CHECKING:
    from facegen.models.base import Model


class Decoupled(StandIn):
    """Stands for the model in `denoise`: the same calls, with a UNet call for each branch that the mask lets act.

    mask: (1 or B, 1, H, W) in [0, 1], at any size; 1 where what the person brings (`person`) acts, 0 where instead of
    it `plain` does.
    """

    def __init__(
        self, model: Model, mask: Tensor, person: Sequence[Condition], plain: Sequence[Condition] = ()
    ) -> None:
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise WrongMask(f"The mask must be (batch, 1, height, width), not {tuple(mask.shape)}.")
        super().__init__(model)
        self.mask = mask
        self.branches = (tuple(person), tuple(plain))

    def prepare(self, conditions: Sequence[Condition], batch: int, guidance: bool) -> PreparedWindows:
        """See Model.prepare; `conditions` act in both branches."""
        shared = [one for one in conditions if not isinstance(one, OWN)]
        parts = [self.model.prepare([*shared, *branch], batch, guidance) for branch in self.branches]
        return PreparedWindows(self.model.prepare(conditions, batch, guidance), parts)

    def predict(self, sample: Tensor, timestep: Tensor | int, now: NowWindows) -> Tensor:
        """See Model.predict: to the bit that of one branch where the mask is all ones or all zeros."""
        mask = F.adaptive_avg_pool2d(self.mask.to(sample), (sample.shape[-2], sample.shape[-1]))
        if len(mask) > 1:
            mask = mask.repeat(len(sample) // len(mask), 1, 1, 1)  # the halves of guidance lie one behind the other
        person, plain = now.parts
        if bool((mask == 1).all()):
            return self.model.predict(sample, timestep, person)
        if not bool(mask.any()):
            return self.model.predict(sample, timestep, plain)
        found, other = (self.model.predict(sample, timestep, one) for one in (person, plain))
        return other.lerp(found, mask)
