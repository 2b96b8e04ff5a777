"""A small part of a photo cut out and enlarged for a model, and what the model made of it put back.

Masks are tensors (1, H, W) in [0, 1], 1 where something changes. Whatever is pasted, pixels whose mask is 0 keep their
bytes: feathering happens inside the mask, never beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facegen.errors import WrongMask
from facegen.face.align import similarity
from facegen.face.types import Array
from facegen.images import to_pil, to_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels; x1 and y1 lie just beyond."""

_CONTRAST = (0.7, 1.4)  # how far colour matching may flatten or steepen; more is no longer a colour cast


@dataclass(frozen=True, eq=False)
class Crop:
    """A square of a photo at the size a model works at, and the way there and back.

    matrix: (2, 3) float64, photo pixels to crop pixels (a similarity; a pixel's centre lies at whole numbers).
    """

    image: Image.Image  # (size, size), RGB
    matrix: Array
    photo_size: tuple[int, int]  # (width, height) of the photo

    @property
    def size(self) -> int:
        """The side in pixels."""
        return self.image.width

    @property
    def enlarged(self) -> float:
        """How many crop pixels a photo pixel became; below 1 the crop is smaller than what it shows."""
        return float(np.hypot(self.matrix[0, 0], self.matrix[1, 0]))

    def points(self, points: Array) -> Array:
        """Points (N, 2) of the photo in crop pixels."""
        moved: Array = np.asarray(points) @ self.matrix[:, :2].T + self.matrix[:, 2]
        return moved

    def take(self, picture: Tensor) -> Tensor:
        """Another picture or mask (C, H, W) of the photo's size, cut alike: (C, size, size)."""
        return _warped(picture, self.matrix, (self.size, self.size), reflect=picture.shape[0] == 3)

    def back(self, picture: Tensor) -> Tensor:
        """A picture or mask (C, size, size) at its place in the photo, (C, H, W); 0 where the crop does not reach."""
        return _warped(picture, _inverse(self.matrix), self.photo_size, reflect=True) * self.reach()

    def reach(self) -> Tensor:
        """(1, H, W): 1 where the photo lies inside the crop."""
        (a, b, left), (c, d, top) = torch.from_numpy(self.matrix).float()
        x, y = torch.arange(self.photo_size[0]), torch.arange(self.photo_size[1])[:, None]
        inside = torch.ones(self.photo_size[1], self.photo_size[0], dtype=torch.bool)
        for place in (a * x + b * y + left, c * x + d * y + top):
            inside &= (place >= -0.501) & (place <= self.size - 0.499)  # pixels have a width; their centres count
        return inside[None].float()


def square(box: Sequence[float], photo_size: tuple[int, int], *, around: float = 0.5, least: int = 1) -> Box:
    """A square in whole pixels around a box, larger on each side by `around` times its longer side.

    It is moved, not cut, where it would leave the photo (width, height), and never larger than the photo's longer side:
    it reaches beyond only where the photo is shorter than the square. least: the shortest side.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    side = min(int(np.ceil(max(x1 - x0, y1 - y0) * (1 + 2 * around))), max(photo_size))
    side = max(side, least, 1)
    corner = []
    for low, high, limit in ((x0, x1, photo_size[0]), (y0, y1, photo_size[1])):
        start = round((low + high - side) / 2)
        corner.append(min(max(start, 0), limit - side) if side <= limit else (limit - side) // 2)
    return corner[0], corner[1], corner[0] + side, corner[1] + side


def mask_box(mask: Tensor) -> Box:
    """The box around all pixels of a mask (1, H, W) that are not 0; WrongMask for an empty mask."""
    rows, columns = mask[0].amax(1).nonzero(), mask[0].amax(0).nonzero()
    if not len(rows):
        raise WrongMask("The mask is empty, so there is nothing to paint; mark the part that should change in white.")
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


def around_both(one: Sequence[float], other: Sequence[float]) -> Box:
    """The smallest box that holds both."""
    return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])


def cut(photo: Image.Image, box: Sequence[float], size: int) -> Crop:
    """The square `box` of a photo at `size` pixels; mirrored where it reaches beyond the photo."""
    x0, y0, x1, _ = box
    scale = size / (x1 - x0)
    # Pixel edges, not centres, are what a scaling maps onto one another.
    matrix = np.array([[scale, 0, (0.5 - x0) * scale - 0.5], [0, scale, (0.5 - y0) * scale - 0.5]])
    return _cut(photo, matrix, size)


def cut_aligned(photo: Image.Image, points: Array, template: Array, size: int) -> Crop:
    """The face whose points (N, 2) come to lie on a template's (N, 2) in a crop of `size` pixels."""
    return _cut(photo, similarity(points, template), size)


def _cut(photo: Image.Image, matrix: Array, size: int) -> Crop:
    image = to_pil(_warped(to_tensor(photo), matrix, (size, size), reflect=True))
    return Crop(image, matrix, photo.size)


def feather(mask: Tensor, width: float) -> Tensor:
    """A mask (1, H, W) that rises from its edge inwards over `width` pixels; 0 wherever it was 0.

    The edge of the picture is no edge of the mask.
    """
    if width <= 0 or not bool((mask == 0).any()):
        return mask
    import cv2  # type: ignore[import-not-found, unused-ignore]

    inside = np.pad((mask[0].numpy() > 0).astype(np.uint8), 1, mode="edge")
    depth = torch.from_numpy(cv2.distanceTransform(inside, cv2.DIST_L2, 5)[1:-1, 1:-1])
    ramp = (depth / (width + 1)).clamp(0, 1)
    return mask * (ramp * ramp * (3 - 2 * ramp))


def erode(mask: Tensor, radius: int) -> Tensor:
    """A mask (1, H, W) without the rim of `radius` pixels (a square kernel); the picture's edge is no rim."""
    return mask if radius <= 0 else 1 - dilate(1 - mask, radius)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """A mask (1, H, W) grown by `radius` pixels (a square kernel)."""
    if radius <= 0:
        return mask
    side = 2 * radius + 1
    # One way after the other: the square at once would cost `side` times as much, seconds for a large face.
    tall = torch.nn.functional.max_pool2d(mask[None], (side, 1), 1, (radius, 0))
    return torch.nn.functional.max_pool2d(tall, (1, side), 1, (0, radius))[0]


def match_colours(made: Tensor, true: Tensor, where: Tensor, there: Tensor | None = None) -> Tensor:
    """`made` (3, H, W) with the mean and spread of each channel that `true` has where both show the same.

    where: weights (1, H, W); with too little of it `made` comes back as it is. there: the weights for `true`, where it
    shows that elsewhere. Mean and spread as in Reinhard et al., "Color Transfer between Images" (2001), in RGB.
    """
    there = where if there is None else there
    if min(float(where.sum()), float(there.sum())) < 16:  # pixels; fewer say nothing of a spread
        return made
    (mean, spread), (goal, wanted) = _mean_and_spread(made, where), _mean_and_spread(true, there)
    gain = ((wanted + 1e-3) / (spread + 1e-3)).clamp(*_CONTRAST)
    return ((made - mean) * gain + goal).clamp(0, 1)


def _mean_and_spread(picture: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel, (3, 1, 1) each."""
    weight = where / where.sum()
    mean = (weight * picture).sum((1, 2), keepdim=True)
    return mean, (weight * (picture - mean).square()).sum((1, 2), keepdim=True).sqrt()


def blend(photo: Image.Image, made: Tensor, mask: Tensor) -> Image.Image:
    """`made` (3, H, W) laid over the photo by a mask (1, H, W); where the mask is 0 the photo's bytes stay."""
    if made.shape[-2:] != (photo.height, photo.width) or mask.shape[-2:] != made.shape[-2:]:
        raise WrongMask(
            f"The mask ({mask.shape[-1]}×{mask.shape[-2]}) and the painted picture ({made.shape[-1]}×{made.shape[-2]})"
            f" must be as large as the photo, {photo.width}×{photo.height} pixels."
        )
    before = to_tensor(photo)
    return to_pil(torch.where(mask > 0, before + mask * (made.to(before) - before), before))


def paste(photo: Image.Image, crop: Crop, made: Tensor, mask: Tensor, *, soft: float = 0.0) -> Image.Image:
    """What was made of a crop, (3, size, size), put back into the photo by a mask (1, H, W) of the photo.

    soft: width in photo pixels over which it fades in. Nothing changes where the mask is 0 or the crop does not reach.
    """
    return blend(photo, crop.back(made), feather(mask * crop.reach(), soft))


def changed_pixels(before: Image.Image, after: Image.Image, mask: Tensor) -> int:
    """How many pixels differ where the mask (1, H, W) is 0: none, if all went well."""
    differ = (np.asarray(before) != np.asarray(after)).any(-1)
    return int((differ & (mask[0].numpy() == 0)).sum())


def measured(before: Image.Image, after: Image.Image, mask: Tensor) -> dict[str, float]:
    """What a report says of a photo of which a part (1, H, W) was painted anew; the difference is in grey levels."""
    differ = np.abs(np.asarray(before, np.int16) - np.asarray(after, np.int16)).max(-1)
    inside = mask[0].numpy() > 0
    return {
        "pixels changed outside": int((differ[~inside] > 0).sum()),
        "largest difference outside": int(differ[~inside].max(initial=0)),
        "share painted": round(float(inside.mean()), 4),
        "mean difference inside": round(float(differ[inside].mean()) if inside.any() else 0.0, 2),
    }


def _inverse(matrix: Array) -> Array:
    linear = np.linalg.inv(matrix[:, :2])
    inverse: Array = np.concatenate([linear, -linear @ matrix[:, 2:]], axis=1)
    return inverse


def _warped(picture: Tensor, matrix: Array, size: tuple[int, int], *, reflect: bool) -> Tensor:
    """(C, H, W) in [0, 1] carried by (2, 3) to `size` (width, height)."""
    import cv2

    array = np.ascontiguousarray(picture.detach().float().cpu().permute(1, 2, 0).numpy())
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    if scale < 1:  # OpenCV reads single pixels: without this, what lies between them would flicker
        array = cv2.GaussianBlur(array, (0, 0), 0.5 * (1 / scale**2 - 1) ** 0.5, borderType=cv2.BORDER_REFLECT_101)
    border = cv2.BORDER_REFLECT_101 if reflect else cv2.BORDER_CONSTANT
    smooth = cv2.INTER_CUBIC if array.ndim == 3 and array.shape[2] == 3 else cv2.INTER_LINEAR
    warped = cv2.warpAffine(array, matrix, size, flags=smooth, borderMode=border, borderValue=0.0)
    tensor = torch.from_numpy(np.ascontiguousarray(warped))
    tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
    return tensor.clamp(0, 1).contiguous()
