"""Group normalisation along the last axis of memory: what PyTorch's own does, several times faster on a CPU.

PyTorch's CPU kernel walks channels-last activations group by group; sums per channel first and groups of channels
after are a few passes over contiguous memory. Statistics in float32, whatever the activations are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        values = rows.float()
        count = height * width * (channels // groups)
        mean = _grouped(values.sum(1), groups) / count
        square = _grouped(values.square().sum(1), groups) / count
        inverse = ((square - mean.square()).clamp_min(0) + eps).rsqrt()
        mean, inverse = _spread(mean, channels), _spread(inverse, channels)
        gain = inverse * weight
        found = torch.addcmul((bias - mean * gain)[:, None], values, gain[:, None]).to(x.dtype)
        ctx.save_for_backward(rows, mean, inverse, weight)
        ctx.sizes = (groups, count, height, width)
        return found.view(batch, height, width, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, mean, inverse, weight = ctx.saved_tensors
        groups, count, height, width = ctx.sizes
        batch, _, channels = rows.shape
        values = rows.float()
        given = gradients[0].permute(0, 2, 3, 1).reshape(rows.shape).float()
        total = given.sum(1)
        along = ((given * values).sum(1) - total * mean) * inverse  # sum of gradient times normalised value
        shared = _spread(_grouped(total * weight, groups) / count, channels)
        tilt = -inverse.square() * _spread(_grouped(along * weight, groups) / count, channels)
        found = torch.addcmul((-inverse * shared - tilt * mean)[:, None], values, tilt[:, None])
        found = found.addcmul_(given, (inverse * weight)[:, None]).to(gradients[0].dtype)
        whole = found.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return whole, along.sum(0), total.sum(0), None, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, C) -> (B, groups): sums of neighbouring channels."""
    return x.view(len(x), groups, -1).sum(2)


def _spread(x: Tensor, channels: int) -> Tensor:
    """(B, groups) -> (B, C)."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


class ChannelsLastGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` for (B, C, H, W) in channels-last memory on a CPU; other inputs take PyTorch's own path.

    The variance is the mean square less the squared mean, in float32: for activations of ordinary size the difference
    to PyTorch's is of the order of 1e-6. Used where CPU training spends its time, not where bits must match diffusers.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        strange = input.ndim != 4 or self.weight is None or input.device.type != "cpu"
        if strange or not input.is_contiguous(memory_format=torch.channels_last):
            return super().forward(input)
        return cast(Tensor, _GroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps))


def quicken(module: nn.Module) -> None:
    """Give every group normalisation in ``module`` the channels-last form, in place; names and weights stay."""
    for part in module.modules():
        if type(part) is nn.GroupNorm and part.affine:
            part.__class__ = ChannelsLastGroupNorm
