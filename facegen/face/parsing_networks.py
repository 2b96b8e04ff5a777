"""Face parsing with the published networks, BiSeNet and ParseNet: which pixel of an aligned face is what.

The two number their classes differently; a :class:`Parser` brings its own table. Source: github
zllrunning/face-parsing.PyTorch (`79999_iter.pth`), github chaofengc/PSFRGAN (`parse_multi_iter_90000.pth`), github
xinntao/facexlib (`parsing_bisenet.pth`, `parsing_parsenet.pth`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen import checkpoints
from facegen.preprocessing import View, preprocessing

BISENET: tuple[str, ...] = (
    "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eyeglass", "l_ear", "r_ear", "earring", "nose",
    "mouth", "u_lip", "l_lip", "neck", "necklace", "cloth", "hair", "hat",
)  # fmt: skip
PARSENET: tuple[str, ...] = (
    "background", "skin", "nose", "eyeglass", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth",
    "u_lip", "l_lip", "hair", "hat", "earring", "necklace", "neck", "cloth",
)  # fmt: skip
SIDE = 512
SLOPE = 0.2


# --- BiSeNet ----------------------------------------------------------------------------------------------------------


class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, before: int, after: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, 1, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """ResNet's basic block (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample: nn.Module | None = None
        if before != after or stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu((x if self.downsample is None else self.downsample(x)) + y)


class ResNet18(nn.Module):
    """Maps at 1/8, 1/16 and 1/32 of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(Block(widths[i], widths[i + 1], 2 if i else 1), Block(widths[i + 1], widths[i + 1], 1))
            for i in range(4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        eighth = self.layer2(self.layer1(x))
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class Refinement(nn.Module):
    """A map weighed by what all of it holds."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = ConvBN(before, after)
        self.conv_atten = nn.Conv2d(after, after, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y * torch.sigmoid(self.bn_atten(self.conv_atten(y.mean((2, 3), keepdim=True))))


class Context(nn.Module):
    """What surrounds each place, from the coarse maps."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet18()
        self.arm16, self.arm32 = Refinement(256, 128), Refinement(512, 128)
        self.conv_head32, self.conv_head16 = ConvBN(128, 128), ConvBN(128, 128)
        self.conv_avg = ConvBN(512, 128, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps: 1/8 of the backbone, 1/8 and 1/16 of the context."""
        eighth, sixteenth, last = self.resnet(x)
        whole = self.conv_avg(last.mean((2, 3), keepdim=True))
        coarse = self.conv_head32(F.interpolate(self.arm32(last) + whole, sixteenth.shape[2:], mode="nearest"))
        fine = self.conv_head16(F.interpolate(self.arm16(sixteenth) + coarse, eighth.shape[2:], mode="nearest"))
        return eighth, fine, coarse


class Fusion(nn.Module):
    """Backbone and context together, weighed by channel."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convblk = ConvBN(before, after, 1)
        self.conv1 = nn.Conv2d(after, after // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(after // 4, after, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        y: Tensor = self.convblk(torch.cat([spatial, context], 1))
        weight = torch.sigmoid(self.conv2(F.relu(self.conv1(y.mean((2, 3), keepdim=True)))))
        return y * weight + y


class Head(nn.Module):
    def __init__(self, before: int, inner: int, classes: int) -> None:
        super().__init__()
        self.conv = ConvBN(before, inner)
        self.conv_out = nn.Conv2d(inner, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv_out(self.conv(x))
        return logits


class BiSeNet(nn.Module):
    """RGB pictures (B, 3, H, W), ImageNet-normalised, to logits (B, 19, H, W) and those of two coarser heads."""

    def __init__(self, classes: int = 19) -> None:
        super().__init__()
        self.cp = Context()
        self.ffm = Fusion(256, 256)
        self.conv_out = Head(256, 256, classes)
        self.conv_out16, self.conv_out32 = Head(128, 64, classes), Head(128, 64, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        eighth, fine, coarse = self.cp(x)
        heads = (self.conv_out(self.ffm(eighth, fine)), self.conv_out16(fine), self.conv_out32(coarse))
        first, second, third = (F.interpolate(one, x.shape[2:], mode="bilinear", align_corners=True) for one in heads)
        return first, second, third

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: Path) -> BiSeNet:
        """From a state dict; a classifier (`fc`) that some ResNets bring is left. Raises CheckpointBroken."""
        own = {key: value for key, value in tensors.items() if not key.startswith("cp.resnet.fc.")}
        checkpoints.require(own, "conv_out.conv_out.weight", path=path)
        with torch.device("meta"):
            net = cls(own["conv_out.conv_out.weight"].shape[0])
        return checkpoints.fill(net, own, path)


# --- ParseNet ---------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed


class Conv(nn.Module):
    """Nearest-neighbour doubling where asked, a mirrored border, a convolution, a norm where there is one."""

    def __init__(self, before: int, after: int, scale: str = "", *, norm: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.conv2d = nn.Conv2d(before, after, 3, 2 if scale == "down" else 1, bias=not norm)
        self.norm: nn.Module | None = Normed(after) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        y: Tensor = self.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        return y if self.norm is None else self.norm(y)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which is one too where width or side changes."""

    def __init__(self, before: int, after: int, scale: str = "") -> None:
        super().__init__()
        self.shortcut_func: nn.Module | None = Conv(before, after, scale) if scale or before != after else None
        self.conv1 = Conv(before, after, "up" if scale == "up" else "", norm=True)
        self.conv2 = Conv(after, after, "down" if scale == "down" else "", norm=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(F.leaky_relu(self.conv1(x), SLOPE))
        return (x if self.shortcut_func is None else self.shortcut_func(x)) + y


class ParseNet(nn.Module):
    """RGB pictures (B, 3, 512, 512) in [-1, 1] to logits (B, 19, 512, 512) and a picture of the same size."""

    def __init__(
        self,
        encoder: tuple[int, ...] = (64, 128, 256, 256, 256),
        decoder: tuple[int, ...] = (256, 256, 128, 64),
        depth: int = 10,
        classes: int = 19,
    ) -> None:
        super().__init__()
        inner = encoder[-1]
        self.encoder = nn.Sequential(
            Conv(3, encoder[0]),
            *(Residual(encoder[i], encoder[i + 1], "down") for i in range(len(encoder) - 1)),
        )
        self.body = nn.Sequential(*(Residual(inner, inner) for _ in range(depth)))
        widths = (inner, *decoder)
        self.decoder = nn.Sequential(*(Residual(widths[i], widths[i + 1], "up") for i in range(len(decoder))))
        self.out_img_conv = Conv(widths[-1], 3)
        self.out_mask_conv = Conv(widths[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.encoder(x)
        made = self.decoder(seen + self.body(seen))
        return self.out_mask_conv(made), self.out_img_conv(made)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: Path) -> ParseNet:
        """From a state dict, whose shapes tell the sizes. Raises CheckpointBroken."""

        def widths(part: str, start: int, inner: str) -> tuple[int, ...]:
            keys = [f"{part}.{i}.{inner}.weight" for i in range(start, checkpoints.count(tensors, part))]
            checkpoints.require(tensors, *keys, path=path)
            return tuple(tensors[key].shape[0] for key in keys)

        checkpoints.require(tensors, "encoder.0.conv2d.weight", "out_mask_conv.conv2d.weight", path=path)
        first = tensors["encoder.0.conv2d.weight"].shape[0]
        with torch.device("meta"):
            net = cls(
                (first, *widths("encoder", 1, "conv2.conv2d")),
                widths("decoder", 0, "conv2.conv2d"),
                checkpoints.count(tensors, "body"),
                tensors["out_mask_conv.conv2d.weight"].shape[0],
            )
        return checkpoints.fill(net, tensors, path)


# --- either -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parser:
    """A parsing network with its table of classes and the pictures it wants."""

    net: nn.Module
    labels: tuple[str, ...]
    view: View

    @classmethod
    def from_file(cls, path: str | Path) -> Parser:
        """BiSeNet or ParseNet, told by the keys. Raises WeightsMissing, CheckpointBroken, WrongAdapter."""
        path = Path(path).expanduser()
        tensors = checkpoints.unwrapped(checkpoints.read(path))
        if "cp.conv_avg.conv.weight" in tensors:
            return cls(BiSeNet.of(tensors, path), BISENET, preprocessing("bisenet").sight)
        if "out_mask_conv.conv2d.weight" in tensors:
            return cls(ParseNet.of(tensors, path), PARSENET, preprocessing("parsenet").sight)
        raise checkpoints.refuse(path, tensors, "a face parsing network (BiSeNet or ParseNet)")

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Aligned faces (B, 3, 512, 512) RGB in [0, 1] to logits (B, 19, 512, 512)."""
        logits: Tensor = self.net(self.view.normal(images))[0]
        return logits

    def parse(self, images: Tensor) -> Tensor:
        """Aligned faces (B, 3, H, W) in [0, 1] to classes (B, H, W) int64, index into `labels`."""
        inputs = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        logits = self.logits(inputs if images.shape[2:] != (SIDE, SIDE) else images)
        if images.shape[2:] != (SIDE, SIDE):
            logits = F.interpolate(logits, images.shape[2:], mode="bilinear")
        return logits.argmax(1)

    def mask(self, images: Tensor, parts: Iterable[str]) -> Tensor:
        """(B, 1, H, W): 1 where one of the named classes is; the names are those of `labels`."""
        wanted = torch.tensor([self.labels.index(part) for part in parts], device=images.device)
        return torch.isin(self.parse(images), wanted)[:, None].float()
