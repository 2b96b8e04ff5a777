"""InstantID: identity tokens in a decoupled attention, and a ControlNet (IdentityNet) that sees the keypoints.

The embedding goes in RAW, not normalised; IdentityNet's context is the identity tokens alone, not the prompt. Source:
github instantX-research/InstantID, hub InstantX/InstantID (Apache-2.0), arXiv 2401.07519.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import (
    Adapter,
    AdapterRequest,
    FaceLike,
    halves,
    ready,
    seen,
    trainable,
    weight_files,
    with_zeros,
)
from facegen.checkpoints import SAFE, Shapes, base_name, section
from facegen.conditions import Condition, ControlCondition, TokenCondition
from facegen.errors import PackageMissing, WeightsMissing, WrongRequest
from facegen.models.clip import CLIP_WIDTHS, FACE_WIDTH
from facegen.models.control import awaken, load_controlnet
from facegen.models.resampler import PerceiverSizes, Resampler
from facegen.models.streams import Streams, dtype_of, initialise
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from diffusers import ControlNetModel

    from facegen.models.base import Model

CONTROLNET = "ControlNetModel"
LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))


class InstantID(Adapter):
    """See the module's text; `controlnet` is a diffusers ControlNetModel."""

    name = "instantid"
    title = "InstantID"
    sees = preprocessing("instantid")
    pack = sees.pack
    needs = frozenset({"face", "points", "photo"})
    strength = 0.8

    def __init__(self, projector: Resampler, streams: Streams, controlnet: ControlNetModel) -> None:
        self.projector = projector
        self.streams = streams
        self.controlnet = controlnet

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        # FaceID-Portrait-unnorm has the same keys and sizes: only its name tells. IP-Adapter-Plus has the same keys and
        # reads CLIP; where the width is neither CLIP's nor a recogniser's, its name tells.
        reads = shapes.get("image_proj.proj_in.weight", (0, 0))[1]
        ours = "image_proj.latents" in shapes or "image_proj.proj_in.weight" in shapes
        named = "faceid" in file_name.lower() or ("plus" in file_name.lower() and reads != FACE_WIDTH)
        return ours and reads not in CLIP_WIDTHS and not named and not any("_lora." in key for key in shapes)

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        width = shapes.get("image_proj.proj_out.weight", (0,))[0]
        found: dict[str, int | str] = {"base": base_name(width), "token width": width}
        if "image_proj.latents" in shapes:
            found["tokens"] = shapes["image_proj.latents"][1]
        if "image_proj.proj_in.weight" in shapes:
            found["embedding"] = shapes["image_proj.proj_in.weight"][1]
        return found

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model) -> InstantID:
        """From `ip-adapter.bin` (or .safetensors) with `ControlNetModel/` beside it, or the folder of both."""
        file = cls.choose(source, model)
        tensors = checkpoints.read(file)
        parts = section(tensors, "image_proj")
        checkpoints.require(parts, "latents", "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", path=file)
        streams = Streams.from_tensors(section(tensors, "ip_adapter"), model, file, section="ip_adapter")
        projector = Resampler.from_shapes({key: tuple(value.shape) for key, value in parts.items()})
        checkpoints.load_into(projector, parts, path=file, prefix="image_proj.")
        adapter = cls(projector, streams, _load_controlnet(file.parent / CONTROLNET, model))
        ready(adapter.modules(), model)
        model.memory.place(adapter.controlnet)
        return adapter

    @classmethod
    def fresh(
        cls, model: Model, embedding_dim: int, *, sizes: PerceiverSizes | None = None, queries: int = 16, seed: int = 0
    ) -> InstantID:
        """To be trained, in float32; sizes: of the resampler, by default the official depth 4 and heads of 64.

        The ControlNet starts as a copy of the UNet's encoder behind zero convolutions, so it changes nothing yet.
        """
        from diffusers import ControlNetModel

        generator = torch.Generator().manual_seed(seed)
        width = model.text_width
        sizes = sizes or PerceiverSizes(embedding_dim, 1280, width, depth=4, heads=20)
        if sizes.context != embedding_dim or sizes.output != width:
            raise WrongRequest(f"The resampler must read {embedding_dim} and give {width} numbers, not {sizes}.")
        projector = Resampler(sizes, queries)
        initialise(projector, generator)
        nn.init.normal_(projector.latents, std=sizes.dim**-0.5, generator=generator)
        channels = (16, 32, 96, 256)[: int(math.log2(model.vae_factor)) + 1]
        controlnet = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=channels)
        awaken(controlnet.controlnet_cond_embedding, generator)
        adapter = cls(projector, Streams.fresh(model, generator=generator), controlnet)
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`ip-adapter.bin` and `ControlNetModel/`; see Adapter.save."""
        nested = {"image_proj": self.projector.state_dict(), "ip_adapter": self.streams.tensors()}
        checkpoints.write(folder / f"ip-adapter{SAFE if safe else '.bin'}", checkpoints.cast(nested, dtype))
        checkpoints.write(
            folder / CONTROLNET / "diffusion_pytorch_model.safetensors",
            checkpoints.cast(self.controlnet.state_dict(), dtype),
            {"format": "pt"},
        )
        self.controlnet.save_config(str(folder / CONTROLNET))
        return folder

    @property
    def embedding_dim(self) -> int:
        return self.projector.input_dim

    def modules(self) -> nn.Module:
        return nn.ModuleDict({"image_proj": self.projector, "ip_adapter": self.streams, "controlnet": self.controlnet})

    def tokens(self, embeddings: Tensor, guidance: bool = True) -> Tensor:
        """RAW embeddings (B, D), or (B, n, D) for n inputs to one set of tokens -> Pair (2, B, tokens, width)."""
        self.check_embeddings(embeddings)
        inputs = embeddings if embeddings.ndim == 3 else embeddings[:, None]  # (B, n, D)
        return halves(self.projector(with_zeros(inputs.to(*dtype_of(self.projector)), guidance)), guidance)

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """See Adapter; without `request.control` IdentityNet is left out."""
        request = request or AdapterRequest()
        tokens = self.tokens(embeddings, request.guidance)
        scale = self.strength if request.scale is None else request.scale
        conditions: list[Condition] = [
            TokenCondition(
                tokens=tokens,
                layers=self.streams.layers,
                scale=scale,
                span=request.acts(),
                mask=request.mask,
                resize="nearest",
            )
        ]
        if request.control is not None:
            control_scale = scale if request.control_scale is None else request.control_scale
            conditions.append(
                ControlCondition(
                    controlnet=self.controlnet,
                    image=request.control,
                    embeds=tokens,
                    scale=control_scale,
                    span=request.acts(),
                    mask=request.mask,
                )
            )
        return conditions

    def complete(self, faces: Sequence[FaceLike], request: AdapterRequest) -> AdapterRequest:
        """Draw the keypoints: those asked for, else those of the first photo, moved to where the picture shows them."""
        if request.control is not None:
            return request
        points = request.points
        if points is None:
            why = "InstantID needs to know where the face is to be; give a photo, or keypoints as points."
            face = seen(faces, why)
            points = moved(face.points, face.image.size, (request.width, request.height))
        drawing = draw(np.asarray(points), (request.width, request.height))
        return replace(request, control=torch.from_numpy(drawing).permute(2, 0, 1)[None].float() / 255)


def moved(points: np.ndarray, photo: tuple[int, int], picture: tuple[int, int]) -> np.ndarray:
    """Points (5, 2) in a photo (width, height) -> in a picture that the photo, scaled evenly, covers.

    Where the shapes differ, the cut is moved so that the points stay as central as the photo allows.
    """
    scale = max(picture[0] / photo[0], picture[1] / photo[1])
    scaled = points.astype(np.float32) * scale
    room = np.array([photo[0] * scale - picture[0], photo[1] * scale - picture[1]], np.float32)
    shift = np.clip(scaled.mean(axis=0) - np.array(picture, np.float32) / 2, 0, room)
    return scaled - shift


def draw(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Keypoints (5, 2) in pixels -> InstantID's drawing (H, W, 3) uint8 RGB; size = (width, height).

    Strokes from the nose at 60 % brightness under full discs of radius 10, whatever the size; pixel for pixel the
    official one. Raises PackageMissing without OpenCV.
    """
    cv2 = _cv2()
    canvas = np.zeros((size[1], size[0], 3))
    for limb in LIMBS:
        x, y = points[list(limb), 0], points[list(limb), 1]
        length = ((x[0] - x[1]) ** 2 + (y[0] - y[1]) ** 2) ** 0.5
        angle = math.degrees(math.atan2(y[0] - y[1], x[0] - x[1]))
        centre = (int(np.mean(x)), int(np.mean(y)))
        polygon = cv2.ellipse2Poly(centre, (int(length / 2), 4), int(angle), 0, 360, 1)
        canvas = cv2.fillConvexPoly(canvas, polygon, COLOURS[limb[0]])
    drawing = (canvas * 0.6).astype(np.uint8)
    for (x, y), colour in zip(points, COLOURS, strict=True):
        drawing = cv2.circle(drawing, (int(x), int(y)), 10, colour, -1)
    return cast(np.ndarray, drawing)


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise PackageMissing(
            f"InstantID draws with OpenCV, which cannot be loaded here ({error}); install opencv-python-headless."
        ) from error
    return cv2


def _load_controlnet(folder: Path, model: Model) -> ControlNetModel:
    if not (folder / "config.json").is_file() or not weight_files(folder):
        raise WeightsMissing(
            f"{folder} with IdentityNet (config.json, diffusion_pytorch_model.safetensors) is missing; InstantID needs"
            " it beside ip-adapter.bin (a FaceID-unnorm file has the same keys: let its name contain faceid)."
        )
    return load_controlnet(folder, model.unet)
