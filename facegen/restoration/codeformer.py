"""CodeFormer: the codes of a clean face predicted by a transformer, and as much of the damaged face as one wants.

Source: arXiv 2206.11253; github sczhou/CodeFormer. `codeformer.pth` holds the weights under `params_ema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen import checkpoints
from facegen.restoration.vqgan import Codebook, Double, Halve, Residual, norm

MARKS = ("position_emb", "feat_emb.weight", "idx_pred_layer.1.weight", "quantize.embedding.weight")
FIRST, WIDTHS, LATENT = 64, (64, 128, 128, 256, 256, 512), 256
HEADS = 8
SHORTCUT = "conv_out"
# Block after which a feature of this side is taken from the encoder, or fused in the generator.
TAKEN: Mapping[int, int] = {512: 2, 256: 5, 128: 8, 64: 11, 32: 14, 16: 18}
FUSED: Mapping[int, int] = {16: 6, 32: 9, 64: 12, 128: 15, 256: 18, 512: 21}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """width: of the transformer's tokens; fused: sides of the maps where the damaged face may be let in."""

    width: int = 512
    inner: int = 1024
    layers: int = 9
    codes: int = 1024
    tokens: int = 256
    fused: tuple[int, ...] = (32, 64, 128, 256)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: Path) -> Sizes:
        """Read off the shapes."""
        checkpoints.require(tensors, *MARKS, "ft_layers.0.linear1.weight", path=path)
        tokens, width = tensors["position_emb"].shape
        sides = {key.split(".")[1] for key in tensors if key.startswith("fuse_convs_dict.")}
        return cls(
            width=width,
            inner=tensors["ft_layers.0.linear1.weight"].shape[0],
            layers=checkpoints.count(tensors, "ft_layers"),
            codes=tensors["quantize.embedding.weight"].shape[0],
            tokens=tokens,
            fused=tuple(sorted(int(side) for side in sides if side.isdigit() and int(side) in TAKEN)),
        )


class Attention(nn.Module):
    """One head over all places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).flatten(2) for part in (self.q, self.k, self.v))  # (B, C, h·w)
        weights = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(2)  # (B, h·w, h·w)
        out: Tensor = x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))
        return out


class Chain(nn.Module):
    """Blocks in a row, numbered as in the file."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


def _encoder() -> Chain:
    blocks: list[nn.Module] = [nn.Conv2d(3, FIRST, 3, 1, 1)]
    before = FIRST
    for number, width in enumerate(WIDTHS):
        coarsest = number == len(WIDTHS) - 1
        for _ in range(2):
            blocks.append(Residual(before, width, SHORTCUT))
            blocks += [Attention(width)] if coarsest else []
            before = width
        blocks += [] if coarsest else [Halve(width)]
    blocks += [Residual(before, before), Attention(before), Residual(before, before), norm(before)]
    return Chain([*blocks, nn.Conv2d(before, LATENT, 3, 1, 1)])


def _generator() -> Chain:
    before = WIDTHS[-1]
    blocks: list[nn.Module] = [nn.Conv2d(LATENT, before, 3, 1, 1)]
    blocks += [Residual(before, before), Attention(before), Residual(before, before)]
    for number, width in reversed(list(enumerate(WIDTHS))):
        for _ in range(2):
            blocks.append(Residual(before, width, SHORTCUT))
            blocks += [Attention(width)] if number == len(WIDTHS) - 1 else []
            before = width
        blocks += [Double(width)] if number else []
    return Chain([*blocks, norm(before), nn.Conv2d(before, 3, 3, 1, 1)])


class Layer(nn.Module):
    """A pre-norm transformer layer; the positions are added to queries and keys alone."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, HEADS)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # (N, B, D), (N, 1, D)
        y = self.norm1(x)
        placed = y + positions
        x = x + self.self_attn(placed, placed, y)[0]
        out: Tensor = x + self.linear2(F.gelu(self.linear1(self.norm2(x))))
        return out


class Fusion(nn.Module):
    """Scales and shifts the generator's map by what the encoder saw."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encode_enc = Residual(2 * width, width, SHORTCUT)
        self.scale, self.shift = (
            nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 3, 1, 1))
            for _ in range(2)
        )

    def forward(self, seen: Tensor, made: Tensor, weight: float) -> Tensor:
        both = self.encode_enc(torch.cat([seen, made], 1))
        out: Tensor = made + weight * (made * self.scale(both) + self.shift(both))
        return out


def take_statistics(content: Tensor, style: Tensor) -> Tensor:
    """`content` (B, C, h, w) with each channel's mean and (unbiased) deviation of `style`; eps 1e-5 on the variance."""

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(2)
        return flat.mean(2)[..., None, None], (flat.var(2) + 1e-5).sqrt()[..., None, None]

    (mean, deviation), (goal, wanted) = statistics(content), statistics(style)
    return (content - mean) / deviation * wanted + goal


class CodeFormer(nn.Module):
    """Aligned faces (B, 3, 512, 512) RGB in [-1, 1] to restored ones, of about that range; not clamped."""

    title = "CodeFormer"

    def __init__(self, sizes: Sizes | None = None) -> None:
        super().__init__()
        sizes = sizes or Sizes()
        self.sizes = sizes
        self.encoder = _encoder()
        self.quantize = Codebook(sizes.codes, LATENT)
        self.generator = _generator()
        self.position_emb = nn.Parameter(torch.zeros(sizes.tokens, sizes.width))
        self.feat_emb = nn.Linear(LATENT, sizes.width)
        self.ft_layers = nn.ModuleList(Layer(sizes.width, sizes.inner) for _ in range(sizes.layers))
        self.idx_pred_layer = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.codes, bias=False))
        widths = {512 >> level: width for level, width in enumerate(WIDTHS)}
        self.fuse_convs_dict = nn.ModuleDict({str(side): Fusion(widths[side]) for side in sizes.fused})

    @classmethod
    def detect(cls, keys: Mapping[str, object]) -> bool:
        """Whether unwrapped keys are of this family."""
        return all(mark in keys for mark in MARKS)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: Path = Path("the state dict")) -> CodeFormer:
        """From a state dict, wrapped or not. Raises CheckpointBroken."""
        own = checkpoints.unwrapped(tensors)
        with torch.device("meta"):
            net = cls(Sizes.of(own, path))
        return checkpoints.fill(net, own, path)

    def logits(self, latent: Tensor) -> Tensor:
        """How well each code fits each place: (B, 256, 16, 16) -> (B, 256, codes)."""
        x = self.feat_emb(latent.flatten(2).permute(2, 0, 1))  # (N, B, D)
        for layer in self.ft_layers:
            x = layer(x, self.position_emb[:, None])
        scores: Tensor = self.idx_pred_layer(x)
        return scores.transpose(0, 1)

    def forward(self, x: Tensor, weight: float = 0.5, *, adapt: bool = True) -> Tensor:
        """weight: 0 the cleanest face, 1 closest to the damaged one; adapt: take over its colours (AdaIN).

        0.5 and True are what the official script uses.
        """
        seen: dict[int, Tensor] = {}
        taken = {TAKEN[side]: side for side in self.sizes.fused}
        for place, block in enumerate(self.encoder.blocks):
            x = block(x)
            if place in taken:
                seen[taken[place]] = x
        codes = self.logits(x).argmax(2)  # (B, h·w)
        made = self.quantize.at(codes.view(len(x), *x.shape[2:]))
        if adapt:
            made = take_statistics(made, x)
        fused = {FUSED[side]: side for side in self.sizes.fused}
        for place, block in enumerate(self.generator.blocks):
            made = block(made)
            if place in fused and weight > 0:
                side = fused[place]
                made = self.fuse_convs_dict[str(side)](seen[side], made, weight)
        return made
