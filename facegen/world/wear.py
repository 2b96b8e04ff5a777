"""What a person wears: clothes, glasses, hats and earrings, as patches."""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from facegen.world.fields import Knobs, mix, power, ridge, smoothstep
from facegen.world.geometry import SIDES, Measures, Patch, head_angles, skull, square, surface
from facegen.world.parameters import CLOTHES, GLASSES, HATS

PI = math.pi


class Material(IntEnum):
    SKIN = 1
    NECK = 2
    CLOTH = 3
    EYE = 4
    CAVITY = 5
    TEETH = 6
    TONGUE = 7
    EAR = 8
    HAIR = 9
    FRAME = 10
    LENS = 11
    METAL = 12
    HAT = 13
    COLLAR = 14


def _present(condition: Tensor, like: Tensor) -> Tensor:
    """A field that is positive in the pictures where a part exists."""
    return torch.where(condition > 0, torch.ones_like(like), -torch.ones_like(like))


def torso_patch(k: Knobs) -> Patch:
    """Shoulders and chest; rest coordinates are x, y and z of the body."""
    u, v = square(72, 48, k.device, (-PI, PI), (0, 1))
    man = k["masculinity"]
    fall = v * v * 4.6
    s, c = torch.sin(u), torch.cos(u)
    broad = 1 + 0.035 * man
    out = smoothstep(0.0, 0.42, v)
    # The first rows close the surface inside the neck.
    closed = 0.6 + 0.4 * smoothstep(0.0, 0.05, v)
    width = (0.50 + 0.92 * power(out, 0.9) * broad + 0.10 * v) * closed
    deep = (0.50 + 0.20 * out + 0.10 * v) * closed
    slope = 0.16 * out + 0.20 * out * s * s
    round_off = smoothstep(0.30, 0.52, v)
    y = -1.33 - 0.10 * v - slope - fall * round_off - 0.10 * (c * 0.5 + 0.5) * (1 - v) * (1 - out)
    chest = 0.05 * ridge(y, -2.1, 0.35) * (c.clamp(min=0))
    stretched = s * (1.16 - 0.16 * s * s)
    points = surface(width * stretched, y, deep * c - 0.20 + chest)
    return Patch(Material.CLOTH, points, points, follows=1, facing=-1)


def glasses_patches(k: Knobs, m: Measures) -> list[Patch]:
    kind = k["glasses"]
    square_rim = k.is_any("glasses", GLASSES.index("square"))
    dark = k.is_any("glasses", GLASSES.index("sunglasses"))
    worn = (kind > 0).float()
    half_w = 0.236 + 0.012 * square_rim + 0.020 * dark + 0.25 * (m.eye_x - 0.34)
    half_h = 0.218 - 0.055 * square_rim - 0.020 * dark
    round_power = 1.0 - 0.48 * square_rim - 0.25 * dark
    thick = 0.015 + 0.009 * square_rim + 0.009 * dark
    front = m.eye_z + m.eye_r * 1.09 + 0.105
    centre_x, centre_y = m.eye_x * 1.02, m.eye_y - 0.020
    patches = []
    for side in SIDES:
        u, v = square(72, 8, k.device, (-PI, PI), (-PI, PI))
        c = torch.cos(u).sign() * power(torch.cos(u).abs(), round_power)
        s = torch.sin(u).sign() * power(torch.sin(u).abs(), round_power) * (1 - 0.10 * dark * torch.cos(u) * -1)
        x = centre_x + (half_w + thick * torch.cos(v)) * c
        y = centre_y + (half_h + thick * torch.cos(v)) * s
        z = front + thick * torch.sin(v) - 0.16 * (x - 0.1).clamp(min=0)
        rim = surface(side * x, y, z)
        patches.append(Patch(Material.FRAME, rim, rim, _present(worn, x)))
        u, v = square(22, 22, k.device, (-1, 1), (-1, 1))
        angle_x, angle_y = u * torch.sqrt(1 - v * v / 2), v * torch.sqrt(1 - u * u / 2)
        x = centre_x + half_w * mix(angle_x, u * (1 - 0.08 * v * v), 1 - round_power + 0.0 * u)
        y = centre_y + half_h * mix(angle_y, v * (1 - 0.08 * u * u), 1 - round_power + 0.0 * u)
        z = front - 0.16 * (x - 0.1).clamp(min=0) + 0.03 * (1 - angle_x * angle_x - angle_y * angle_y)
        lens = surface(side * x, y, z)
        patches.append(Patch(Material.LENS, lens, surface(u * side, v, 0 * u).expand_as(lens), _present(worn, x)))
        u, v = square(28, 8, k.device, (0, 1), (-PI, PI))
        hinge = centre_x + half_w
        x = mix(hinge, m.skull_w * 0.985 + 0.02, smoothstep(0, 0.5, u)) + 0.014 * torch.cos(v)
        y = m.eye_y + 0.03 - 0.02 * u + (0.016 + 0.012 * dark * (1 - u)) * torch.sin(v) - 0.10 * smoothstep(0.88, 1, u)
        z = mix(front - 0.16 * (hinge - 0.1), 0 * front - 0.14, u)
        arm = surface(side * x, y, z)
        patches.append(Patch(Material.FRAME, arm, arm, _present(worn, arm[..., 0])))
    u, v = square(16, 8, k.device, (-1, 1), (-PI, PI))
    x = u * (centre_x - half_w + 0.01)
    bridge = surface(
        x,
        m.eye_y + 0.030 + 0.03 * (1 - u * u) + 0.016 * torch.cos(v),
        front + 0.016 * torch.sin(v) + 0.09 * (1 - u * u),
    )
    patches.append(Patch(Material.FRAME, bridge, bridge, _present(worn, bridge[..., 0])))
    return patches


def hat_line(k: Knobs, longitude: Tensor) -> Tensor:
    """Height of the lower edge of a beanie or a cap around the head."""
    back = smoothstep(0.4, 2.4, longitude.abs())
    cap = k.is_any("hat", HATS.index("cap"))
    return mix(0.500 - 0.02 * cap, 0.08 + 0.06 * cap, back)


def hat_patches(k: Knobs, m: Measures, columns: int, rows: int) -> list[Patch]:
    longitude, latitude = head_angles(columns, rows, k.device)
    x, y, z = skull(k, m, longitude, latitude)
    beanie = k.is_any("hat", HATS.index("beanie"))
    cap = k.is_any("hat", HATS.index("cap"))
    above = y - hat_line(k, longitude)
    length = torch.sqrt((x / 0.62) ** 2 + (y / 1.2) ** 2 + (z / 0.9) ** 2 + 1e-9)
    brim = smoothstep(0.225, 0.195, above) * smoothstep(0.0, 0.02, above)
    ribs = 0.010 * torch.sin(longitude * 42)
    thick = 0.135 + 0.06 * smoothstep(0.2, 1.1, y)
    thick = thick * (1 - 0.4 * smoothstep(0.02, 0.0, above))
    thick = thick + beanie * (0.035 * brim + ribs + 0.08 * smoothstep(0.8, 1.15, y)) - 0.01 * cap
    points = surface(x + x / 0.62 / length * thick, y + y / 1.2 / length * thick, z + z / 0.9 / length * thick)
    rest = surface(longitude + 0 * x, y, above)
    patches = [
        Patch(Material.HAT, points, rest, torch.where(k["hat"] > 0, above + 0.004, -torch.ones_like(above)), facing=1)
    ]
    if bool((cap > 0).any()):
        patches.append(_cap_brim(k, m, cap))
    if bool((beanie > 0).any()):
        patches.append(_pompon(k, m, beanie))
    return patches


def _cap_brim(k: Knobs, m: Measures, cap: Tensor) -> Patch:
    """A curved shield which starts inside the cap's front."""
    u, v = square(44, 18, k.device, (-1, 1), (0, 1))
    angle = u * 1.08
    reach = 0.60 * v * torch.cos(u * 1.35).clamp(min=0.02)
    x = (m.skull_w + 0.02) * torch.sin(angle) * (1 + 0.10 * v)
    z = 0.90 * power(torch.cos(angle), 0.8) + reach
    y = 0.555 - 0.13 * u * u - 0.10 * v * v - 0.02 * v
    points = surface(x, y, z)
    return Patch(Material.HAT, points, surface(u, v, 9 + 0 * u).expand_as(points), _present(cap, x))


def _pompon(k: Knobs, m: Measures, beanie: Tensor) -> Patch:
    u, v = square(30, 18, k.device, (-PI, PI), (-PI / 2, PI / 2))
    fluff = 0.17 * (1 + 0.06 * torch.sin(u * 9 + v * 7) + 0.05 * torch.sin(v * 13))
    c = torch.cos(v)
    points = surface(fluff * torch.sin(u) * c, m.skull_h + 0.30 + fluff * torch.sin(v), fluff * torch.cos(u) * c - 0.05)
    return Patch(Material.HAT, points, surface(u, v, 5 + 0 * u).expand_as(points), _present(beanie, points[..., 0]))


def earring_patches(k: Knobs, m: Measures) -> list[Patch]:
    u, v = square(16, 10, k.device, (-PI, PI), (-PI / 2, PI / 2))
    size = 1 + 0.120 * k["ear_size"] + 0.10 * k["age"]
    patches = []
    for side in SIDES:
        x = side * (m.skull_w * 0.955 + 0.05 + 0.015 * k["ear_stickout"]) + 0.052 * torch.sin(u) * torch.cos(v)
        y = -0.02 - 0.265 * size + 0.062 * torch.sin(v)
        points = surface(x, y, 0.052 * torch.cos(u) * torch.cos(v) - 0.04)
        worn = _present(k["earrings"], points[..., 0])
        patches.append(Patch(Material.METAL, points, surface(u, v, 0 * u).expand_as(points), worn))
    return patches


def collar_patches(k: Knobs) -> list[Patch]:
    """The raised parts of clothes around the neck: a rolled turtleneck, a shirt collar, a hood."""
    style = CLOTHES.index
    patches = []
    column = k.scenes.column("clothes")
    if bool((column == style("turtleneck")).any()):
        u, v = square(48, 16, k.device, (-PI, PI), (0, 1))
        roll = 0.045 * torch.sin(v * PI) + 0.02 * ridge(v, 0.5, 0.08) * -1
        radius = 0.470 + roll + 0.10 * v * v + 0.030 * k["neck_width"] + 0.024 * k["masculinity"]
        points = surface(
            radius * torch.sin(u), -1.02 - 0.42 * v - 0.05 * torch.cos(u), radius * 0.97 * torch.cos(u) - 0.15
        )
        worn = _present(k.is_any("clothes", style("turtleneck")), points[..., 0])
        patches.append(Patch(Material.COLLAR, points, surface(u, v, 0 * u).expand_as(points), worn, follows=2))
    if bool(((column == style("shirt")) | (column == style("suit"))).any()):
        u, v = square(60, 12, k.device, (-PI, PI), (0, 1))
        front = smoothstep(1.3, 0.0, u.abs())
        fold = ridge(v, 0.0, 0.25)
        neck = 0.028 * k["neck_width"] + 0.022 * k["masculinity"]
        radius = 0.500 + 0.10 * v + 0.020 * front - 0.025 * fold + neck
        y = -1.08 - 0.13 * front - (0.24 + 0.10 * front) * v
        points = surface(radius * torch.sin(u), y, radius * (1 + 0.05 * front) * torch.cos(u) - 0.17)
        worn = _present(k.is_any("clothes", style("shirt"), style("suit")), points[..., 0])
        inside = torch.minimum(worn, u.abs() - 0.05 - 0.34 * v * v + 0 * worn)
        patches.append(Patch(Material.COLLAR, points, surface(u, v, 1 + 0 * u).expand_as(points), inside, follows=1))
    if bool((column == style("hoodie")).any()):
        u, v = square(56, 18, k.device, (-PI, PI), (-PI, PI))
        back = smoothstep(0.4, 2.2, u.abs())
        tube = 0.085 + 0.085 * back
        radius = 0.60 + 0.05 * back + tube * torch.cos(v)
        y = -1.34 + 0.20 * back - 0.14 * smoothstep(0.8, 0.0, u.abs()) + tube * torch.sin(v) * 1.1
        points = surface(radius * torch.sin(u), y, radius * torch.cos(u) * 0.95 - 0.22)
        worn = _present(k.is_any("clothes", style("hoodie")), points[..., 0])
        patches.append(Patch(Material.COLLAR, points, surface(u, v, 2 + 0 * u).expand_as(points), worn, follows=1))
    return patches
