"""From a face embedding to the tokens of the IP-Adapter-FaceID family.

Key names and arithmetic of github tencent-ailab/IP-Adapter `ip_adapter/ip_adapter_faceid.py`; sizes are read from the
file.
"""

from __future__ import annotations

from torch import Tensor, nn

from facegen.checkpoints import Shapes, section
from facegen.models.resampler import PerceiverResampler, depth_of


class FaceProjection(nn.Module):
    """LayerNorm(MLP(embedding)) as `tokens` tokens; the norm acts on each token."""

    def __init__(self, embedding_dim: int, hidden_dim: int, tokens: int, output_dim: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Sequential(
            nn.Linear(embedding_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, tokens * output_dim)
        )
        self.norm = nn.LayerNorm(output_dim)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> FaceProjection:
        hidden_dim, embedding_dim = shapes["proj.0.weight"]
        output_dim = shapes["norm.weight"][0]
        return cls(embedding_dim, hidden_dim, shapes["proj.2.weight"][0] // output_dim, output_dim)

    @property
    def input_dim(self) -> int:
        return self.proj[0].in_features  # pyright: ignore[reportReturnType]

    @property
    def output_dim(self) -> int:
        return self.norm.normalized_shape[0]

    def forward(self, embeddings: Tensor) -> Tensor:
        """embeddings (B, n, embedding_dim) -> (B, n · tokens, output_dim)."""
        tokens = self.proj(embeddings).unflatten(-1, (self.tokens, -1))  # (B, n, tokens, output_dim)
        return self.norm(tokens).flatten(1, 2)


class FacePlusProjection(FaceProjection):
    """The face tokens as queries into CLIP's patch tokens of the aligned face.

    Plus v1 returns what was read (shortcut=False), PlusV2 adds the face tokens to it (shortcut=True); their files
    have the same keys.
    """

    def __init__(self, face: FaceProjection, clip_dim: int, *, depth: int, heads: int, dim_head: int) -> None:
        dim = face.output_dim
        super().__init__(face.input_dim, face.proj[0].out_features, face.tokens, dim)  # pyright: ignore[reportArgumentType]
        self.perceiver_resampler = PerceiverResampler(
            clip_dim, dim, depth=depth, heads=heads, dim_head=dim_head, output_dim=dim
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes, dim_head: int = 64) -> FacePlusProjection:
        inner = section(shapes, "perceiver_resampler")
        return cls(
            FaceProjection.from_shapes(shapes),
            inner["proj_in.weight"][1],
            depth=depth_of(inner),
            heads=inner["layers.0.0.to_q.weight"][0] // dim_head,
            dim_head=dim_head,
        )

    @property
    def clip_dim(self) -> int:
        return self.perceiver_resampler.proj_in.in_features

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, embeddings: Tensor, clip: Tensor, *, shortcut: bool, structure: float = 1.0
    ) -> Tensor:
        """embeddings (B, 1, D), clip (B, S, clip_dim) -> (B, tokens, output_dim); `structure` weighs CLIP in PlusV2."""
        faces = super().forward(embeddings)
        read = self.perceiver_resampler(faces, clip)
        return faces + structure * read if shortcut else read
