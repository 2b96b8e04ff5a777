"""From a photo to the aligned face that restoration networks were trained on."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from facegen.errors import NoFaceFound
from facegen.face.paste import Crop
from facegen.face.types import Array
from facegen.images import from_bgr, to_bgr

SIDE = 512
# Eyes, nose tip, mouth corners of FFHQ's faces at 512 pixels (facexlib `face_restoration_helper.py`).
FFHQ_POINTS: Array = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)
# Where they lie in the face world's pictures at 512 pixels: the mean of its calm, frontal people.
WORLD_POINTS: Array = np.array([[198.7, 232.0], [313.3, 232.0], [256.0, 280.0], [216.6, 331.6], [295.4, 331.6]])
_SMOOTH, _AGAIN = 1.0, 2.0  # pixels
BORDER = (135, 133, 132)  # blue, green, red of what lies beyond the photo, as in training


def cut_ffhq(photo: Image.Image, points: Array, size: int = SIDE) -> Crop:
    """The face with these points (5, 2) at `size` pixels, to the bit as the official helper cuts it.

    Raises NoFaceFound when the points do not say where the face is.
    """
    import cv2  # type: ignore[import-not-found, unused-ignore]

    goal = FFHQ_POINTS * (size / SIDE)
    # The median of squares rather than their mean: one bad point of five does no harm.
    matrix, _ = cv2.estimateAffinePartial2D(np.asarray(points, np.float64), goal, method=cv2.LMEDS)
    if matrix is None:
        raise NoFaceFound("The points of a face coincide, so it cannot be aligned; give a larger photo.")
    warped = cv2.warpAffine(to_bgr(photo), matrix, (size, size), borderMode=cv2.BORDER_CONSTANT, borderValue=BORDER)
    return Crop(from_bgr(warped), matrix, photo.size)


def is_gray(photo: Image.Image, least: float = 10.0) -> bool:
    """Whether a photo has no colours: the differences of its channels hardly vary (CodeFormer's `is_gray`)."""
    red, green, blue = (np.asarray(photo, np.int16)[..., channel] for channel in range(3))
    return float(np.mean([(red - green).var(), (green - blue).var(), (blue - red).var()])) <= least


def gray(made: Tensor, seen: Tensor) -> Tensor:
    """A restored face (3, H, W) in [0, 1] without colours, as bright and as rich in contrast as the damaged one."""
    light = (made * made.new_tensor([0.2989, 0.5870, 0.1140])[:, None, None]).sum(0, keepdim=True)
    goal = seen.mean(0, keepdim=True)
    matched = (light - light.mean()) * (goal.std() / light.std().clamp(min=1e-5)) + goal.mean()
    return matched.clamp(0, 1).expand_as(made)


def with_coarse(made: Tensor, seen: Tensor, sigma: float) -> Tensor:
    """A restored face (3, H, W) that keeps what the damaged one shows beyond the width of a blur, `sigma` pixels.

    Only what the blur would take away comes from `made`; light, colour and place of all larger things are the photo's.
    """
    return (made + blurred(seen - made, sigma)).clamp(0, 1)


def blur_width(picture: Tensor) -> float:
    """How blurred a picture (3, H, W) in [0, 1] is: the width of a Gaussian in pixels, read off its strongest edges.

    Blurred once more by a known width, an edge of width w loses the more of its slope the sharper it was (Zhuo and Sim
    2011, "Defocus map estimation from a single image"). Noise is smoothed away first, and that width taken off again.
    """
    light = picture.mean(0, keepdim=True)
    first = blurred(light, _SMOOTH)
    before, after = (_slope(one) for one in (first, blurred(first, _AGAIN)))
    edges = before >= before.flatten().quantile(0.97)
    ratio = float((before[edges] / after[edges].clamp(min=1e-6)).median())
    width = _AGAIN**2 / max(ratio**2 - 1, 1e-4) - _SMOOTH**2
    return max(width, 0.0) ** 0.5


def blurred(picture: Tensor, sigma: float) -> Tensor:
    """(C, H, W) under a Gaussian of `sigma` pixels, the borders mirrored."""
    if sigma <= 0:
        return picture
    channels, height, width = picture.shape
    reach = min(max(1, round(3 * sigma)), min(height, width) - 1)
    places = torch.arange(-reach, reach + 1, dtype=picture.dtype)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(channels, 1, -1)
    padded = F.pad(picture[None], (reach,) * 4, mode="reflect")
    across = F.conv2d(padded, kernel[..., None, :], groups=channels)
    return F.conv2d(across, kernel[..., None], groups=channels)[0]


def _slope(light: Tensor) -> Tensor:
    """Steepness (H - 1, W - 1) of (1, H, W)."""
    across, down = light[0, 1:, 1:] - light[0, 1:, :-1], light[0, 1:, 1:] - light[0, :-1, 1:]
    return (across.square() + down.square()).sqrt()
