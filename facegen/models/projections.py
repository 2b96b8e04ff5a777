"""From a face embedding, or what CLIP sees of a photo, to the tokens of the IP-Adapter family.

Key names and arithmetic of github tencent-ailab/IP-Adapter `ip_adapter/{ip_adapter,ip_adapter_faceid}.py`; sizes come
from the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from facegen.checkpoints import Shapes, section
from facegen.models.resampler import PerceiverResampler, PerceiverSizes


@dataclass(frozen=True)
class ProjectionSizes:
    """Length of the embedding, width inside, number and width of the tokens."""

    embedding: int
    hidden: int
    tokens: int
    output: int

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> ProjectionSizes:
        hidden, embedding = shapes["proj.0.weight"]
        output = shapes["norm.weight"][0]
        return cls(embedding, hidden, shapes["proj.2.weight"][0] // output, output)


class _Mlp(nn.Module):
    def __init__(self, sizes: ProjectionSizes) -> None:
        super().__init__()
        self.sizes = sizes
        out = sizes.tokens * sizes.output
        self.proj = nn.Sequential(nn.Linear(sizes.embedding, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, out))
        self.norm = nn.LayerNorm(sizes.output)

    def faces(self, embeddings: Tensor) -> Tensor:
        """embeddings (B, n, sizes.embedding) -> (B, n · tokens, output); the norm acts on each token."""
        tokens = self.proj(embeddings).view(embeddings.shape[0], -1, self.sizes.output)
        out: Tensor = self.norm(tokens)
        return out


class FaceProjection(_Mlp):
    """LayerNorm(MLP(embedding)): FaceID (4 tokens) and FaceID-Portrait (16 tokens for each of several photos)."""

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> FaceProjection:
        return cls(ProjectionSizes.from_shapes(shapes))

    def forward(self, embeddings: Tensor) -> Tensor:
        """embeddings (B, n, sizes.embedding) -> (B, n · tokens, output)."""
        return self.faces(embeddings)


class FacePlusProjection(_Mlp):
    """The face tokens as queries into CLIP's patch tokens of the aligned face.

    Plus v1 returns what was read (shortcut=False), PlusV2 adds the face tokens to it (shortcut=True); their files have
    the same keys.
    """

    def __init__(self, sizes: ProjectionSizes, reader: PerceiverSizes) -> None:
        super().__init__(sizes)
        self.perceiver_resampler = PerceiverResampler(reader)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> FacePlusProjection:
        reader = PerceiverSizes.from_shapes(section(shapes, "perceiver_resampler"))
        return cls(ProjectionSizes.from_shapes(shapes), reader)

    def forward(self, embeddings: Tensor, clip: Tensor, *, shortcut: bool, structure: float = 1.0) -> Tensor:
        """embeddings (B, n, D), clip (B, S, C) -> (B, n · tokens, output); `structure` weighs CLIP in PlusV2."""
        faces = self.faces(embeddings)
        read: Tensor = self.perceiver_resampler(faces, clip)
        return faces + structure * read if shortcut else read


class LinearProjection(nn.Module):
    """LayerNorm of one linear layer cut into tokens: the plain IP-Adapter, which reads CLIP's pooled embedding."""

    def __init__(self, features: int, tokens: int, output: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(features, tokens * output)
        self.norm = nn.LayerNorm(output)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> LinearProjection:
        rows, features = shapes["proj.weight"]
        output = shapes["norm.weight"][0]
        return cls(features, rows // output, output)

    @property
    def input_dim(self) -> int:
        """Length of what it reads."""
        return self.proj.in_features

    def forward(self, features: Tensor) -> Tensor:
        """features (B, n, input_dim) -> (B, n · tokens, output)."""
        out: Tensor = self.norm(self.proj(features).unflatten(-1, (self.tokens, -1)).flatten(1, 2))
        return out


class PatchProjection(nn.Module):
    """Each of CLIP's patch tokens becomes a token by itself: the full-face IP-Adapter."""

    def __init__(self, features: int, output: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(features, features), nn.GELU(), nn.Linear(features, output), nn.LayerNorm(output)
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> PatchProjection:
        output, features = shapes["proj.2.weight"]
        return cls(features, output)

    @property
    def input_dim(self) -> int:
        """Width of the patch tokens."""
        first = self.proj[0]
        assert isinstance(first, nn.Linear)
        return first.in_features

    def forward(self, features: Tensor) -> Tensor:
        """features (B, S, input_dim) -> (B, S, output)."""
        out: Tensor = self.proj(features)
        return out
