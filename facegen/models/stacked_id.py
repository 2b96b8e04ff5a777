"""PhotoMaker's encoder of a person's photos: CLIP's view of them, stacked into the prompt's word for the person.

Key names and arithmetic of github TencentARC/PhotoMaker `photomaker/model.py` (v1) and `model_v2.py`; sizes come from
the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from facegen.checkpoints import Shapes, section
from facegen.models.clip import vision_config
from facegen.models.resampler import PerceiverResampler, PerceiverSizes

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

HEAD_WIDTH = 128  # of v2's resampler


class Mlp(nn.Module):
    """LayerNorm, widen, GELU, narrow; the residual is the caller's."""

    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, out)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(self.layernorm(x))))
        return out


class FuseModule(nn.Module):
    """A word's embeddings (…, D) and a person's (…, D) -> the word as this person, (…, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp1 = Mlp(2 * width, width, width)
        self.mlp2 = Mlp(width, width, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, words: Tensor, people: Tensor) -> Tensor:
        mixed = self.mlp1(torch.cat([words, people], dim=-1)) + words
        out: Tensor = self.layer_norm(self.mlp2(mixed) + mixed)
        return out


class FaceReader(nn.Module):
    """v2: a face embedding as tokens that read CLIP's patches of its photo."""

    def __init__(self, embedding: int, hidden: int, tokens: int, reader: PerceiverSizes) -> None:
        super().__init__()
        self.embedding, self.tokens, self.width = embedding, tokens, reader.dim
        self.token_proj = nn.Sequential(nn.Linear(embedding, hidden), nn.GELU(), nn.Linear(hidden, tokens * reader.dim))
        self.token_norm = nn.LayerNorm(reader.dim)
        self.perceiver_resampler = PerceiverResampler(reader)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> FaceReader:
        with _within("perceiver_resampler"):
            reader = PerceiverSizes.from_shapes(section(shapes, "perceiver_resampler"), HEAD_WIDTH)
        hidden, embedding = shapes["token_proj.0.weight"]
        return cls(embedding, hidden, shapes["token_proj.2.weight"][0] // reader.dim, reader)

    def forward(self, embeddings: Tensor, patches: Tensor) -> Tensor:
        """embeddings (N, D), patches (N, S, C) -> (N, tokens, width)."""
        tokens = self.token_norm(self.token_proj(embeddings).unflatten(-1, (-1, self.width)))
        read: Tensor = self.perceiver_resampler(tokens, patches)
        return tokens + read


class StackedID(nn.Module):
    """See the module's text; with a `reader` v2, without one v1.

    widths: of the two text encoders' tokens.
    """

    def __init__(self, vision: CLIPVisionConfig, widths: tuple[int, int], reader: FaceReader | None = None) -> None:
        from transformers import CLIPVisionModel

        super().__init__()
        self.vision_model = CLIPVisionModel(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, widths[0], bias=False)
        self.visual_projection_2 = nn.Linear(vision.hidden_size, widths[1], bias=False)
        self.fuse_module = FuseModule(sum(widths))
        self.qformer_perceiver = reader

    @classmethod
    def from_shapes(cls, shapes: Shapes, heads: int | None = None) -> StackedID:
        """heads: of the image encoder, see `vision_config`. Raises KeyError for a key that is missing, WrongRequest."""
        widths = shapes["visual_projection.weight"][0], shapes["visual_projection_2.weight"][0]
        parts = section(shapes, "qformer_perceiver")
        with _within("qformer_perceiver"):
            reader = FaceReader.from_shapes(parts) if parts else None
        with _within("vision_model"):
            vision = vision_config(section(shapes, "vision_model"), heads)
        return cls(vision, widths, reader)

    @property
    def width(self) -> int:
        """Width of the prompt's tokens."""
        return self.fuse_module.layer_norm.normalized_shape[0]

    @property
    def per_photo(self) -> int:
        """Tokens that each photo gives."""
        return 1 if self.qformer_perceiver is None else self.qformer_perceiver.tokens

    def people(self, pixels: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Photos' pixels (N, 3, S, S) and, for v2, their RAW face embeddings (N, D) -> (N, per_photo, width)."""
        seen = self.vision_model(pixels)
        if self.qformer_perceiver is None:
            pooled = seen.pooler_output
            return torch.cat([self.visual_projection(pooled), self.visual_projection_2(pooled)], dim=-1)[:, None]
        assert embeddings is not None, "v2 reads face embeddings"
        found: Tensor = self.qformer_perceiver(embeddings, seen.last_hidden_state)
        return found

    def stack(self, embeds: Tensor, places: Tensor, people: Tensor) -> Tensor:
        """The prompt (B, L, width) with its words at `places` (B, L), k in each row, made people (B, k, width)."""
        words = embeds[places].unflatten(0, (embeds.shape[0], -1))  # (B, k, width)
        return embeds.masked_scatter(places[..., None], self.fuse_module(words, people))


@contextmanager
def _within(name: str) -> Iterator[None]:
    """A key that is missing in a part is told by its whole name."""
    try:
        yield
    except KeyError as missing:
        raise KeyError(f"{name}.{missing.args[0]}") from missing
