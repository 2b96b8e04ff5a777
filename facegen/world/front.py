"""Hands and other things in front of a drawn face: a hand with its forearm, a cup, a phone, a ball, a cloth.

The world's own scenes hold none of these; they are laid over finished pictures, in the plane, as shaded capsules and
boxes. Lengths are shares of a picture's side, x goes right, y down, z towards the viewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.world.fields import dot, mix, smoothstep, unit
from facegen.world.shading import CLASS, SKIN_RAMP, tone

THINGS: tuple[str, ...] = ("hand", "box", "cup", "ball", "cloth")
_SHARES = (0.72, 0.07, 0.07, 0.06, 0.08)  # how often each kind is drawn
_OWN_TONE = 0.5  # share of hands that have the colour of the face behind them
_SLEEVES = 0.5
_HELD = 0.35  # share of boxes and cups that a hand holds
_SKIN = tuple(CLASS[name] for name in ("skin", "nose", "neck"))
_FINGERS = 4
_LENGTHS = (0.80, 0.92, 0.86, 0.66)  # index to little finger, in palm lengths
_SEGMENTS = (0.46, 0.30, 0.24)


@dataclass(frozen=True, eq=False)
class _Layer:
    """Something seen from the front, per pixel (B, H, W): how much of the pixel it covers, and how it looks."""

    cover: Tensor  # 0 to 1
    normal: Tensor  # (B, H, W, 3), unit
    color: Tensor  # (B, H, W, 3), linear
    label: Tensor  # its class: `front`, or `cloth` for what is worn; int64


def _even(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _chosen(count: int, shares: tuple[float, ...], generator: torch.Generator) -> Tensor:
    return torch.multinomial(torch.tensor(shares), count, replacement=True, generator=generator)


def cover(
    pictures: Tensor, classes: Tensor, generator: torch.Generator, *, chance: float = 1.0, kind: str | None = None
) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, S, S) in [0, 1] and their classes (B, S, S), some with a thing laid over them.

    The thing's pixels get the class ``front``; sleeves and cloths are ``cloth``, as they are elsewhere. ``chance`` is
    that of each picture; ``kind`` (one of ``THINGS``) asks for one thing alone. New tensors; on the CPU. Raises
    ValueError for an unknown kind.
    """
    if kind is not None and kind not in THINGS:
        raise ValueError(f"There is no thing called '{kind}'; the things are: {', '.join(THINGS)}.")
    rows = (torch.rand(len(pictures), generator=generator) < chance).nonzero()[:, 0]
    what = _chosen(len(pictures), _SHARES, generator)[rows] if kind is None else None
    pictures, classes = pictures.clone(), classes.clone()
    for index, name in enumerate(THINGS):
        mine = rows if kind == name else rows[:0] if what is None else rows[what == index]
        if len(mine):
            under, labels = pictures[mine], classes[mine]
            layers = _layers(name, under, labels, generator)
            pictures[mine] = _laid(under, layers, generator)
            for layer in layers:
                labels = torch.where(layer.cover > 0.5, layer.label.to(labels.dtype), labels)
            classes[mine] = labels
    return pictures, classes


def _layers(name: str, pictures: Tensor, classes: Tensor, generator: torch.Generator) -> list[_Layer]:
    """What is drawn of one kind, the hindmost first."""
    count, size = len(pictures), pictures.shape[-1]
    place = _Place.drawn(count, generator)
    if name == "cloth":
        return [_cloth(place, size, generator)]
    if name == "hand":
        return [_hand(place, _tones(pictures, classes, generator), size, generator)]
    things = {"box": _box, "cup": _cup, "ball": _ball}
    layers = [things[name](place, size, generator)]
    if name != "ball" and float(torch.rand((), generator=generator)) < _HELD:
        layers.append(_hand(place, _tones(pictures, classes, generator), size, generator))
    return layers


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a thing is, (B,): its middle in picture sides, and the direction from which it comes into the picture."""

    x: Tensor
    y: Tensor
    angle: Tensor  # of the direction the thing points to: 0 up, positive clockwise

    @classmethod
    def drawn(cls, count: int, generator: torch.Generator) -> _Place:
        """Mostly from below and from the sides; anywhere over the head and around it."""
        angle = 0.8 * torch.randn(count, generator=generator)
        around = torch.rand(count, generator=generator) < 0.15
        angle = torch.where(around, _even((count,), -math.pi, math.pi, generator), angle)
        reach = _even((count,), 0.0, 0.42, generator)  # how far the middle stays behind the face's
        x = 0.5 - reach * angle.sin() + 0.12 * torch.randn(count, generator=generator)
        y = 0.55 + reach * angle.cos() + 0.12 * torch.randn(count, generator=generator)
        return cls(x, y, angle)

    def local(self, size: int) -> tuple[Tensor, Tensor]:
        """Coordinates (B, S, S) in picture sides: across, and along the direction it points to."""
        places = (torch.arange(size) + 0.5) / size
        x, y = places - self.x[:, None, None], places[:, None] - self.y[:, None, None]
        x, y = torch.broadcast_tensors(x, y)
        sine, cosine = self.angle.sin()[:, None, None], self.angle.cos()[:, None, None]
        return x * cosine + y * sine, x * sine - y * cosine

    def outwards(self, normal: Tensor) -> Tensor:
        """Normals (B, S, S, 3) of the thing's own axes (across, along, z) in the picture's (x right, y up, z)."""
        sine, cosine = self.angle.sin()[:, None, None], self.angle.cos()[:, None, None]
        across, along, z = normal.unbind(-1)
        return torch.stack([across * cosine + along * sine, -across * sine + along * cosine, z], -1)


def _laid(pictures: Tensor, layers: list[_Layer], generator: torch.Generator) -> Tensor:
    """Pictures with the layers lit and laid over them."""
    count, _, size, _ = pictures.shape
    bright = pictures.mean((1, 2, 3))
    light = unit(
        torch.stack(
            [
                torch.randn(count, generator=generator),
                _even((count,), -0.2, 1.2, generator),
                _even((count,), 0.5, 1.6, generator),
            ],
            -1,
        )
    )
    key = (_even((count,), 0.5, 1.2, generator) * (0.5 + bright)).view(-1, 1, 1)
    fill = (_even((count,), 0.25, 0.6, generator) * (0.5 + bright)).view(-1, 1, 1)
    gloss = _even((count, 1, 1), 0.0, 0.15, generator)
    warmth = 1 + 0.08 * torch.randn(count, 1, 1, 3, generator=generator)
    shade = _even((count, 1, 1, 1), 0.0, 0.55, generator)
    far = (light[:, :2] * _even((count, 1), 0.01, 0.05, generator)).tolist()
    for layer in layers:
        lit = dot(layer.normal, light.view(-1, 1, 1, 3).expand_as(layer.normal))
        half = unit(light + light.new_tensor([0.0, 0.0, 1.0])).view(-1, 1, 1, 3).expand_as(layer.normal)
        shine = gloss * dot(layer.normal, half).clamp(min=0).pow(20)
        hollow = 0.55 + 0.45 * layer.normal[..., 2].clamp(0, 1)  # where parts meet there is less light
        power = (fill * hollow + key * (0.85 * lit + 0.15).clamp(min=0))[..., None]
        seen = tone(layer.color * power * warmth + shine[..., None]).permute(0, 3, 1, 2)
        cover = layer.cover[:, None]
        moved = [(round(y * size), round(-x * size)) for x, y in far]
        dark = torch.stack([torch.roll(one, by, (-2, -1)) for one, by in zip(cover, moved, strict=True)])
        small = F.interpolate(dark, (max(4, size // 6),) * 2, mode="area")
        dark = F.interpolate(F.avg_pool2d(small, 3, 1, 1), (size, size), mode="bilinear")
        pictures = pictures * (1 - shade * dark)
        pictures = pictures * (1 - cover) + seen * cover
    return pictures


def _tones(pictures: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """Linear colours of skin (B, 3): of all kinds, or that of the face behind."""
    count = len(pictures)
    ramp = torch.tensor(SKIN_RAMP)
    at = torch.rand(count, generator=generator) * (len(ramp) - 1)
    low = at.long().clamp(max=len(ramp) - 2)
    any_tone = mix(ramp[low], ramp[low + 1], (at - low)[:, None])
    skin = torch.isin(classes, torch.tensor(_SKIN, dtype=classes.dtype))[:, None].float()
    area = skin.sum((2, 3))
    own = (((pictures * skin).sum((2, 3)) / area.clamp(min=1)).clamp(0.02, 1) ** 2.2) * 1.15
    take = (torch.rand(count, 1, generator=generator) < _OWN_TONE) & (area > 50)
    color = torch.where(take, own, any_tone)
    lighter = 0.15 * torch.randn(count, 1, generator=generator) + 0.05 * torch.randn(count, 3, generator=generator)
    return (color * torch.exp(lighter)).clamp(0.01, 1)


def _paint(count: int, generator: torch.Generator) -> Tensor:
    """Linear colours (B, 3) of things: black, white, gray, or any."""
    gray = torch.rand(count, 1, generator=generator).expand(-1, 3) ** 2
    color = torch.rand(count, 3, generator=generator) ** 2
    return torch.where(torch.rand(count, 1, generator=generator) < 0.5, gray, color) * 0.9 + 0.02


def _grain(count: int, size: int, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth noise (B, S, S, 1) of about unit variance, ``cells`` spots across."""
    noise = torch.randn(count, 1, cells, cells, generator=generator)
    return F.interpolate(noise, (size, size), mode="bicubic")[:, 0, :, :, None]


# --- hands ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Capsules:
    """Round cones between two points: ends (B, K, 3), radii (B, K), what they are (K,) int64."""

    start: Tensor
    end: Tensor
    first: Tensor
    last: Tensor
    kind: Tensor


_FLESH, _TIP, _SLEEVE = 0, 1, 2


def _skeleton(count: int, generator: torch.Generator) -> _Capsules:
    """A hand of palm length 1 that points upwards (+y), z towards the viewer: open, bent, a fist, or pointing."""
    curl = _even((count, 1), 0.0, 0.35, generator).expand(-1, _FINGERS).clone()
    pose = torch.rand(count, generator=generator)
    curl[pose < 0.3] = _even((int((pose < 0.3).sum()), 1), 0.35, 1.0, generator)
    pointing = (pose > 0.85).nonzero()[:, 0]
    curl[pointing] = 0.95
    curl[pointing[:, None], torch.randint(0, 2, (len(pointing), 1), generator=generator)] = 0.05
    curl = (curl + 0.07 * torch.randn(count, _FINGERS, generator=generator)).clamp(0, 1.1)
    # Whether the palm faces the viewer.
    towards = torch.where(torch.rand(count, 1, generator=generator) < 0.5, 1.0, -1.0)
    across = torch.tensor([-0.37, -0.125, 0.125, 0.36])
    fan = torch.tensor([-1.5, -0.5, 0.5, 1.5]) * _even((count, 1), 0.0, 0.2, generator)
    fan = fan + 0.03 * torch.randn(count, _FINGERS, generator=generator)
    thick = _even((count, 1), 0.11, 0.145, generator) * torch.tensor([1.0, 1.04, 1.0, 0.85])
    lengths = torch.tensor(_LENGTHS) * _even((count, 1), 0.9, 1.1, generator)

    starts, ends, first, last, kinds = [], [], [], [], []

    def add(start: Tensor, end: Tensor, radius: Tensor, thinner: Tensor, kind: int) -> None:
        starts.append(start)
        ends.append(end)
        first.append(radius)
        last.append(thinner)
        kinds.append(kind)

    zero = torch.zeros(count)
    for finger in range(_FINGERS):
        wrist = torch.stack([zero + 0.6 * float(across[finger]), zero - 0.45, zero], 1)
        knuckle = torch.stack([zero + across[finger], zero + 0.46 - 0.3 * float(across[finger]) ** 2, zero], 1)
        add(wrist, knuckle, zero + 0.24, thick[:, finger] + 0.05, _FLESH)
        at, bent = knuckle, zero
        for segment, share in enumerate(_SEGMENTS):
            bent = bent + curl[:, finger] * (0.9, 1.5, 1.0)[segment]
            step = lengths[:, finger] * share
            along, up = bent.cos() * step, bent.sin() * step * towards[:, 0]
            to = at + torch.stack([along * fan[:, finger].sin(), along * fan[:, finger].cos(), up], 1)
            radius = thick[:, finger] * (1 - 0.08 * segment)
            add(at, to, radius, radius * 0.92, _TIP if segment == 2 else _FLESH)
            at = to
    out = _even((count,), 0.15, 1.2, generator)
    at = torch.stack([zero - 0.22, zero - 0.35, 0.1 * towards[:, 0]], 1)
    for segment, (far, wide) in enumerate(((0.42, 0.19), (0.38, 0.15), (0.3, 0.135))):
        turned = out * (1.0, 0.85, 0.6)[segment]
        to = at + far * torch.stack([-turned.sin(), turned.cos(), 0.25 * towards[:, 0]], 1)
        add(at, to, zero + wide, zero + wide * 0.9, _TIP if segment == 2 else _FLESH)
        at = to
    bend = 0.35 * torch.randn(count, generator=generator)
    arm = torch.stack([bend.sin(), -bend.cos(), zero], 1)
    wrist = torch.tensor([0.0, -0.5, -0.02]).expand(count, 3)
    width = _even((count,), 0.24, 0.31, generator)
    add(wrist, wrist + 8 * arm, width, width * 2.2, _FLESH)
    cuff = _even((count, 1), 0.15, 1.6, generator)
    cuff = torch.where(torch.rand(count, 1, generator=generator) < _SLEEVES, cuff, torch.full_like(cuff, 50.0))
    begin = wrist + cuff * arm
    add(begin, begin + 8 * arm, width + 0.1 + 0.12 * cuff.clamp(max=2)[:, 0], width * 3, _SLEEVE)
    side = torch.where(torch.rand(count, 1, generator=generator) < 0.5, 1.0, -1.0)  # a left or a right hand
    mirror = torch.cat([side, torch.ones(count, 2)], 1)[:, None]
    return _Capsules(
        torch.stack(starts, 1) * mirror, torch.stack(ends, 1) * mirror,
        torch.stack(first, 1), torch.stack(last, 1), torch.tensor(kinds),
    )  # fmt: skip


def _across(
    at: tuple[Tensor, Tensor], ends: tuple[Tensor, Tensor], radii: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of places (B, S, S) beside a capsule: where along it, the way to its axis in two numbers, its radius there."""
    du, dv = ends[1][:, 0] - ends[0][:, 0], ends[1][:, 1] - ends[0][:, 1]
    x, y = at[0] - ends[0][:, 0], at[1] - ends[0][:, 1]
    t = ((x * du + y * dv) / (du * du + dv * dv).clamp(min=1e-4)).clamp(0, 1)
    return t, x - t * du, y - t * dv, mix(radii[0], radii[1], t)


def _hand(place: _Place, color: Tensor, size: int, generator: torch.Generator) -> _Layer:
    """Capsules seen from the front; the foremost is seen at each pixel."""
    count = len(color)
    bones = _skeleton(count, generator)
    palm = _even((count, 1, 1), 0.14, 0.3, generator)  # its length in picture sides
    u, v = (axis / palm for axis in place.local(size))
    sleeve = _paint(count, generator)
    grain = 1 + 0.05 * _grain(count, size, size // 8, generator) + 0.05 * _grain(count, size, 5, generator)
    best, inside = torch.full_like(u, -1e9), torch.full_like(u, -1e9)
    which = torch.zeros_like(u, dtype=torch.int64)
    for k in range(len(bones.kind)):
        ends = (bones.start[:, k, :, None, None], bones.end[:, k, :, None, None])
        radii = (bones.first[:, k, None, None], bones.last[:, k, None, None])
        t, x, y, radius = _across((u, v), ends, radii)
        far = torch.sqrt(x * x + y * y)
        z = mix(ends[0][:, 2], ends[1][:, 2], t) + torch.sqrt((radius * radius - far * far).clamp(min=0))
        z = torch.where(far < radius, z, -1e9)
        inside = torch.maximum(inside, radius - far)
        which = torch.where(z > best, k, which)
        best = torch.maximum(best, z)
    picked = which.flatten(1)

    def seen(values: Tensor) -> Tensor:
        return values.gather(1, picked).view_as(u)

    start, end = (torch.stack([seen(one[..., i]) for i in range(3)], 1) for one in (bones.start, bones.end))
    along, x, y, radius = _across((u, v), (start, end), (seen(bones.first), seen(bones.last)))
    x, y = x / radius, y / radius
    normal = torch.stack([x, y, torch.sqrt((1 - x * x - y * y).clamp(min=0))], -1)
    kind = bones.kind[which]
    cover = (inside * palm * size + 0.5).clamp(0, 1)
    # On the rim, where a pixel is covered in part only, the surface turns away from the viewer.
    normal = torch.where((best > -1e8)[..., None], normal, normal.new_tensor([0.0, 0.0, 0.3]))
    backs = (torch.rand(count, 1, 1, generator=generator) < 0.5) & (kind == _TIP) & (along > 0.45)
    nail = backs.float() * smoothstep(0.78, 0.92, normal[..., 2])
    crease = 1 - 0.12 * smoothstep(0.1, 0.0, along)
    flesh = color[:, None, None] * grain * crease[..., None]
    flesh = mix(flesh, (flesh * 1.35 + flesh.new_tensor([0.05, 0.02, 0.025])), nail[..., None])
    flesh = torch.where((kind == _TIP)[..., None], flesh * flesh.new_tensor([1.05, 0.93, 0.92]), flesh)
    worn = sleeve[:, None, None] * (0.85 + 0.15 * torch.sin(80 * along + 3 * normal[..., 0]))[..., None]
    shown = torch.where((kind == _SLEEVE)[..., None], worn, flesh)
    label = torch.where(kind == _SLEEVE, CLASS["cloth"], CLASS["front"])
    return _Layer(cover, place.outwards(unit(normal)), shown, label)


# --- things -----------------------------------------------------------------------------------------------------------


def _held(places: Tensor) -> Tensor:
    return torch.full_like(places, CLASS["front"], dtype=torch.int64)


def _rounded(u: Tensor, v: Tensor, wide: Tensor, tall: Tensor, round_: Tensor) -> Tensor:
    """How far inside a rectangle with round corners a place is, negative outside."""
    x, y = u.abs() - (wide - round_), v.abs() - (tall - round_)
    out = torch.sqrt(x.clamp(min=0) ** 2 + y.clamp(min=0) ** 2)
    return round_ - out - torch.maximum(x, y).clamp(max=0)


def _flat(inside: Tensor, size: int, rim: float) -> tuple[Tensor, Tensor]:
    """Cover and normals of something flat with a rounded rim, by how far inside a place is (B, S, S)."""
    across = torch.stack(torch.gradient(inside, dim=2), -1)[..., 0] * size
    along = torch.stack(torch.gradient(inside, dim=1), -1)[..., 0] * size
    slope = smoothstep(rim, 0.0, inside)
    normal = torch.stack([-across * slope, along * slope, torch.ones_like(inside)], -1)
    return (inside * size + 0.5).clamp(0, 1), unit(normal)


def _box(place: _Place, size: int, generator: torch.Generator) -> _Layer:
    """A phone, a book, a card: flat, of one colour, with a picture or lenses on it."""
    count = len(place.x)
    u, v = place.local(size)
    wide, tall = _even((count, 1, 1), 0.07, 0.22, generator), _even((count, 1, 1), 0.1, 0.3, generator)
    round_ = _even((count, 1, 1), 0.05, 0.9, generator) * 0.25 * torch.minimum(wide, tall)
    inside = _rounded(u, v, wide, tall, round_)
    cover, normal = _flat(inside, size, 0.012)
    color = _paint(count, generator)[:, None, None].expand(-1, size, size, -1)
    inner = smoothstep(0.0, 0.006, inside - _even((count, 1, 1), 0.005, 0.08, generator))
    inner = inner * (torch.rand(count, 1, 1, generator=generator) < 0.5)
    other = _paint(count, generator)[:, None, None] * (1 + 0.5 * _grain(count, size, 6, generator)).clamp(min=0)
    color = mix(color, other, inner[..., None])
    lens = smoothstep(0.018, 0.014, torch.sqrt((u + 0.55 * wide) ** 2 + (v - 0.72 * tall) ** 2))
    lens = lens * (torch.rand(count, 1, 1, generator=generator) < 0.5)
    color = mix(color, torch.full_like(color, 0.02), lens[..., None])
    return _Layer(cover, normal, color * (1 + 0.03 * _grain(count, size, size // 8, generator)), _held(u))


def _cup(place: _Place, size: int, generator: torch.Generator) -> _Layer:
    """A cup, a glass that is not clear, a bottle, a microphone: round about its axis, some with a handle."""
    count = len(place.x)
    u, v = place.local(size)
    wide, tall = _even((count, 1, 1), 0.05, 0.14, generator), _even((count, 1, 1), 0.09, 0.26, generator)
    taper = _even((count, 1, 1), -0.25, 0.25, generator)
    here = wide * (1 + taper * v / tall)
    body = torch.minimum(here - u.abs(), _rounded(u, v, wide * 1.4, tall, 0.3 * wide))
    side = torch.where(torch.rand(count, 1, 1, generator=generator) < 0.5, 1.0, -1.0)
    ring = torch.sqrt(((u - side * wide) / 0.8) ** 2 + v**2)
    handle = 0.014 - (ring - 0.5 * tall).abs()
    handle = torch.where(torch.rand(count, 1, 1, generator=generator) < 0.4, handle, torch.full_like(handle, -1.0))
    inside = torch.maximum(body, handle)
    sideways = (u / here.clamp(min=1e-3)).clamp(-0.98, 0.98)
    normal = torch.stack([sideways, torch.zeros_like(u), torch.sqrt(1 - sideways * sideways)], -1)
    band = smoothstep(0.0, 0.004, v - _even((count, 1, 1), -0.2, 0.2, generator))
    color = mix(_paint(count, generator)[:, None, None], _paint(count, generator)[:, None, None], band[..., None])
    return _Layer((inside * size + 0.5).clamp(0, 1), place.outwards(unit(normal)), color, _held(u))


def _ball(place: _Place, size: int, generator: torch.Generator) -> _Layer:
    """A ball, a fruit, the head of a microphone, on a stick now and then."""
    count = len(place.x)
    u, v = place.local(size)
    radius = _even((count, 1, 1), 0.05, 0.16, generator)
    squash = _even((count, 1, 1), 0.8, 1.25, generator)
    far = torch.sqrt(u * u + (v * squash) ** 2)
    stick = 0.35 * radius - u.abs()
    stick = torch.where((v < 0) & (torch.rand(count, 1, 1, generator=generator) < 0.5), stick, -1.0)
    inside = torch.maximum(radius - far, stick)
    x, y = (u / radius).clamp(-1, 1), (v * squash / radius).clamp(-1, 1)
    sideways = (u / (0.35 * radius)).clamp(-1, 1)
    x, y = torch.where(far < radius, x, sideways), torch.where(far < radius, y, torch.zeros_like(y))
    normal = torch.stack([x, y, torch.sqrt((1 - x * x - y * y).clamp(min=0.01))], -1)
    spots = 1 + 0.25 * _grain(count, size, size // 6, generator) * _even((count, 1, 1, 1), 0.0, 1.0, generator)
    head, rod = _paint(count, generator)[:, None, None], _paint(count, generator)[:, None, None]
    color = torch.where((far > radius)[..., None], rod, head)
    return _Layer(
        (inside * size + 0.5).clamp(0, 1), place.outwards(unit(normal)), color * spots.clamp(min=0.2), _held(u)
    )


def _cloth(place: _Place, size: int, generator: torch.Generator) -> _Layer:
    """A cloth, a scarf, a sheet of anything with a wavy edge, that reaches from outside over a part of the face."""
    count = len(place.x)
    u, v = place.local(size)
    edge = _waves(u, 3, 0.03, generator)
    band = _even((count, 1, 1), 0.12, 0.6, generator)  # a scarf ends again further down
    inside = torch.minimum(edge - v, v + band - _waves(u, 2, 0.03, generator))
    folds = _waves(u * 0.7 + v * _even((count, 1, 1), -1.0, 1.0, generator), 4, 0.02, generator)
    slope = torch.stack(torch.gradient(folds, dim=2), -1)[..., 0] * size
    drop = torch.stack(torch.gradient(folds, dim=1), -1)[..., 0] * size
    normal = unit(torch.stack([-slope, drop, torch.full_like(u, 0.8)], -1))
    stripes = (torch.sin(_even((count, 1, 1), 20, 120, generator) * (u + folds)) > 0).float()
    stripes = stripes * (torch.rand(count, 1, 1, generator=generator) < 0.3)
    color = mix(_paint(count, generator)[:, None, None], _paint(count, generator)[:, None, None], stripes[..., None])
    color = color * (1 + 0.06 * _grain(count, size, size // 4, generator)).clamp(min=0)
    worn = torch.full_like(u, CLASS["cloth"], dtype=torch.int64)
    return _Layer((inside * size + 0.5).clamp(0, 1), normal, color, worn)


def _waves(x: Tensor, octaves: int, strength: float, generator: torch.Generator) -> Tensor:
    """A sum of sines along x (B, S, S), in picture sides."""
    total = torch.zeros_like(x)
    for octave in range(octaves):
        often = _even((len(x), 1, 1), 4, 9, generator) * 2**octave
        total = total + strength / 1.6**octave * torch.sin(often * x + _even((len(x), 1, 1), 0, 6.3, generator))
    return total
