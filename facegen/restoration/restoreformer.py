"""RestoreFormer and RestoreFormer++: a face coded by a learnt dictionary, each part of it asked for by the damaged one.

The encoder's features are the queries, the decoder's state keys and values. RestoreFormer++ asks at two scales and has
other heads. Source: arXiv 2201.06374, 2308.07228; github wzhouxiff/RestoreFormerPlusPlus; GFPGAN's `RestoreFormer.pth`
is the first one in another wrapping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from facegen import checkpoints
from facegen.restoration.vqgan import Codebook, Double, Halve, Residual, norm, swish

PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
MARKS = ("encoder.mid.attn_1.norm2.weight", "decoder.mid.attn_1.norm2.weight", "quantize.embedding.weight")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """first: width of the first convolution; widths: of each level, finest first; blocks: per level of the encoder.

    looks, asks: levels of the encoder and of the decoder that have attention.
    """

    first: int = 64
    widths: tuple[int, ...] = (64, 128, 128, 256, 256, 512)
    blocks: int = 2
    latent: int = 256
    codes: tuple[int, int] = (1024, 256)
    looks: tuple[int, ...] = (5,)
    asks: tuple[int, ...] = (4, 5)
    heads: int = 4

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: Path) -> Sizes:
        """Read off the shapes; the number of heads follows from the number of scales, as it was published."""
        checkpoints.require(
            tensors, "encoder.conv_in.weight", "decoder.conv_in.weight", "quantize.embedding.weight", path=path
        )
        levels = range(checkpoints.count(tensors, "encoder.down"))
        first = [f"encoder.down.{level}.block.0.conv1.weight" for level in levels]
        checkpoints.require(tensors, *first, path=path)
        asks = tuple(level for level in levels if checkpoints.count(tensors, f"decoder.up.{level}.attn"))
        codes, width = tensors["quantize.embedding.weight"].shape
        return cls(
            first=tensors["encoder.conv_in.weight"].shape[0],
            widths=tuple(tensors[key].shape[0] for key in first),
            blocks=checkpoints.count(tensors, "encoder.down.0.block"),
            latent=tensors["decoder.conv_in.weight"].shape[1],
            codes=(codes, width),
            looks=tuple(level for level in levels if checkpoints.count(tensors, f"encoder.down.{level}.attn")),
            asks=asks,
            heads=4 if len(asks) > 1 else 8,
        )


class Attention(nn.Module):
    """Looks at itself, or, with a query map, answers another map's questions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:  # all (B, C, h, w)
        state = self.norm1(x)
        asked = state if query is None else self.norm2(query)
        found = _attend(self.q(asked), self.k(state), self.v(state), self.heads)
        out: Tensor = x + self.proj_out(found)
        return out


class Level(nn.Module):
    """The blocks of one resolution, an attention after each where there is any, and the way to the next one."""

    def __init__(
        self,
        blocks: Sequence[Residual],
        attentions: Sequence[Attention],
        *,
        downsample: Halve | None = None,
        upsample: Double | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        for place, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[place](x, query)
        return x


class Middle(nn.Module):
    """The coarsest part, between encoder and codes or codes and decoder."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.block_1 = Residual(width, width)
        self.attn_1 = Attention(width, heads)
        self.block_2 = Residual(width, width)


class Encoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, sizes.first, 3, 1, 1)
        self.down = nn.ModuleList()
        before = sizes.first
        for number, width in enumerate(sizes.widths):
            level = Level(
                [Residual(before if i == 0 else width, width) for i in range(sizes.blocks)],
                [Attention(width, sizes.heads) for _ in range(sizes.blocks) if number in sizes.looks],
                downsample=Halve(width) if number < len(sizes.widths) - 1 else None,
            )
            self.down.append(level)
            before = width
        self.mid = Middle(before, sizes.heads)
        self.norm_out = norm(before)
        self.conv_out = nn.Conv2d(before, sizes.latent, 3, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The latent, the queries for each level, finest first, and the one for the middle."""
        queries = []
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if isinstance(level.downsample, Halve):
                queries.append(x)
                x = level.downsample(x)
        x = self.mid.block_1(x)
        queries.append(x)
        x = self.mid.block_2(self.mid.attn_1(x))
        return self.conv_out(swish(self.norm_out(x))), queries, x


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        before = sizes.widths[-1]
        self.conv_in = nn.Conv2d(sizes.latent, before, 3, 1, 1)
        self.mid = Middle(before, sizes.heads)
        levels = []
        for number, width in reversed(list(enumerate(sizes.widths))):
            level = Level(
                [Residual(before if i == 0 else width, width) for i in range(sizes.blocks + 1)],
                [Attention(width, sizes.heads) for _ in range(sizes.blocks + 1) if number in sizes.asks],
                upsample=Double(width) if number else None,
            )
            levels.append(level)
            before = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = norm(before)
        self.conv_out = nn.Conv2d(before, 3, 3, 1, 1)

    def forward(self, z: Tensor, queries: Sequence[Tensor], middle: Tensor) -> Tensor:
        x = self.mid.block_1(self.conv_in(z))
        x = self.mid.block_2(self.mid.attn_1(x, middle))
        for level, query in reversed(list(zip(self.up, queries, strict=True))):
            x = level(x, query)
            if isinstance(level.upsample, Double):
                x = level.upsample(x)
        image: Tensor = self.conv_out(swish(self.norm_out(x)))
        return image


class RestoreFormer(nn.Module):
    """Aligned faces (B, 3, 512, 512) RGB in [-1, 1] to restored ones, of about that range; not clamped."""

    def __init__(self, sizes: Sizes | None = None) -> None:
        super().__init__()
        self.sizes = sizes or Sizes()
        codes, width = self.sizes.codes
        self.encoder = Encoder(self.sizes)
        self.decoder = Decoder(self.sizes)
        self.quantize = Codebook(codes, width)
        self.quant_conv = nn.Conv2d(self.sizes.latent, width, 1)
        self.post_quant_conv = nn.Conv2d(width, self.sizes.latent, 1)

    @property
    def title(self) -> str:
        return "RestoreFormer++" if len(self.sizes.asks) > 1 else "RestoreFormer"

    @classmethod
    def detect(cls, keys: Mapping[str, object]) -> bool:
        """Whether unwrapped keys are of this family."""
        return all(mark in keys for mark in MARKS)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: Path = Path("the state dict")) -> RestoreFormer:
        """From a state dict, wrapped or not; losses and discriminators beside it are left. Raises CheckpointBroken."""
        own = {key: value for key, value in checkpoints.unwrapped(tensors).items() if key.split(".")[0] in PARTS}
        with torch.device("meta"):
            net = cls(Sizes.of(own, path))
        return checkpoints.fill(net, own, path)

    def forward(self, x: Tensor) -> Tensor:
        latent, queries, middle = self.encoder(x)
        codes = self.quantize.nearest(self.quant_conv(latent))
        image: Tensor = self.decoder(self.post_quant_conv(codes), queries, middle)
        return image


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention between the places of maps (B, C, h, w), the channels shared out among the heads."""
    b, c, h, w = query.shape
    q, k, v = (x.reshape(b, heads, c // heads, h * w) for x in (query, key, value))  # (B, heads, C/heads, h·w)
    weights = ((q * (c // heads) ** -0.5).transpose(2, 3) @ k).softmax(-1)  # (B, heads, h·w, h·w)
    return torch.matmul(v, weights.transpose(2, 3)).reshape(b, c, h, w)
