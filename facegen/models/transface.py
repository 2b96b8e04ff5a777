"""TransFace-S: a vision transformer that recognises faces; FaceChain-FACT reads its patch tokens.

Only what leads to the tokens is kept of the file: not the gate over the patches nor the head that makes an embedding.
Source: github modelscope/facechain `face_adapter/vit.py`, DanJun6737/TransFace, ICCV 2023.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen import checkpoints
from facegen.checkpoints import Shapes

HEADS = 8
SIDE = 112  # pixels of the aligned face
BEHIND = ("feature.", "senet.", "mask_token")  # of the file, behind the tokens or for training alone


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        found = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(found.transpose(1, 2).flatten(2))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.relu6(self.fc1(x)))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Patches(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)


class TransFace(nn.Module):
    """Aligned faces (B, 3, 112, 112) RGB in [-1, 1] -> normalised patch tokens (B, 144, 512)."""

    def __init__(self, width: int = 512, *, patch: int = 9, depth: int = 12, inner: int = 2048) -> None:
        super().__init__()
        self.patch_embed = _Patches(width, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIDE // patch) ** 2, width))
        self.blocks = nn.ModuleList(_Block(width, inner) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> TransFace:
        width, _, patch, _ = shapes["patch_embed.proj.weight"]
        depth = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
        return cls(width, patch=patch, depth=depth, inner=shapes["blocks.0.mlp.fc1.weight"][0])

    @classmethod
    def from_file(cls, path: Path) -> TransFace:
        """From `ms1mv2_model_TransFace_S.pt`; WeightsMissing, CheckpointBroken."""
        tensors = {key: value for key, value in checkpoints.read(path).items() if not key.startswith(BEHIND)}
        checkpoints.require(tensors, "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", path=path)
        encoder = cls.from_shapes({key: tuple(value.shape) for key, value in tensors.items()})
        checkpoints.load_into(encoder, tensors, path=path)
        return encoder.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed  # (B, patches, width)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out
