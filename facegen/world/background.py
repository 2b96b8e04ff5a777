"""What is behind a person: a plain wall, a gradient, blurred lights or stripes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from facegen.world.fields import Knobs, smoothstep
from facegen.world.parameters import BACKGROUNDS
from facegen.world.shading import palette

LIGHTS = 12


def backdrop(k: Knobs, size: int) -> Tensor:
    """Linear colours (B, size, size, 3)."""
    line = (torch.arange(size, device=k.device) + 0.5) / size * 2 - 1
    x, y = line.view(1, 1, size), -line.view(1, size, 1)
    base = palette(k.device)[k.scenes.column("background_color").long()] * 0.80 + 0.05
    kind = k.scenes.column("background")
    seed = k["background_seed"]
    shade = 1.05 - 0.30 * (0.5 * x * x + 0.5 * (y - 0.1) ** 2)
    field = shade.expand(k.count, size, size)
    if bool((kind == BACKGROUNDS.index("gradient")).any()):
        angle = seed * (2 * math.pi)
        slope = 0.75 + 0.65 * (x * torch.sin(angle) + y * torch.cos(angle))
        field = torch.where(k.is_any("background", BACKGROUNDS.index("gradient")) > 0, slope.clamp(min=0.12), field)
    if bool((kind == BACKGROUNDS.index("stripes")).any()):
        angle = seed * math.pi
        wave = torch.sin((x * torch.cos(angle) + y * torch.sin(angle)) * (7 + 9 * ((seed * 7.3) % 1)))
        striped = shade * (0.72 + 0.50 * smoothstep(-0.35, 0.35, wave))
        field = torch.where(k.is_any("background", BACKGROUNDS.index("stripes")) > 0, striped, field)
    if bool((kind == BACKGROUNDS.index("bokeh")).any()):
        spots = _bokeh(x, y, seed)
        field = torch.where(k.is_any("background", BACKGROUNDS.index("bokeh")) > 0, 0.42 * shade + spots, field)
    return base.view(-1, 1, 1, 3) * field[..., None]


def _bokeh(x: Tensor, y: Tensor, seed: Tensor) -> Tensor:
    total = torch.zeros_like(x + y + seed)
    for i in range(LIGHTS):
        cx = ((seed * 13.7 + i * 0.618) % 1) * 2.2 - 1.1
        cy = ((seed * 29.3 + i * 0.755 + 0.31 * ((seed * 91.7 + i * 0.37) % 1)) % 1) * 2.2 - 1.1
        radius = 0.10 + 0.20 * ((seed * 57.1 + i * 0.43) % 1)
        away = torch.sqrt((x - cx) ** 2 + (y - cy) ** 2)
        total = total + (0.25 + 0.25 * ((i * 0.29) % 1)) * smoothstep(radius + 0.06, radius - 0.04, away)
    return total
