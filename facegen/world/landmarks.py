"""Landmarks and the face box, from points of the mesh's own surface."""

from __future__ import annotations

import torch
from torch import Tensor

from facegen.world.fields import Knobs
from facegen.world.geometry import Measures, lip_line, shape, skull
from facegen.world.raster import pose, project

JAW = 17


def _grid_of(values: list[Tensor]) -> Tensor:
    return torch.cat([value.view(-1, 1) for value in values], 1)


def _targets(m: Measures) -> tuple[Tensor, Tensor, Tensor]:
    """Rest coordinates (B, 51) of the iBUG points 17 to 67, and whether they belong to the lower lip."""
    flat = lambda t: t.reshape(-1)  # noqa: E731
    zero = torch.zeros_like(flat(m.eye_x))
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    low: list[float] = []

    def add(x: Tensor, y: Tensor, lower: float = 0.0) -> None:
        xs.append(flat(x + 0 * zero.view_as(m.eye_x)))
        ys.append(flat(y + 0 * zero.view_as(m.eye_x)))
        low.append(lower)

    for side in (-1, 1):
        places = (1.0, 0.75, 0.5, 0.25, 0.02)
        for t in places if side < 0 else places[::-1]:
            t_ = torch.full_like(m.eye_x, t)
            x = side * (0.100 + 0.3 * (m.eye_x - 0.340) + 0.400 * t_)
            add(x, m.brow_y + 0.040 * torch.sin(t_ * 2.4) - 0.045 * t_)
    for t in (0.0, 0.34, 0.67, 1.0):
        top = m.eye_y - 0.02
        add(0 * m.eye_x, top + (m.nose_y + 0.01 - top) * t)
    for t in (-1.0, -0.5, 0.0, 0.5, 1.0):
        add(t * (m.nose_w - 0.005), m.nose_y - 0.075 - 0.020 * (1 - abs(t)) + 0 * m.nose_w)
    for side in (-1, 1):
        corners = ((-1.0, 0), (-0.38, 1), (0.38, 1), (1.0, 0), (0.38, -1), (-0.38, -1))
        for u, lid in corners:
            u_ = u * side
            height = m.lid_tilt * u_
            if lid > 0:
                height = height + m.lid_up * (1 - abs(u) ** 2.4) * (1 - 0.12 * u_)
            if lid < 0:
                height = height - m.lid_low * (1 - u * u) * (1 + 0.22 * u_)
            add(side * m.eye_x + u * m.lid_width, m.eye_y + height)
    _add_mouth(m, add)
    return torch.stack(xs, 1), torch.stack(ys, 1), torch.tensor(low, device=zero.device).view(1, -1)


def _add_mouth(m: Measures, add) -> None:  # type: ignore[no-untyped-def]
    def lip(t: float, offset: Tensor, lower: float) -> None:
        x = t * m.mouth_w
        add(x, lip_line(m, x) + offset * (1 - t * t) ** 0.5, lower)

    none = 0 * m.lip_up
    for t in (-1.0, -0.6, -0.25, 0.0, 0.25, 0.6, 1.0):
        lip(t, m.lip_up * (0.8 if t == 0 else 1.0), 0.0)
    for t in (0.6, 0.25, 0.0, -0.25, -0.6):
        lip(t, -m.lip_low, 1.0)
    for t in (-0.95, -0.3, 0.0, 0.3, 0.95):
        lip(t, none, 0.0)
    for t in (0.3, 0.0, -0.3):
        lip(t, none, 1.0)


def _on_skull(k: Knobs, x: Tensor, y: Tensor, grid: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The depth of the skull at rest coordinates (B, P): the mean of the nearest four vertices in front, by distance."""
    gx, gy, gz = (axis.reshape(k.count, -1) for axis in grid)
    away = (x[..., None] - gx[:, None]) ** 2 + (y[..., None] - gy[:, None]) ** 2 + 4.0 * (gz[:, None] < 0.0).float()
    near, index = away.topk(4, -1, largest=False)
    weight = 1 / (near + 1e-5)
    depth = gz.gather(1, index.flatten(1)).view_as(near)
    return (depth * weight).sum(-1) / weight.sum(-1)


def landmarks68(k: Knobs, m: Measures, grid: tuple[Tensor, Tensor, Tensor], size: int) -> Tensor:
    """The iBUG points (B, 68, 2) in pixels; ``grid`` holds the rest coordinates (B, rows, columns) of the mesh."""
    angle = torch.linspace(-1, 1, JAW, device=k.device)
    longitude = (1.42 * angle).view(1, 1, -1)
    latitude = (-0.02 - 1.02 * (1 - angle.abs() ** 1.7)).view(1, 1, -1)
    jx, jy, jz = skull(k, m, longitude, latitude)
    x, y, lower = _targets(m)
    z = _on_skull(k, x, y, (grid[0][:, ::2, ::2], grid[1][:, ::2, ::2], grid[2][:, ::2, ::2]))
    rest = tuple(torch.cat([a[:, 0], b], 1)[:, None] for a, b in ((jx, x), (jy, y), (jz, z)))
    lower = torch.cat([(jy[:, 0] < m.mouth_y[:, 0]).float(), lower.expand(k.count, -1)], 1)[:, None]
    points = shape(k, m, (rest[0], rest[1], rest[2]), lower)  # (B, 1, 68, 3)
    px, py = project(k, pose(k, points, 0)[:, 0], size)
    return torch.stack([px, py], -1)


def landmarks5(points: Tensor) -> Tensor:
    """Eyes, nose tip and mouth corners (B, 5, 2), picture's left first, from the 68 points."""
    left, right = points[:, 36:42].mean(1), points[:, 42:48].mean(1)
    return torch.stack([left, right, points[:, 30], points[:, 48], points[:, 54]], 1)


def face_box(k: Knobs, m: Measures, points: Tensor, size: int) -> Tensor:
    """x0, y0, x1, y1 (B, 4) around the 68 points and the middle of the hairline."""
    zero = torch.zeros_like(m.hairline)
    z = 0.80 - 0.45 * (m.hairline - 0.4)
    crown = torch.stack(torch.broadcast_tensors(zero, m.hairline, z), -1)
    px, py = project(k, pose(k, crown, 0)[:, 0], size)
    whole = torch.cat([points, torch.stack([px, py], -1)], 1)
    return torch.cat([whole.amin(1), whole.amax(1)], 1)
