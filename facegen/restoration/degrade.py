"""How photos get damaged: blur, fewer pixels, noise, JPEG, lost colours; drawn by lot, the same for the same seed.

The order and the kinds are those that blind restoration is trained and measured with (GFPGAN, arXiv 2101.04061).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image

from facegen.images import to_pil, to_tensor

Range = tuple[float, float]
_FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_REFERENCE = 512  # pixels of the side at which a blur's width is meant


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Probability of each kind in [0, 1], and the range from which its amount is drawn.

    sigma: of the blur along and across, in pixels of a picture of 512; factor: how many times smaller; level: of the
    noise, standard deviation in grey levels; quality: of the JPEG.
    """

    blur: float = 1.0
    shrink: float = 1.0
    noise: float = 1.0
    jpeg: float = 1.0
    gray: float = 0.0
    sigma: Range = (0.2, 10.0)
    factor: Range = (1.0, 8.0)
    level: Range = (0.0, 15.0)
    quality: Range = (60.0, 100.0)

    def __post_init__(self) -> None:
        for kind in ("blur", "shrink", "noise", "jpeg", "gray"):
            if not 0.0 <= getattr(self, kind) <= 1.0:
                raise ValueError(f"The probability of {kind} must lie in [0, 1], not be {getattr(self, kind)}.")
        limits: Mapping[str, Range] = {
            "sigma": (0, 100), "factor": (1, 64), "level": (0, 255), "quality": (1, 100),
        }  # fmt: skip
        for name, (least, most) in limits.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(f"The range of {name} must ascend within {least} to {most}, not be {(low, high)}.")


NONE = Damage(blur=0.0, shrink=0.0, noise=0.0, jpeg=0.0)
LEVELS: Mapping[str, Damage] = {
    "light": Damage(sigma=(1.0, 2.0), factor=(1.5, 2.5), level=(1.0, 4.0), quality=(75.0, 90.0)),
    "medium": Damage(sigma=(2.0, 4.0), factor=(3.0, 5.0), level=(3.0, 8.0), quality=(50.0, 75.0)),
    "heavy": Damage(sigma=(4.0, 8.0), factor=(6.0, 8.0), level=(6.0, 15.0), quality=(25.0, 50.0)),
}


def between(degree: float) -> Damage:
    """The damage of a degree between light (0), medium (0.5) and heavy (1): its ranges lie between theirs."""
    if not 0.0 <= degree <= 1.0:
        raise ValueError(f"A degree of damage must lie in [0, 1], not be {degree}.")
    light, medium, heavy = (LEVELS[name] for name in ("light", "medium", "heavy"))
    one, other, share = (light, medium, 2 * degree) if degree < 0.5 else (medium, heavy, 2 * degree - 1)

    def mixed(name: str) -> Range:
        (low, high), (other_low, other_high) = getattr(one, name), getattr(other, name)
        return low + share * (other_low - low), high + share * (other_high - high)

    return replace(light, sigma=mixed("sigma"), factor=mixed("factor"), level=mixed("level"), quality=mixed("quality"))


def degrade(photo: Image.Image, damage: Damage, generator: torch.Generator) -> Image.Image:
    """A damaged copy of the same size; with all probabilities 0 the photo to the bit.

    Every call draws the same number of times, so that switching one kind off leaves the others as they were.
    """
    drawn = torch.rand(len(fields(Damage)) + 4, generator=generator).tolist()
    grain = torch.randn(photo.height, photo.width, 3, generator=generator).numpy()
    chance = iter(drawn)

    def happens(probability: float) -> bool:
        return next(chance) < probability

    def amount(low: float, high: float) -> float:
        return low + (high - low) * next(chance)

    blurred, along, across, angle = happens(damage.blur), amount(*damage.sigma), amount(*damage.sigma), next(chance)
    shrunk, factor, how = happens(damage.shrink), amount(*damage.factor), int(next(chance) * len(_FILTERS))
    noisy, level = happens(damage.noise), amount(*damage.level)
    pressed, quality = happens(damage.jpeg), round(amount(*damage.quality))
    made = photo
    if blurred:
        scale = max(photo.size) / _REFERENCE
        made = _blurred(made, along * scale, across * scale, math.pi * angle)
    small = (max(1, round(photo.width / factor)), max(1, round(photo.height / factor)))
    if shrunk and small != photo.size:
        made = made.resize(small, _FILTERS[how])
    if noisy:
        pixels = np.asarray(made, np.float32) + level * grain[: made.height, : made.width]
        made = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    if pressed:
        file = io.BytesIO()
        made.save(file, "JPEG", quality=quality)
        made = Image.open(file).convert("RGB")
    if made.size != photo.size:
        made = made.resize(photo.size, Image.Resampling.BICUBIC)
    return made.convert("L").convert("RGB") if happens(damage.gray) else made


def _blurred(photo: Image.Image, along: float, across: float, angle: float) -> Image.Image:
    """A Gaussian of two widths (pixels), turned by an angle; the borders are mirrored."""
    import cv2  # type: ignore[import-not-found, unused-ignore]

    reach = max(1, math.ceil(3 * max(along, across)))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = np.exp(-0.5 * ((u / max(along, 1e-3)) ** 2 + (v / max(across, 1e-3)) ** 2))
    array = to_tensor(photo).permute(1, 2, 0).numpy()
    filtered = cv2.filter2D(array, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)
    return to_pil(torch.from_numpy(filtered).permute(2, 0, 1))
