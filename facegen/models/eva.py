"""The picture tower of EVA-CLIP (EVA02-CLIP-L-14-336), by which PuLID sees a face.

A ViT with rotary positions besides learned ones, SwiGLU, and a norm inside attention and feed-forward. Key names and
arithmetic of github baaivision/EVA `EVA-CLIP/rei/eva_clip/eva_vit_model.py` (MIT), hub QuanSun/EVA-CLIP.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen import checkpoints
from facegen.checkpoints import Shapes, section

FILE = "EVA02_CLIP_L_336_psz14_s6B.pt"
EPS = 1e-6
TRAINED_SIDE = 16  # patches at a side of the 224-pixel pictures it was first trained on
HIDDEN_EVERY, HIDDEN_COUNT = 4, 5


@dataclass(frozen=True)
class EvaSizes:
    """Widths of the inside, of the feed-forward and of what goes out; layers, width of a head, pixels of a patch and of
    the picture's side.
    """

    width: int
    inner: int
    output: int
    depth: int
    head: int
    patch: int
    image: int

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> EvaSizes:
        """Raises KeyError for a key that is missing; a head is as wide as the rotary table, if that is there."""
        width, _, patch, _ = shapes["patch_embed.proj.weight"]
        head = next((shape[-1] for key, shape in shapes.items() if key.endswith("freqs_cos")), min(64, width))
        side = round((shapes["pos_embed"][1] - 1) ** 0.5)
        inner = shapes["blocks.0.mlp.w1.weight"][0]
        depth = checkpoints.count(shapes, "blocks")
        return cls(width, inner, shapes["head.weight"][0], depth, head, patch, side * patch)


def rotary(side: int, head: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (side², head): half a head turns with the row, half with the column, two numbers at a time."""
    half = head // 2
    speeds = 1.0 / 10000 ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    places = torch.arange(side) / side * TRAINED_SIDE
    angles = torch.outer(places, speeds).repeat_interleave(2, dim=-1)  # (side, half)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    whole = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return whole.cos(), whole.sin()


class EvaAttention(nn.Module):
    def __init__(self, sizes: EvaSizes) -> None:
        super().__init__()
        width = sizes.width
        self.head = sizes.head
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, eps=EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, 1 + patches, width), the class token first; turn: of the patches."""
        query = _turned(self._split(self.q_proj(x) + self.q_bias), turn)
        key = _turned(self._split(self.k_proj(x)), turn)
        found = F.scaled_dot_product_attention(query, key, self._split(self.v_proj(x) + self.v_bias))
        out: Tensor = self.proj(self.inner_attn_ln(found.transpose(1, 2).flatten(2)))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head)).transpose(1, 2)  # (B, heads, S, head)


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=EPS)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))
        return out


class EvaBlock(nn.Module):
    def __init__(self, sizes: EvaSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=EPS)
        self.attn = EvaAttention(sizes)
        self.norm2 = nn.LayerNorm(sizes.width, eps=EPS)
        self.mlp = SwiGLU(sizes.width, sizes.inner)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), turn)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    def __init__(self, sizes: EvaSizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, sizes.width, sizes.patch, stride=sizes.patch)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return patches


class EvaTower(nn.Module):
    """Pixels (B, 3, S, S) with CLIP's mean and deviation -> the whole's vector (B, output) and five hidden states.

    These are the states (B, 1 + patches, width) before the blocks 4, 8, 12, 16 and 20.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: EvaSizes) -> None:
        super().__init__()
        self.sizes = sizes
        side = sizes.image // sizes.patch
        self.patch_embed = PatchEmbed(sizes)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, sizes.width))
        self.blocks = nn.ModuleList(EvaBlock(sizes) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=EPS)
        self.head = nn.Linear(sizes.width, sizes.output)
        cos, sin = rotary(side, sizes.head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @classmethod
    def from_file(cls, path: Path) -> EvaTower:
        """From the whole model's file, whose text half is left, or from the tower's alone.

        Raises WeightsMissing, CheckpointBroken, WrongAdapter.
        """
        tensors = checkpoints.read(path)
        tensors = checkpoints.unwrapped(section(tensors, "model") or tensors)  # as training wrapped it, or bare
        tensors = section(tensors, "visual") or tensors
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        if "blocks.0.attn.inner_attn_ln.weight" not in shapes:
            raise checkpoints.refuse(path, shapes, "EVA02-CLIP's picture tower")
        checkpoints.require(
            shapes, "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.w1.weight", "head.weight", path=path
        )
        tower = cls(EvaSizes.from_shapes(shapes))
        # The rotary table is computed, as the official code does it whatever the file holds.
        own = {key: value for key, value in tensors.items() if not key.endswith(("freqs_cos", "freqs_sin"))}
        checkpoints.load_into(tower, own, path=path)
        return tower.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        hidden: list[Tensor] = []
        for place, block in enumerate(self.blocks):
            if place and place % HIDDEN_EVERY == 0 and len(hidden) < HIDDEN_COUNT:
                hidden.append(x)
            x = block(x, (self.cos, self.sin))
        return self.head(self.norm(x)[:, 0]), hidden


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on all but the class token; x (B, heads, 1 + patches, head)."""
    first, rest = x[:, :, :1], x[:, :, 1:]
    even, odd = rest.unflatten(-1, (-1, 2)).unbind(dim=-1)
    across = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([first, rest * turn[0] + across * turn[1]], dim=2).to(x.dtype)
