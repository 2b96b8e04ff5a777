"""Landmarks and the face box, from points of the mesh's own surface."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from facegen.world.fields import Knobs, power
from facegen.world.geometry import SIDES, Measures, lip_line, shape, skull
from facegen.world.raster import pose, project, turns

JAW = 17


BROW_PLACES = (1.0, 0.75, 0.5, 0.25, 0.02)
LID_PLACES = ((-1.0, 0), (-0.38, 1), (0.38, 1), (1.0, 0), (0.38, -1), (-0.38, -1))
OUTER_LIPS = (-1.0, -0.6, -0.25, 0.0, 0.25, 0.6, 1.0)
INNER_LIPS = (-0.95, -0.3, 0.0, 0.3, 0.95)


def _columns(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(1, 1, -1)


def _targets(k: Knobs, m: Measures) -> tuple[Tensor, Tensor, Tensor]:
    """Rest coordinates x, y (B, 1, 51) of the iBUG points 17 to 67, and 1 for those on the lower lip."""
    brows, eyes = [], []
    for side in SIDES:
        t = _columns(BROW_PLACES if side < 0 else BROW_PLACES[::-1], m.eye_x)
        brow_x = side * (0.100 + 0.3 * (m.eye_x - 0.340) + 0.400 * t)
        brows.append((brow_x, m.brow_y + 0.040 * torch.sin(t * 2.4) - 0.045 * t))
        across = _columns([u for u, _ in LID_PLACES], m.eye_x)
        lid = _columns([float(up) for _, up in LID_PLACES], m.eye_x)
        eyes.append((side * m.eye_x + across * m.lid_width, _lid_height(k, m, across * side, lid, side)))
    t = _columns((0.0, 0.34, 0.67, 1.0), m.eye_x)
    top = m.eye_y - 0.02
    bridge = (0 * t + 0 * top, top + (m.nose_y + 0.01 - top) * t)
    t = _columns((-1.0, -0.5, 0.0, 0.5, 1.0), m.eye_x)
    base = (t * (m.nose_w - 0.005), m.nose_y - 0.075 - 0.020 * (1 - t.abs()) + 0 * t)
    lips = [_lip(m, OUTER_LIPS, m.lip_up), _lip(m, OUTER_LIPS[-2:0:-1], -m.lip_low)]
    lips += [_lip(m, INNER_LIPS, 0 * m.lip_up), _lip(m, INNER_LIPS[-2:0:-1], 0 * m.lip_up)]
    parts = [*brows, bridge, base, *eyes, *lips]
    lower = [0.0] * 38 + [1.0] * 5 + [0.0] * 5 + [1.0] * 3
    return torch.cat([x for x, _ in parts], -1), torch.cat([y for _, y in parts], -1), _columns(lower, m.eye_x)


def _lid_height(k: Knobs, m: Measures, u: Tensor, lid: Tensor, side: int) -> Tensor:
    """Height of the lid edges at eye coordinate u; ``lid`` is 1 for the upper lid, -1 the lower, 0 in corners."""
    closed = k["eye_close_left" if side < 0 else "eye_close_right"]
    reach = u.abs()
    low = -m.lid_low * (1 - reach * reach) * (1 + 0.22 * u)
    high = m.lid_up * (1 - power(reach, 2.4)) * (1 - 0.12 * u)
    high = high + (low - 0.004 - high) * closed
    return m.eye_y + m.lid_tilt * u + high * (lid > 0) + low * (lid < 0)


def _lip(m: Measures, places: Sequence[float], offset: Tensor) -> tuple[Tensor, Tensor]:
    t = _columns(places, m.mouth_w)
    x = t * m.mouth_w
    return x, lip_line(m, x) + offset * torch.sqrt(1 - t * t)


def _on_skull(k: Knobs, x: Tensor, y: Tensor, grid: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The depth (B, P) of the skull at rest coordinates (B, P), from the nearest four vertices in front."""
    gx, gy, gz = (axis.reshape(k.count, -1) for axis in grid)
    away = (x[..., None] - gx[:, None]) ** 2 + (y[..., None] - gy[:, None]) ** 2 + 4.0 * (gz[:, None] < 0.0).float()
    near, index = away.topk(4, -1, largest=False)
    weight = 1 / (near + 1e-5)
    depth = gz.gather(1, index.flatten(1)).view_as(near)
    return (depth * weight).sum(-1) / weight.sum(-1)


def landmarks68(k: Knobs, m: Measures, grid: tuple[Tensor, Tensor, Tensor], size: int) -> Tensor:
    """The iBUG points (B, 68, 2) in pixels; ``grid`` holds the rest coordinates (B, rows, columns) of the mesh."""
    px, py = project(k, pose(turns(k), head_points(k, m, grid)[:, None])[:, 0], size)
    return torch.stack([px, py], -1)


def head_points(k: Knobs, m: Measures, grid: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The iBUG points (B, 68, 3) in head space, with the expression; ``grid`` as for ``landmarks68``."""
    angle = torch.linspace(-1, 1, JAW, device=k.device)
    longitude = (1.42 * angle).view(1, 1, -1)
    latitude = (-0.02 - 1.02 * (1 - angle.abs() ** 1.7)).view(1, 1, -1)
    jx, jy, jz = skull(k, m, longitude, latitude)
    x, y, lower = _targets(k, m)
    z = _on_skull(k, x[:, 0], y[:, 0], (grid[0][:, ::2, ::2], grid[1][:, ::2, ::2], grid[2][:, ::2, ::2]))
    rest = tuple(torch.cat([a, b], -1) for a, b in ((jx, x), (jy, y), (jz, z[:, None])))
    lower = torch.cat([(jy < m.mouth_y).float(), lower.expand(k.count, -1, -1)], -1)
    return shape(k, m, (rest[0], rest[1], rest[2]), lower)[:, 0]


def landmarks5(points: Tensor) -> Tensor:
    """Eyes, nose tip and mouth corners (B, 5, 2), picture's left first, from the 68 points."""
    left, right = points[:, 36:42].mean(1), points[:, 42:48].mean(1)
    return torch.stack([left, right, points[:, 30], points[:, 48], points[:, 54]], 1)


def face_box(k: Knobs, m: Measures, points: Tensor, size: int) -> Tensor:
    """x0, y0, x1, y1 (B, 4) around the 68 points and the middle of the hairline."""
    zero = torch.zeros_like(m.hairline)
    z = 0.80 - 0.45 * (m.hairline - 0.4)
    crown = torch.stack(torch.broadcast_tensors(zero, m.hairline, z), -1)
    px, py = project(k, pose(turns(k), crown)[:, 0], size)
    whole = torch.cat([points, torch.stack([px, py], -1)], 1)
    return torch.cat([whole.amin(1), whole.amax(1)], 1)
