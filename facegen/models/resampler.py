"""Perceiver resampler: queries that read a sequence and come out as a fixed number of tokens.

Key names and arithmetic are those of the IP-Adapter family (InstantID, FaceID-Plus), whose files load as they are.
Source: github tencent-ailab/IP-Adapter `ip_adapter/resampler.py`, after lucidrains' open_flamingo.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.checkpoints import Shapes


class PerceiverAttention(nn.Module):
    """Latents attend to the context and to themselves; both are normalised separately."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)  # of the context
        self.norm2 = nn.LayerNorm(dim)  # of the latents
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)  # rows of K first, then those of V
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """context (B, S, dim), latents (B, Q, dim) -> (B, Q, dim), without the residual."""
        context, latents = self.norm1(context), self.norm2(latents)
        query = self._split(self.to_q(latents))
        key, value = self.to_kv(torch.cat([context, latents], dim=1)).chunk(2, dim=-1)
        found = F.scaled_dot_product_attention(query, self._split(key), self._split(value))  # (B, heads, Q, dim_head)
        out: Tensor = self.to_out(found.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class PerceiverLayer(nn.ModuleList):
    """Attention, then feed-forward (LayerNorm, x4, GELU), each with a residual; `0` and `1.{0,1,3}` in the files."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        widen, narrow = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        feed_forward = nn.Sequential(nn.LayerNorm(dim), widen, nn.GELU(), narrow)
        super().__init__([PerceiverAttention(dim, heads, dim_head), feed_forward])

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """context (B, S, dim), latents (B, Q, dim) -> (B, Q, dim)."""
        attention, feed_forward = self
        latents = latents + attention(context, latents)
        out: Tensor = latents + feed_forward(latents)
        return out


@dataclass(frozen=True)
class PerceiverSizes:
    """Widths of the context that comes in, of the inside and of the tokens that go out; depth and heads."""

    context: int
    dim: int
    output: int
    depth: int
    heads: int
    dim_head: int = 64

    @classmethod
    def from_shapes(cls, shapes: Shapes, dim_head: int = 64) -> PerceiverSizes:
        """Sizes from a checkpoint; only the head width is not written there (64, in PhotoMaker's files 128)."""
        dim, context = shapes["proj_in.weight"]
        inner = shapes["layers.0.0.to_q.weight"][0]
        depth = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers."))
        dim_head = min(dim_head, inner)
        return cls(context, dim, shapes["proj_out.weight"][0], depth, inner // dim_head, dim_head)


class _Reader(nn.Module):
    """What both resamplers below share, keys included."""

    def __init__(self, sizes: PerceiverSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.proj_in = nn.Linear(sizes.context, sizes.dim)
        self.proj_out = nn.Linear(sizes.dim, sizes.output)
        self.norm_out = nn.LayerNorm(sizes.output)
        self.layers = nn.ModuleList(PerceiverLayer(sizes.dim, sizes.heads, sizes.dim_head) for _ in range(sizes.depth))

    def read(self, latents: Tensor, context: Tensor) -> Tensor:
        """latents (B, Q, dim), context (B, S, sizes.context) -> (B, Q, sizes.output)."""
        context = self.proj_in(context)
        for layer in self.layers:
            latents = layer(context, latents)
        out: Tensor = self.norm_out(self.proj_out(latents))
        return out


class PerceiverResampler(_Reader):
    """Latents given by the caller read a context: the resampler inside FaceID-Plus."""

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """latents (B, Q, dim), context (B, S, sizes.context) -> (B, Q, sizes.output)."""
        return self.read(latents, context)


class Resampler(_Reader):
    """Learned queries read a sequence of vectors: InstantID, FaceID-Portrait-unnorm, IP-Adapter-Plus.

    Several embeddings are several INPUT tokens of one person, not a batch.
    """

    def __init__(self, sizes: PerceiverSizes, queries: int) -> None:
        super().__init__(sizes)
        self.latents = nn.Parameter(torch.empty(1, queries, sizes.dim))
        nn.init.normal_(self.latents, std=sizes.dim**-0.5)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> Resampler:
        return cls(PerceiverSizes.from_shapes(shapes), shapes["latents"][1])

    @property
    def input_dim(self) -> int:
        """Length of the embeddings it takes."""
        return self.sizes.context

    @property
    def tokens(self) -> int:
        """Number of tokens it gives."""
        return self.latents.shape[1]

    def forward(self, embeddings: Tensor) -> Tensor:
        """embeddings (B, n, input_dim) -> (B, tokens, sizes.output)."""
        return self.read(self.latents.expand(embeddings.shape[0], -1, -1), embeddings)


def by_photo(features: Tensor) -> Tensor:
    """Features (B, D), (B, S, D) or (B, n, S, D) -> (B, n, S, D): S vectors of each of n photos of a person."""
    while features.ndim < 4:
        features = features.unsqueeze(1)
    return features
