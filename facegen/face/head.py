"""A head in three dimensions from 68 points of a photo, and the same head seen from elsewhere.

The shapes are those that people of the drawn world have: a mean, the ways in which heads differ, and the ways in which
faces move (principal components of the world's own mesh). A head and its pose are the least squares of the points
under the world's camera (Blanz & Vetter 1999 have it with pixels instead of points).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from facegen.errors import WrongRequest
from facegen.face.types import Array
from facegen.world.fields import Knobs
from facegen.world.geometry import head_angles, measure, skull
from facegen.world.landmarks import head_points, landmarks5
from facegen.world.parameters import POSE
from facegen.world.raster import CAMERA_DISTANCE, FIELD_CENTRE, FIELD_HEIGHT, rotation, turn
from facegen.world.sampling import scenes_for

HEADS, FACES = 12, 8  # components kept
_PEOPLE, _GRID = 240, (104, 84)
_NOISE = 0.05  # by how many eye distances points are wrong, and shapes need not explain them better
_ROUNDS = 12
_RANGES = {one.name: one for one in POSE}


@dataclass(frozen=True, eq=False)
class Shapes:
    """mean (68, 3) in the world's head space; components (K, 68, 3), each at one standard deviation."""

    mean: Tensor
    components: Tensor

    def points(self, shape: Tensor) -> Tensor:
        """(68, 3) of coefficients (K,)."""
        return self.mean + torch.einsum("k,kpd->pd", shape, self.components)


@lru_cache(maxsize=1)
@torch.no_grad()
def shapes() -> Shapes:
    """What heads are like, from people of the world who stand for all; first heads at rest, then what faces do."""
    moving = scenes_for(0, range(_PEOPLE), [0] * _PEOPLE)
    still = replace(moving, expression=torch.zeros_like(moving.expression))
    rest, moved = (torch.cat([_points(Knobs(part[i : i + 40])) for i in range(0, _PEOPLE, 40)])
                   for part in (still, moving))  # fmt: skip
    mean = rest.mean(0)
    faces = (moved - rest).mean(0)
    return Shapes(mean + faces, torch.cat([_components(rest - mean, HEADS), _components(moved - rest - faces, FACES)]))


def _points(k: Knobs) -> Tensor:
    m = measure(k)
    longitude, latitude = head_angles(*_GRID, k.device)
    return head_points(k, m, skull(k, m, longitude, latitude))


def _components(deviations: Tensor, count: int) -> Tensor:
    """(count, 68, 3) of (N, 68, 3), largest first."""
    _, sizes, ways = torch.linalg.svd(deviations.flatten(1), full_matrices=False)
    return (ways[:count] * sizes[:count, None] / math.sqrt(len(deviations) - 1)).view(count, *deviations.shape[1:])


@dataclass(frozen=True, eq=False)
class Head:
    """Whose shape it is (K,), and how it was seen: yaw, pitch and roll in radians; error: root mean square of what the
    shape does not explain, in eye distances.
    """

    shape: Tensor
    yaw: float
    pitch: float
    roll: float
    error: float

    def seen(self, pose: dict[str, float], size: tuple[int, int]) -> Array:
        """The 68 points (68, 2) float32 in pixels of a portrait in this pose; size = (height, width).

        pose: yaw, pitch, roll (radians), shift_x, shift_y, zoom as in facegen.world.parameters.POSE, 0 and zoom 1
        where nothing is said. Raises WrongRequest for what is no pose.
        """
        check_pose(pose)
        values = torch.tensor([pose.get(name, 0.0) for name in ("yaw", "pitch", "roll", "shift_x", "shift_y")])
        zoom = torch.tensor(pose.get("zoom", 1.0))
        side = min(size)
        points = _projected(shapes().points(self.shape), values[:3], values[3:], zoom) * side
        middle = torch.tensor([size[1] - side, size[0] - side]) / 2
        return (points + middle).numpy().astype(np.float32)


def check_pose(pose: dict[str, float]) -> None:
    """WrongRequest for a name or a value that the world's heads do not have."""
    for name, value in pose.items():
        if name not in _RANGES:
            raise WrongRequest(f"There is no pose '{name}'; there are: {', '.join(_RANGES)}.")
        if not _RANGES[name].low <= value <= _RANGES[name].high:
            raise WrongRequest(f"{name} must be from {_RANGES[name].low:g} to {_RANGES[name].high:g}, not {value:g}.")


def fit(points: Array) -> Head:
    """The head that 68 points (68, 2), in pixels, show: Gauss-Newton from a head that looks ahead."""
    seen = torch.from_numpy(np.asarray(points, np.float32))
    five = landmarks5(seen[None])[0]
    apart = float((five[0] - five[1]).norm().clamp(min=1e-3))
    # An eye distance in a portrait of the world is about a fifth of its side; turned heads find their size themselves.
    scaled = (seen - seen.mean(0)) / (4.6 * apart)
    model, count = shapes(), HEADS + FACES

    def residuals(x: Tensor) -> Tensor:
        """Of x (6 + K,): yaw, pitch, roll, shift x and y, log zoom, shape."""
        found = _projected(model.points(x[6:]), x[:3], x[3:5], x[5].exp())
        away = (found - 0.5 - scaled).flatten() * (4.6 / _NOISE)
        return torch.cat([away, x[6:]])

    x = torch.zeros(6 + count)
    eyes = five[1] - five[0]
    x[2] = torch.atan2(eyes[1], eyes[0])
    damping = 1.0
    now = residuals(x)
    jacobian = torch.func.jacfwd(residuals)
    for _ in range(_ROUNDS):
        slopes: Tensor = jacobian(x)
        square = slopes.T @ slopes
        step = torch.linalg.solve(square + damping * torch.diag(square.diagonal()), slopes.T @ now)
        tried = residuals(x - step)
        if bool(tried.square().sum() < now.square().sum()):
            x, now, damping = x - step, tried, damping / 5
        else:
            damping *= 5
    left = now[: 2 * len(seen)].view(-1, 2) * _NOISE
    yaw, pitch, roll = x[:3].tolist()
    return Head(x[6:], yaw, pitch, roll, float(left.square().sum(1).mean().sqrt()))


def _projected(points: Tensor, angles: Tensor, shift: Tensor, zoom: Tensor) -> Tensor:
    """Where points (68, 3) of a head are in a picture of side 1, (68, 2): facegen.world.raster.project."""
    matrix = rotation(*(angle[None] for angle in angles))
    turned = turn(points[None], matrix)[0]
    scale = CAMERA_DISTANCE / (CAMERA_DISTANCE - turned[:, 2]) * zoom / FIELD_HEIGHT
    x = turned[:, 0] * scale + (1 + shift[0]) / 2
    y = (FIELD_CENTRE - turned[:, 1]) * scale + (1 - shift[1]) / 2
    return torch.stack([x, y], 1)
