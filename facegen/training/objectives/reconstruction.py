"""How far a reconstruction is from its picture: values and edges, at full and half resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def edges(image: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels along x and y: (B, C, H, W-1), (B, C, H-1, W)."""
    return image[..., 1:] - image[..., :-1], image[..., 1:, :] - image[..., :-1, :]


def mean_around(x: Tensor) -> Tensor:
    """The mean of the 3 x 3 places around each, (B, C, H, W); those at the border count again beyond it."""
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def reconstruction_loss(found: Tensor, wanted: Tensor, scales: int = 2, weights: Tensor | None = None) -> Tensor:
    """Mean absolute and squared error of values and mean absolute error of edges. (B, 3, H, W) in [-1, 1] → scalar.

    Edges carry what a face is recognised by (lids, iris, lips, frames), and a plain squared error blurs them.
    weights: how much each place counts, (B, 1, H, W), 1 on average; None: all alike.
    """
    weights = torch.ones_like(wanted[:, :1]) if weights is None else weights
    error = found - wanted
    loss = ((error.abs() + 2 * error.square()) * weights).mean()
    for scale in range(scales):
        across, down = edges(found - wanted)
        loss = loss + 0.7**scale * 0.7 * (across.abs() * (weights[..., 1:] + weights[..., :-1]) / 2).mean()
        loss = loss + 0.7**scale * 0.7 * (down.abs() * (weights[..., 1:, :] + weights[..., :-1, :]) / 2).mean()
        if scale + 1 < scales:
            found, wanted, weights = (F.avg_pool2d(one, 2) for one in (found, wanted, weights))
            loss = loss + 0.5 * ((found - wanted).abs() * weights).mean()
    return loss


def feature_loss(layers: Sequence[Tensor]) -> Tensor:
    """How differently a network sees two batches, each layer (2 B, C, h, w): first B found, then B wanted → scalar.

    Mean squared distance of the unit vectors over the channels, as LPIPS without learnt weights (Zhang et al. 2018).
    """
    total = torch.zeros(())
    for layer in layers:
        found, wanted = F.normalize(layer.float(), dim=1).chunk(2)
        total = total + (found - wanted.detach()).square().sum(1).mean()
    return total / len(layers)
