"""Blocks of the VQGAN family, of which RestoreFormer and CodeFormer are made.

Source: Esser et al. 2021, "Taming Transformers" (github CompVis/taming-transformers); key names of the two networks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(width: int) -> nn.GroupNorm:
    """32 groups, eps 1e-6."""
    return nn.GroupNorm(32, width, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    """x · sigmoid(x), written out: torch's own rounds otherwise, and a code may then be another one."""
    return x * torch.sigmoid(x)


class Residual(nn.Module):
    """Twice norm, swish, 3 × 3 convolution, beside a shortcut.

    The shortcut is a 1 × 1 convolution where the width changes; the networks have different names for it.
    """

    def __init__(self, before: int, after: int, shortcut: str = "nin_shortcut") -> None:
        super().__init__()
        self.norm1 = norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, 1, 1)
        self.norm2 = norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1)
        self.shortcut = shortcut if before != after else ""
        if self.shortcut:
            self.add_module(shortcut, nn.Conv2d(before, after, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, before, H, W) -> (B, after, H, W)
        y: Tensor = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return (self.get_submodule(self.shortcut)(x) if self.shortcut else x) + y


class Halve(nn.Module):
    """Half the side: one row and column of zeros at the far edges, then a convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 2, 0)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class Double(nn.Module):
    """Twice the side: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


class Codebook(nn.Module):
    """The learnt codes (N, D)."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)

    def nearest(self, z: Tensor) -> Tensor:
        """Each vector of a map (B, D, h, w) replaced by the nearest code."""
        codes = self.embedding.weight
        flat = z.permute(0, 2, 3, 1).reshape(-1, codes.shape[1])  # (B·h·w, D)
        distance = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
        found = self.at(distance.argmin(1).view(z.shape[0], *z.shape[2:]))
        return z + (found - z)  # as in training, where the gradient passes; its rounding belongs to the numbers

    def at(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) to their codes (B, D, h, w)."""
        codes: Tensor = self.embedding(indices)
        return codes.permute(0, 3, 1, 2).contiguous()
