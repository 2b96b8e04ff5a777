"""The shape of a head: skull, features and expression as smooth fields over a grid that wraps around the head.

Head space: x to the picture's right, y up, z towards the viewer; the head is about two units high and its centre is
the origin. ``rest`` coordinates are those of the undeformed skull: textures are drawn on them, so that brows, lips and
wrinkles follow the expression.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from facegen.world.fields import Knobs, bump, mix, power, ridge, smooth_max, smoothstep

SIDES = (-1, 1)
LIP_GAP = 0.0015


@dataclass(frozen=True, eq=False)
class Patch:
    """A deformed grid of H x W points with what is needed to draw it.

    ``points`` (B, H, W, 3) in head or body space; ``rest`` (B, H, W, 3) texture coordinates; ``inside`` (B, H, W) or
    None: the surface exists where it is positive; ``keep`` (B, H-1, W-1) or None: cells that exist; ``split_row``: the
    surface is torn between this row and the next one; ``follows``: 0 the head, 1 the body, 2 a neck between both;
    ``facing``: the orientation of cells that are seen, 0 for both; ``side``: -1, 1 for parts at the left and right;
    ``casts``: a shadow.
    """

    material: int
    points: Tensor
    rest: Tensor
    inside: Tensor | None = None
    keep: Tensor | None = None
    split_row: int | None = None
    follows: int = 0
    facing: int = 0
    side: int = 0
    casts: bool = True


@dataclass(frozen=True, eq=False)
class Measures:
    """Where the features of a face are, in rest coordinates; derived from the identity, the age and some actions."""

    eye_x: Tensor
    eye_y: Tensor
    eye_z: Tensor
    eye_r: Tensor
    lid_width: Tensor
    lid_up: Tensor
    lid_low: Tensor
    lid_tilt: Tensor
    brow_y: Tensor
    nose_y: Tensor
    nose_w: Tensor
    mouth_y: Tensor
    mouth_w: Tensor
    lip_up: Tensor
    lip_low: Tensor
    hairline: Tensor
    skull_w: Tensor
    skull_h: Tensor


def measure(k: Knobs) -> Measures:
    """Feature positions and sizes; the same formulas serve grids and pixels."""
    man, old = k["masculinity"], k["age"]
    skull_w = 0.80 * (1 + 0.055 * k["face_width"] + 0.012 * man)
    skull_h = 1.08 * (1 + 0.042 * k["face_length"])
    eye_x = 0.340 + 0.028 * k["eye_spacing"] + 0.006 * k["face_width"]
    eye_y = 0.045 + 0.036 * k["eye_height"]
    grow = 1 + 0.085 * k["eye_size"] - 0.035 * man
    eye_r = 0.205 * (1 + 0.6 * (grow - 1))
    surface = 0.90 * power((1 - (eye_x / skull_w) ** 2 - (eye_y / 1.12) ** 2).clamp(min=0.2), 0.40)
    squint = (0.55 * k["cheek_raise"] + 0.30 * k["smile"] + 0.45 * k["nose_wrinkle"]).clamp(max=1)
    droop = 0.085 * k["eye_hood"].clamp(min=-2) + 0.22 * old + 0.25 * k["brow_lower"] + 0.02 * man
    lid_up = 0.108 * grow * (1 - droop + 0.36 * k["eyes_wide"] + 0.10 * k["brow_raise"] - 0.28 * squint).clamp(min=0.25)
    lid_low = 0.070 * grow * (1 - 0.80 * squint + 0.10 * k["eyes_wide"])
    press = 1 - 0.62 * k["lip_press"]
    thin = (1 - 0.060 * man - 0.28 * old) * press * (1 + 0.25 * k["pucker"])
    return Measures(
        eye_x=eye_x,
        eye_y=eye_y,
        eye_z=surface - 0.050 - eye_r - 0.024 * k["eye_depth"],
        eye_r=eye_r,
        lid_width=0.182 * grow,
        lid_up=lid_up,
        lid_low=lid_low,
        lid_tilt=0.012 + 0.030 * k["eye_tilt"] - 0.012 * old,
        brow_y=eye_y + 0.242 + 0.029 * k["brow_height"] - 0.016 * man - 0.015 * old,
        nose_y=-0.255 - 0.042 * k["nose_length"],
        nose_w=0.112 + 0.025 * k["nose_width"] + 0.006 * man + 0.008 * old,
        mouth_y=-0.565 + 0.032 * k["mouth_height"] - 0.012 * k["nose_length"].clamp(min=0),
        mouth_w=0.246 * (1 + 0.105 * k["mouth_width"]),
        lip_up=0.062 * (1 + 0.27 * k["upper_lip"]).clamp(min=0.4) * thin,
        lip_low=0.080 * (1 + 0.27 * k["lower_lip"]).clamp(min=0.4) * thin,
        hairline=0.640 + 0.052 * k["forehead_height"] + 0.03 * old,
        skull_w=skull_w,
        skull_h=skull_h,
    )


def lip_line(m: Measures, x: Tensor) -> Tensor:
    """Height of the line between the lips, with a dip in the middle and resting corners."""
    t = (x / m.mouth_w).clamp(-1.25, 1.25)
    return m.mouth_y - 0.004 + 0.010 * torch.cos(t * 5.0)


@lru_cache(maxsize=16)
def head_angles(columns: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Longitude (1, rows, columns) and latitude of the grid; the face gets more columns than the back."""
    u = torch.linspace(-1, 1, columns, device=device)
    v = torch.linspace(-1, 1, rows, device=device)
    longitude = math.pi * (0.42 * u + 0.58 * u**3)
    latitude = math.pi / 2 * v
    return longitude.view(1, 1, -1).expand(1, rows, columns), latitude.view(1, -1, 1).expand(1, rows, columns)


@lru_cache(maxsize=64)
def square(
    columns: int,
    rows: int,
    device: torch.device,
    u: tuple[float, float] = (-1.0, 1.0),
    v: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Two parameter grids (1, rows, columns)."""
    across = torch.linspace(u[0], u[1], columns, device=device).view(1, 1, -1).expand(1, rows, columns)
    along = torch.linspace(v[0], v[1], rows, device=device).view(1, -1, 1).expand(1, rows, columns)
    return across, along


def skull(k: Knobs, m: Measures, longitude: Tensor, latitude: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The head without features: three coordinates of shape (B, rows, columns)."""
    man, old = k["masculinity"], k["age"]
    level = torch.cos(latitude)
    x = m.skull_w * (torch.sin(longitude) * level)
    y = m.skull_h * torch.sin(latitude)
    depth = torch.cos(longitude) * level
    z = torch.where(depth > 0, 0.90 * power(depth, 0.80), 1.0 * depth) + 0 * x
    chin = 0.062 * k["chin_length"] + 0.018 * man
    y = torch.where(y < 0, y * (1 + chin * smoothstep(-0.4, -1.0, y)), y)
    jaw = 0.075 * k["jaw_width"] + 0.042 * man + 0.035 * old + 0.028 * k["cheek_fullness"]
    x = x * (
        1
        + jaw * ridge(y, -0.66, 0.34)
        - 0.08 * smoothstep(-0.05, -0.70, y)
        + (0.17 + 0.080 * k["chin_width"] + 0.034 * man) * smoothstep(-0.72, -1.10, y)
        + 0.045 * k["temple_width"] * ridge(y, 0.42, 0.34)
        + 0.033 * k["cheekbone_width"] * ridge(y, -0.12, 0.22)
        + 0.015 * smoothstep(0.15, 0.80, y)
    )
    z = z + 0.36 * smoothstep(-0.25, -1.05, y) * (0.35 + 0.65 * smoothstep(-0.6, 0.5, z))
    y = y + 0.42 * smoothstep(0.35, -0.70, z) * smoothstep(-0.35, -1.05, y)
    return x, y, z


def lids(k: Knobs, m: Measures, x: Tensor, y: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances above the lower lid edge's and below the upper lid edge, and eye coordinates u, v.

    Returns (below_upper, above_lower, u, v); the eye is open where both distances are positive; u is -1 at the inner
    corner and 1 at the outer one.
    """
    closed = k["eye_close_left" if side < 0 else "eye_close_right"]
    u = (x - side * m.eye_x) / m.lid_width * side
    v = (y - m.eye_y) - m.lid_tilt * u
    reach = u.abs().clamp(max=1)
    low = -m.lid_low * (1 - reach * reach) * (1 + 0.22 * u)
    high = m.lid_up * (1 - power(reach, 2.4)) * (1 - 0.12 * u)
    high = mix(high, low - 0.004, closed)
    return high - v, v - low, u, v


def face_relief(k: Knobs, m: Measures, x: Tensor, y: Tensor) -> Tensor:
    """How far the features of a face at rest stand out from the skull, towards the viewer."""
    man, old = k["masculinity"], k["age"]
    ax = x.abs()
    full, bone = k["cheek_fullness"], k["cheekbone_width"]
    d = -0.10 * bump(ax, y, (m.eye_x * 0.95, m.eye_y + 0.02), (0.23, 0.15)) * (1 + 0.10 * k["eye_depth"])
    d = d + (0.052 + 0.020 * man) * bump(ax, y, (m.eye_x * 0.92, m.brow_y + 0.02), (0.27, 0.085))
    d = d + (0.062 + 0.034 * bone) * bump(ax, y, (0.47, -0.15), (0.20, 0.14))
    d = d + (0.035 + 0.048 * full - 0.060 * old) * bump(ax, y, (0.46, -0.47), (0.22, 0.22))
    d = d + 0.035 * old * bump(ax, y, (0.40, -0.80), (0.16, 0.13))
    d = d - 0.045 * bump(ax, y, (0.70, 0.22), (0.15, 0.28))
    d = d + nose_relief(k, m, x, y)
    d = d + mouth_relief(k, m, x, y)
    forward = 0.095 + 0.042 * k["chin_projection"] + 0.016 * man
    d = d + forward * bump(x, y, (0.0, -0.93 - 0.035 * k["chin_length"]), (0.17 + 0.030 * k["chin_width"], 0.13))
    fold = ridge(ax, 0.225 + 0.32 * (-0.26 - y), 0.040) * smoothstep(-0.66, -0.48, y) * smoothstep(-0.20, -0.32, y)
    return d - (0.020 * old + 0.018 * k["smile"]) * fold


def nose_relief(k: Knobs, m: Measures, x: Tensor, y: Tensor) -> Tensor:
    man = k["masculinity"]
    ax = x.abs()
    top = m.eye_y + 0.13
    t = ((top - y) / (top - m.nose_y)).clamp(-0.5, 1.6)
    height = 0.035 + 0.028 * k["nose_bridge"] + 0.008 * man
    tip = 0.185 + 0.028 * k["nose_tip"] + 0.016 * k["nose_length"] + 0.012 * man
    profile = mix(height, tip, smoothstep(-0.15, 1.0, t) * 0.55 + 0.45 * t.clamp(0, 1))
    profile = profile + (0.018 * k["nose_bridge"] + 0.044 * k["nose_hump"]) * ridge(t, 0.45, 0.27)
    lift = 0.075 * k["nose_tip_up"]
    profile = profile * (1 - smoothstep(1.0 - lift, 1.34 - lift, t)) * smoothstep(-0.55, 0.10, t)
    breadth = 0.070 + 0.012 * k["nose_bridge"] + (0.34 * (m.nose_w - 0.112) + 0.042) * smoothstep(0.3, 1.0, t)
    across = (ax / (breadth * 1.15)).clamp(max=4)
    nose = profile * torch.exp(-across * across)
    ball = 0.050 + 0.022 * k["nose_tip"]
    ball_y = m.nose_y + 0.008 + 0.024 * k["nose_tip_up"]
    nose = nose + ball * bump(x, y, (0.0, ball_y), (0.080 + 0.014 * k["nose_tip"], 0.080))
    return nose + (0.088 + 0.20 * (m.nose_w - 0.112)) * bump(ax, y, (m.nose_w, m.nose_y - 0.010), (0.060, 0.066))


def mouth_relief(k: Knobs, m: Measures, x: Tensor, y: Tensor) -> Tensor:
    t = (x / m.mouth_w).clamp(-1, 1)
    ends = torch.sqrt((1 - t * t).clamp(min=0))
    above = y - lip_line(m, x)
    d = 0.070 * bump(x, y, (0.0, m.mouth_y), (0.30, 0.20))
    upper = ridge(above, 0.42 * m.lip_up, 0.62 * m.lip_up) * (1 - 0.25 * ridge(x, 0.0, 0.035))
    d = d + ends * (0.040 * torch.sqrt(m.lip_up / 0.062) * upper)
    d = d + ends * (0.054 * torch.sqrt(m.lip_low / 0.080) * ridge(above, -0.5 * m.lip_low, 0.62 * m.lip_low))
    d = d - 0.034 * ridge(above, 0.0, 0.020) * smoothstep(1.12, 0.9, (x / m.mouth_w).abs())
    d = d - 0.016 * bump(x, y, (0.0, m.mouth_y + 0.16), (0.030, 0.07))
    return d - 0.032 * bump(x, y, (0.0, m.mouth_y - 0.185), (0.14, 0.055))


def wrap_lids(k: Knobs, m: Measures, x: Tensor, y: Tensor, z: Tensor, front: Tensor) -> Tensor:
    """Let the lids lie on the eyeballs, with the fold of the upper lid."""
    for side in SIDES:
        radius = m.eye_r * 1.065
        dx, dy = x - side * m.eye_x, y - m.eye_y
        square_distance = dx * dx + dy * dy
        ball = m.eye_z + torch.sqrt((radius * radius - square_distance).clamp(min=0))
        near = (square_distance < radius * radius * 0.98) & (front > 0.5)
        below_upper, _, u, _ = lids(k, m, x, y, side)
        hood = 0.018 + 0.011 * k["eye_hood"] + 0.010 * k["age"]
        fold = -0.022 * ridge(below_upper, -0.045, 0.018) + hood * ridge(below_upper, -0.085, 0.030)
        z = torch.where(near, smooth_max(z, ball, 0.035), z) + fold * smoothstep(1.25, 0.8, u.abs()) * front
    return z


def beard_field(k: Knobs, m: Measures, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Where a full beard grows, 0 to 1: jaw, chin and sideburns, not around the lips."""
    ax = x.abs()
    top = mix(m.mouth_y - 0.06, -0.04, smoothstep(0.30, 0.74, ax))
    grown = smoothstep(top + 0.06, top - 0.10, y) * smoothstep(-0.25, 0.05, z)
    lips = bump(x, y, (0.0, m.mouth_y - 0.01), (m.mouth_w * 1.10, 0.110))
    return grown * (1 - 1.35 * lips).clamp(min=0)


def goatee_field(m: Measures, x: Tensor, y: Tensor) -> Tensor:
    """Where a goatee grows, 0 to 1: the chin."""
    ax = x.abs()
    low = smoothstep(m.mouth_y - m.lip_low - 0.045, m.mouth_y - m.lip_low - 0.085, y)
    return low * smoothstep(0.27, 0.20, ax + 0.10 * smoothstep(-0.75, -0.60, y))


def moustache_field(m: Measures, x: Tensor, y: Tensor) -> Tensor:
    """Where a moustache grows, 0 to 1."""
    ax = x.abs()
    centre = lip_line(m, x) + m.lip_up + 0.052 - 0.20 * ax
    grown = smoothstep(0.25, 0.55, ridge(y, centre, 0.046 - 0.05 * ax))
    return grown * smoothstep(m.mouth_w * 1.30, m.mouth_w * 1.10, ax) * smoothstep(0.004, 0.016, ax + 0.012)


def express(
    k: Knobs, m: Measures, rest: tuple[Tensor, Tensor, Tensor], z: Tensor, lower: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Move the surface by the facial actions; ``lower`` is 1 where a point belongs to the lower lip or the chin."""
    x0, y0, z0 = rest
    front = smoothstep(0.05, 0.45, z0)
    ax = x0.abs()
    side = x0 / (ax + 0.02)
    corner = bump(ax, y0, (m.mouth_w, m.mouth_y), (0.15, 0.13)) * front
    around = bump(x0, y0, (0.0, m.mouth_y), (0.34, 0.19)) * front
    smile, pucker = k["smile"], k["pucker"]
    apple = bump(ax, y0, (0.43, -0.22), (0.18, 0.14)) * front
    raised = 0.7 * smile + 0.8 * k["cheek_raise"]
    puffed = bump(ax, y0, (0.46, -0.50), (0.22, 0.21)) * front
    x = x0 + side * corner * (0.085 * smile + 0.085 * k["lip_stretch"] + 0.02 * k["frown"])
    x = x - pucker * 0.44 * x0 * around + side * 0.070 * k["cheek_puff"] * puffed
    y = y0 + corner * (0.115 * smile - 0.100 * k["frown"] - 0.025 * k["lip_stretch"]) + 0.040 * raised * apple
    z = (
        z
        - 0.045 * (smile + 0.7 * k["lip_stretch"]) * corner
        + 0.055 * raised * apple
        + 0.130 * k["cheek_puff"] * puffed
    )
    z = z + pucker * (0.10 * around + 0.04 * bump(x0, y0, (0.0, m.mouth_y), (0.12, 0.10)) * front)
    z = z - 0.020 * k["lip_press"] * bump(x0, y0, (0.0, m.mouth_y), (m.mouth_w * 0.9, 0.09)) * front
    x, y, z = _move_brows(k, m, (x0, y0), (x, y, z), front)
    return _open_mouth(k, m, rest, (x, y, z), lower, front)


def _move_brows(
    k: Knobs, m: Measures, rest: tuple[Tensor, Tensor], moved: tuple[Tensor, Tensor, Tensor], front: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x0, y0 = rest
    x, y, z = moved
    ax = x0.abs()
    side = x0 / (ax + 0.02)
    brow = bump(ax, y0, (m.eye_x * 0.95, m.brow_y + 0.02), (0.30, 0.13)) * front
    inner = bump(ax, y0, (0.13, m.brow_y), (0.12, 0.12)) * front
    lower = k["brow_lower"] + 0.5 * k["nose_wrinkle"]
    y = (
        y
        + 0.088 * k["brow_raise"] * brow
        + 0.075 * k["brow_inner_raise"] * inner
        - lower * (0.030 * brow + 0.060 * inner)
    )
    x = x - side * (0.038 * k["brow_lower"] + 0.018 * k["brow_inner_raise"]) * inner
    z = z + 0.022 * lower * inner
    wing = bump(ax, y0, (m.nose_w * 0.9, m.nose_y + 0.03), (0.09, 0.11)) * front
    bridge = bump(x0, y0, (0.0, m.eye_y + 0.02), (0.12, 0.09)) * front
    y = y + k["nose_wrinkle"] * (0.050 * wing + 0.020 * bridge)
    z = z + k["nose_wrinkle"] * (0.012 * wing + 0.016 * bridge)
    return x + side * 0.012 * k["nose_wrinkle"] * wing, y, z


def _open_mouth(
    k: Knobs,
    m: Measures,
    rest: tuple[Tensor, Tensor, Tensor],
    moved: tuple[Tensor, Tensor, Tensor],
    lower: Tensor,
    front: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raise the upper lip and turn the jaw about its hinge in front of the ears."""
    x0, y0, z0 = rest
    x, y, z = moved
    t = (x0 / (m.mouth_w * 1.02)).clamp(-1, 1)
    gape = torch.sqrt((1 - t * t).clamp(min=0))
    raised = (k["upper_lip_raise"] + 0.35 * k["nose_wrinkle"]).clamp(max=1.2)
    up = smoothstep(-0.38, -0.54, y0) * (1 - lower) * bump(x0, y0, (0.0, m.mouth_y), (m.mouth_w * 0.9, 0.6)) * front
    y = (
        y
        + 0.062 * raised * up * gape
        - 0.018 * k["upper_lip_raise"] * lower * gape * ridge(y0, m.mouth_y, 0.12) * front
    )
    chin = smoothstep(-0.15, -0.95, y0) * smoothstep(-0.1, 0.3, z0)
    at_lips = gape * smoothstep(m.mouth_y + 0.5, m.mouth_y + 0.1, y0)
    weight = chin + (lower * smoothstep(-0.1, 0.3, z0) - chin) * at_lips
    angle = -0.27 * k["jaw_open"] * weight
    c, s = torch.cos(angle), torch.sin(angle)
    dy, dz = y + 0.12, z - 0.02
    return x, -0.12 + c * dy + s * dz, 0.02 - s * dy + c * dz


def shape(k: Knobs, m: Measures, rest: tuple[Tensor, Tensor, Tensor], lower: Tensor) -> Tensor:
    """Points of the face (..., 3) from points of the skull: features, then expression."""
    x, y, z = rest
    front = smoothstep(0.05, 0.45, z)
    relief = wrap_lids(k, m, x, y, z + face_relief(k, m, x, y) * front, (z > 0.2).float())
    return torch.stack(torch.broadcast_tensors(*express(k, m, rest, relief, lower)), -1)


def mouth_row(rows: int) -> int:
    """The grid row just below the lip line (the row above it is just above the line)."""
    return round((math.asin(-0.575 / 1.08) / (math.pi / 2) + 1) / 2 * (rows - 1))


def fit_rows_to_lips(m: Measures, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Slide the rows near the mouth so that two of them lie on the two sides of the line between the lips."""
    row = mouth_row(y.shape[1])
    line = lip_line(m, x)
    near = smoothstep(1.7, 1.2, (x / m.mouth_w).abs()) * smoothstep(0.1, 0.3, z)
    low, high = y[:, : row + 1], y[:, row + 1 :]
    low_edge, high_edge = low[:, -1:], high[:, :1]
    low = low + near[:, : row + 1] * (line[:, row : row + 1] - LIP_GAP - low_edge) * ridge(low, low_edge, 0.22)
    high = high + near[:, row + 1 :] * (line[:, row + 1 : row + 2] + LIP_GAP - high_edge) * ridge(high, high_edge, 0.22)
    return torch.cat([low, high], 1)


def head_patch(k: Knobs, m: Measures, material: int, columns: int, rows: int) -> Patch:
    longitude, latitude = head_angles(columns, rows, k.device)
    x, y, z = skull(k, m, longitude, latitude)
    y = fit_rows_to_lips(m, x, y, z)
    row = mouth_row(rows)
    lower = (torch.arange(rows, device=k.device) <= row).float().view(1, -1, 1)
    points = shape(k, m, (x, y, z), lower)
    points = points + _beard_thickness(k, m, (x, y, z), longitude)[..., None] * _outward(x, y, z)
    open_eye = torch.full_like(x, -1.0)
    for side in SIDES:
        below_upper, above_lower, _, _ = lids(k, m, x, y, side)
        open_eye = torch.maximum(open_eye, torch.minimum(below_upper, above_lower))
    inside = torch.where(z > 0.2, -open_eye, torch.ones_like(x))
    in_mouth = ((x[:, row] / m.mouth_w[:, 0]).abs() < 1.0) & (z[:, row] > 0.2) & (parted(k)[:, 0] > 0)
    keep = torch.ones(k.count, rows - 1, columns - 1, dtype=torch.bool, device=k.device)
    keep[:, row] = ~(in_mouth[:, 1:] | in_mouth[:, :-1])
    return Patch(material, points, torch.stack([x, y, z], -1), inside, keep, row, facing=1)


def _outward(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    length = torch.sqrt(x * x + 0.36 * y * y + z * z + 1e-9)
    return torch.stack([x / length, 0.6 * y / length, z / length], -1)


def _beard_thickness(k: Knobs, m: Measures, rest: tuple[Tensor, Tensor, Tensor], longitude: Tensor) -> Tensor:
    if not (k.any("beard") or k.any("goatee") or k.any("moustache")):
        return torch.zeros_like(rest[0])
    x, y, z = rest
    tufts = 0.75 + 0.25 * torch.sin(longitude * 46 + 3 * torch.sin(y * 26))
    front = smoothstep(0.1, 0.3, z)
    field = 0.060 * k["beard"] * beard_field(k, m, x, y, z) + 0.055 * k["goatee"] * goatee_field(m, x, y) * front
    return field * tufts + 0.026 * k["moustache"] * moustache_field(m, x, y) * front


def eye_patches(k: Knobs, m: Measures, material: int) -> list[Patch]:
    """Eyeballs; their rest coordinates are directions in the frame of the gaze (z along the line of sight)."""
    u, v = square(34, 26, k.device, (-1.6, 1.6), (-1.1, 1.1))
    direction = torch.stack([torch.sin(u) * torch.cos(v), torch.sin(v), torch.cos(u) * torch.cos(v)], -1)
    x, y, z = direction.unbind(-1)
    patches = []
    for side in SIDES:
        # Towards the nose the ball widens to a cup, which closes the gap to the lids for oblique views.
        cup = smoothstep(0.88, 1.30, torch.acos(z.clamp(-1, 1))) * smoothstep(0.5, 0.8, -side * x)
        turn, tip = 0.42 * k["gaze_x"] - 0.03 * side, 0.30 * k["gaze_y"]
        gx, gz = torch.cos(turn) * x - torch.sin(turn) * z, torch.sin(turn) * x + torch.cos(turn) * z
        gy, gz = torch.cos(tip) * y - torch.sin(tip) * gz, torch.sin(tip) * y + torch.cos(tip) * gz
        centre = surface(side * m.eye_x, m.eye_y, m.eye_z + 0.07 * cup)
        patches.append(
            Patch(
                material,
                direction * (m.eye_r * (1 + 0.25 * cup))[..., None] + centre,
                torch.stack([gx, gy, gz], -1),
                facing=1,
                side=side,
            )
        )
    return patches


def parted(k: Knobs) -> Tensor:
    """Positive (B, 1, 1) where the lips are apart."""
    return torch.maximum(torch.maximum(k["jaw_open"], k["upper_lip_raise"]), 0.35 * k["nose_wrinkle"]) - 0.01


def mouth_hollow(k: Knobs, m: Measures, head: Patch, material: int) -> Patch:
    """The dark inside of the mouth: a bag which hangs on the very edges of the lips, so that it leaves no gap."""
    assert head.split_row is not None
    columns = head.points.shape[2]
    middle = slice(columns // 4, columns - columns // 4)
    low, high = head.points[:, head.split_row, middle], head.points[:, head.split_row + 1, middle]  # (B, W, 3)
    t = (head.rest[:, head.split_row, middle, 0] / m.mouth_w[:, 0])[:, None]  # (B, 1, W)
    v = torch.linspace(0, 1, 13, device=k.device).view(1, -1, 1)
    gape = torch.sqrt((1 - t * t).clamp(min=0))
    points = high[:, None] + (low - high)[:, None] * v[..., None]
    bulge = 0.10 * gape * torch.sin(2 * math.pi * v)
    deep = -0.40 * gape * torch.sqrt((4 * v * (1 - v)).clamp(min=0))
    points = points + surface(0 * bulge, bulge, deep - 0.02 * smoothstep(1.09, 1.14, t.abs()))
    inside = torch.where((t.abs() < 1.15) & (parted(k) > 0), 1.0, -1.0).expand(-1, 13, -1)
    return Patch(material, points, surface(t + 0 * v, v + 0 * t, 0 * bulge).expand_as(points), inside)


def mouth_patches(k: Knobs, m: Measures, head: Patch, cavity: int, teeth: int, tongue: int) -> list[Patch]:
    """What an open mouth shows: a dark hollow, two rows of teeth and the tongue."""
    if not bool((parted(k) > 0).any()):
        return []
    jaw = k["jaw_open"]
    line = m.mouth_y
    width = m.mouth_w * (1.15 + 0.3 * k["lip_stretch"] + 0.3 * k["smile"] - 0.3 * k["pucker"])
    patches = [mouth_hollow(k, m, head, cavity)]
    u, v = square(28, 8, k.device, (-1, 1), (0, 1))
    bow = 0.80 - 0.24 * u * u + 0.02 * torch.sin(v * 3)
    bite = 0.11 - 0.153 * v + (0.02 + 0.06 * k["smile"]) * u * u
    upper = surface(u * width * 0.68, line + bite, bow)
    patches.append(Patch(teeth, upper, surface(u, v, 0 * u).expand_as(upper)))
    lower = surface(u * width * 0.60, line - 0.035 - 0.075 * v - 0.222 * jaw, bow - 0.05 - 0.035 * jaw)
    patches.append(Patch(teeth, lower, surface(u, v + 2, 0 * u).expand_as(lower)))
    u, v = square(18, 12, k.device, (-1, 1), (-1, 1))
    top = line - 0.10 - 0.172 * jaw + 0.075 * (1 - u * u) * (1 - 0.5 * v * v) + 0.02 * v
    body = surface(u * m.mouth_w * 0.62, top, 0.70 - 0.07 * v - 0.03 * u * u)
    patches.append(Patch(tongue, body, surface(u, v, 0 * u).expand_as(body)))
    return patches


def ear_patches(k: Knobs, m: Measures, material: int, covered: Tensor) -> list[Patch]:
    """Both ears; ``covered`` (B, 1, 1) is 1 where hair presses them to the head."""
    u, v = square(26, 26, k.device, (-1, 1), (-1, 1))
    # A square mapped to a disc, so that the rim needs no cut.
    du, dv = u * torch.sqrt(1 - v * v / 2), v * torch.sqrt(1 - u * u / 2)
    radius = torch.sqrt(du * du + dv * dv)
    size = 1 + 0.120 * k["ear_size"] + 0.10 * k["age"] + 0.02 * k["masculinity"]
    out = 0.050 * k["ear_stickout"] * (1 - covered)
    helix = 0.075 * ridge(radius, 0.82, 0.15) - 0.02 - 0.05 * smoothstep(0.90, 1.0, radius)
    concha = 0.05 * ridge(radius, 0.38, 0.14) * smoothstep(-0.2, 0.6, -0.85 * du + 0.5 * dv)
    up = dv * 0.235 * size * (1 - 0.12 * smoothstep(0, -1, dv)) + 0.01
    ahead = du * 0.140 * size * (1 + 0.25 * dv)
    stick = (0.11 - 0.07 * covered + out).clamp(min=0.02) * smoothstep(0.5, -1.0, du)
    patches = []
    for side in SIDES:
        x = side * (m.skull_w * 0.955 - 0.005 + (helix + concha) * size + stick)
        points = surface(x, up - 0.03, ahead - 0.08)
        patches.append(Patch(material, points, surface(radius, du, dv).expand_as(points), side=side))
    return patches


def neck_patch(k: Knobs, m: Measures, material: int) -> Patch:
    u, v = square(48, 22, k.device, (-math.pi, math.pi), (0, 1))
    man = k["masculinity"]
    radius = 0.415 + 0.032 * k["neck_width"] + 0.026 * man + 0.20 * v * v * v * v + 0.02 * (1 - v)
    apple = 0.018 * (man + 1.0).clamp(0, 3) * bump(u, v, (0.0, 0.40), (0.14, 0.07))
    cords = 0.010 * (0.5 + k["age"]) * ridge(u.abs(), 0.42 - 0.25 * v, 0.10)
    reach = radius + apple + cords
    points = surface(reach * torch.sin(u), -0.55 - 1.08 * v, reach * 0.95 * torch.cos(u) - 0.14 - 0.10 * v * v)
    return Patch(material, points, surface(u, v, 0 * u).expand_as(points), follows=2, facing=-1)


def surface(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(x, y, z), -1)
