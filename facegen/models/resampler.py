"""Perceiver resampler: learned queries that read a sequence and come out as a fixed number of tokens.

Key names and arithmetic are those of the IP-Adapter family (InstantID, FaceID-Plus), so that its files load as they
are.
Source: github tencent-ailab/IP-Adapter `ip_adapter/resampler.py`, after lucidrains' open_flamingo.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.checkpoints import Shapes


class PerceiverAttention(nn.Module):
    """Latents (B, Q, dim) attend to the context and to themselves; both are normalised separately."""

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
        out = F.scaled_dot_product_attention(query, self._split(key), self._split(value))  # (B, heads, Q, dim_head)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def perceiver_layers(dim: int, depth: int, heads: int, dim_head: int) -> nn.ModuleList:
    """`depth` pairs of attention and feed-forward (LayerNorm, x4, GELU), named layers.i.0 and layers.i.1.{0,1,3}."""
    return nn.ModuleList(
        nn.ModuleList(
            [
                PerceiverAttention(dim, heads, dim_head),
                nn.Sequential(
                    nn.LayerNorm(dim),
                    nn.Linear(dim, 4 * dim, bias=False),
                    nn.GELU(),
                    nn.Linear(4 * dim, dim, bias=False),
                ),
            ]
        )
        for _ in range(depth)
    )


class PerceiverResampler(nn.Module):
    """Latents given by the caller read a context: the resampler inside FaceID-Plus."""

    def __init__(self, context_dim: int, dim: int, *, depth: int, heads: int, dim_head: int, output_dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(context_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = perceiver_layers(dim, depth, heads, dim_head)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """latents (B, Q, dim), context (B, S, context_dim) -> (B, Q, output_dim)."""
        context = self.proj_in(context)
        for attention, feed_forward in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            latents = attention(context, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm_out(self.proj_out(latents))


class Resampler(PerceiverResampler):
    """Learned queries read a sequence of vectors: InstantID, FaceID-Portrait-unnorm, IP-Adapter-Plus.

    Several embeddings are several INPUT tokens of one person, not a batch.
    """

    def __init__(
        self, context_dim: int, dim: int, *, depth: int, heads: int, dim_head: int, queries: int, output_dim: int
    ) -> None:
        super().__init__(context_dim, dim, depth=depth, heads=heads, dim_head=dim_head, output_dim=output_dim)
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)

    @classmethod
    def from_shapes(cls, shapes: Shapes, dim_head: int = 64) -> Resampler:
        """Sizes from a checkpoint; only the head width is not written there (64 in every known file)."""
        _, queries, dim = shapes["latents"]
        return cls(
            shapes["proj_in.weight"][1],
            dim,
            depth=depth_of(shapes),
            heads=shapes["layers.0.0.to_q.weight"][0] // dim_head,
            dim_head=dim_head,
            queries=queries,
            output_dim=shapes["proj_out.weight"][0],
        )

    @property
    def input_dim(self) -> int:
        return self.proj_in.in_features

    @property
    def output_dim(self) -> int:
        return self.proj_out.out_features

    @property
    def queries(self) -> int:
        return self.latents.shape[1]

    def forward(self, embeddings: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """embeddings (B, n, context_dim) -> (B, queries, output_dim)."""
        return super().forward(self.latents.expand(embeddings.shape[0], -1, -1), embeddings)


def depth_of(shapes: Shapes) -> int:
    """Number of perceiver layers in a state dict."""
    return 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers."))
