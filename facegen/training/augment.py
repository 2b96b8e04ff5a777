"""What happens to pictures between the world and a net: light, colour, blur, noise, compression, things in the way.

Every function takes pictures (B, C, H, W) in [0, 1] and an explicit generator, and returns the same shape and range.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Wear:
    """How hard pictures are treated: ranges of the changes, and chances of each kind per picture."""

    light: float = 0.25  # brightness and contrast
    color: float = 0.12  # gains of the channels
    gamma: float = 0.25
    gray: float = 0.05
    invert: float = 0.0  # chance that the colours are mixed up, shapes staying
    blur: float = 0.3
    smallest: float = 0.3  # of the side, when blurred by a smaller size
    noise: float = 0.3
    noise_level: float = 0.06
    jpeg: float = 0.2
    erase: float = 0.2


USUAL = Wear()
GENTLE = Wear(
    light=0.12, color=0.06, gamma=0.1, gray=0.0, blur=0.2, smallest=0.5, noise=0.2, noise_level=0.03, jpeg=0.1,
    erase=0.05,
)  # fmt: skip
ROUGH = Wear(
    light=0.5, color=0.3, gamma=0.6, gray=0.25, invert=0.1, blur=0.4, smallest=0.2, noise=0.4, noise_level=0.12,
    jpeg=0.3, erase=0.3,
)  # fmt: skip


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def wear(pictures: Tensor, settings: Wear, generator: torch.Generator) -> Tensor:
    """All kinds of wear one after the other."""
    x = recolour(pictures, settings, generator)
    x = blur(x, settings.blur, settings.smallest, generator)
    x = add_noise(x, settings.noise, settings.noise_level, generator)
    x = erase(x, settings.erase, generator)
    return jpeg(x.clamp(0, 1), settings.jpeg, generator)


def recolour(pictures: Tensor, settings: Wear, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, gamma, channel gains, now and then gray or with mixed-up colours."""
    b, c = pictures.shape[:2]
    contrast = 1 + uniform((b, 1, 1, 1), -settings.light, settings.light, generator)
    brightness = uniform((b, 1, 1, 1), -settings.light, settings.light, generator) * 0.5
    gains = 1 + uniform((b, c, 1, 1), -settings.color, settings.color, generator)
    gamma = torch.exp(uniform((b, 1, 1, 1), -settings.gamma, settings.gamma, generator))
    x = ((pictures - 0.5) * contrast + 0.5 + brightness) * gains
    x = x.clamp(0, 1).pow(gamma)
    if c == 3:
        gray = torch.rand((b, 1, 1, 1), generator=generator) < settings.gray
        if gray.any():
            x = torch.where(gray, (x * x.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True), x)
        mixed = (torch.rand(b, generator=generator) < settings.invert).nonzero()[:, 0].tolist()
        for i in mixed:
            x[i] = x[i][torch.randperm(3, generator=generator)]
    return x


def blur(pictures: Tensor, chance: float, smallest: float, generator: torch.Generator) -> Tensor:
    """Some pictures made smaller and large again: by one ratio per call, so that a batch stays a batch."""
    chosen = (torch.rand(len(pictures), generator=generator) < chance).nonzero()[:, 0]
    if len(chosen) == 0:
        return pictures
    height, width = pictures.shape[-2:]
    ratio = float(uniform((1,), smallest, 0.9, generator))
    small = F.interpolate(
        pictures[chosen], (max(4, int(height * ratio)), max(4, int(width * ratio))), mode="bilinear", antialias=True
    )
    return pictures.index_copy(0, chosen, F.interpolate(small, (height, width), mode="bilinear"))


def add_noise(pictures: Tensor, chance: float, level: float, generator: torch.Generator) -> Tensor:
    b = len(pictures)
    amount = uniform((b, 1, 1, 1), 0, level, generator) * (torch.rand((b, 1, 1, 1), generator=generator) < chance)
    chosen = (amount.flatten() > 0).nonzero()[:, 0]
    if len(chosen) == 0:
        return pictures
    noise = torch.randn(pictures[chosen].shape, generator=generator) * amount[chosen]
    return pictures.index_copy(0, chosen, pictures[chosen] + noise)


def erase(pictures: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """A rectangle of one colour, up to a third of each side, in some pictures."""
    b, c, height, width = pictures.shape
    x = pictures.clone()
    for i in (torch.rand(b, generator=generator) < chance).nonzero()[:, 0].tolist():
        fraction = uniform((4,), 0.05, 1.0, generator)
        h, w = int(height * fraction[0] * 0.33) + 1, int(width * fraction[1] * 0.33) + 1
        top, left = int((height - h) * fraction[2]), int((width - w) * fraction[3])
        x[i, :, top : top + h, left : left + w] = torch.rand(c, 1, 1, generator=generator)
    return x


def jpeg(pictures: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """Some pictures through a JPEG of quality 25 to 90."""
    x = pictures.clone()
    channels = pictures.shape[1]
    for i in (torch.rand(len(x), generator=generator) < chance).nonzero()[:, 0].tolist():
        quality = int(torch.randint(25, 90, (1,), generator=generator))
        array = (x[i] * 255).round().byte().permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(array if channels == 3 else array[..., 0]).save(buffer, "JPEG", quality=quality)
        read = np.asarray(Image.open(buffer), np.float32)
        x[i] = torch.from_numpy(read.reshape(*array.shape[:2], channels)).permute(2, 0, 1) / 255
    return x
