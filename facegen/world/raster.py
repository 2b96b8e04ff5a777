"""From patches to pixels: pose and camera, and a z-buffer of the two triangles of every grid cell.

Neighbouring triangles share their edges and every pixel centre is tried, so there are no pinholes at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from facegen.world.fields import Knobs, cross, smoothstep, unit
from facegen.world.geometry import Patch

CAMERA_DISTANCE = 9.0
FIELD_HEIGHT = 3.42
FIELD_CENTRE = -0.10
PIVOT = (0.0, -0.75, -0.15)
NEAREST = 3.0
DEPTH_RANGE = 8.0
DEPTH_BITS, CELL_BITS, SPOT_BITS = 22, 24, 8
EDGE = 2e-3
EMPTY = 2**62


@dataclass(frozen=True, eq=False)
class Mesh:
    """All patches of a batch, posed, as one list of vertices and one list of cells.

    ``points`` and ``normals`` (B, V, 3) camera space; ``rest`` (B, V, 3); ``inside`` (B, V); ``cells`` (Q, 4) indices
    of vertices in the order (0, 0), (0, 1), (1, 0), (1, 1) of row, column; ``keep`` (B, Q); ``material`` (Q,);
    ``facing`` (Q,) is 0 where both sides are seen; ``side`` (Q,) is -1 or 1 for the parts at the picture's
    left and right, else 0; ``casts`` (V,) says whether a vertex casts a shadow.
    """

    points: Tensor
    normals: Tensor
    rest: Tensor
    inside: Tensor
    cells: Tensor
    keep: Tensor
    material: Tensor
    facing: Tensor
    side: Tensor
    casts: Tensor


@dataclass(frozen=True, eq=False)
class Fragments:
    """The visible surface: one row for each covered pixel.

    ``picture`` and ``pixel`` (N,) say where; ``material`` (N,); ``points``, ``normals``, ``rest`` (N, 3);
    ``side`` (N,) as in Mesh.
    """

    picture: Tensor
    pixel: Tensor
    material: Tensor
    points: Tensor
    normals: Tensor
    rest: Tensor
    side: Tensor


def rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Rotation matrices (B, 3, 3): pitch up, then yaw to the picture's right, then roll clockwise."""
    cy, sy, cx, sx = torch.cos(yaw), torch.sin(yaw), torch.cos(-pitch), torch.sin(-pitch)
    cz, sz = torch.cos(-roll), torch.sin(-roll)
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    rows = lambda *entries: torch.stack(entries, -1).view(-1, 3, 3)  # noqa: E731
    roll_matrix = rows(cz, -sz, zero, sz, cz, zero, zero, zero, one)
    yaw_matrix = rows(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    pitch_matrix = rows(one, zero, zero, zero, cx, -sx, zero, sx, cx)
    return _product(_product(roll_matrix, yaw_matrix), pitch_matrix)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, :, :, None] * b[:, None, :, :]).sum(2)


def turn(points: Tensor, matrix: Tensor) -> Tensor:
    """Rotate points (B, ..., 3) by matrices (B, 3, 3) about the pivot in the neck."""
    x, y, z = (points[..., axis] - PIVOT[axis] for axis in range(3))
    shape = (-1,) + (1,) * (points.ndim - 2)
    m = [[matrix[:, row, column].view(shape) for column in range(3)] for row in range(3)]
    return torch.stack([m[row][0] * x + m[row][1] * y + m[row][2] * z + PIVOT[row] for row in range(3)], -1)


@dataclass(frozen=True, eq=False)
class Turns:
    """How head and body of each picture are turned: matrices (B, 3, 3)."""

    head: Tensor
    body: Tensor


def turns(k: Knobs) -> Turns:
    """The body follows the head a little."""
    column = k.scenes.column
    head = rotation(column("yaw"), column("pitch"), column("roll"))
    return Turns(head, rotation(0.22 * column("yaw"), 0 * column("pitch"), 0.10 * column("roll")))


def pose(turned: Turns, points: Tensor, follows: int = 0) -> Tensor:
    """Points (B, H, W, 3) of the head (0), the body (1) or the neck between both (2) to camera space."""
    if follows < 2:
        return turn(points, turned.body if follows else turned.head)
    t = smoothstep(-0.80, -1.50, points[..., 1])[..., None]
    return turn(points, turned.head) * (1 - t) + turn(points, turned.body) * t


def project(k: Knobs, points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pixel coordinates x (right) and y (down) of camera-space points (B, N, 3)."""
    column = k.scenes.column
    near = CAMERA_DISTANCE / (CAMERA_DISTANCE - points[..., 2])
    scale = near * column("zoom")[:, None] * (size / FIELD_HEIGHT)
    x = points[..., 0] * scale + (1 + column("shift_x")[:, None]) * (size / 2)
    y = (FIELD_CENTRE - points[..., 1]) * scale + (1 - column("shift_y")[:, None]) * (size / 2)
    return x, y


def _normals(points: Tensor, split_row: int | None) -> Tensor:
    du = torch.cat(
        [
            points[:, :, 1:2] - points[:, :, :1],
            points[:, :, 2:] - points[:, :, :-2],
            points[:, :, -1:] - points[:, :, -2:-1],
        ],
        2,
    )
    dv = torch.cat(
        [points[:, 1:2] - points[:, :1], points[:, 2:] - points[:, :-2], points[:, -1:] - points[:, -2:-1]], 1
    )
    if split_row is not None:
        r = split_row
        dv[:, r] = points[:, r] - points[:, r - 1]
        dv[:, r + 1] = points[:, r + 2] - points[:, r + 1]
    return unit(cross(du, dv))


@dataclass(frozen=True, eq=False)
class Topology:
    """What a list of patches has in common over pictures; the fields are those of :class:`Mesh`."""

    cells: Tensor
    material: Tensor
    facing: Tensor
    side: Tensor
    casts: Tensor


Layout = tuple[int, int, int, int, int, bool]  # rows, columns, material, facing, side, casts


@lru_cache(maxsize=256)
def _topology(layouts: tuple[Layout, ...], device: torch.device) -> Topology:
    cells, casts, of_cell = [], [], []
    start = 0
    for rows, columns, material, facing, side, casting in layouts:
        lines = torch.arange(rows - 1, device=device)[:, None] * columns
        corner = (lines + torch.arange(columns - 1, device=device)).reshape(-1) + start
        cells.append(torch.stack([corner, corner + 1, corner + columns, corner + columns + 1], 1))
        casts.append(torch.full((rows * columns,), casting, device=device))
        of_cell.append(torch.tensor([[material, facing, side]], device=device).expand(len(corner), 3))
        start += rows * columns
    material_of, facing_of, side_of = (values.contiguous() for values in torch.cat(of_cell).unbind(1))
    return Topology(torch.cat(cells), material_of, facing_of, side_of, torch.cat(casts))


def assemble(k: Knobs, patches: Sequence[Patch]) -> Mesh:
    """Pose the patches and join them into one mesh."""
    batch, device = k.count, k.device
    turned = turns(k)
    one = torch.ones(1, 1, 1, device=device)
    everywhere = torch.ones(1, 1, dtype=torch.bool, device=device)
    points, normals, rest, inside, keep, layouts = [], [], [], [], [], []
    for patch in patches:
        at_rest = patch.points.expand(batch, -1, -1, -1)
        rows, columns = at_rest.shape[1:3]
        posed = pose(turned, at_rest, patch.follows)
        outward = _normals(posed, patch.split_row) * (-1 if patch.facing < 0 else 1)
        points.append(posed.reshape(batch, -1, 3))
        normals.append(outward.reshape(batch, -1, 3))
        rest.append(patch.rest.expand(batch, rows, columns, 3).reshape(batch, -1, 3))
        inside.append((one if patch.inside is None else patch.inside).expand(batch, rows, columns).reshape(batch, -1))
        kept = everywhere if patch.keep is None else patch.keep.reshape(batch, -1)
        keep.append(kept.expand(batch, (rows - 1) * (columns - 1)))
        layouts.append((rows, columns, int(patch.material), patch.facing, patch.side, patch.casts))
    shared = _topology(tuple(layouts), device)
    return Mesh(
        points=torch.cat(points, 1),
        normals=torch.cat(normals, 1),
        rest=torch.cat(rest, 1),
        inside=torch.cat(inside, 1),
        cells=shared.cells,
        keep=torch.cat(keep, 1),
        material=shared.material,
        facing=shared.facing,
        side=shared.side,
        casts=shared.casts,
    )


def rasterise(k: Knobs, mesh: Mesh, size: int) -> Fragments:
    """The nearest surface in each pixel of pictures of ``size`` x ``size`` pixels."""
    batch, vertices = mesh.inside.shape
    x, y = project(k, mesh.points, size)
    corners = torch.stack([x, y, mesh.points[..., 2], mesh.inside], -1)  # (B, V, 4)
    picture, cell = _candidates(mesh, corners, size)
    at_corners = corners.view(-1, 4)[(picture[:, None] * vertices + mesh.cells[cell]).view(-1)].view(-1, 4, 4)
    buffer = _z_buffer(picture, cell, at_corners, batch, size)
    pixel = (buffer < EMPTY).nonzero()[:, 0]
    return _resolve(mesh, buffer[pixel], pixel, size)


def _candidates(mesh: Mesh, corners: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pictures and cells which may be visible: kept, not cut away, not turned away, and within the picture."""
    x, y, inside = corners[..., 0], corners[..., 1], corners[..., 3]
    c = mesh.cells
    x0, x1, x2, x3 = (x[:, c[:, i]] for i in range(4))
    y0, y1, y2, y3 = (y[:, c[:, i]] for i in range(4))
    near = (x1 - x0) * (y2 - y0) - (y1 - y0) * (x2 - x0)
    far = (x2 - x3) * (y1 - y3) - (y2 - y3) * (x1 - x3)
    turned = (
        torch.minimum(near * mesh.facing, far * mesh.facing) >= 0
    )  # screen y runs down: seen triangles are negative
    alive = inside > 0
    exists = alive[:, c[:, 0]] | alive[:, c[:, 1]] | alive[:, c[:, 2]] | alive[:, c[:, 3]]
    right = torch.maximum(torch.maximum(x0, x1), torch.maximum(x2, x3)) >= 0
    left = torch.minimum(torch.minimum(x0, x1), torch.minimum(x2, x3)) < size
    low = torch.maximum(torch.maximum(y0, y1), torch.maximum(y2, y3)) >= 0
    high = torch.minimum(torch.minimum(y0, y1), torch.minimum(y2, y3)) < size
    seen = mesh.keep & exists & right & left & low & high & ~(turned & (mesh.facing != 0))
    picture, cell = seen.nonzero(as_tuple=True)
    return picture, cell


def _affine(origin: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """Coefficients (1, x, y) of both coordinates of a point in a triangle: 0 at the origin, 1 at a corner."""
    ax, ay = first[:, 0] - origin[:, 0], first[:, 1] - origin[:, 1]
    bx, by = second[:, 0] - origin[:, 0], second[:, 1] - origin[:, 1]
    area = ax * by - ay * bx
    # A triangle without area covers nothing: its coordinates become hugely negative.
    scale = torch.where(area.abs() > 1e-7, 1 / area, torch.full_like(area, float("nan")))
    ux, uy, vx, vy = by * scale, -bx * scale, -ay * scale, ax * scale
    x, y = origin[:, 0], origin[:, 1]
    return -(ux * x + uy * y), ux, uy, -(vx * x + vy * y), vx, vy


def _z_buffer(picture: Tensor, cell: Tensor, corners: Tensor, batch: int, size: int) -> Tensor:
    """Keys (B * size * size,) of the nearest cells: depth, cell and place in the cell; EMPTY where nothing is.

    Each cell is two triangles; every pixel centre within the bounds of a cell is tried against both.
    """
    p00, p01, p10, p11 = corners.unbind(1)  # (M, 4) each: x, y, z, inside
    low = (corners[..., :2].amin(1) - 0.5).ceil().clamp(min=0)
    high = (corners[..., :2].amax(1) - 0.5).floor().clamp(max=size - 1)
    extent = (high - low + 1).clamp(min=0).long()
    count = extent[:, 0] * extent[:, 1]
    owner = torch.repeat_interleave(count)  # (S,) row of the candidate a sample belongs to
    place = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner]
    values = (p00, p01 - p00, p10 - p00, p11 - p10 - p01 + p00)
    places = (*_affine(p00, p01, p10), *_affine(p11, p10, p01))
    table = torch.stack([*places, *(value[:, i] for i in (2, 3) for value in values), low[:, 0], low[:, 1]])
    at = table[:, owner].unbind()
    a0, ax, ay, b0, bx, by, c0, cx, cy, d0, dx, dy, z0, zu, zv, zuv, i0, iu, iv, iuv, left, top = at
    wide = extent[:, 0][owner]
    line = torch.div(place, wide, rounding_mode="floor")
    column = (place - line * wide) + left.long()
    line = line + top.long()
    x, y = column.float() + 0.5, line.float() + 0.5
    u, v = a0 + ax * x + ay * y, b0 + bx * x + by * y
    u_far, v_far = c0 + cx * x + cy * y, d0 + dx * x + dy * y
    near = (u >= -EDGE) & (v >= -EDGE) & (u + v <= 1 + EDGE)
    far = (u_far >= -EDGE) & (v_far >= -EDGE) & (u_far + v_far <= 1 + EDGE)
    u = torch.where(near, u, 1 - u_far).clamp(0, 1)
    v = torch.where(near, v, 1 - v_far).clamp(0, 1)
    uv = u * v
    valid = (near | far) & (i0 + u * iu + v * iv + uv * iuv > 0)
    depth = ((NEAREST - (z0 + u * zu + v * zv + uv * zuv)) * ((2**DEPTH_BITS - 1) / DEPTH_RANGE)).clamp(
        0, 2**DEPTH_BITS - 1
    )
    spot = ((v * 255).long() << SPOT_BITS) | (u * 255).long()
    key = (depth.long() << (CELL_BITS + 2 * SPOT_BITS)) | (cell[owner] << (2 * SPOT_BITS)) | spot
    target = (picture[owner] * size + line) * size + column
    buffer = torch.full((batch * size * size,), EMPTY, dtype=torch.int64, device=corners.device)
    return buffer.scatter_reduce_(0, target[valid], key[valid], "amin")


def _resolve(mesh: Mesh, key: Tensor, pixel: Tensor, size: int) -> Fragments:
    picture = torch.div(pixel, size * size, rounding_mode="floor")
    vertices = mesh.inside.shape[1]
    mask = 2**SPOT_BITS - 1
    u = (key & mask).float()[:, None] / 255
    v = ((key >> SPOT_BITS) & mask).float()[:, None] / 255
    cell = (key >> (2 * SPOT_BITS)) & (2**CELL_BITS - 1)
    values = torch.cat([mesh.points, mesh.normals, mesh.rest], -1).view(-1, 9)
    corner = picture[:, None] * vertices + mesh.cells[cell]
    p00, p01, p10, p11 = (values[corner[:, i]] for i in range(4))
    blended = (p00 * (1 - u) + p01 * u) * (1 - v) + (p10 * (1 - u) + p11 * u) * v
    points, normals, rest = blended[:, :3], unit(blended[:, 3:6]), blended[:, 6:]
    # The far side of a thin sheet is turned to the viewer; on a silhouette the normal just stops at grazing.
    normals = torch.where((normals[:, 2:3] < -0.25) & (mesh.facing[cell] == 0)[:, None], -normals, normals)
    normals = unit(torch.cat([normals[:, :2], normals[:, 2:].clamp(min=0.02)], 1))
    return Fragments(
        picture, pixel, mesh.material[cell], points.contiguous(), normals, rest.contiguous(), mesh.side[cell]
    )
