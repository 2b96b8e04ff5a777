"""Losses on the picture that a run sees coming: whose face it is, and which pixel is what.

They steer without any training. A step is as large as its strength says, whatever the loss: the gradient is brought to
unit root mean square first, for its own size says more about the autoencoder than about the way to go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.conditions import GuidanceCondition, Scale, Span

if TYPE_CHECKING:
    from facegen.face.embed import ArcFace
    from facegen.face.parse import FaceParser
    from facegen.models.base import Model


class _UnitGradient(torch.autograd.Function):
    """The same forwards; backwards each row's gradient at unit root mean square."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        size = gradient.square().flatten(1).mean(1).sqrt().view(-1, *[1] * (gradient.ndim - 1))
        return gradient / size.clamp(min=1e-12)


def unit_gradient(x: Tensor) -> Tensor:
    """x (B, …), whose gradient will have unit root mean square in each row."""
    made: Tensor = _UnitGradient.apply(x)
    return made


def likeness_guidance(
    model: Model, recogniser: ArcFace, person: Tensor, points: Tensor, *, scale: Scale = 0.1, span: Span = (0.0, 1.0)
) -> GuidanceCondition:
    """Towards a person: 1 − cosine of what a differentiable recogniser sees in the coming picture.

    person: their embedding (D,), RAW or unit; points (5, 2): where in the picture, in pixels, the face is.
    """
    wanted = F.normalize(person.float(), dim=0)

    def loss(clean: Tensor, timestep: Tensor) -> Tensor:
        pictures = model.decode(unit_gradient(clean))
        where = points.to(pictures)[None].expand(len(pictures), -1, -1)
        return 1 - F.cosine_similarity(recogniser.embed(pictures, where), wanted.to(pictures)[None])

    return GuidanceCondition(loss=loss, scale=scale, span=span)


def parsing_guidance(
    model: Model, parser: FaceParser, picture: Tensor, mask: Tensor, *, scale: Scale = 0.05, span: Span = (0.0, 1.0)
) -> GuidanceCondition:
    """Towards the layout of a picture (3, H, W): eyes and mouth where they are in it, inside the mask (1, H, W)."""
    with torch.no_grad():
        wanted = parser.chances(picture[None])  # (1, classes, H, W)
    weight = mask[None] / mask.sum().clamp(min=1)

    def loss(clean: Tensor, timestep: Tensor) -> Tensor:
        seen = parser.chances(model.decode(unit_gradient(clean)))
        differ = -(wanted.to(seen) * seen.clamp(min=1e-6).log()).sum(1, keepdim=True)  # (B, 1, H, W)
        return (differ * weight.to(seen)).sum((1, 2, 3))

    return GuidanceCondition(loss=loss, scale=scale, span=span)


def light_guidance(
    model: Model, side: float, points: Tensor, *, scale: Scale = 0.1, span: Span = (0.0, 1.0)
) -> GuidanceCondition:
    """Towards light that comes from a side: -1 the picture's left, 1 its right (facegen.face.light).

    points (5, 2): where in the picture, in pixels, the face is.
    """
    from facegen.face.light import lean, lean_of

    def loss(clean: Tensor, timestep: Tensor) -> Tensor:
        pictures = model.decode(unit_gradient(clean))
        where = points.to(pictures)[None].expand(len(pictures), -1, -1)
        return (lean(pictures, where) - lean_of(side)).square()

    return GuidanceCondition(loss=loss, scale=scale, span=span)
