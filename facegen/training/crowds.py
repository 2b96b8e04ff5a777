"""Pictures with several faces, or none, to learn detection from: the world's people pasted onto invented surroundings.

Real photos look like none of our renderings, so the surroundings and the treatment vary as wildly as they can, and much
of what resembles a face in one respect (skin-coloured ovals, shuffled pieces of faces, stripes) is shown as not one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facegen.training.cache import Cache

Picture = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Crowd:
    """One canvas (H, W, 3) uint8 with the boxes (N, 4) x0, y0, x1, y1 and points (N, 5, 2) of its faces, in pixels."""

    picture: Picture
    boxes: NDArray[np.float32]
    points: NDArray[np.float32]


@dataclass(frozen=True)
class CrowdSettings:
    size: int = 320
    smallest: float = 14.0  # pixels, longer side of the face box
    largest: float = 300.0
    empty: float = 0.1  # chance of a picture without faces
    turn: float = 0.25  # radians, standard deviation


CROWDED = CrowdSettings()


def crowd(cache: Cache, settings: CrowdSettings, generator: torch.Generator) -> Crowd:
    """One picture, drawn with ``generator`` alone."""
    import cv2

    random = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    size = settings.size
    canvas = _surroundings(cache, size, random)
    boxes: list[NDArray[np.float32]] = []
    points: list[NDArray[np.float32]] = []
    count = 0 if random.random() < settings.empty else int(random.choice([1, 1, 1, 2, 3, 5]))
    for _ in range(count):
        row = torch.tensor([int(random.integers(len(cache)))])
        box = cache.field("box", row)[0].float().numpy()
        width, height = box[2:] - box[:2]
        limit = settings.largest if count == 1 else 0.45 * settings.largest
        side = float(np.exp(random.uniform(np.log(settings.smallest), np.log(limit))))
        turn = float(settings.turn * random.standard_normal())
        scale = side / max(width, height)
        stretch = float(np.exp(random.normal(0, 0.07)))
        linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.diag([stretch, 1]) * scale
        half = np.hypot(linear[:, 0] * width / 2, linear[:, 1] * height / 2)  # of the turned oval's own box
        reach = 0.15 * half  # a face may be cut off a little by the picture's edge
        low, high = half - reach, size - 1 - half + reach
        place = np.where(high > low, low + (high - low) * random.random(2), size / 2)
        new = np.concatenate([place - half, place + half]).astype(np.float32)
        if any(_overlap(new, other) > 0.02 for other in boxes):
            continue
        shift = place - linear @ ((box[:2] + box[2:]) / 2)
        matrix = np.concatenate([linear, shift[:, None]], 1)
        picture = cache.field("rgb", row)[0].numpy()
        if scale < 0.5:  # bilinear sampling alone would leave out pixels
            sigma = 0.5 * (1 / scale - 1)
            picture = cv2.GaussianBlur(picture, (0, 0), sigma)
        drawn = cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_LINEAR)
        alpha = cv2.warpAffine(_cutout(cache, row, random), matrix, (size, size), flags=cv2.INTER_LINEAR)[..., None]
        canvas = (canvas + (drawn.astype(np.float32) - canvas) * alpha).astype(np.float32)
        boxes.append(new)
        points.append((cache.field("landmarks5", row)[0].float().numpy() @ linear.T + shift).astype(np.float32))
    canvas = _in_front(canvas, boxes, random)
    return Crowd(
        canvas.clip(0, 255).astype(np.uint8),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(points, np.float32).reshape(-1, 5, 2),
    )


def crowds(cache: Cache, count: int, settings: CrowdSettings, generator: torch.Generator) -> tuple[Tensor, list[Crowd]]:
    """Pictures (count, 3, size, size) float32 in [0, 1], and their faces."""
    drawn = [crowd(cache, settings, generator) for _ in range(count)]
    pictures = torch.from_numpy(np.stack([one.picture for one in drawn])).permute(0, 3, 1, 2).float() / 255
    return pictures, drawn


def _overlap(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    return float(np.prod((high - low).clip(0)) / min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2])))


def _cutout(cache: Cache, row: Tensor, random: np.random.Generator) -> NDArray[np.float32]:
    """How much of each pixel is pasted, (H, W): the person cut out, or the whole picture."""
    parsing = cache.field("parsing", row)[0].numpy()
    if random.random() < 0.25:
        return np.ones(parsing.shape, np.float32)
    return (parsing > 0).astype(np.float32)


def _surroundings(cache: Cache, size: int, random: np.random.Generator) -> NDArray[np.float32]:
    """(size, size, 3) float32, 0 to 255, without a face."""
    import cv2

    kind = random.random()
    if kind < 0.4:
        cells = int(random.choice([2, 3, 5, 9, 20, 60]))
        canvas = cv2.resize(random.uniform(0, 255, (cells, cells, 3)).astype(np.float32), (size, size),
                            interpolation=cv2.INTER_CUBIC)  # fmt: skip
    elif kind < 0.7:
        canvas = np.empty((size, size, 3), np.float32)
        ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
        canvas[:] = random.uniform(0, 255, 3) * ramp + random.uniform(0, 255, 3) * (1 - ramp)
        canvas = np.rot90(canvas, int(random.integers(4))).copy()
    else:
        canvas = _shuffled_pieces(cache, size, random)
    canvas = np.ascontiguousarray(canvas, np.float32)
    for _ in range(int(random.integers(0, 14))):
        _shape(canvas, random)
    if random.random() < 0.5:
        grain = random.normal(0, random.uniform(3, 40), (size // 2, size // 2, 3)).astype(np.float32)
        canvas += cv2.resize(grain, (size, size))
    if random.random() < 0.4:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), float(random.uniform(0.5, 4))), np.float32)
    return canvas


def _shuffled_pieces(cache: Cache, size: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Hair, skin and cloth, but no face: small pieces of several pictures in random order."""
    import cv2

    rows = torch.from_numpy(random.integers(len(cache), size=4))
    pictures = cache.field("rgb", rows).numpy()
    side = pictures.shape[1]
    piece = int(random.choice([8, 16, 24]))
    count = -(-size // (2 * piece))
    canvas = np.empty((count * 2 * piece, count * 2 * piece, 3), np.float32)
    for y in range(count):
        for x in range(count):
            top, left = random.integers(side - piece, size=2)
            cut = pictures[int(random.integers(4)), top : top + piece, left : left + piece].astype(np.float32)
            canvas[y * 2 * piece :, x * 2 * piece :][: 2 * piece, : 2 * piece] = cv2.resize(cut, (2 * piece, 2 * piece))
    return canvas[:size, :size]


def _shape(canvas: NDArray[np.float32], random: np.random.Generator) -> None:
    """One oval, rectangle, line or polygon, drawn in place."""
    import cv2

    size = len(canvas)
    skin = random.random() < 0.3
    tone = np.array([random.uniform(90, 255), 0, 0])
    color = (tone[0], tone[0] * 0.78, tone[0] * 0.65) if skin else tuple(random.uniform(0, 255, 3).tolist())
    centre = tuple(int(v) for v in random.integers(0, size, 2))
    extent = tuple(int(v) for v in np.exp(random.uniform(np.log(4), np.log(size / 2.5), 2)))
    thickness = -1 if random.random() < 0.7 else int(random.integers(1, 8))
    kind = int(random.integers(4))
    if kind == 0:
        cv2.ellipse(canvas, centre, extent, float(random.uniform(0, 180)), 0, 360, color, thickness)
    elif kind == 1:
        corner = (centre[0] + extent[0], centre[1] + extent[1])
        cv2.rectangle(canvas, centre, corner, color, thickness)
    elif kind == 2:
        end = tuple(int(v) for v in random.integers(0, size, 2))
        cv2.line(canvas, centre, end, color, int(random.integers(1, 16)))
    else:
        corners = np.array(centre) + random.normal(0, 1, (int(random.integers(3, 7)), 2)) * extent
        cv2.fillPoly(canvas, [corners.astype(np.int32)], color)


def _in_front(
    canvas: NDArray[np.float32], boxes: list[NDArray[np.float32]], random: np.random.Generator
) -> NDArray[np.float32]:
    """Light and shade over everything, and now and then a bar across a face."""
    import cv2

    size = len(canvas)
    if random.random() < 0.4:
        cells = int(random.choice([2, 3, 4]))
        shade = random.uniform(0.35, 1.25, (cells, cells)).astype(np.float32)
        canvas = canvas * cv2.resize(shade, (size, size), interpolation=cv2.INTER_CUBIC)[..., None]
    if random.random() < 0.25:
        texture = random.normal(1, random.uniform(0.03, 0.2), (size // 2, size // 2)).astype(np.float32)
        canvas = canvas * cv2.resize(texture, (size, size))[..., None]
    for box in boxes:
        if random.random() < 0.15:  # at most the lower or outer third of the face
            low, high = box[:2], box[2:]
            corner = low + (high - low) * np.array([random.uniform(-0.2, 0.4), random.uniform(0.65, 0.9)])
            end = corner + (high - low) * random.uniform(0.3, 1.0, 2)
            color = tuple(random.uniform(0, 255, 3).tolist())
            canvas = np.ascontiguousarray(canvas)
            cv2.rectangle(canvas, corner.astype(int).tolist(), end.astype(int).tolist(), color, -1)
    return canvas
