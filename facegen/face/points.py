"""Five points in a face box by the embedded pack's small net (points.onnx)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from facegen.face.types import Array

MARGIN = 1.4  # side of the net's crop, in larger sides of the face box (facegen.training.points)
_MIRROR = [1, 0, 2, 4, 3]


class PointNet:
    """A `PointFinder` around an ONNX net: gray crops (B, 1, S, S) in [-1, 1] to points (B, 5, 2) in crop sides."""

    def __init__(self, path: Path, providers: list[str]) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=providers)
        self.input = self.session.get_inputs()[0].name
        self.size = int(self.session.get_inputs()[0].shape[-1])

    def __call__(self, image: Image.Image, boxes: Array) -> Array:
        """Points (N, 5, 2) float32 in pixels for boxes (N, 4)."""
        if not len(boxes):
            return np.zeros((0, 5, 2), np.float32)
        # The net was taught plain means of the channels.
        gray = Image.fromarray(np.asarray(image.convert("RGB"), np.float32).mean(axis=2))
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        sides = MARGIN * np.maximum((boxes[:, 2:] - boxes[:, :2]).max(axis=1), 1.0)
        turns = np.zeros(len(boxes))
        points = self._found(gray, centres, sides, turns)
        # Once more about what was found, upright: the net is at its best there.
        eyes = points[:, 1] - points[:, 0]
        again = self._found(gray, centres, sides, np.arctan2(eyes[:, 1], eyes[:, 0]))
        answer: Array = again.astype(np.float32)
        return answer

    def _found(self, gray: Image.Image, centres: Array, sides: Array, turns: Array) -> Array:
        """Points of square crops about `centres` (N, 2), `sides` (N,) wide, turned by `turns` (N,) radians."""
        size = self.size
        crops = np.stack([_crop(gray, c, s, t, size) for c, s, t in zip(centres, sides, turns, strict=True)])
        batch = (crops / 127.5 - 1)[:, None].astype(np.float32)
        both = np.concatenate([batch, batch[..., ::-1]])  # the picture and its mirror image
        answer: Array = self.session.run(None, {self.input: both})[0] * size
        plain, mirrored = np.split(answer, 2)
        other = np.stack([size - 1 - mirrored[..., 0], mirrored[..., 1]], axis=2)[:, _MIRROR]
        offsets = ((plain + other) / 2 - (size - 1) / 2) * (sides / size)[:, None, None]
        cosine, sine = np.cos(turns)[:, None], np.sin(turns)[:, None]
        x = offsets[..., 0] * cosine - offsets[..., 1] * sine
        y = offsets[..., 0] * sine + offsets[..., 1] * cosine
        points: Array = np.stack([x, y], axis=2) + centres[:, None]
        return points


def _crop(gray: Image.Image, centre: Array, side: float, turn: float, size: int) -> Array:
    """(size, size) gray levels; the photo's rim goes on outside it."""
    import cv2  # type: ignore[import-not-found, unused-ignore]

    # First a plain piece somewhat larger than the turned crop, shrunk with a filter, then the turn.
    reach = side * 0.75
    left, top = max(0.0, centre[0] - reach), max(0.0, centre[1] - reach)
    right, bottom = min(float(gray.width), centre[0] + reach), min(float(gray.height), centre[1] + reach)
    if right - left < 2 or bottom - top < 2:
        return np.zeros((size, size), np.float32)
    scale = size / side
    width, height = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    piece = np.asarray(gray.resize((width, height), Image.Resampling.BILINEAR, (left, top, right, bottom)))
    across, down = width / (right - left), height / (bottom - top)
    x, y = (centre[0] - left) * across - 0.5, (centre[1] - top) * down - 0.5
    cosine, sine = np.cos(turn), np.sin(turn)
    middle = (size - 1) / 2
    # Crop pixel to piece pixel: turn about the middle, then move it to the centre.
    matrix = np.array(
        [[cosine, -sine, x - cosine * middle + sine * middle], [sine, cosine, y - sine * middle - cosine * middle]]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    crop: Array = cv2.warpAffine(piece, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return crop
