"""What everything that learns to denoise faces shares: which noise, which places weigh, and the model's answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from facegen.attention.backends import for_training
from facegen.conditions import Condition
from facegen.training.loop import Objective
from facegen.training.objectives.velocity import VelocityObjective
from facegen.world.render import PARSING

if TYPE_CHECKING:
    from facegen.models.base import Model
    from facegen.training.diffusion import Lessons

_ALL_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
_FACE = torch.tensor([
    PARSING.index(name)
    for name in ("skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "nose", "mouth", "u_lip", "l_lip", "beard")
])  # fmt: skip
_SMALL = torch.tensor([PARSING.index(name) for name in ("l_eye", "r_eye", "ear_r")])
# Blocks of a UNet or of its copy: neither what leads in and out nor embeddings.
_INSIDE = re.compile(r"(^unet|controlnet)\.(down_blocks|mid_block|up_blocks)\.")


class DenoisingObjective(Objective):
    """Predict the velocity of noisy latents; what conditions the model is up to whoever inherits."""

    model: Model
    steering: float = 2.0  # factor on the learning rate of what listens to prompts and faces

    def __init__(self, model: Model, lessons: Lessons, held_out: Lessons | None, scheduler: Mapping[str, Any]) -> None:
        self.model, self.lessons, self.held_out = model, lessons, held_out
        self.velocity = VelocityObjective(scheduler)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Everything decays alike; what listens to prompts and faces learns faster, for it hears of them late.

        Muon moves the matrices inside the UNet, and in those of a ControlNet that began as its copy.
        """
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, weight in self.module.named_parameters():
            if weight.requires_grad:
                steering = not name.startswith("unet.") or ".attn2." in name
                inside = _INSIDE.search(name) is not None and weight.ndim > 1
                groups.setdefault((steering, inside), []).append(weight)
        return [
            {"params": weights, "scale": self.steering if steering else 1.0, "muon": inside}
            for (steering, inside), weights in groups.items()
        ]

    def predicted(
        self, conditions: Callable[[], Sequence[Condition]], latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The model's velocity of the latents (B, C, h, w) at timesteps (B,), and the noisy latents."""
        noisy = self.velocity.noisy(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        return self.answered(conditions, noisy, timesteps), noisy

    def answered(self, conditions: Callable[[], Sequence[Condition]], noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The model's velocity of noisy latents (B, C, h, w) at timesteps (B,)."""
        # The text encoder's attention is PyTorch's: on a CPU, its plain form.
        with sdpa_kernel([SDPBackend.MATH] if noisy.device.type == "cpu" else _ALL_KERNELS):
            backend = for_training(noisy.device)
            prepared = self.model.prepare(conditions(), len(noisy), guidance=False, backend=backend)
            return self.model.predict(noisy, timesteps, prepared.throughout())


def noise_levels(count: int, generator: torch.Generator, even: float = 0.25) -> Tensor:
    """Timesteps (count,) int64, mostly of the middle, where faces take shape (Esser et al. 2024, logit-normal).

    Near the ends the error is large and can hardly become smaller: it would drown the rest. even: share drawn evenly.
    """
    shape = torch.randn(count, generator=generator, device=generator.device).sigmoid()
    level = torch.rand(2, count, generator=generator, device=generator.device)
    return (torch.where(level[0] < even, level[1], shape) * 1000).long().clamp(max=999)


def face_weights(lessons: Lessons, rows: Tensor, face: float = 4.0, small: float = 0.0) -> Tensor:
    """(B, h, w), 1 on average: a face is a small part of a picture, and the part that matters.

    face: how much more an error inside the face weighs than one beside it; small: how much more still where there are
    eyes or earrings, which lie in one or two places of the latents each.
    """
    parsing = lessons.pictures.field("parsing", rows)
    height, width = lessons.latents.shape[-2:]
    weights = 1 + face * F.adaptive_avg_pool2d(torch.isin(parsing, _FACE).float(), (height, width))
    weights = weights + small * F.adaptive_max_pool2d(torch.isin(parsing, _SMALL).float(), (height, width))
    return weights / weights.mean((1, 2), keepdim=True)


def another(lessons: Lessons, rows: Tensor, roll: Tensor) -> Tensor:
    """For each row another picture of the same person, chosen by roll (B,) in [0, 1); itself if it is the only one."""
    label = lessons.pictures.label
    order = torch.argsort(label, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    sizes = torch.bincount(label)
    starts = torch.cumsum(sizes, 0) - sizes
    own = label[rows]
    step = 1 + (roll * (sizes[own] - 1)).long().clamp(max=sizes[own] - 2)
    return order[starts[own] + (place[rows] - starts[own] + step) % sizes[own]]
