"""Hair as a cap over the skull, hair which hangs from it, and tied hair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from facegen.world.fields import Knobs, mix, power, ridge, smoothstep
from facegen.world.geometry import Measures, Patch, head_angles, skull, square, surface
from facegen.world.parameters import HAIR_STYLES
from facegen.world.wear import Material, hat_line

PI = math.pi


def _style(k: Knobs, *names: str) -> Tensor:
    return k.is_any("hair_style", *(HAIR_STYLES.index(name) for name in names))


def covers_ears(k: Knobs) -> Tensor:
    """1 where hair hangs over the ears (B, 1, 1)."""
    return _style(k, "bob", "long straight", "long wavy", "bangs", "curly", "afro")


def waves(s: Tensor, frequency: float = 1.0) -> Tensor:
    """Irregular ripples across strands, about -1 to 1."""
    f = frequency
    return 0.5 * torch.sin(s * (37 * f)) + 0.3 * torch.sin(s * (71 * f) + 1.3) + 0.2 * torch.sin(s * (113 * f) + 0.5)


def hair_edge(k: Knobs, m: Measures, longitude: Tensor, x: Tensor) -> Tensor:
    """Height of the hairline around the head, from the forehead over the temples and ears to the nape."""
    a = longitude.abs()
    part = k["hair_part"]
    fringe = _style(k, "bangs")
    forehead = m.hairline + 0.055 * torch.cos(a * 3.0) * (1 - fringe)
    forehead = forehead - fringe * (0.30 + 0.14 * k["hair_length"] + 0.045 * (m.hairline - 0.64))
    man = smoothstep(-0.5, 1.5, k["masculinity"])
    recede = 0.09 * k["age"] * man * ridge(a, 0.55, 0.22) * (1 - fringe)
    forehead = forehead + recede
    side = _style(k, "side part")
    forehead = forehead - side * 0.10 * smoothstep(-0.1, 0.8, -longitude * part.sign()) * smoothstep(1.0, 0.5, a)
    loose = covers_ears(k)
    tied = _style(k, "bun", "ponytail")
    sideburn = -0.17 + 0.05 * loose + 0.21 * tied + 0.03 * _style(k, "buzz cut")
    over_ear = 0.10 - 0.20 * loose
    edge = mix(forehead, sideburn, smoothstep(0.76, 1.10, a))
    edge = mix(edge, over_ear, smoothstep(1.26, 1.40, a))
    return mix(edge, -0.62 - 0.10 * k["hair_length"], smoothstep(1.75, 2.3, a))


def strand_angle(k: Knobs, x: Tensor, y: Tensor, z: Tensor, longitude: Tensor) -> Tensor:
    """A coordinate that is constant along a strand: strands leave the crown or the parting, or run to the back."""
    part = k["hair_part"]
    parted = _style(k, "side part", "long straight", "long wavy", "bob")
    back = _style(k, "quiff", "bun", "ponytail")
    from_part = 1.3 * z + 0.35 * (x - 0.3 * part).abs()
    to_back = 1.6 * x / (1.25 + 0.4 * z)
    crown = longitude
    return mix(mix(crown, from_part, parted), to_back, back)


def hair_patches(k: Knobs, m: Measures, columns: int, rows: int) -> list[Patch]:
    styles = k.scenes.column("hair_style")
    if not bool((styles > 0).any()):
        return []
    patches = [_cap(k, m, columns, rows)]
    if _any(styles, "bob", "bangs", "long straight", "long wavy", "curly"):
        patches.append(_fall(k, m))
    if _any(styles, "bun"):
        patches.append(_bun(k, m))
    if _any(styles, "ponytail"):
        patches.append(_ponytail(k, m))
    return patches


def _any(styles: Tensor, *names: str) -> bool:
    return any(bool((styles == HAIR_STYLES.index(name)).any()) for name in names)


def _cap(k: Knobs, m: Measures, columns: int, rows: int) -> Patch:
    longitude, latitude = head_angles(columns, rows, k.device)
    x, y, z = skull(k, m, longitude, latitude)
    s = strand_angle(k, x, y, z, longitude)
    volume, length, part = k["hair_volume"], k["hair_length"], k["hair_part"]
    shaggy = 1 - _style(k, "buzz cut", "afro", "curly")
    above = y - hair_edge(k, m, longitude, x) + (0.012 * waves(s, 0.7) + 0.010 * waves(s, 1.9)) * shaggy
    thick = (
        0.022 * _style(k, "buzz cut")
        + (0.050 + 0.050 * length) * _style(k, "short")
        + (0.075 + 0.030 * length) * _style(k, "side part")
        + 0.070 * _style(k, "quiff")
        + 0.105 * _style(k, "bob", "bangs")
        + 0.085 * _style(k, "long straight", "long wavy")
        + (0.150 + 0.080 * length) * _style(k, "curly")
        + 0.100 * _style(k, "afro")
        + 0.050 * _style(k, "bun", "ponytail")
    )
    thick = thick * (0.60 + 0.80 * volume)
    thick = thick * (1 - 0.75 * _style(k, "bob", "bangs", "long straight", "long wavy") * smoothstep(0.50, 0.15, y))
    top = smoothstep(0.45, 1.0, y)
    quiff = _style(k, "quiff") * (0.14 + 0.20 * length) * (0.6 + 0.8 * volume) * top * smoothstep(-0.5, 0.6, z)
    swoop = (
        _style(k, "side part")
        * 0.12
        * (0.5 + volume)
        * top
        * smoothstep(-0.5, 0.5, z)
        * smoothstep(-0.5, 0.4, -x * part.sign())
    )
    lift = (thick + quiff + swoop) * torch.sqrt(smoothstep(0, 0.20, above)) * (1 + 0.10 * waves(s, 0.8) * shaggy)
    curls = torch.sin(x * 15 + 2 * z) * torch.sin(y * 16 + 3 * x) * torch.sin(z * 15 + 2 * y)
    lift = lift + (0.085 * _style(k, "curly") + 0.030 * _style(k, "afro")) * curls * smoothstep(0, 0.1, above)
    groove = _style(k, "side part", "long straight", "long wavy", "bob") * ridge(x, 0.32 * part, 0.035)
    lift = lift * (1 - 0.75 * groove * smoothstep(0.45, 0.8, y) * smoothstep(-0.4, 0.2, z))
    hat = (k["hat"] > 0).float() * smoothstep(-0.02, 0.10, y - hat_line(k, longitude) + 0.05)
    lift = lift * (1 - hat) + 0.03 * hat
    length_n = torch.sqrt((x / 0.62) ** 2 + (y / 1.2 + 0.25) ** 2 + (z / 0.9) ** 2 + 1e-9)
    lift = (lift + 0.010) / length_n
    points = surface(x + x / 0.62 * lift, y + (y / 1.2 + 0.25) * lift, z + z / 0.9 * lift)
    if bool((k["hair_style"] == HAIR_STYLES.index("afro")).any()):
        ball = _ball(k, points, curls) * ((1 - hat) * smoothstep(0, 0.10, above))[..., None]
        points = points + ball * _style(k, "afro")[..., None]
    inside = torch.where(k["hair_style"] > 0, above, -torch.ones_like(above))
    return Patch(Material.HAIR, points, surface(s, y, above), inside)


def _ball(k: Knobs, points: Tensor, curls: Tensor) -> Tensor:
    """The way from points of the cap to the round outline of an afro."""
    centre = points.new_tensor([0.0, 0.42, -0.18])
    away = points - centre
    distance = torch.sqrt((away * away).sum(-1))
    radius = 0.86 + 0.30 * k["hair_length"] + 0.22 * k["hair_volume"] + 0.03 * curls
    return away * ((radius - distance).clamp(min=0) / distance.clamp(min=0.1))[..., None]


def _fall(k: Knobs, m: Measures) -> Patch:
    """Hair that falls around the back from one temple to the other."""
    u, v = square(96, 44, k.device, (-1, 1), (0, 1))
    straight, wavy = _style(k, "long straight"), _style(k, "long wavy")
    bob, bangs, curly = _style(k, "bob"), _style(k, "bangs"), _style(k, "curly")
    length, volume = k["hair_length"], k["hair_volume"]
    long = 1.35 * (straight + wavy) + 0.62 * bob + 1.0 * bangs + 0.55 * curly
    long = long + length * (0.95 * (straight + wavy) + 0.40 * bob + 0.7 * bangs + 0.5 * curly)
    opening = 0.98 + 0.10 * v - 0.30 * (bob + bangs) * v - 0.10 * (straight + wavy) * smoothstep(0.1, 0.6, v)
    longitude = PI + u * (PI - opening)
    strand = longitude - PI
    y = 0.74 - (0.74 + long) * v + 0.03 * waves(strand) * v
    # Down to the ears it lies on the skull and rises through the cap, so that no ledge shows where it begins.
    level = torch.sqrt(1 - (y.clamp(min=0) / 1.08) ** 2)
    spread = (0.10 + 0.11 * volume) * smoothstep(0.74, 0.0, y)
    inward = 0.16 * bob * smoothstep(0.65, 1.0, v) + 0.10 * straight * smoothstep(0.5, 1.0, v)
    width = m.skull_w + spread - inward + (0.10 + 0.10 * volume) * wavy * v + 0.10 * curly
    deep = 0.88 + 0.5 * spread - 0.16 * smoothstep(0.3, 1, v)
    sway = (0.05 + 0.05 * volume) * wavy * torch.sin(v * 17 + strand * 3) * smoothstep(0.1, 0.4, v)
    lumps = curly * (0.10 * torch.sin(strand * 13) * torch.sin(v * 17) + 0.07)
    radius = 1 + 0.018 * waves(strand) + sway + lumps
    points = surface(
        (width - m.skull_w * (1 - level)) * torch.sin(longitude) * radius * -1,
        y,
        ((deep - 0.88 * (1 - level)) * torch.cos(longitude) - 0.06) * radius,
    )
    ends = torch.minimum((1 - u.abs()) * 6 + 0.02, (1 - v) * 1.0 - 0.06 * (1 + waves(strand, 0.9)))
    exists = straight + wavy + bob + bangs + curly
    inside = torch.where(exists > 0, ends + 0 * exists, -torch.ones_like(ends + 0 * exists))
    return Patch(Material.HAIR, points, surface(strand * 1.3, y, 0.2 + 0 * y), inside)


def _bun(k: Knobs, m: Measures) -> Patch:
    u, v = square(44, 28, k.device, (-PI, PI), (-PI / 2, PI / 2))
    size = (0.20 + 0.12 * k["hair_volume"] + 0.08 * k["hair_length"]) * (1 + 0.05 * torch.sin(u * 3 + v * 6))
    c = torch.cos(v)
    points = surface(
        size * torch.sin(u) * c, m.skull_h + 0.08 + size * 0.85 * torch.sin(v), size * torch.cos(u) * c - 0.34
    )
    shown = (_style(k, "bun") * (k["hat"] == 0).float() - 0.5) + 0 * points[..., 0]
    return Patch(Material.HAIR, points, surface(u * 0.8 + v * 2, 1.0 + 0 * u, 0.2 + 0 * u).expand_as(points), shown)


def _ponytail(k: Knobs, m: Measures) -> Patch:
    """A tail from the back of the crown that swings to one side, so that it is seen from the front."""
    u, v = square(36, 36, k.device, (-PI, PI), (0, 1))
    length, volume = k["hair_length"], k["hair_volume"]
    side = torch.where(k["hair_part"] < 0, 1.0, -1.0)
    thick = (
        (0.20 + 0.14 * volume)
        * power((1.0 - v).clamp(min=0), 0.35)
        * smoothstep(-0.15, 0.25, v)
        * (1 + 0.08 * waves(u, 0.3))
    )
    swing = torch.sin(v * PI * 0.55)
    x = side * (0.12 + 0.95 * swing + 0.04 * torch.sin(v * 9)) + thick * torch.sin(u)
    y = 0.75 + 0.32 * torch.sin(v * 2.6) - (1.1 + 1.2 * length) * v * v
    z = -0.80 - 0.25 * swing + 0.55 * v * v + thick * torch.cos(u)
    points = surface(x, y, z)
    shown = (_style(k, "ponytail") - 0.5) + 0 * points[..., 0]
    return Patch(Material.HAIR, points, surface(u * 0.8, y, 0.2 + 0 * y).expand_as(points), shown)
