"""Small smooth functions from which shapes and textures are composed, and named access to the parameters of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from facegen.world.parameters import Scenes, locate

Number = Tensor | float


def smoothstep(start: Number, end: Number, x: Tensor) -> Tensor:
    """0 at ``start``, 1 at ``end`` (which may be the smaller one), with flat ends."""
    t = ((x - start) / (end - start)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def ridge(x: Tensor, centre: Number, width: Number) -> Tensor:
    """A Gaussian along one axis, 1 at its centre."""
    d = (x - centre) / width
    return torch.exp(-(d * d))


def bump(x: Tensor, y: Tensor, at: tuple[Number, Number], size: tuple[Number, Number]) -> Tensor:
    """A Gaussian hill, 1 at its centre."""
    u, v = (x - at[0]) / size[0], (y - at[1]) / size[1]
    return torch.exp(-(u * u + v * v))


def mix(a: Number, b: Number, t: Tensor) -> Tensor:
    return a + (b - a) * t


def smooth_max(a: Tensor, b: Tensor, softness: float) -> Tensor:
    t = (0.5 + 0.5 * (a - b) / softness).clamp(0, 1)
    return b + (a - b) * t + softness * t * (1 - t)


def power(x: Tensor, exponent: Number) -> Tensor:
    """``x ** exponent`` for x >= 0."""
    return torch.exp(torch.log(x.clamp(min=1e-6)) * exponent)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product over a last axis of 3, summed in a fixed order."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def unit(v: Tensor) -> Tensor:
    """Vectors (..., 3) scaled to length one."""
    return v / torch.sqrt(dot(v, v).clamp(min=1e-18))[..., None]


def cross(a: Tensor, b: Tensor) -> Tensor:
    ax, ay, az = a.unbind(-1)
    bx, by, bz = b.unbind(-1)
    return torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], -1)


class Knobs:
    """The parameters of a batch by name, shaped to broadcast against the batch's grids (B, 1, 1) or its pixels (N,)."""

    def __init__(self, scenes: Scenes, picture: Tensor | None = None) -> None:
        self._scenes = scenes
        self._picture = picture
        self._seen: dict[str, Tensor] = {}

    @property
    def scenes(self) -> Scenes:
        return self._scenes

    @property
    def count(self) -> int:
        return len(self._scenes)

    @property
    def device(self) -> torch.device:
        return self._scenes.identity.device

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._seen:
            group, column = locate(name)
            values: Tensor = getattr(self._scenes, group)[:, column]
            self._seen[name] = values.view(-1, 1, 1) if self._picture is None else self._spread(values)
        return self._seen[name]

    def _spread(self, values: Tensor) -> Tensor:
        return values if len(values) == 1 else values[self._picture]

    def at(self, picture: Tensor) -> Knobs:
        """The same parameters, one value for each pixel; ``picture`` (N,) says which picture a pixel belongs to."""
        return Knobs(self._scenes, picture)

    def any(self, name: str, above: float = 0.0) -> bool:
        """Whether a parameter is above a bound in any picture of the batch, so that its part must be built."""
        return bool((self._scenes.column(name) > above).any())

    def is_any(self, name: str, *choices: int) -> Tensor:
        """1.0 where a categorical parameter is one of the choices, else 0.0."""
        value = self[name]
        chosen = torch.zeros_like(value)
        for choice in choices:
            chosen = chosen + (value == choice).float()
        return chosen
