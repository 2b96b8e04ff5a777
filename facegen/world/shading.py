"""What a surface looks like: textures on rest coordinates, then light."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.world.fields import Knobs, bump, dot, mix, ridge, smoothstep, unit
from facegen.world.geometry import (
    SIDES,
    Measures,
    beard_field,
    goatee_field,
    lids,
    lip_line,
    measure,
    moustache_field,
)
from facegen.world.hair import waves
from facegen.world.parameters import CLOTHES, COLORS, HAIR_COLORS, HAIR_STYLES, HATS
from facegen.world.raster import CAMERA_DISTANCE, Fragments, Mesh
from facegen.world.wear import Material

PARSING: tuple[str, ...] = (
    "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r", "nose", "mouth",
    "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat", "beard",
    "front",  # hands and things before a face: facegen.world.front lays them over finished pictures
)  # fmt: skip
CLASS = {name: index for index, name in enumerate(PARSING)}

SKIN_RAMP = (
    (0.880, 0.640, 0.530), (0.820, 0.545, 0.410), (0.690, 0.415, 0.275), (0.500, 0.275, 0.165), (0.300, 0.155, 0.090),
    (0.140, 0.075, 0.048),
)  # fmt: skip
IRIS_RAMP = (
    (0.060, 0.026, 0.013), (0.190, 0.085, 0.030), (0.200, 0.160, 0.050), (0.110, 0.240, 0.120), (0.090, 0.250, 0.500),
    (0.300, 0.370, 0.430),
)  # fmt: skip
NATURAL_BEARD = (0.090, 0.046, 0.026)
DYED = tuple(index for index, name in enumerate(HAIR_COLORS) if name in ("blue", "pink"))


@dataclass(frozen=True, eq=False)
class Surface:
    """How N visible points reflect light.

    ``color`` (N, 3) linear; ``gloss`` (N,) strength and ``focus`` (N,) exponent of highlights; ``soft`` (N,) 1 where
    light bleeds under the surface; ``hair`` (N,) 1 on strands; ``label`` (N,) index into PARSING.
    """

    color: Tensor
    gloss: Tensor
    focus: Tensor
    soft: Tensor
    hair: Tensor
    label: Tensor


def palette(device: torch.device) -> Tensor:
    return torch.tensor(list(COLORS.values()), device=device)


def ramp(colors: tuple[tuple[float, float, float], ...], at: Tensor) -> Tensor:
    """Colours (N, 3) along a ramp, ``at`` (N,) in [0, 1]."""
    table = torch.tensor(colors, device=at.device)
    place = at.clamp(0, 1) * (len(colors) - 1)
    below = place.floor().clamp(max=len(colors) - 2)
    t = (place - below)[:, None]
    first = table[below.long()]
    return first + (table[below.long() + 1] - first) * t


@lru_cache(maxsize=8)
def _noise(device: torch.device) -> Tensor:
    """Three octaves of smooth, periodic noise in [0, 1], shape (1, 3, 256, 256)."""
    generator = torch.Generator().manual_seed(5)
    layers = []
    for cells in (128, 64, 24):
        tile = torch.rand(1, 1, cells, cells, generator=generator)
        tile = F.pad(tile, (0, 4, 0, 4), mode="circular")
        layers.append(F.interpolate(tile, (256, 256), mode="bicubic", align_corners=True)[0, 0])
    return torch.stack(layers)[None].to(device)


def noise(x: Tensor, y: Tensor, octave: int) -> Tensor:
    """Smooth noise (N,) in about [0, 1]; coordinates wrap around at 2."""
    place = torch.stack([(x + 0.37) % 2 - 1, y % 2 - 1], -1).view(1, 1, -1, 2)
    return F.grid_sample(_noise(x.device)[:, octave : octave + 1], place, align_corners=True).view(-1)


def tint(color: Tensor, weight: Tensor, by: tuple[float, float, float]) -> Tensor:
    """Multiply colours by ``by`` where the weight (N,) is 1."""
    factor = torch.tensor(by, device=color.device)
    return color * (1 + (factor - 1) * weight[:, None])


def paint(color: Tensor, weight: Tensor, over: Tensor) -> Tensor:
    return color + (over - color) * weight[:, None]


def skin_color(k: Knobs) -> Tensor:
    """(N, 3) or (1, 3) linear."""
    base = ramp(SKIN_RAMP, k["skin_tone"])
    warm = k["skin_undertone"] - 0.5
    base = base * torch.stack([1 - 0.03 * warm, 1 + 0.08 * warm, 1 - 0.24 * warm], -1)
    gray = (base * torch.tensor([0.3, 0.6, 0.1], device=base.device)).sum(-1, keepdim=True)
    return base + (gray - base) * (0.10 * k["age"])[:, None]


def hair_color(k: Knobs) -> Tensor:
    return torch.stack([k["hair_r"], k["hair_g"], k["hair_b"]], -1)


def facial_hair_color(k: Knobs) -> Tensor:
    """Brows and beards keep a natural colour when the hair is dyed."""
    dyed = k.is_any("hair_color", *DYED)[:, None]
    natural = torch.tensor(NATURAL_BEARD, device=k.device)
    own = hair_color(k) * 0.85
    return own + (natural - own) * dyed


def face_surface(k: Knobs, rest: Tensor, full: bool = True) -> Surface:
    """Skin of the head with everything that grows or is painted on it."""
    m = measure(k)
    x, y, z = rest.unbind(-1)
    front = (z > 0.1).float()
    color = skin_color(k).expand(len(x), 3)
    color = _complexion(k, m, color, x, y, front)
    color = _age_lines(k, m, color, x, y, front)
    color = _nostrils(k, m, color, x, y, front)
    label = torch.full_like(x, CLASS["skin"])
    label = torch.where(_nose_region(m, x, y) & (front > 0), float(CLASS["nose"]), label)
    gloss, focus = 0.085 + 0.05 * front * bump(x, y, (0.0, m.nose_y), (0.09, 0.30)), torch.full_like(x, 13.0)
    color, lips, label = _lips(k, m, color, x, y, front, label)
    gloss, focus = gloss + lips * (0.14 + 0.12 * k["lipstick"]), focus + 26 * lips
    color, label, brows = _eyes_and_brows(k, m, color, x, y, front, label)
    color, label, grown = _facial_hair(k, m, color, (x, y, z), front, label)
    hairy = (grown + brows).clamp(0, 1)
    return Surface(color, gloss * (1 - 0.8 * hairy), focus, 1 - 0.8 * hairy, 0 * x, label)


def _complexion(k: Knobs, m: Measures, color: Tensor, x: Tensor, y: Tensor, front: Tensor) -> Tensor:
    ax = x.abs()
    color = color * (1 + (0.05 + 0.06 * k["age"]) * (noise(0.6 * x, 0.6 * y, 2) - 0.5))[:, None]
    red = bump(ax, y, (0.45, -0.24), (0.20, 0.15)) + 0.7 * bump(x, y, (0.0, m.nose_y), (0.13, 0.10))
    color = tint(color, ((0.30 + 0.85 * k["blush"]) * red).clamp(0, 1.15) * front, (1.04, 0.76, 0.74))
    speckle = smoothstep(0.60, 0.76, noise(1.1 * x, 1.1 * y, 0))
    spread = (bump(ax, y, (0.33, -0.18), (0.30, 0.17)) + bump(x, y, (0.0, -0.10), (0.25, 0.15))).clamp(0, 1)
    color = tint(
        color,
        ((k["freckles"] - 0.65) / 0.20).clamp(0, 1) * speckle * (1.2 * spread).clamp(max=1) * front,
        (0.62, 0.45, 0.36),
    )
    spots = smoothstep(0.76, 0.90, noise(0.9 * x + 0.4, 0.9 * y, 1)) * ((k["age"] - 0.55) / 0.45).clamp(0, 1)
    color = tint(color, 0.5 * spots * front, (0.74, 0.62, 0.55))
    has_mole = ((k["mole"] - 0.68) / 0.06).clamp(0, 1)
    mole = smoothstep(0.030, 0.020, torch.sqrt((x - 0.42 * k["mole_x"]) ** 2 + (y + 0.42 - 0.30 * k["mole_y"]) ** 2))
    return tint(color, has_mole * mole * front, (0.22, 0.15, 0.13))


def _age_lines(k: Knobs, m: Measures, color: Tensor, x: Tensor, y: Tensor, front: Tensor) -> Tensor:
    ax, old = x.abs(), k["age"]
    bags = bump(ax, y, (m.eye_x * 0.95, m.eye_y - 0.155), (0.13, 0.050))
    color = tint(color, (0.10 + 0.30 * old) * bags * front, (0.62, 0.52, 0.52))
    out = ax - m.eye_x - m.lid_width
    feet = 0 * x
    for slope in (-0.55, 0.0, 0.55):
        feet = feet + ridge(y, m.eye_y + slope * (out + 0.04), 0.010)
    feet = feet * smoothstep(0.015, 0.05, out) * smoothstep(0.17, 0.10, out)
    smiling = 0.35 * k["smile"] + 0.45 * k["cheek_raise"]
    color = tint(color, ((0.75 * old * (0.6 + smiling) + 0.4 * smiling) * feet).clamp(0, 1) * front, (0.72, 0.60, 0.56))
    wave = (y - 0.02 * torch.cos(x * 9) - 0.36) % 0.088
    forehead = (
        ridge(wave, 0.044, 0.011) * smoothstep(0.34, 0.42, y) * smoothstep(0.70, 0.58, y) * smoothstep(0.44, 0.25, ax)
    )
    creased = (0.85 * old + 0.55 * k["brow_raise"] + 0.45 * k["brow_inner_raise"] * smoothstep(0.3, 0.15, ax)).clamp(
        0, 1
    )
    color = tint(color, creased * forehead * front, (0.76, 0.66, 0.62))
    fold = ridge(ax, 0.220 + 0.32 * (-0.26 - y), 0.020) * smoothstep(-0.66, -0.48, y) * smoothstep(-0.22, -0.33, y)
    deep = (0.60 * old + 0.35 * k["smile"] + 0.3 * k["upper_lip_raise"]).clamp(0, 1)
    color = tint(color, deep * fold * front, (0.70, 0.57, 0.54))
    puppet = ridge(ax, m.mouth_w + 0.03 + 0.15 * (m.mouth_y - y), 0.015) * smoothstep(-0.84, -0.74, y)
    color = tint(color, 0.6 * old * puppet * smoothstep(m.mouth_y, m.mouth_y - 0.06, y) * front, (0.72, 0.60, 0.57))
    frown = ridge(ax, 0.048, 0.012) * smoothstep(0.14, 0.20, y) * smoothstep(0.42, 0.34, y)
    color = tint(color, (k["brow_lower"] + 0.30 * old).clamp(0, 1) * frown * front, (0.64, 0.52, 0.50))
    bunny = ridge((y - 0.5 * ax) % 0.05, 0.025, 0.009) * bump(ax, y, (0.09, m.eye_y - 0.04), (0.06, 0.06))
    return tint(color, k["nose_wrinkle"] * bunny * front, (0.66, 0.54, 0.52))


def _nostrils(k: Knobs, m: Measures, color: Tensor, x: Tensor, y: Tensor, front: Tensor) -> Tensor:
    ax = x.abs()
    hole = bump(ax, y, (0.020 + 0.42 * m.nose_w, m.nose_y - 0.080), (0.032 + 0.06 * (m.nose_w - 0.1), 0.021))
    color = tint(color, 0.85 * hole * front, (0.22, 0.12, 0.11))
    wing = bump(ax, y, (m.nose_w + 0.062, m.nose_y - 0.015), (0.020, 0.060))
    return tint(color, 0.35 * wing * front, (0.62, 0.48, 0.46))


def _nose_region(m: Measures, x: Tensor, y: Tensor) -> Tensor:
    t = ((m.eye_y - y) / (m.eye_y - m.nose_y + 0.10)).clamp(0, 1)
    return (x.abs() < 0.055 + (m.nose_w + 0.01) * t * t) & (y < m.eye_y + 0.02) & (y > m.nose_y - 0.105)


def _lips(
    k: Knobs, m: Measures, color: Tensor, x: Tensor, y: Tensor, front: Tensor, label: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    above, t = y - lip_line(m, x), x / m.mouth_w
    ends = (1 - t.clamp(-1, 1) ** 2).clamp(min=0)
    upper = m.lip_up * torch.sqrt(ends) * (1 - 0.22 * ridge(x, 0.0, 0.035)) + 0.003
    lower = m.lip_low * torch.sqrt(ends) + 0.003
    blur = 0.008
    lips = smoothstep(upper + blur, upper - blur, above) * smoothstep(-lower - blur, -lower + blur, above)
    lips = lips * (t.abs() < 1.02).float() * front
    light = color.mean(-1, keepdim=True)
    own = color * torch.tensor([0.93, 0.60, 0.60], device=color.device)
    red = torch.tensor([0.60, 0.045, 0.085], device=color.device) * (0.45 + 0.75 * light)
    painted = own + (red - own) * (0.92 * k["lipstick"])[:, None]
    color = paint(color, 0.92 * lips, painted * (1 - 0.12 * (above > 0).float())[:, None])
    line = ridge(above, 0.0, 0.0085) * smoothstep(1.06, 0.96, t.abs()) * front
    color = tint(color, 0.70 * line, (0.35, 0.18, 0.18))
    on_lip = (lips > 0.5).float()
    label = torch.where(on_lip > 0, torch.where(above > 0, float(CLASS["u_lip"]), float(CLASS["l_lip"])), label)
    return color, lips, label


def _eyes_and_brows(
    k: Knobs, m: Measures, color: Tensor, x: Tensor, y: Tensor, front: Tensor, label: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    man, makeup = k["masculinity"], k["eye_makeup"]
    brow_color = facial_hair_color(k) * 0.65 + 0.004
    brow_color = brow_color.clamp(max=0.42)
    brows = 0 * x
    lash = (0.80 - 0.07 * man + 0.15 * makeup).clamp(0.45, 1)
    for side in SIDES:
        below_upper, above_lower, u, v = lids(k, m, x, y, side)
        near = smoothstep(1.12, 0.95, u.abs()) * front
        shadow = ridge(below_upper, -0.055, 0.055) * smoothstep(1.25, 0.8, u.abs()) * (below_upper < 0).float() * front
        color = tint(color, (0.30 + 0.9 * makeup).clamp(max=1.0) * shadow, (0.70, 0.50, 0.56))
        color = tint(color, makeup * 0.75 * shadow, (0.62, 0.52, 0.78))
        width = 0.010 + 0.004 * makeup - 0.001 * man
        edge = ridge(below_upper, -0.003, width) * (below_upper < 0.012).float() * (v > -0.2).float()
        wing = (
            ridge(below_upper - 0.10 * (u - 0.9).clamp(min=0), -0.004, 0.012)
            * smoothstep(0.8, 1.0, u)
            * smoothstep(1.25, 1.1, u)
        )
        dark = lash * edge * near + makeup * 0.9 * wing * front
        color = tint(color, dark.clamp(0, 1), (0.09, 0.06, 0.06))
        under = ridge(above_lower, -0.002, 0.009) * (above_lower < 0.010).float()
        color = tint(color, (0.42 + 0.35 * makeup) * under * near, (0.35, 0.24, 0.24))
        fold = ridge(below_upper, -0.052 + 0.006 * k["eye_hood"], 0.009) * smoothstep(1.1, 0.8, u.abs()) * front
        color = tint(color, 0.5 * fold, (0.55, 0.42, 0.42))
        t = (x * side - 0.100 - 0.3 * (m.eye_x - 0.340)) / 0.400
        arch = (0.040 + 0.025 * k["brow_arch"]) * torch.sin(t.clamp(0, 1) * 2.4)
        centre = m.brow_y + arch - 0.045 * t + 0.038 * k["brow_tilt"] * (t - 0.4)
        thick = (0.036 + 0.0105 * k["brow_thickness"] + 0.0060 * man).clamp(min=0.013) * (
            1 - 0.62 * smoothstep(0.35, 1.0, t) - 0.25 * smoothstep(0.12, -0.02, t)
        )
        off = (y - centre).abs()
        brow = (
            smoothstep(thick + 0.012, thick - 0.016, off)
            * smoothstep(-0.03, 0.07, t)
            * smoothstep(1.03, 0.84, t)
            * front
        )
        hairs = 0.92 + 0.08 * torch.sin(x * (side * 150) - (y - centre) * 260 + 4 * torch.sin(t * 9))
        color = paint(color, (0.94 * brow * hairs).clamp(0, 1), brow_color)
        label = torch.where(brow > 0.45, float(CLASS["l_brow" if side < 0 else "r_brow"]), label)
        brows = brows + brow
    return color, label, brows.clamp(0, 1)


def _facial_hair(
    k: Knobs, m: Measures, color: Tensor, rest: tuple[Tensor, Tensor, Tensor], front: Tensor, label: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    names = ("beard", "goatee", "moustache", "stubble")
    if not any(k.any(name) for name in names):
        return color, label, 0 * label
    x, y, z = rest
    full, tache = beard_field(k, m, x, y, z), moustache_field(m, x, y) * front
    chin = goatee_field(m, x, y) * front
    grain = noise(2.3 * x, 1.2 * y, 0)
    reach = lambda name: (1.6 * k[name]).clamp(max=1)  # noqa: E731
    grown = torch.maximum(torch.maximum(full * reach("beard"), chin * reach("goatee")), tache * reach("moustache"))
    # Short hair lets the skin shine through in grains, a grown beard is a closed surface.
    cover = smoothstep(0.05, 0.55, grown + 0.35 * (grain - 0.5) * (1 - grown))
    strand = facial_hair_color(k) * (0.66 + 0.55 * grain + 0.12 * torch.sin(x * 90 + 5 * torch.sin(y * 31)))[:, None]
    rough = (full.clamp(0, 1) + tache + chin).clamp(0, 1) * k["stubble"]
    color = tint(color, 0.62 * rough * smoothstep(0.10, 0.70, grain), (0.50, 0.50, 0.54))
    color = paint(color, 0.96 * cover, strand)
    return color, torch.where(cover > 0.5, float(CLASS["beard"]), label), cover


def _plain(color: Tensor, label: str, gloss: float, focus: float, soft: float = 0.0, hair: float = 0.0) -> Surface:
    n = color.new_ones(len(color))
    return Surface(color, gloss * n, focus * n, soft * n, hair * n, float(CLASS[label]) * n)


def _sided(surface: Surface, side: Tensor, left: str, right: str) -> Surface:
    label = torch.where(side < 0, float(CLASS[left]), float(CLASS[right]))
    return Surface(surface.color, surface.gloss, surface.focus, surface.soft, surface.hair, label)


def eye_surface(k: Knobs, rest: Tensor) -> Surface:
    x, y, z = rest.unbind(-1)
    angle = torch.acos(z.clamp(-1, 1))
    around = torch.atan2(y, x)
    iris_radius = 0.54
    iris = ramp(IRIS_RAMP, k["eye_color"]).expand(len(x), 3)
    glow = 1.1 + 0.22 * torch.sin(around * 23) + 0.9 * smoothstep(0.10, 0.42, angle) * (y < 0.08).float() * 0.7
    iris = iris * (glow * (1 - 0.75 * smoothstep(iris_radius * 0.80, iris_radius, angle)))[:, None]
    white = torch.tensor([0.83, 0.82, 0.82], device=x.device) * (1 - 0.25 * smoothstep(0.8, 1.4, angle))[:, None]
    white = tint(white, smoothstep(1.15, 1.45, angle), (0.75, 0.42, 0.38))
    white = tint(white, 0.6 * smoothstep(0.8, 1.3, angle) * k["age"], (1.0, 0.85, 0.80))
    color = paint(iris, smoothstep(iris_radius - 0.03, iris_radius + 0.04, angle), white)
    color = color * (0.02 + 0.98 * smoothstep(0.215, 0.265, angle))[:, None]
    return _plain(color, "l_eye", 0.25, 60.0)


def ear_surface(k: Knobs, rest: Tensor) -> Surface:
    radius = rest[:, 0]
    color = skin_color(k).expand(len(radius), 3)
    color = tint(color, (0.6 + 0.6 * k["blush"]) * (0.4 + 0.6 * radius), (1.02, 0.84, 0.82))
    return _plain(tint(color, 0.55 * ridge(radius, 0.52, 0.18), (0.62, 0.45, 0.42)), "l_ear", 0.06, 12.0, 1.0)


def neck_surface(k: Knobs, rest: Tensor) -> Surface:
    u, v, _ = rest.unbind(-1)
    color = skin_color(k).expand(len(u), 3) * 0.97
    bands = ridge((v + 0.02 * torch.cos(u * 3)) % 0.16, 0.08, 0.012) * (u.abs() < 1.2).float()
    return _plain(tint(color, (0.08 + 0.45 * k["age"]) * bands, (0.74, 0.63, 0.60)), "neck", 0.06, 12.0, 1.0)


def cloth_color(k: Knobs) -> Tensor:
    return palette(k.device)[k["clothes_color"].long()]


def torso_surface(k: Knobs, rest: Tensor) -> Surface:
    """T-shirt, shirt, turtleneck, hoodie or suit, drawn on the torso by x and y."""
    x, y, z = rest.unbind(-1)
    ax, front = x.abs(), (z > 0).float()
    own = cloth_color(k).expand(len(x), 3)
    white = torch.tensor([0.80, 0.80, 0.82], device=x.device).expand(len(x), 3)
    shirt, suit = (k.is_any("clothes", CLOTHES.index(name)) for name in ("shirt", "suit"))
    hoodie, tee = (k.is_any("clothes", CLOTHES.index(name)) for name in ("hoodie", "t-shirt"))
    skin = skin_color(k).expand(len(x), 3) * 0.97
    color = (
        own
        * (1 + 0.05 * (noise(0.9 * x, 0.5 * y, 1) - 0.5) + 0.025 * torch.sin(5 * x + 4 * y + 2 * torch.sin(3 * y)))[
            :, None
        ]
    )
    # Neck opening of a t-shirt, as a distance from the neck's axis which widens to the front.
    around = torch.sqrt(x * x + ((z + 0.16) * 1.0) ** 2)
    opening = 0.60 + 0.05 * smoothstep(-0.4, 0.4, z)
    top = tee * smoothstep(-1.66, -1.60, y)
    bare = smoothstep(opening + 0.008, opening - 0.008, around) * top
    band = top * (around > opening).float() * smoothstep(opening + 0.075, opening + 0.065, around)
    color = color * (1 - 0.22 * band)[:, None]
    placket = shirt * front * smoothstep(0.075, 0.070, ax)
    color = color * (1 - 0.10 * placket - 0.25 * shirt * front * ridge(ax, 0.072, 0.006))[:, None]
    button = smoothstep(0.030, 0.022, torch.sqrt(x * x + ((y + 0.16) % 0.34 - 0.17) ** 2))
    color = paint(color, 0.8 * shirt * front * button * (y < -1.6).float(), white * 0.9)
    vee = (y + 2.75) * 0.36
    chest = suit * front * smoothstep(vee + 0.008, vee - 0.008, ax)
    lapel = suit * front * smoothstep(vee + 0.20, vee + 0.19, ax) * (ax > vee).float()
    color = color * (1 - 0.22 * lapel - 0.45 * suit * front * ridge(ax, vee + 0.195, 0.008))[:, None]
    color = paint(color, chest, white)
    tie_width = 0.060 + 0.045 * smoothstep(-1.45, -2.6, y) + 0.03 * ridge(y, -1.47, 0.07)
    tie_color = palette(x.device)[((k["clothes_color"] * 5 + 3) % len(COLORS)).long()].expand(len(x), 3) * 0.8
    color = paint(color, chest * smoothstep(tie_width + 0.008, tie_width - 0.008, ax), tie_color)
    string = hoodie * front * ridge(ax, 0.20, 0.020) * smoothstep(-2.25, -2.22, y)
    color = paint(color, string.clamp(0, 1), white)
    pocket = hoodie * front * ridge(y, -2.75, 0.012) * (ax < 0.6).float()
    arms = ridge(ax, 1.10 + 0.10 * (y + 2), 0.03) * smoothstep(-1.85, -2.2, y) * front
    color = color * (1 - 0.35 * pocket - 0.30 * arms)[:, None]
    color = paint(color, bare, skin)
    plain = _plain(color, "cloth", 0.03, 8.0)
    label = torch.where(bare > 0.5, float(CLASS["neck"]), plain.label)
    return Surface(color, plain.gloss, plain.focus, bare, plain.hair, label)


def collar_surface(k: Knobs, rest: Tensor) -> Surface:
    u, v, kind = rest.unbind(-1)
    own = cloth_color(k).expand(len(u), 3)
    white = torch.tensor([0.80, 0.80, 0.82], device=u.device)
    suit = k.is_any("clothes", CLOTHES.index("suit"))
    color = paint(own, suit + 0 * u, white.expand(len(u), 3))
    ribs = 1 + 0.10 * torch.sin(u * 60) * (kind == 0).float()
    stitch = 1 - 0.22 * ridge(v, 0.86, 0.03) * (kind == 1).float()
    return _plain(color * (ribs * stitch)[:, None], "cloth", 0.03, 8.0)


def hair_surface(k: Knobs, rest: Tensor) -> Surface:
    s, y, above = rest.unbind(-1)
    streaks = 0.5 * waves(s, 1.0) + 0.3 * torch.sin(s * 190 + y * 5)
    shade = (
        (1 + 0.30 * streaks) * (0.70 + 0.30 * smoothstep(-0.6, 0.9, y)) * (0.72 + 0.28 * smoothstep(0.0, 0.15, above))
    )
    fuzzy = k.is_any("hair_style", HAIR_STYLES.index("afro"), HAIR_STYLES.index("curly"))
    kinks = 0.45 + 0.75 * noise(1.9 * s, 1.6 * y, 0) + 0.30 * noise(2.7 * s, 2.3 * y + 0.4, 0)
    shade = mix(shade, kinks * (0.80 + 0.20 * smoothstep(-0.4, 0.8, y)), fuzzy + 0 * s)
    color = hair_color(k) * shade[:, None]
    buzz = k.is_any("hair_style", HAIR_STYLES.index("buzz cut"))
    scalp = 0.40 * buzz * (1 - 0.6 * k["hair_length"]) * smoothstep(0.2, 0.8, noise(2.3 * s, 2.0 * y, 0))
    color = paint(color, scalp + 0 * s, skin_color(k).expand(len(s), 3))
    return _plain(color, "hair", 0.1, 20.0, 0.0, 1.0)


def frame_surface(k: Knobs, rest: Tensor) -> Surface:
    color = palette(k.device)[k["glasses_color"].long()].expand(len(rest), 3)
    return _plain(color * 0.7, "eye_g", 0.5, 40.0)


def hat_surface(k: Knobs, rest: Tensor) -> Surface:
    u, y, above = rest.unbind(-1)
    own = palette(k.device)[k["hat_color"].long()].expand(len(u), 3)
    beanie = k.is_any("hat", HATS.index("beanie"))
    knit = 1 + 0.14 * torch.sin(u * 84) * (above < 3).float() + 0.06 * torch.sin(y * 90)
    fold = 1 - 0.35 * ridge(above, 0.215, 0.014)
    seams = 1 - 0.22 * ridge((u * 0.9549 + 0.5) % 1, 0.5, 0.018) * (above < 3).float()
    return _plain(own * mix(seams, knit * fold, beanie + 0 * u)[:, None], "hat", 0.04, 8.0)


def teeth_surface(k: Knobs, rest: Tensor) -> Surface:
    u, v, _ = rest.unbind(-1)
    gaps = 1 - 0.22 * ridge((u * 4.0) % 1, 0.5, 0.06)
    color = (
        torch.tensor([0.86, 0.83, 0.77], device=u.device)
        * (gaps * (1 - 0.45 * u * u) * torch.where(v >= 2, 0.75, 1.0))[:, None]
    )
    return _plain(tint(color, k["age"] + 0 * u, (0.93, 0.87, 0.74)), "mouth", 0.2, 30.0, 0.5)


def _fixed(
    color: tuple[float, float, float], label: str, gloss: float, focus: float, soft: float
) -> Callable[[Knobs, Tensor], Surface]:
    return lambda k, rest: _plain(
        torch.tensor(color, device=rest.device).expand(len(rest), 3), label, gloss, focus, soft
    )


SURFACES: dict[Material, Callable[[Knobs, Tensor], Surface]] = {
    Material.SKIN: face_surface,
    Material.NECK: neck_surface,
    Material.CLOTH: torso_surface,
    Material.COLLAR: collar_surface,
    Material.EYE: eye_surface,
    Material.CAVITY: _fixed((0.085, 0.018, 0.018), "mouth", 0.0, 1.0, 0.0),
    Material.TEETH: teeth_surface,
    Material.TONGUE: _fixed((0.52, 0.15, 0.15), "mouth", 0.15, 20.0, 0.5),
    Material.EAR: ear_surface,
    Material.HAIR: hair_surface,
    Material.FRAME: frame_surface,
    Material.METAL: _fixed((0.85, 0.64, 0.25), "ear_r", 0.9, 30.0, 0.0),
    Material.HAT: hat_surface,
}


def surfaces(k: Knobs, fragments: Fragments) -> Surface:
    """The look of all fragments, material by material."""
    n, device = len(fragments.pixel), fragments.pixel.device
    color = torch.zeros(n, 3, device=device)
    gloss, focus, soft, hair, label = (torch.zeros(n, device=device) for _ in range(5))
    for material, look in SURFACES.items():
        rows = (fragments.material == int(material)).nonzero()[:, 0]
        if not len(rows):
            continue
        part = look(k.at(fragments.picture[rows]), fragments.rest[rows])
        if material in (Material.EYE, Material.EAR):
            name = "eye" if material == Material.EYE else "ear"
            part = _sided(part, fragments.side[rows], f"l_{name}", f"r_{name}")
        color[rows] = part.color
        for whole, values in (
            (gloss, part.gloss),
            (focus, part.focus),
            (soft, part.soft),
            (hair, part.hair),
            (label, part.label),
        ):
            whole[rows] = values
    return Surface(color, gloss, focus, soft, hair, label)


@dataclass(frozen=True, eq=False)
class Light:
    """The key light of each picture: where it is (B, 3), and the axes (B, 3) of its shadow map."""

    direction: Tensor
    across: Tensor
    up: Tensor


def key_light(k: Knobs) -> Light:
    column = k.scenes.column
    angle = 1.1 * column("light_x")
    direction = unit(torch.stack([torch.sin(angle), column("light_y"), torch.cos(angle)], -1))
    across = unit(torch.stack([direction[:, 2], torch.zeros_like(angle), -direction[:, 0]], -1))
    ux, uy, uz = (direction[:, 1] * across[:, 2] - direction[:, 2] * across[:, 1],
                  direction[:, 2] * across[:, 0] - direction[:, 0] * across[:, 2],
                  direction[:, 0] * across[:, 1] - direction[:, 1] * across[:, 0])  # fmt: skip
    return Light(direction, across, torch.stack([ux, uy, uz], -1))


SHADOW_SIZE = 96
SHADOW_REACH = 2.4
SHADOW_SHARPNESS = 22.0
SHADOW_BIAS = 0.055


def _shadow_place(light: Light, points: Tensor, picture: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    row = (lambda v: v[:, None]) if picture is None else (lambda v: v if len(v) == 1 else v[picture])
    scale = SHADOW_SIZE / (2 * SHADOW_REACH)
    u = (dot(points, row(light.across)) + SHADOW_REACH) * scale
    v = (dot(points, row(light.up)) + SHADOW_REACH) * scale
    return u, v, -dot(points, row(light.direction))


def _shadow_map(mesh: Mesh, light: Light) -> Tensor:
    """Blurred exponentials (B * S * S,) of the distance of the vertices nearest to the light.

    The exponential lets the map be blurred before it is read, which gives soft edges without stains.
    """
    batch, size = len(mesh.points), SHADOW_SIZE
    u, v, away = _shadow_place(light, mesh.points, None)
    hit = (mesh.inside > 0) & mesh.casts & (u >= 0) & (u < size) & (v >= 0) & (v < size)
    cell = v.clamp(0, size - 1).long() * size + u.clamp(0, size - 1).long()
    cell = cell + torch.arange(batch, device=u.device)[:, None] * (size * size)
    nearest = torch.full((batch * size * size,), 3.0, device=u.device)
    nearest.scatter_reduce_(0, cell[hit], away[hit], "amin")
    filled = -F.max_pool2d(-nearest.view(batch, 1, size, size), 3, 1, 1)
    closed = F.max_pool2d(filled, 3, 1, 1)
    soft = torch.exp(SHADOW_SHARPNESS * closed.clamp(-3, 3))
    for _ in range(3):
        soft = F.avg_pool2d(soft, 3, 1, 1, count_include_pad=False)
    return soft.view(-1)


def shadow(mesh: Mesh, light: Light, fragments: Fragments) -> Tensor:
    """How much of the key light reaches each fragment (N,), from a small blurred shadow map of the vertices."""
    size = SHADOW_SIZE
    table = _shadow_map(mesh, light)
    u, v, away = _shadow_place(light, fragments.points, fragments.picture)
    u, v = (u - 0.5).clamp(0, size - 1.001), (v - 0.5).clamp(0, size - 1.001)
    column, line = u.floor(), v.floor()
    s, t = u - column, v - line
    place = line.long() * size + column.long() + fragments.picture * (size * size)
    top = table[place] * (1 - s) + table[place + 1] * s
    bottom = table[place + size] * (1 - s) + table[place + size + 1] * s
    lit = (top * (1 - t) + bottom * t) * torch.exp(-SHADOW_SHARPNESS * (away - SHADOW_BIAS).clamp(-3, 3))
    return lit.clamp(0, 1)


def occlusion(depth: Tensor, size: int) -> Tensor:
    """Darkness in hollows (B, 1, S, S), from how far a pixel lies behind the mean depth around it."""
    full = depth.shape[-1]
    step = max(1, full // 128)
    small = F.avg_pool2d(depth.clamp(min=-1.2), step, step)
    dark = torch.zeros_like(small)
    for reach, weight in ((2, 1.1), (6, 1.3)):
        window = 2 * reach + 1
        mean = small
        for _ in range(2):
            mean = F.avg_pool2d(mean, window, 1, reach, count_include_pad=False)
        dark = dark + weight * (mean - small).clamp(0, 0.25)
    return F.interpolate(dark, (full, full), mode="bilinear", align_corners=False).clamp(0, 0.75)


def illuminate(k: Knobs, light: Light, fragments: Fragments, look: Surface, lit: Tensor, dark: Tensor) -> Tensor:
    """Linear colours (N, 3) of the fragments; ``lit`` (N,) from the shadow map, ``dark`` (N,) from occlusion."""
    q = k.at(fragments.picture)
    n, p = fragments.normals, fragments.points
    key = light.direction if len(light.direction) == 1 else light.direction[fragments.picture]
    key = key.expand(len(n), 3)
    view = unit(torch.stack([-p[:, 0], -p[:, 1], CAMERA_DISTANCE - p[:, 2]], -1))
    half = unit(key + view)
    facing = dot(n, key)
    wrap = look.soft[:, None] * n.new_tensor([0.40, 0.20, 0.13])
    bleed = look.soft[:, None] * n.new_tensor([0.30, 0.12, 0.08])
    diffuse = ((facing[:, None] + wrap) / (1 + wrap)).clamp(0, 1) * (bleed + (1 - bleed) * lit[:, None])
    warm = q["warmth"]
    key_color = torch.stack([1.06 + 0.09 * warm, 1.0 + 0 * warm, 0.94 - 0.12 * warm], -1) * (1.05 * q["key"])[:, None]
    fill_from = unit(torch.stack([-1.2 * key[:, 0], 0.1 + 0 * facing, 0.8 + 0 * facing], -1))
    fill = ((dot(n, fill_from) * 0.5 + 0.5).clamp(0, 1) * q["fill"])[:, None] * n.new_tensor([0.66, 0.70, 0.80])
    sky, ground = n.new_tensor([0.22, 0.24, 0.28]), n.new_tensor([0.13, 0.10, 0.09])
    ambient = ground + (sky - ground) * (0.5 + 0.5 * n[:, 1:2])
    open_ = (1 - dark)[:, None]
    out = look.color * (diffuse * key_color * torch.sqrt(open_) + (fill + ambient) * open_)
    glint = look.gloss * torch.exp(torch.log(dot(n, half).clamp(1e-4, 1)) * look.focus) * lit * (facing > 0).float()
    strand = unit(torch.stack([-0.12 * n[:, 0] - n[:, 1] * n[:, 0], 1 - n[:, 1] ** 2, -n[:, 1] * n[:, 2]], -1))
    tilt = dot(strand, half) - 0.10 + 0.10 * waves(fragments.rest[:, 0])
    sheen = (
        torch.exp(torch.log((1 - tilt * tilt).clamp(1e-4, 1)) * 36)
        * (0.25 + 0.75 * lit)
        * torch.sqrt(facing.clamp(0, 1))
    )
    glint = glint * (1 - look.hair) + 0.34 * sheen * look.hair
    shine = 1 + look.hair[:, None] * (0.30 + 1.7 * look.color - 1)
    out = out + glint[:, None] * key_color * shine
    grazing = 1 - dot(n, view).clamp(0, 1)
    behind = unit(torch.stack([-0.9 * key[:, 0].sign(), 0.35 + 0 * facing, -0.35 + 0 * facing], -1))
    rim = (0.06 + 0.75 * q["rim"]) * grazing * grazing * grazing * (0.4 + 0.6 * dot(n, behind)).clamp(0, 1) * (1 - dark)
    out = out + rim[:, None] * (0.22 + look.color)
    sparkle = unit(torch.stack([-0.25 + 0.5 * (key[:, 0] > 0).float(), 0.32 + 0 * facing, 0.9 + 0 * facing], -1))
    off = n - sparkle
    catch = smoothstep(0.17, 0.11, torch.sqrt(dot(off, off))) * (fragments.material == int(Material.EYE)).float()
    return out + 0.9 * catch[:, None]


def tone(linear: Tensor) -> Tensor:
    """Linear light to sRGB values in [0, 1], with a soft shoulder."""
    mapped = 1.06 * linear * (1 + linear / 2.6) / (1 + 0.82 * linear)
    return torch.exp(torch.log(mapped.clamp(1e-5, 1)) * (1 / 2.2))
