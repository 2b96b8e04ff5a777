"""ArcFace's additive angular margin (Deng et al. 2019)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ArcFaceMargin(nn.Module):
    """Cross-entropy over people, the right one's angle made larger by a margin.

    ``scale`` multiplies the cosines. The margin (radians) is given per call, so that it can grow during training.
    """

    def __init__(self, dim: int, people: int, scale: float = 24.0) -> None:
        super().__init__()
        self.scale = scale
        self.centres = nn.Parameter(0.05 * torch.randn(people, dim))

    def forward(self, embeddings: Tensor, labels: Tensor, margin: float) -> tuple[Tensor, Tensor]:
        """(B, D), (B,) → the loss, and the fraction of pictures nearest to their own person without a margin."""
        cosines = F.normalize(embeddings.float(), dim=1) @ F.normalize(self.centres, dim=1).T  # (B, people)
        own = cosines.gather(1, labels[:, None]).clamp(-0.999, 0.999)
        moved = own * math.cos(margin) - (1 - own.square()).sqrt() * math.sin(margin)
        logits = self.scale * cosines.scatter(1, labels[:, None], moved)
        right = (cosines.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), right.detach()
