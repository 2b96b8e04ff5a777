"""Portraits from parameters: ``render(scenes)`` draws a batch and returns everything that is known about each pixel."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.world.background import backdrop
from facegen.world.fields import Knobs, dot, smoothstep
from facegen.world.geometry import (
    Measures,
    Patch,
    ear_patches,
    eye_patches,
    head_patch,
    measure,
    mouth_patches,
    neck_patch,
)
from facegen.world.hair import covers_ears, hair_patches
from facegen.world.landmarks import face_box, landmarks5, landmarks68
from facegen.world.parameters import GLASSES, Scenes
from facegen.world.raster import CAMERA_DISTANCE, Fragments, assemble, rasterise
from facegen.world.shading import CLASS, PARSING, illuminate, key_light, occlusion, shadow, surfaces, tone
from facegen.world.wear import Material, collar_patches, earring_patches, glasses_patches, hat_patches, torso_patch

__all__ = ["PARSING", "Rendering", "render"]

FARTHEST = -3.0
GPU_BATCH = 64


@dataclass(frozen=True, eq=False)
class Rendering:
    """A batch of B drawn pictures of H x W pixels.

    Left and right always mean the picture's left and right (``l_eye`` is the eye at the picture's left).

    rgb: (B, 3, H, W) float32, sRGB in [0, 1].
    parsing: (B, H, W) uint8, index into ``PARSING``; what is seen through a clear lens keeps its own class.
    depth: (B, 1, H, W) float32, distance from the camera along the view, in half head heights; 12 in the background.
    normals: (B, 3, H, W) float32, unit, camera space (x right, y up, z to the viewer); (0, 0, 1) in the background.
    landmarks5: (B, 5, 2) float32 pixels x, y: eye at the left, eye at the right, nose tip, mouth corner left, right.
    landmarks68: (B, 68, 2) float32 pixels x, y in the iBUG order.
    box: (B, 4) float32 pixels x0, y0, x1, y1 of the face from chin to hairline.
    """

    rgb: Tensor
    parsing: Tensor
    depth: Tensor
    normals: Tensor
    landmarks5: Tensor
    landmarks68: Tensor
    box: Tensor


@torch.no_grad()
def render(scenes: Scenes, size: int = 256, *, supersample: int = 2) -> Rendering:
    """Draw a batch of scenes at ``size`` x ``size`` pixels, each pixel the mean of ``supersample`` squared samples.

    Deterministic; a picture does not depend on the rest of its batch. Runs where the scenes are.
    """
    if size < 16 or supersample < 1:
        raise ValueError(f"size must be at least 16 and supersample at least 1, not {size} and {supersample}.")
    # On a CPU one picture at a time stays in the cache, is faster, and skips parts which this picture does not have.
    chunk = 1 if scenes.identity.device.type == "cpu" else GPU_BATCH
    parts = [
        _render(scenes[start : start + chunk], size, supersample) for start in range(0, max(1, len(scenes)), chunk)
    ]
    return Rendering(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Rendering)))


def _detail(size: int) -> tuple[int, int]:
    """Columns and rows of the head's grid."""
    return (104, 84) if size <= 80 else (148, 120) if size <= 192 else (224, 184)


def _patches(k: Knobs, m: Measures, size: int) -> list[Patch]:
    columns, rows = _detail(size)
    coarse = (108, 72) if size <= 192 else (180, 120)
    patches = [head_patch(k, m, Material.SKIN, columns, rows), neck_patch(k, m, Material.NECK), torso_patch(k)]
    patches += eye_patches(k, m, Material.EYE) + ear_patches(k, m, Material.EAR, covers_ears(k))
    patches += mouth_patches(k, m, patches[0], Material.CAVITY, Material.TEETH, Material.TONGUE)
    patches += hair_patches(k, m, *coarse) + collar_patches(k)
    if k.any("hat"):
        patches += hat_patches(k, m, *coarse)
    if k.any("glasses"):
        patches += [patch for patch in glasses_patches(k, m) if patch.material != Material.LENS]
    if k.any("earrings"):
        patches += earring_patches(k, m)
    return patches


def _render(scenes: Scenes, size: int, supersample: int) -> Rendering:
    k = Knobs(scenes)
    m = measure(k)
    wide = size * supersample
    patches = _patches(k, m, size)
    mesh = assemble(k, patches)
    seen = rasterise(k, mesh, wide)
    light = key_light(k)
    depth = _scatter(seen, seen.points[:, 2:3], k.count, wide, FARTHEST)
    dark = occlusion(depth.view(-1, 1, wide, wide), wide).reshape(-1)[seen.pixel]
    lit = shadow(mesh, light, seen)
    look = surfaces(k, seen)
    color = backdrop(k, size).repeat_interleave(supersample, 1).repeat_interleave(supersample, 2).reshape(-1, 3)
    color[seen.pixel] = illuminate(k, light, seen, look, lit, dark)
    label = _scatter(seen, look.label[:, None], k.count, wide, 0.0)
    normal = torch.tensor([0.0, 0.0, 1.0], device=k.device).repeat(k.count * wide * wide, 1)
    normal[seen.pixel] = seen.normals
    if k.any("glasses"):
        _lay_lenses(k, m, Layers(color, label, depth, normal), wide)
    picture = tone(color).view(k.count, wide, wide, 3).permute(0, 3, 1, 2)
    rest = patches[0].rest.expand(k.count, -1, -1, -1)
    points = landmarks68(k, m, (rest[..., 0], rest[..., 1], rest[..., 2]), size)
    return Rendering(
        rgb=F.avg_pool2d(picture.contiguous(), supersample),
        parsing=_thin(label, k.count, size, supersample)[:, 0].to(torch.uint8),
        depth=CAMERA_DISTANCE - _thin(depth, k.count, size, supersample),
        normals=_thin(normal, k.count, size, supersample),
        landmarks5=landmarks5(points),
        landmarks68=points,
        box=face_box(k, m, points, size),
    )


def _thin(values: Tensor, batch: int, size: int, supersample: int) -> Tensor:
    """One sample of each pixel: (B * S * S, C) to (B, C, size, size)."""
    middle = slice(supersample // 2, None, supersample)
    wide = size * supersample
    return values.view(batch, wide, wide, -1)[:, middle, middle].permute(0, 3, 1, 2).contiguous()


def _scatter(seen: Fragments, values: Tensor, batch: int, size: int, empty: float) -> Tensor:
    """Values (N, C) of fragments as a picture (B * size * size, C)."""
    picture = torch.full((batch * size * size, values.shape[1]), empty, device=values.device)
    picture[seen.pixel] = values
    return picture


@dataclass(frozen=True, eq=False)
class Layers:
    """Pictures (B * S * S, C) in the making: linear colour, class, depth towards the viewer, normal."""

    color: Tensor
    label: Tensor
    depth: Tensor
    normal: Tensor


def _lay_lenses(k: Knobs, m: Measures, layers: Layers, size: int) -> None:
    """Lay the lenses over the picture, in place: dark glass, or clear glass with a reflection."""
    lenses = [patch for patch in glasses_patches(k, m) if patch.material == Material.LENS]
    glass = rasterise(k, assemble(k, lenses), size)
    front = glass.points[:, 2] >= layers.depth[glass.pixel, 0] - 0.01
    q = k.at(glass.picture)
    dark = q.is_any("glasses", GLASSES.index("sunglasses")) + 0 * glass.points[:, 0]
    shine = _reflection(glass) * (0.6 + 0.4 * q["key"])
    through = (0.94 - 0.885 * dark)[:, None] * (1 - dark[:, None] * (1 - glass.points.new_tensor([1.0, 0.92, 0.85])))
    sky = glass.points.new_tensor([0.78, 0.88, 1.0])
    tinted = layers.color[glass.pixel] * through + shine[:, None] * sky * (0.55 + 0.45 * dark[:, None])
    layers.color[glass.pixel] = torch.where(front[:, None], tinted, layers.color[glass.pixel])
    opaque = (front & (dark > 0)).nonzero()[:, 0]
    pixel = glass.pixel[opaque]
    layers.label[pixel] = float(CLASS["eye_g"])
    layers.depth[pixel] = glass.points[opaque, 2:3]
    layers.normal[pixel] = glass.normals[opaque]


def _reflection(glass: Fragments) -> Tensor:
    """Two slanted streaks of a window, and more light towards grazing views (N,)."""
    u, v, _ = glass.rest.unbind(-1)
    band = u * 0.55 + v
    wide = smoothstep(0.10, 0.16, band) * smoothstep(0.55, 0.49, band)
    thin = smoothstep(0.64, 0.68, band) * smoothstep(0.78, 0.74, band)
    towards = torch.stack([-glass.points[:, 0], -glass.points[:, 1], CAMERA_DISTANCE - glass.points[:, 2]], -1)
    grazing = 1 - (dot(glass.normals, towards) / torch.sqrt(dot(towards, towards))).clamp(0, 1)
    return 0.10 * (wide + 0.6 * thin) + 0.35 * grazing * grazing * grazing
