"""What is known of one face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def unit(vector: Array) -> Array:
    """`vector` (…, D) scaled to length one; a zero vector stays zero."""
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    scaled: Array = vector / np.maximum(length, 1e-12)
    return scaled


@dataclass(frozen=True, eq=False)
class Detection:
    """A place in a picture that looks like a face."""

    box: Array  # (4,) float32: x0, y0, x1, y1 in pixels
    score: float  # 0 to 1
    points: Array | None = None  # (5, 2) float32: eyes, nose tip, mouth corners, left before right in the picture

    @property
    def area(self) -> float:
        return float(max(0.0, self.box[2] - self.box[0]) * max(0.0, self.box[3] - self.box[1]))


@dataclass(frozen=True, eq=False)
class Face:
    """One face in one photo."""

    box: Array  # (4,) float32: x0, y0, x1, y1 in pixels of the photo
    points: Array  # (5, 2) float32 in pixels, insightface's order: eyes, nose tip, mouth corners, left before right
    score: float  # the detector's, 0 to 1
    embedding: Array  # (D,) float32: the RAW ArcFace output, not normalised
    image: Image.Image  # the whole photo, RGB

    @property
    def unit(self) -> Array:
        """The embedding at length one, (D,) float32."""
        return unit(self.embedding).astype(np.float32)

    @property
    def area(self) -> float:
        """Of the box, in pixels²."""
        return float(max(0.0, self.box[2] - self.box[0]) * max(0.0, self.box[3] - self.box[1]))
