"""A classical face detector beside the learnt one, and what both share: merging by overlap, points from a box.

The embedded pack's detector learnt from drawings; on photographs the cascade of local binary patterns that scikit-image
ships (OpenCV's lbpcascade_frontalface, trained on real faces) finds frontal faces it may miss. One pass of the cascade
is rough, so several passes at slightly different scales, mirrored and turned, vote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from facegen.face.types import Array, Detection

# Boxes (N, 4) in a picture to their five points (N, 5, 2), all in pixels of the picture.
PointFinder: TypeAlias = Callable[[Image.Image, Array], Array]

# Where the five points of a frontal face lie in a cascade's box, in its sides.
MEAN_SHAPE: Array = np.array([[0.30, 0.37], [0.70, 0.37], [0.50, 0.60], [0.34, 0.79], [0.66, 0.79]], dtype=np.float32)
_WINDOW = 24  # the cascade's smallest face, in pixels


def mean_shape(image: Image.Image, boxes: Array) -> Array:
    """Points of an average upright face in each box: the fall-back where no net finds them."""
    sides = boxes[:, None, 2:] - boxes[:, None, :2]  # (N, 1, 2)
    points: Array = (boxes[:, None, :2] + sides * MEAN_SHAPE).astype(np.float32)
    return points


def overlap(box: Array, boxes: Array) -> Array:
    """Intersection over union of one box (4,) with many (N, 4): (N,)."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
    union = float(np.clip(box[2:] - box[:2], 0, None).prod()) + areas - shared
    ratio: Array = shared / np.maximum(union, 1e-9)
    return ratio


def covered(box: Array, boxes: Array) -> Array:
    """The part of the smaller of two boxes that lies in the other, one box (4,) with many (N, 4): (N,)."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
    smaller = np.minimum(areas, float(np.clip(box[2:] - box[:2], 0, None).prod()))
    ratio: Array = shared / np.maximum(smaller, 1e-9)
    return ratio


def merge(detections: Sequence[Detection], *, iou: float = 0.4, inside: float = 0.8) -> list[Detection]:
    """Non-maximum suppression: by descending score, without what overlaps, or mostly lies in, a better one."""
    kept: list[Detection] = []
    for candidate in sorted(detections, key=lambda detection: -detection.score):
        if kept:
            boxes = np.stack([detection.box for detection in kept])
            if (overlap(candidate.box, boxes) > iou).any() or (covered(candidate.box, boxes) > inside).any():
                continue
        kept.append(candidate)
    return kept


@dataclass(frozen=True)
class Trust:
    """When two detectors are believed, alone and together; measured like `CascadeSettings`."""

    faint: float = 0.3  # a learnt score that counts where the cascade agrees
    alone: float = 0.5  # a learnt score that counts by itself
    beside: float = 0.75  # a score of either that counts in a picture where both agree on another face
    votes: float = 0.5  # a cascade score that counts by itself: ornaments gather almost as many votes as faces
    iou: float = 0.3  # overlap from which on two boxes mean one face


def agree(learnt: Sequence[Detection], classical: Sequence[Detection], trust: Trust | None = None) -> list[Detection]:
    """What a learnt detector and the cascade find together, by descending score.

    Where both see a face, their scores add up like independent witnesses; the learnt box and points are taken where
    that detector is sure enough, else the cascade's box, without points.
    """
    trust = trust or Trust()
    rest = merge([detection for detection in learnt if detection.score >= trust.faint])
    found: list[Detection] = []
    single: list[Detection] = []
    for box in classical:
        shared = overlap(box.box, np.stack([d.box for d in rest])) if rest else np.zeros(0)
        if len(shared) and shared.max() > trust.iou:
            partner = rest.pop(int(shared.argmax()))
            sure = partner.score >= trust.alone
            both = 1 - (1 - partner.score) * (1 - box.score)
            found.append(Detection(partner.box if sure else box.box, both, partner.points if sure else None))
        else:
            single.append(box)
    single = [detection for detection in single if detection.score >= (trust.beside if found else trust.votes)]
    rest = [detection for detection in rest if detection.score >= (trust.beside if found else trust.alone)]
    return merge([*found, *single, *rest], iou=0.3, inside=0.6)


@dataclass(frozen=True)
class CascadeSettings:
    """How thoroughly the cascade looks.

    Measured on 23 photographs with 25 faces, some blurred: true faces gather 20 to 180 votes, other things at most 27.
    """

    turned: tuple[int, ...] = (96, 128, 160)  # the longer side of the picture, in pixels, of the passes with turns
    straight: tuple[int, ...] = (200, 256, 320)  # and of those without: dearer, for smaller faces
    angles: tuple[float, ...] = (-12.0, 12.0)  # degrees
    step: float = 1.1  # from one window size to the next
    votes: int = 8  # windows that must agree; `Trust` asks for more where nobody else sees a face
    part: float = 0.2  # of the best face's votes, below which nothing beside it counts
    certain: int = 60  # votes that make a score of one


FINE = CascadeSettings(turned=(), straight=(400, 560))  # for faces a thirtieth of the picture wide


class Cascade:
    """Frontal faces by the cascade; a score of one is `certain` votes."""

    def __init__(self, settings: CascadeSettings | None = None) -> None:
        self.settings = settings or CascadeSettings()

    def __call__(self, image: Image.Image) -> list[Detection]:
        """Detections without points, by descending score."""
        gray = image.convert("L")
        settings = self.settings
        found = [np.zeros((0, 4))]
        passes = [(side, angle) for side in settings.turned for angle in (0.0, *settings.angles)]
        for side, angle in passes + [(side, 0.0) for side in settings.straight]:
            if side > 1.5 * max(gray.size):
                continue  # enlarged that far, a picture shows nothing new
            found += [self._pass(gray, side, angle, mirrored) for mirrored in (False, True)]
        return self._vote(np.concatenate(found))

    def _pass(self, gray: Image.Image, side: int, angle: float, mirrored: bool) -> Array:
        """Boxes (N, 4) in pixels of the picture."""
        scale = side / max(gray.size)
        width, height = max(1, round(gray.width * scale)), max(1, round(gray.height * scale))
        if min(width, height) < _WINDOW:
            return np.zeros((0, 4))
        small = gray.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        if mirrored:
            small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if angle:
            small = small.rotate(angle, Image.Resampling.BILINEAR, fillcolor=127)
        found = _cascade().detect_multi_scale(
            img=np.asarray(small),
            scale_factor=self.settings.step,
            step_ratio=1.0,
            min_size=(_WINDOW, _WINDOW),
            max_size=(side, side),
            min_neighbor_number=1,
            intersection_score_threshold=0.999,  # as good as no grouping: the votes of all passes are counted together
        )
        boxes = np.array(
            [(d["c"], d["r"], d["c"] + d["width"], d["r"] + d["height"]) for d in found], dtype=np.float64
        ).reshape(-1, 4)
        if angle:  # the centre turns back, the box stays upright
            turn = np.deg2rad(angle)
            middle = np.array([width / 2, height / 2])
            centres, half = (boxes[:, :2] + boxes[:, 2:]) / 2 - middle, (boxes[:, 2:] - boxes[:, :2]) / 2
            # PIL turns counter-clockwise as seen, y points down
            back = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            centres = centres @ back.T + middle
            boxes = np.concatenate([centres - half, centres + half], axis=1)
        if mirrored:
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        return boxes / scale

    def _vote(self, boxes: Array) -> list[Detection]:
        settings = self.settings
        detections: list[Detection] = []
        alike = np.array([overlap(box, boxes) for box in boxes]).reshape(len(boxes), len(boxes)) > 0.5
        alive = np.ones(len(boxes), dtype=bool)
        most = 0
        while alive.any():
            counts = (alike & alive).sum(axis=1) * alive
            best = int(counts.argmax())
            votes = int(counts[best])
            most = max(most, votes)
            if votes < max(settings.votes, settings.part * most):
                break
            group = alike[best] & alive
            box = np.median(boxes[group], axis=0).astype(np.float32)
            detections.append(Detection(box, min(1.0, votes / settings.certain)))
            alive &= ~group
        return merge(detections, iou=0.2, inside=0.6)


@cache
def _cascade() -> Any:
    import skimage.data
    from skimage.feature import Cascade as Detector

    return Detector(str(Path(skimage.data.__file__).parent / "lbpcascade_frontalface_opencv.xml"))
