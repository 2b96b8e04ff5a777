"""Which faces a photo shows, and whether two photos show the same person."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from facegen import examples
from facegen.request import Photo

if TYPE_CHECKING:
    from PIL import Image

    from facegen.face.types import Face

Select = Literal["only", "largest", "central"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sight:
    """One photo and its faces, the surest first."""

    name: str
    image: Image.Image
    faces: tuple[Face, ...]
    providers: tuple[str, ...]  # what onnxruntime ran on

    def __str__(self) -> str:
        count = {0: "no face", 1: "1 face"}.get(len(self.faces), f"{len(self.faces)} faces")
        lines = [f"{self.name} ({self.image.width}×{self.image.height}): {count}"]
        for place, face in enumerate(self.faces, 1):
            left, top, right, bottom = (round(float(edge)) for edge in face.box)
            where = f"at ({left}, {top}), {right - left}×{bottom - top} pixels"
            lines.append(f"  {place}. {where}, score {face.score:.2f}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data: boxes as x0, y0, x1, y1 and five points each as x, y, in pixels."""
        return {
            "photo": self.name,
            "width": self.image.width,
            "height": self.image.height,
            "providers": list(self.providers),
            "faces": [
                {
                    "box": [round(float(edge), 1) for edge in face.box],
                    "score": round(float(face.score), 4),
                    "points": [[round(float(x), 1), round(float(y), 1)] for x, y in face.points],
                }
                for face in self.faces
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """cosine: of the two embeddings, -1 to 1; from `threshold` on it counts as one person (None: not known)."""

    cosine: float
    threshold: float | None
    pack: str

    @property
    def same(self) -> bool | None:
        """None where there is no threshold."""
        return None if self.threshold is None else self.cosine >= self.threshold

    def __str__(self) -> str:
        if self.threshold is None:
            return f"cosine {self.cosine:.3f} ({self.pack} names no threshold; give one with --threshold)"
        word = "the same person" if self.same else "two different people"
        return f"{word}: cosine {self.cosine:.3f}, threshold {self.threshold:.3f} ({self.pack})"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"same": self.same, "cosine": round(self.cosine, 5), "threshold": self.threshold, "pack": self.pack}


def opened(photo: Photo, what: str = "photo") -> Image.Image:
    """A photo by path, by an example's name, or in any form that facegen.images reads."""
    from facegen.images import load_rgb

    return examples.photo(photo) if examples.is_example(photo) else load_rgb(photo, what=what)


def look(photos: Sequence[Photo], pack: str = "mini") -> list[Sight]:
    """Find all faces of each photo; a photo without one is no error here. Raises BadImage, WeightsMissing."""
    from facegen.face.analyze import FaceAnalyzer

    images = [opened(photo) for photo in photos]
    analyzer = FaceAnalyzer.from_pretrained(pack)
    return [
        Sight(name=_name(photo), image=image, faces=tuple(analyzer.faces(image)), providers=analyzer.providers)
        for photo, image in zip(photos, images, strict=True)
    ]


def compare(
    first: Photo, second: Photo, pack: str = "mini", select: Select = "only", threshold: float | None = None
) -> Verdict:
    """Whether two photos show one person. Raises BadImage, NoFaceFound, SeveralFaces, WeightsMissing."""
    from facegen.face.analyze import FaceAnalyzer

    images = opened(first, "first photo"), opened(second, "second photo")
    analyzer = FaceAnalyzer.from_pretrained(pack)
    one, other = (
        analyzer.face(image, select=select, what=_name(photo))
        for image, photo in zip(images, (first, second), strict=True)
    )
    limit = analyzer.threshold if threshold is None else threshold
    return Verdict(cosine=float(one.unit @ other.unit), threshold=limit, pack=pack)


def annotated(sight: Sight) -> Image.Image:
    """A copy of the photo with boxes, points and scores drawn in."""
    from PIL import ImageDraw

    drawn = sight.image.copy()
    pen = ImageDraw.Draw(drawn)
    thick = max(1, round(min(drawn.size) / 250))
    for place, face in enumerate(sight.faces, 1):
        box = [float(edge) for edge in face.box]
        pen.rectangle(box, outline=(40, 220, 90), width=thick)
        pen.text((box[0] + 2 * thick, box[1] + thick), f"{place}  {face.score:.2f}", fill=(40, 220, 90))
        for x, y in face.points:
            pen.ellipse((x - 2 * thick, y - 2 * thick, x + 2 * thick, y + 2 * thick), fill=(255, 80, 60))
    return drawn


def _name(photo: Photo) -> str:
    return os.fspath(photo) if isinstance(photo, (str, os.PathLike)) else "photo"
