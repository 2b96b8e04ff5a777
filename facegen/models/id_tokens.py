"""PuLID's encoders: a face's vector and five views of it by EVA-CLIP -> tokens.

Key names and arithmetic of github ToTheBeginning/PuLID `pulid/encoders.py` (v1) and `pulid/encoders_transformer.py`
(v1.1); sizes come from the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from facegen.checkpoints import Shapes, count
from facegen.models.resampler import PerceiverLayer

VIEWS = 5
HEAD_WIDTH = 64


class Mapper(nn.Sequential):
    """Linear, LayerNorm, LeakyReLU, twice, then Linear."""

    def __init__(self, before: int, inner: tuple[int, int], after: int) -> None:
        super().__init__(
            nn.Linear(before, inner[0]),
            nn.LayerNorm(inner[0]),
            nn.LeakyReLU(),
            nn.Linear(inner[0], inner[1]),
            nn.LayerNorm(inner[1]),
            nn.LeakyReLU(),
            nn.Linear(inner[1], after),
        )


def inside(shapes: Shapes, name: str) -> tuple[int, int]:
    """The widths inside a mapper."""
    return shapes[f"{name}.0.weight"][0], shapes[f"{name}.3.weight"][0]


@dataclass(frozen=True)
class TokenSizes:
    """Lengths of a face's vector (ArcFace's and EVA-CLIP's) and of a view's rows; widths inside the mapper of the
    vector and inside those of the views, of the transformer (v1.1) and of the tokens; how many tokens the vector gives;
    queries, layers and heads of the transformer (None: as many as are 64 wide in `dim`).
    """

    vector: int = 1280
    view: int = 1024
    body: tuple[int, int] = (1024, 1024)
    inner: tuple[int, int] = (1024, 1024)
    dim: int = 1024
    output: int = 2048
    own: int = 5
    queries: int = 32
    depth: int = 10
    heads: int | None = None


class IDEncoder(nn.Module):
    """v1: tokens of the vector, then one per view."""

    def __init__(self, sizes: TokenSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.body = Mapper(sizes.vector, sizes.body, sizes.own * sizes.output)
        for place in range(VIEWS):
            self.add_module(f"mapping_{place}", Mapper(sizes.view, sizes.inner, sizes.output))
            self.add_module(f"mapping_patch_{place}", Mapper(sizes.view, sizes.inner, sizes.output))

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> IDEncoder:
        """Raises KeyError for a key that is missing."""
        vector, view = shapes["body.0.weight"][1], shapes["mapping_0.0.weight"][1]
        output = shapes["mapping_0.6.weight"][0]
        own = shapes["body.6.weight"][0] // output
        sizes = TokenSizes(vector, view, inside(shapes, "body"), inside(shapes, "mapping_0"), output=output, own=own)
        return cls(sizes)

    @property
    def own(self) -> int:
        """Tokens of the vector alone."""
        return self.sizes.own

    def forward(self, vectors: Tensor, views: Sequence[Tensor]) -> Tensor:
        """vectors (N, vector), views 5 × (N, S, view), the class token's row first -> (N, own + 5, output)."""
        tokens = [self.body(vectors).unflatten(-1, (self.own, -1))]
        for place, view in enumerate(views):
            whole = self.get_submodule(f"mapping_{place}")(view[:, :1])
            patches = self.get_submodule(f"mapping_patch_{place}")(view[:, 1:])
            tokens.append(whole + patches.mean(dim=1, keepdim=True))
        return torch.cat(tokens, dim=1)


class IDFormer(nn.Module):
    """v1.1: learned queries read the vector's tokens and, stage by stage, the views."""

    def __init__(self, sizes: TokenSizes) -> None:
        super().__init__()
        self.sizes = sizes
        scale = sizes.dim**-0.5
        self.latents = nn.Parameter(torch.randn(1, sizes.queries, sizes.dim) * scale)
        self.proj_out = nn.Parameter(torch.randn(sizes.dim, sizes.output) * scale)
        heads = sizes.heads or max(sizes.dim // HEAD_WIDTH, 1)
        self.layers = nn.ModuleList(PerceiverLayer(sizes.dim, heads, HEAD_WIDTH) for _ in range(sizes.depth))
        for place in range(VIEWS):
            self.add_module(f"mapping_{place}", Mapper(sizes.view, sizes.inner, sizes.dim))
        self.id_embedding_mapping = Mapper(sizes.vector, sizes.body, sizes.own * sizes.dim)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> IDFormer:
        """Raises KeyError for a key that is missing."""
        _, queries, dim = shapes["latents"]
        vector, view = shapes["id_embedding_mapping.0.weight"][1], shapes["mapping_0.0.weight"][1]
        body, inner = inside(shapes, "id_embedding_mapping"), inside(shapes, "mapping_0")
        own = shapes["id_embedding_mapping.6.weight"][0] // dim
        output, depth = shapes["proj_out"][1], count(shapes, "layers")
        heads = shapes["layers.0.0.to_q.weight"][0] // HEAD_WIDTH
        own_heads = None if heads == max(dim // HEAD_WIDTH, 1) else heads
        return cls(TokenSizes(vector, view, body, inner, dim, output, own, queries, depth, own_heads))

    def forward(self, vectors: Tensor, views: Sequence[Tensor]) -> Tensor:
        """vectors (N, n, vector) of n photos of a person, views 5 × (N, n · S, view) -> (N, queries, output)."""
        people = self.id_embedding_mapping(vectors).reshape(vectors.shape[0], -1, self.sizes.dim)  # (N, 5 n, dim)
        latents = torch.cat([self.latents.expand(vectors.shape[0], -1, -1), people], dim=1)
        stage = self.sizes.depth // VIEWS
        for place, view in enumerate(views):
            context = torch.cat([people, self.get_submodule(f"mapping_{place}")(view)], dim=1)
            for layer in self.layers[place * stage : (place + 1) * stage]:
                latents = layer(context, latents)
        out: Tensor = latents[:, : self.sizes.queries] @ self.proj_out
        return out
