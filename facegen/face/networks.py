"""The small nets of the embedded model's perception: recogniser, judges, parsing, detector, key points.

Sizes are chosen to be trained on one CPU thread within minutes. All nets read their sizes from a plain config, so that
``network(config)`` rebuilds what a ``.safetensors`` file holds the weights of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.world.facts import FACTS
from facegen.world.parameters import (
    ATTRIBUTES,
    BACKGROUNDS,
    CLOTHES,
    COLORS,
    EXPRESSION,
    GLASSES,
    HAIR_COLORS,
    HAIR_STYLES,
    HATS,
    LIGHT,
    POSE,
)

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "hair_style": HAIR_STYLES,
    "hair_color": tuple(HAIR_COLORS),
    "glasses": GLASSES,
    "glasses_color": tuple(COLORS),
    "hat": HATS,
    "hat_color": tuple(COLORS),
    "clothes": CLOTHES,
    "clothes_color": tuple(COLORS),
    "background": BACKGROUNDS,
    "background_color": tuple(COLORS),
}
AMOUNTS: tuple[str, ...] = (  # 0 is none, 1 is full
    *(p.name for p in ATTRIBUTES if p.name in ("beard", "goatee", "moustache", "stubble", "earrings", "lipstick")),
    "eye_makeup",
    "age",
    "hair_length",
    "hair_volume",
    *(p.name for p in EXPRESSION if p.low == 0.0),
    "skin_tone",
    "freckles",
    "eye_color",
)
VALUES: tuple[str, ...] = (  # signed, in the units of facegen.world.parameters
    "gaze_x",
    "gaze_y",
    *(p.name for p in POSE),
    *(p.name for p in LIGHT if p.name in ("light_x", "light_y", "key", "warmth", "rim")),
    "masculinity",
)
KINDS: Mapping[str, tuple[str, ...]] = {  # facts that are no column of the parameters, judged as they are said
    kind: values for kind, values in FACTS.items() if kind not in CATEGORIES
}
STRIDES: tuple[int, ...] = (8, 16, 32)
ANCHORS = 2


class ResidualBlock(nn.Module):
    """IResNet's block: BN-conv-BN-PReLU-conv-BN beside a shortcut (arcface_torch, ``backbones/iresnet.py``)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, H, W) -> (B, outputs, H/stride, W/stride)
        shortcut: Tensor = self.shortcut(x)
        return shortcut + self.path(x)


class RecogniserNet(nn.Module):
    """The pack's recogniser, a short IResNet: aligned RGB crops (B, 3, 112, 112) in [-1, 1] to raw (B, D)."""

    def __init__(self, dim: int = 128, widths: Sequence[int] = (32, 64, 128), size: int = 112) -> None:
        super().__init__()
        first, middle, last = widths
        self.config: dict[str, Any] = {"net": "recogniser", "dim": dim, "widths": list(widths), "size": size}
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 7, 4, 3, bias=False), nn.BatchNorm2d(first), nn.PReLU(first)
        )  # (B, first, 28, 28)
        self.body = nn.Sequential(
            ResidualBlock(first, middle, 2),  # (B, middle, 14, 14)
            ResidualBlock(middle, middle),
            ResidualBlock(middle, last, 2),  # (B, last, 7, 7)
            ResidualBlock(last, last),
            nn.BatchNorm2d(last),
        )
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(last * (size // 16) ** 2, dim, bias=False)
        self.features = nn.BatchNorm1d(dim, affine=False)

    def forward(self, crops: Tensor) -> Tensor:
        x = self.dropout(self.body(self.stem(crops)).flatten(1))
        embedding: Tensor = self.features(self.fc(x))
        return embedding

    def seen(self, crops: Tensor) -> list[Tensor]:
        """What the layers see: after stem and blocks (B, C, h, w) each, and the embedding (B, D, 1, 1)."""
        x = self.stem(crops)
        found = [x]
        for block in self.body:
            x = block(x)
            found.append(x)
        found[-1] = self.features(self.fc(x.flatten(1)))[..., None, None]
        return found


class TokenBlock(nn.Module):
    """A pre-norm transformer block (Dosovitskiy et al. 2021)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        grown: Tensor = x + self.mlp(self.norm2(x))
        return grown


class JudgeNet(nn.Module):
    """The judge of likeness, of another kind than :class:`RecogniserNet`: strided convolutions, then attention.

    Aligned RGB crops (B, 3, 112, 112) in [-1, 1] to (B, D), not normalised.
    """

    def __init__(self, dim: int = 128, width: int = 160, depth: int = 3, heads: int = 5, size: int = 112) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "net": "judge", "dim": dim, "width": width, "depth": depth, "heads": heads, "size": size,
        }  # fmt: skip
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.GELU(),
            nn.Conv2d(32, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48), nn.GELU(),
            nn.Conv2d(48, 96, 3, 2, 1, bias=False), nn.BatchNorm2d(96), nn.GELU(),
            nn.Conv2d(96, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.place = nn.Parameter(0.02 * torch.randn(1, (size // 16) ** 2, width))
        self.blocks = nn.Sequential(*(TokenBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.squeeze = nn.Linear(width, 32)
        self.fc = nn.Linear(32 * (size // 16) ** 2, dim, bias=False)
        self.features = nn.BatchNorm1d(dim, affine=False)

    def forward(self, crops: Tensor) -> Tensor:
        x = self.stem(crops).flatten(2).transpose(1, 2) + self.place  # (B, 49, width)
        x = self.squeeze(self.norm(self.blocks(x))).flatten(1)
        embedding: Tensor = self.features(self.fc(x))
        return embedding


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class PlainBlock(nn.Module):
    """ResNet's basic block (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, 3, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class AttributeJudge(nn.Module):
    """Whole RGB pictures (B, 3, 128, 128) in [-1, 1] to what they show.

    The answer maps each name of :data:`CATEGORIES` to logits (B, classes), each of :data:`AMOUNTS` to logits (B,) whose
    sigmoid is the amount, each of :data:`VALUES` to numbers (B,) in the parameter's own unit, and each of
    :data:`KINDS`, as ``fact.{kind}``, to logits (B, classes).
    """

    def __init__(self, widths: Sequence[int] = (16, 48, 96, 128), hidden: int = 160) -> None:
        super().__init__()
        a, b, c, d = widths
        self.config: dict[str, Any] = {"net": "attributes", "widths": list(widths), "hidden": hidden}
        self.body = nn.Sequential(
            _conv(3, a, 5, 2),  # (B, a, 64, 64): an iris is three pixels wide
            PlainBlock(a, b, 2),
            PlainBlock(b, c, 2),
            PlainBlock(c, c),
            PlainBlock(c, d, 2),
            PlainBlock(d, d),  # (B, d, 8, 8)
        )
        self.squeeze = _conv(d, 40, 1)
        self.mix = nn.Sequential(nn.Linear(40 * 64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1))
        self.sizes: dict[str, int] = {name: len(classes) for name, classes in CATEGORIES.items()}
        self.sizes |= dict.fromkeys((*AMOUNTS, *VALUES), 1)
        self.sizes |= {f"fact.{kind}": len(values) for kind, values in KINDS.items()}
        self.head = nn.Linear(hidden, sum(self.sizes.values()))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        return self.answers(self.body(pictures))

    def answers(self, seen: Tensor) -> dict[str, Tensor]:
        """What it says by what its last layer sees, (B, C, 8, 8)."""
        answers = self.head(self.mix(self.squeeze(seen).flatten(1))).float()
        parts = zip(self.sizes, answers.split(list(self.sizes.values()), 1), strict=True)
        return {name: part[:, 0] if name in AMOUNTS or name in VALUES else part for name, part in parts}

    def facts(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits (B, values) of every kind of ``facegen.world.facts.FACTS``, in its order."""
        return self.facts_of(self.body(pictures))

    def facts_of(self, seen: Tensor) -> dict[str, Tensor]:
        """The same, by what its last layer sees."""
        return facts_among(self.answers(seen))

    def seen(self, pictures: Tensor) -> list[Tensor]:
        """What each layer makes of them, (B, C, h, w)."""
        layers, x = [], pictures
        for layer in self.body:
            x = layer(x)
            layers.append(x)
        return layers


def facts_among(answers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what an :class:`AttributeJudge` answers, the logits (B, values) of every kind of fact, in their order."""
    return {kind: answers[kind if kind in CATEGORIES else f"fact.{kind}"] for kind in FACTS}


class ParsingNet(nn.Module):
    """A small U-Net: RGB pictures (B, 3, 128, 128) in [-1, 1] to class logits (B, classes, 128, 128).

    With ``detail`` channels, what the U-Net says at half the size is mended at every pixel by what is seen there.
    """

    def __init__(self, classes: int = 21, widths: Sequence[int] = (24, 48, 80, 112), detail: int = 0) -> None:
        super().__init__()
        a, b, c, d = widths
        self.config: dict[str, Any] = {"net": "parsing", "classes": classes, "widths": list(widths), "detail": detail}
        self.down1 = nn.Sequential(_conv(3, a, 5, 2), _conv(a, a))  # 64
        self.down2 = PlainBlock(a, b, 2)  # 32
        self.down3 = PlainBlock(b, c, 2)  # 16
        self.down4 = nn.Sequential(PlainBlock(c, d, 2), PlainBlock(d, d))  # 8
        self.up3 = _conv(d + c, c)
        self.up2 = _conv(c + b, b)
        self.up1 = _conv(b + a, 2 * a)
        self.out = nn.Conv2d(2 * a, 4 * classes, 3, 1, 1)
        if detail:
            self.near = _conv(3, detail)  # 128
            self.mend = nn.Sequential(_conv(detail + a // 2, 2 * detail), nn.Conv2d(2 * detail, classes, 1))
            nn.init.zeros_(cast(Tensor, self.mend[1].weight))

    def forward(self, pictures: Tensor) -> Tensor:
        x1 = self.down1(pictures)
        x2 = self.down2(x1)
        x3 = self.down3(x2)
        x = self.down4(x3)
        for skip, up in ((x3, self.up3), (x2, self.up2), (x1, self.up1)):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], 1))
        logits = F.pixel_shuffle(self.out(x), 2)
        if not self.config["detail"]:
            return logits
        mended: Tensor = logits + self.mend(torch.cat([self.near(pictures), F.pixel_shuffle(x, 2)], 1))
        return mended


class DetectorNet(nn.Module):
    """A one-stage face detector with SCRFD's contract: strides 8, 16, 32, two anchors a cell.

    RGB pictures (B, 3, H, W), (x - 127.5) / 128, sides divisible by 32, to per-stride scores (B, N, 1) as logits,
    distances left, top, right, bottom (B, N, 4) and point offsets (B, N, 10), both in strides, N = H W / stride² · 2
    ordered by y, x, anchor. In evaluation scores are sigmoids and B must be 1 in the exported file, whose outputs are
    (N, 1), (N, 4), (N, 10) (insightface ``model_zoo/scrfd.py``).
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 48, 80, 112), neck: int = 48) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.config: dict[str, Any] = {"net": "detector", "widths": list(widths), "neck": neck}
        self.stem = nn.Sequential(_conv(3, a, 5, 2), _conv(a, b, 3, 2))  # stride 4
        self.stage8 = nn.Sequential(PlainBlock(b, c, 2), PlainBlock(c, c))
        self.stage16 = nn.Sequential(PlainBlock(c, d, 2), PlainBlock(d, d))
        self.stage32 = nn.Sequential(PlainBlock(d, e, 2), PlainBlock(e, e))
        self.lateral = nn.ModuleList(nn.Conv2d(width, neck, 1) for width in (c, d, e))
        self.smooth = nn.ModuleList(_conv(neck, neck) for _ in STRIDES)
        self.tower = _conv(neck, neck)
        self.score = nn.Conv2d(neck, ANCHORS, 3, 1, 1)
        self.box = nn.Conv2d(neck, ANCHORS * 4, 3, 1, 1)
        self.points = nn.Conv2d(neck, ANCHORS * 10, 3, 1, 1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        nn.init.constant_(cast(Tensor, self.score.bias), -4.6)  # faces are rare: RetinaNet's prior of 0.01

    def forward(self, pictures: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        x8 = self.stage8(self.stem(pictures))
        x16 = self.stage16(x8)
        x32 = self.stage32(x16)
        levels = [lateral(x) for lateral, x in zip(self.lateral, (x8, x16, x32), strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0, mode="nearest")
        scores, boxes, points = [], [], []
        for i, (level, smooth) in enumerate(zip(levels, self.smooth, strict=True)):
            x = self.tower(smooth(level))
            scores.append(_cells(self.score(x), 1))
            boxes.append(_cells(self.box(x) * self.scales[i], 4))
            points.append(_cells(self.points(x) * self.scales[i], 10))
        return scores, boxes, points


def _cells(x: Tensor, size: int) -> Tensor:
    """(B, anchors * size, H, W) -> (B, H * W * anchors, size)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, size)


class KeypointNet(nn.Module):
    """Gray face crops (B, 1, size, size) in [-1, 1] to points (B, count, 2), x and y in crop sides (0 to 1)."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 96), size: int = 80, count: int = 5) -> None:
        super().__init__()
        a, b, c, d = widths
        self.config: dict[str, Any] = {"net": "points", "widths": list(widths), "size": size, "count": count}
        self.count = count
        self.body = nn.Sequential(
            _conv(1, a, 5, 2), PlainBlock(a, b, 2), PlainBlock(b, c, 2), PlainBlock(c, d, 2)
        )  # (B, d, 5, 5)
        self.mix = nn.Sequential(nn.Linear(d * (size // 16) ** 2, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.head = nn.Linear(128, 2 * count)

    def forward(self, crops: Tensor) -> Tensor:
        return 0.5 + self.head(self.mix(self.body(crops).flatten(1))).float().view(-1, self.count, 2)


NETWORKS: Mapping[str, type[nn.Module]] = {
    "recogniser": RecogniserNet,
    "judge": JudgeNet,
    "attributes": AttributeJudge,
    "parsing": ParsingNet,
    "detector": DetectorNet,
    "points": KeypointNet,
}


def network(config: Mapping[str, Any]) -> nn.Module:
    """A fresh net of a config as found beside its weights; raises ValueError for an unknown kind."""
    sizes = dict(config)
    kind = sizes.pop("net", None)
    if kind not in NETWORKS:
        raise ValueError(f"There is no net of the kind {kind!r}; the kinds are: {', '.join(NETWORKS)}.")
    return NETWORKS[kind](**sizes)
