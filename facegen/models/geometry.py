"""Where things are: ControlNets that follow landmarks, depth, normals or a sketch, and the pictures they read.

A control lies in a folder called after its kind, in diffusers' format; "geometry" is one net that follows all kinds. It
tells them apart by what it sees, so each part of a face has lines of its own colour. The pictures are drawn the same
way in training and in use, from the drawn world's own truth, from a photo (a sketch, landmarks), or from a map that
somebody brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facegen.conditions import ControlCondition, Scale, Span
from facegen.errors import WrongRequest
from facegen.images import to_tensor
from facegen.request import CONTROL_KINDS

if TYPE_CHECKING:
    from facegen.face.head import Head
    from facegen.models.base import Model
    from facegen.world.render import Rendering

KINDS = CONTROL_KINDS
ALL = "geometry"  # a net that follows every kind
# iBUG's 68 points as lines: jaw, brows, nose, nostrils, eyes, outer and inner lips; closed ones end where they begin.
LINES: tuple[tuple[int, int, bool], ...] = (
    (0, 17, False), (17, 22, False), (22, 27, False), (27, 31, False), (31, 36, False), (36, 42, True), (42, 48, True),
    (48, 60, True), (60, 68, True),
)  # fmt: skip
# What tells lines from the white ones of a sketch, and one part of a face from another.
COLORS: tuple[tuple[int, int, int], ...] = (
    (255, 0, 0), (0, 255, 0), (0, 255, 0), (0, 0, 255), (0, 0, 255), (255, 255, 0), (255, 255, 0),
    (255, 0, 255), (0, 255, 255),
)  # fmt: skip
_FARTHEST = 12.0  # the drawn world's depth of the background


def draw_landmarks(points: np.ndarray[Any, Any], size: tuple[int, int]) -> Tensor:
    """68 points (68, 2) in pixels → coloured lines on black, (3, H, W); size = (width, height)."""
    import cv2

    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    thick = max(1, round(min(size) / 128))
    for (first, last, closed), color in zip(LINES, COLORS, strict=True):
        line = np.round(np.asarray(points[first:last]) * 8).astype(np.int32)  # eighths of a pixel
        cv2.polylines(canvas, [line], closed, color, thick, cv2.LINE_AA, shift=3)
    return torch.from_numpy(canvas).permute(2, 0, 1).float() / 255


def draw_depth(depth: Tensor) -> Tensor:
    """Distances (1, H, W) → (3, H, W), the nearest white, the background black."""
    near = depth < _FARTHEST
    if not bool(near.any()):
        return torch.zeros_like(depth).expand(3, -1, -1)
    low, high = depth[near].min(), depth[near].max()
    shade = torch.where(near, 1 - 0.9 * (depth - low) / (high - low).clamp(min=1e-6), 0.0)
    return shade.expand(3, -1, -1)


def draw_normals(normals: Tensor) -> Tensor:
    """Unit normals (3, H, W), x right, y up, z to the viewer → (3, H, W) in [0, 1]."""
    return normals / 2 + 0.5


def draw_sketch(picture: Tensor) -> Tensor:
    """The edges of a picture (3, H, W), white on black, (3, H, W)."""
    import cv2

    gray = (picture.mean(0).clamp(0, 1) * 255).byte().numpy()
    edges = cv2.Canny(cv2.GaussianBlur(gray, (3, 3), 0), 60, 140)
    return torch.from_numpy(edges)[None].float().expand(3, -1, -1) / 255


def drawn(kind: str, rendering: Rendering, row: int = 0) -> Tensor:
    """The control picture (3, H, W) of a picture of the drawn world, from its truth."""
    height, width = rendering.rgb.shape[-2:]
    if kind == "landmarks":
        return draw_landmarks(rendering.landmarks68[row].numpy(), (width, height))
    if kind == "depth":
        return draw_depth(rendering.depth[row])
    if kind == "normals":
        return draw_normals(rendering.normals[row])
    return draw_sketch(rendering.rgb[row])


def read(kind: str, picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """The control picture (1, 3, H, W) that a photo or a map stands for; size = (height, width).

    A sketch is found in any photo; landmarks (those of a photo: facegen.face.landmarks), depth and normals are taken
    as drawn.
    """
    check(kind)
    fitted = to_tensor(picture.resize((size[1], size[0]), Image.Resampling.LANCZOS))
    return (draw_sketch(fitted) if kind == "sketch" else fitted)[None]


def check(kind: str, kinds: Sequence[str] = KINDS) -> None:
    """WrongRequest for a kind that does not exist."""
    if kind not in kinds:
        raise WrongRequest(f"There is no control '{kind}'; there are: {', '.join(kinds)}.")


def is_map(picture: Image.Image) -> bool:
    """Whether a picture is drawn lines on black, white or in the colours of landmarks, rather than a photo."""
    pixels = np.asarray(picture.convert("RGB"), np.int16)
    bright = pixels.max(axis=2)
    if (bright < 16).mean() <= 0.6:
        return False
    gray = bool((np.ptp(pixels, axis=2) <= 8).all())
    return gray or bool((pixels.min(axis=2) < 0.4 * bright)[bright >= 64].mean() > 0.8)  # pure colours


def posed_points(pose: dict[str, float], size: tuple[int, int], head: Head | None = None) -> np.ndarray[Any, Any]:
    """Where five points of a head in this pose are, (5, 2) in pixels of a portrait; size = (height, width).

    pose: yaw, pitch, roll (radians), shift_x, shift_y, zoom as in facegen.world.parameters.POSE; head: whose, None for
    the average one. Raises WrongRequest for what is no pose.
    """
    from facegen.face.head import check_pose
    from facegen.world.landmarks import landmarks5
    from facegen.world.parameters import GROUPS, Scenes
    from facegen.world.render import render

    if head is not None:
        seen: np.ndarray[Any, Any] = landmarks5(torch.from_numpy(head.seen(pose, size))[None])[0].numpy()
        return seen
    check_pose(pose)
    blank = Scenes(**{name: torch.zeros(1, len(columns)) for name, columns in GROUPS.items()})
    scene = blank.with_values(zoom=1.0, key=1.0, fill=0.5, skin_tone=0.3)
    side = 64  # points are as exact in a small picture
    five = render(scene.with_values(**pose), side, supersample=1).landmarks5[0].numpy()
    scaled: np.ndarray[Any, Any] = (five + 0.5) * (min(size) / side) - 0.5
    return scaled + np.array([(size[1] - min(size)) / 2, (size[0] - min(size)) / 2], np.float32)


@dataclass(frozen=True, eq=False)
class Geometry:
    """A ControlNet of one kind, or of all of them."""

    kinds: ClassVar[tuple[str, ...]] = (*KINDS, ALL)

    kind: str
    net: Any

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: Model) -> Self:
        """From a folder called after its kind; WeightsMissing, CheckpointBroken, WrongBaseModel, WrongRequest."""
        from facegen.models.control import load_controlnet

        path = Path(folder).expanduser()
        check(path.name, cls.kinds)
        net = load_controlnet(path, model.unet)
        net.to(model.device, model.dtype).requires_grad_(False).eval()
        model.memory.place(net)
        return cls(path.name, net)

    @classmethod
    def fresh(cls, kind: str, model: Model, *, seed: int = 0) -> Self:
        """To be trained: a copy of the UNet's encoder behind zero convolutions, so that it changes nothing yet."""
        from diffusers import ControlNetModel

        from facegen.models.control import awaken

        check(kind, cls.kinds)
        channels = (16, 32, 96, 256)[: model.vae_factor.bit_length()]
        net = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=channels)
        awaken(net.controlnet_cond_embedding, torch.Generator().manual_seed(seed))
        return cls(kind, net.to(model.device, torch.float32).requires_grad_(True).train())

    def save(self, folder: Path) -> Path:
        """Write `folder`/kind in diffusers' format."""
        from facegen import checkpoints

        place = folder / self.kind
        tensors = checkpoints.cast(self.net.state_dict(), torch.float16)
        checkpoints.write(place / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
        self.net.save_config(str(place))
        return place

    def condition(
        self, picture: Tensor, *, scale: Scale = 1.0, span: Span = (0.0, 1.0), mask: Tensor | None = None
    ) -> ControlCondition:
        """picture: (B, 3, H, W) as `read` or `drawn` gives it."""
        return ControlCondition(controlnet=self.net, image=picture, scale=scale, span=span, mask=mask)
