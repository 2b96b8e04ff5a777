"""GFPGAN v1.2 to v1.4: a U-Net that steers a StyleGAN2 generator of faces, code by code and map by map.

The "clean" architecture, whose resampling is bilinear. Source: arXiv 2101.04061; github TencentARC/GFPGAN; the files
hold the weights under `params_ema`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen import checkpoints
from facegen.errors import WrongAdapter

MARKS = ("conv_body_first.weight", "final_linear.weight", "stylegan_decoder.constant_input.weight")
SLOPE = 0.2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """unet, generator: channels of the maps of side 4, 8, 16, … up to the picture's; style: length of a style code.

    half: the maps steer half of the generator's channels; each: every layer has a style code of its own; mapped: layers
    of the generator's mapping network, which is not used here but stands in the file.
    """

    unet: tuple[int, ...] = (256, 256, 256, 256, 256, 128, 64, 32)
    generator: tuple[int, ...] = (512, 512, 512, 512, 512, 256, 128, 64)
    style: int = 512
    half: bool = True
    each: bool = True
    mapped: int = 8

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return 2 << len(self.unet)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: Path) -> Sizes:
        """Read off the shapes."""
        levels = checkpoints.count(tensors, "conv_body_up")
        unet = ["final_conv.weight", *(f"conv_body_up.{i}.conv2.weight" for i in range(levels))]
        generator = [
            "stylegan_decoder.style_conv1.modulated_conv.weight",
            *(f"stylegan_decoder.style_convs.{2 * i}.modulated_conv.weight" for i in range(levels)),
        ]
        style = "stylegan_decoder.style_conv1.modulated_conv.modulation.weight"
        checkpoints.require(tensors, *unet, *generator, style, "condition_scale.0.2.weight", path=path)
        length = tensors[style].shape[1]
        steered = tensors["condition_scale.0.2.weight"].shape[0]
        return cls(
            unet=tuple(tensors[key].shape[0] for key in unet),
            generator=tuple(tensors[key].shape[1] for key in generator),
            style=length,
            half=2 * steered == tensors[generator[1]].shape[1],
            each=tensors["final_linear.weight"].shape[0] != length,
            mapped=checkpoints.count(tensors, "stylegan_decoder.style_mlp"),
        )


class Resized(nn.Module):
    """Residual block that halves (0.5) or doubles (2) the side between its two convolutions."""

    def __init__(self, before: int, after: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.conv1 = nn.Conv2d(before, before, 3, 1, 1)
        self.conv2 = nn.Conv2d(before, after, 3, 1, 1)
        self.skip = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _resized(F.leaky_relu(self.conv1(x), SLOPE), self.factor)
        out: Tensor = F.leaky_relu(self.conv2(y), SLOPE) + self.skip(_resized(x, self.factor))
        return out


class ModulatedConv(nn.Module):
    """StyleGAN2's convolution: its input channels are scaled by a style, its output channels normalised."""

    def __init__(self, before: int, after: int, kernel: int, style: int, *, demodulate: bool = True) -> None:
        super().__init__()
        self.demodulate = demodulate
        self.modulation = nn.Linear(style, before)
        self.weight = nn.Parameter(torch.randn(1, after, before, kernel, kernel) * (before * kernel**2) ** -0.5)

    def forward(self, x: Tensor, style: Tensor, *, double: bool = False) -> Tensor:
        """x (B, before, H, W), style (B, D); double: the side is doubled before the convolution."""
        b, c = x.shape[:2]
        weight = self.weight * self.modulation(style).view(b, 1, c, 1, 1)  # (B, after, before, k, k)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        x = _resized(x, 2) if double else x
        height, width = x.shape[2:]
        # One group per picture: each has a kernel of its own.
        y = F.conv2d(x.reshape(1, b * c, height, width), weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=b)
        return y.view(b, -1, height, width)


class StyleConv(nn.Module):
    """A modulated convolution with gain √2, then noise, bias and leaky ReLU."""

    def __init__(self, before: int, after: int, style: int, *, double: bool = False) -> None:
        super().__init__()
        self.doubles = double
        self.modulated_conv = ModulatedConv(before, after, 3, style)
        self.weight = nn.Parameter(torch.zeros(1))  # of the noise
        self.bias = nn.Parameter(torch.zeros(1, after, 1, 1))

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        y = self.modulated_conv(x, style, double=self.doubles) * 2**0.5
        return F.leaky_relu(y + self.weight * noise + self.bias, SLOPE)


class ToRGB(nn.Module):
    """Adds a map's colours to the picture so far."""

    def __init__(self, width: int, style: int) -> None:
        super().__init__()
        self.modulated_conv = ModulatedConv(width, 3, 1, style, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor, style: Tensor, picture: Tensor | None = None) -> Tensor:
        colours: Tensor = self.modulated_conv(x, style) + self.bias
        return colours if picture is None else colours + _resized(picture, 2)


class Start(nn.Module):
    """The learnt map of side 4 that every face begins with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width, 4, 4))


class Noises(nn.Module):
    """The noise that the file brings: one map per layer."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        for number in range(2 * levels + 1):
            side = 2 ** ((number + 5) // 2)
            self.register_buffer(f"noise{number}", torch.zeros(1, 1, side, side))

    def all(self) -> list[Tensor]:
        return list(self.buffers())


class Generator(nn.Module):
    """StyleGAN2 whose maps are scaled and shifted on the way."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.partly = sizes.half
        first, *widths = sizes.generator
        # Only for the keys: styles come from the U-Net, not from a random code.
        self.style_mlp = nn.Sequential(nn.Identity())
        for _ in range(sizes.mapped):
            self.style_mlp.extend([nn.Linear(sizes.style, sizes.style), nn.LeakyReLU(SLOPE)])
        self.constant_input = Start(first)
        self.style_conv1 = StyleConv(first, first, sizes.style)
        self.to_rgb1 = ToRGB(first, sizes.style)
        self.style_convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        before = first
        for width in widths:
            self.style_convs.append(StyleConv(before, width, sizes.style, double=True))
            self.style_convs.append(StyleConv(width, width, sizes.style))
            self.to_rgbs.append(ToRGB(width, sizes.style))
            before = width
        self.noises = Noises(len(widths))

    def forward(
        self, styles: Tensor, steering: Sequence[tuple[Tensor, Tensor]], generator: torch.Generator | None
    ) -> Tensor:
        """styles (B, layers, D); steering: (scale, shift) of each side from 8 on; generator: of fresh noise."""
        noises = self.noises.all()
        if generator is not None:
            drawn = [
                torch.randn(len(styles), *one.shape[1:], generator=generator, device=generator.device) for one in noises
            ]
            noises = [one.to(styles) for one in drawn]
        x = self.constant_input.weight.expand(len(styles), -1, -1, -1)
        x = self.style_conv1(x, styles[:, 0], noises[0])
        picture = self.to_rgb1(x, styles[:, 1])
        for level, (scale, shift) in enumerate(steering):
            at = 2 * level + 1
            x = self.style_convs[2 * level](x, styles[:, at], noises[at])
            kept = x.shape[1] // 2 if self.partly else 0
            x = torch.cat([x[:, :kept], x[:, kept:] * scale + shift], 1)
            x = self.style_convs[2 * level + 1](x, styles[:, at + 1], noises[at + 1])
            picture = self.to_rgbs[level](x, styles[:, at + 2], picture)
        return picture


class GFPGAN(nn.Module):
    """Aligned faces (B, 3, 512, 512) RGB in [-1, 1] to restored ones, of about that range; not clamped."""

    title = "GFPGAN"

    def __init__(self, sizes: Sizes | None = None) -> None:
        super().__init__()
        sizes = sizes or Sizes()
        self.sizes = sizes
        unet = sizes.unet
        self.conv_body_first = nn.Conv2d(3, unet[-1], 1)
        down = list(reversed(unet))
        self.conv_body_down = nn.ModuleList(Resized(down[i], down[i + 1], 0.5) for i in range(len(unet) - 1))
        self.final_conv = nn.Conv2d(down[-2], unet[0], 3, 1, 1)
        self.conv_body_up = nn.ModuleList(Resized(unet[i], unet[i + 1], 2) for i in range(len(unet) - 1))
        self.toRGB = nn.ModuleList(nn.Conv2d(width, 3, 1) for width in unet[1:])  # of training alone
        codes = 2 * len(unet) if sizes.each else 1
        self.final_linear = nn.Linear(unet[0] * 16, codes * sizes.style)
        self.stylegan_decoder = Generator(sizes)
        self.condition_scale, self.condition_shift = (
            nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(width, width, 3, 1, 1),
                    nn.LeakyReLU(SLOPE),
                    nn.Conv2d(width, whole // 2 if sizes.half else whole, 3, 1, 1),
                )
                for width, whole in zip(unet[1:], sizes.generator[1:], strict=True)
            )
            for _ in range(2)
        )

    @classmethod
    def detect(cls, keys: Mapping[str, object]) -> bool:
        """Whether unwrapped keys are of this family (the CUDA architecture of v1 too, which `of` refuses)."""
        return all(mark in keys for mark in (MARKS[1], MARKS[2]))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: Path = Path("the state dict")) -> GFPGAN:
        """From a state dict, wrapped or not.

        Raises CheckpointBroken, and WrongAdapter for v1, whose filtered resampling is another architecture.
        """
        own = checkpoints.unwrapped(tensors)
        if "conv_body_first.0.weight" in own:
            raise WrongAdapter(
                f"{path} is GFPGAN v1 of the original architecture (it holds conv_body_first.0.weight), which is not"
                " built here; take v1.2, v1.3 or v1.4 of the clean architecture."
            )
        with torch.device("meta"):
            net = cls(Sizes.of(own, path))
        return checkpoints.fill(net, own, path)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """generator: draws the generator's noise afresh, as the official code does at each call; None: the file's."""
        x = F.leaky_relu(self.conv_body_first(x), SLOPE)
        seen: list[Tensor] = []
        for block in self.conv_body_down:
            x = block(x)
            seen.insert(0, x)
        x = F.leaky_relu(self.final_conv(x), SLOPE)
        codes = self.final_linear(x.flatten(1)).view(len(x), -1, self.sizes.style)
        codes = codes.expand(-1, 2 * len(self.sizes.unet), -1)
        steering = []
        for level, block in enumerate(self.conv_body_up):
            x = block(x + seen[level])
            steering.append((self.condition_scale[level](x), self.condition_shift[level](x)))
        picture: Tensor = self.stylegan_decoder(codes, steering, generator)
        return picture


def _resized(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
