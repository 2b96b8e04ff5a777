"""e4e: a photo of a face -> StyleGAN's W+ code of it, 18 rows of 512 numbers from coarse to fine.

An improved ResNet with squeeze-and-excitation, a feature pyramid and one head per row. Key names of the official
`e4e_ffhq_encode.pt`. Source: github omertov/encoder4editing, arXiv 2102.02766; github csxmli2016/w-plus-adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen import checkpoints

ROWS, WIDTH, SIDE = 18, 512, 256
COARSE, MIDDLE = 3, 7  # rows 0-2 are read from the coarsest map, 3-6 from the middle one, the rest from the finest


class SqueezeExcite(nn.Module):
    """Weighs channels by what the whole map holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(width // 16, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * torch.sigmoid(weight)


class Unit(nn.Module):
    """Residual unit; the stride is in its second convolution."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.shortcut_layer = (
            None
            if before == after
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.Conv2d(before, after, 3, 1, 1, bias=False),
            nn.PReLU(after),
            nn.Conv2d(after, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            SqueezeExcite(after),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept = x[..., :: self.stride, :: self.stride] if self.shortcut_layer is None else self.shortcut_layer(x)
        out: Tensor = kept + self.res_layer(x)
        return out


class ScaledLinear(nn.Linear):
    """StyleGAN's linear layer: the weights are stored √n times too large."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


class Head(nn.Module):
    """A map (B, 512, S, S) -> one row of the code (B, 512), halving it down to a point."""

    def __init__(self, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(int(math.log2(side))):
            layers += [nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.LeakyReLU(0.01)]
        self.convs = nn.Sequential(*layers)
        self.linear = ScaledLinear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.convs(x).flatten(1))
        return out


class E4E(nn.Module):
    """Aligned faces (B, 3, 256, 256) RGB in [-1, 1], background white -> W+ codes (B, 18, 512), mean code added."""

    latent_avg: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.body = nn.Sequential(*(Unit(*sizes) for sizes in _units()))
        self.latlayer1 = nn.Conv2d(256, WIDTH, 1)
        self.latlayer2 = nn.Conv2d(128, WIDTH, 1)
        self.styles = nn.ModuleList(
            Head(SIDE // (16 if row < COARSE else 8 if row < MIDDLE else 4)) for row in range(ROWS)
        )
        self.register_buffer("latent_avg", torch.zeros(ROWS, WIDTH), persistent=False)

    @classmethod
    def from_file(cls, path: Path) -> E4E:
        """From `e4e_ffhq_encode.pt`; what it holds of StyleGAN's decoder is not used. Raises CheckpointBroken."""
        tensors = checkpoints.read(path)
        own = checkpoints.section(checkpoints.section(tensors, "state_dict"), "encoder")
        checkpoints.require(tensors, "latent_avg", path=path)
        with torch.device("meta"):
            encoder = cls()
        shapes = encoder.state_dict()
        own = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
        wanted = {key: value for key, value in shapes.items() if not key.endswith("num_batches_tracked")}
        checkpoints.check(wanted, own, path=path, prefix="state_dict.encoder.")
        counters = {key: torch.tensor(0) for key in shapes.keys() - wanted.keys()}
        encoder.load_state_dict({**own, **counters}, assign=True)
        encoder.latent_avg = tensors["latent_avg"].view(-1, WIDTH).expand(ROWS, WIDTH)
        return encoder.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        maps = []
        x = self.input_layer(images)
        for place, unit in enumerate(self.body):
            x = unit(x)
            if place in (6, 20, 23):
                maps.append(x)
        fine, middle, coarse = maps  # (B, 128, 64, 64), (B, 256, 32, 32), (B, 512, 16, 16)
        second = _upsampled(coarse, middle) + self.latlayer1(middle)
        first = _upsampled(second, fine) + self.latlayer2(fine)
        rows = [
            head(coarse if row < COARSE else second if row < MIDDLE else first) for row, head in enumerate(self.styles)
        ]
        base = rows[0]
        return torch.stack([base, *(base + row for row in rows[1:])], dim=1) + self.latent_avg


def _units() -> Iterator[tuple[int, int, int]]:
    """Width before, width after, stride of each of the 24 units of IR-50."""
    widths = (64, 64, 128, 256, 512)
    for (before, after), count in zip(pairwise(widths), (3, 4, 14, 3), strict=True):
        yield before, after, 2
        yield from ((after, after, 1) for _ in range(count - 1))


def _upsampled(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)
