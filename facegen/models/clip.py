"""CLIP's picture encoders: how a picture is handed to one, and loading one from a folder or from inside a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from facegen.checkpoints import Shapes, count
from facegen.errors import CheckpointBroken, WeightsMissing, WrongAdapter, WrongRequest
from facegen.models.resampler import by_photo
from facegen.models.streams import dtype_of
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

IMAGE_ENCODER = "image_encoder"
CLIP_VIEW = preprocessing("ip_adapter").sight
CLIP_WIDTHS = (768, 1024, 1280, 1664)  # of patch tokens: what reads such looks at pictures, not at face embeddings
FACE_WIDTH = 512  # of every published recogniser's embedding
EXPRESSION_WIDTH = 55  # numbers of a face's expression: what reads such belongs to Arc2Face
HEADS = {768: 12, 1024: 16, 1280: 16, 1664: 16}  # of the published picture encoders (ViT-B, -L, -H, -bigG) by width


def clip_pixels(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) with CLIP's mean and deviation; channels as they come."""
    return CLIP_VIEW.normal(torch.tensor(picture).permute(2, 0, 1)[None].float() / 255)


def centre(image: Image.Image, size: int) -> np.ndarray:
    """A whole picture as CLIP sees it, (size, size, 3) uint8 RGB: the shorter side to `size`, the middle cut out.

    Bicubic; the longer side is rounded down, as transformers' CLIPImageProcessor does it.
    """
    width, height = image.size
    short = min(width, height)
    width, height = (size if side == short else int(size * side / short) for side in (width, height))
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(scaled.crop((left, top, left + size, top + size)))


@dataclass(frozen=True, eq=False)
class ClipView:
    """CLIP's picture encoder and how the aligned face is handed to it.

    bgr: with the channels swapped, as IP-Adapter-FaceID's official sample code does (it passes OpenCV's crop on as it
    is); its adapters were published and are used that way.
    """

    encoder: CLIPVisionModelWithProjection
    bgr: bool = True

    @property
    def size(self) -> int:
        """Side of the pictures it takes, in pixels."""
        return int(self.encoder.config.image_size)

    @property
    def width(self) -> int:
        """Width of its patch tokens."""
        return int(self.encoder.config.hidden_size)

    def pixels(self, crop: np.ndarray) -> Tensor:
        """Aligned face (S, S, 3) uint8 RGB -> (1, 3, S, S), as `AdapterRequest.clip` takes it."""
        return clip_pixels(crop[..., ::-1].copy() if self.bgr else crop)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + patches, width), of the last layer but one."""
        out = self.encoder(pixels.to(*dtype_of(self.encoder)), output_hidden_states=True)
        features: Tensor = out.hidden_states[-2]
        return features


@dataclass(eq=False)
class Sight:
    """What an adapter sees of photos: CLIP's patch tokens of the last layer but one, or its one pooled embedding.

    clip: None where the faces bring what is seen as their embeddings.
    """

    clip: ClipView | None = None
    pooled: bool = False
    _grey: Tensor | None = field(default=None, repr=False)

    def features(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, patches, width), pooled (n, 1, width)."""
        assert self.clip is not None, "features are made by CLIP"
        if not self.pooled:
            return self.clip.features(pixels)
        embeds: Tensor = self.clip.encoder(pixels.to(*dtype_of(self.clip.encoder))).image_embeds
        return embeds[:, None]

    def nothing(self, like: Tensor) -> Tensor:
        """What the other half sees in place of photos (…, S, width), (1, 1, S, width).

        Zeros for a pooled embedding; else the features of zero pixels, which are grey after CLIP's normalisation.
        """
        if self.pooled or self.clip is None:
            return torch.zeros_like(like[:1, :1])
        if self._grey is None:
            side = self.clip.size
            with torch.no_grad():
                self._grey = self.features(torch.zeros(1, 3, side, side))[None]
        if self._grey.shape[-2] != like.shape[-2]:
            raise WrongAdapter(
                f"The image encoder gives {self._grey.shape[-2]} tokens for a photo, not {like.shape[-2]}; give what it"
                " gives."
            )
        return self._grey.to(like)

    def given(self, embeddings: Tensor, width: int, title: str) -> Tensor:
        """What faces (1, n, D) bring themselves where there is no CLIP, (1, n, 1, D); WeightsMissing for another D."""
        if embeddings.shape[-1] != width:
            raise WeightsMissing(
                f"{title} looks at photos through CLIP, which is not there; put its {IMAGE_ENCODER} beside the file of"
                " the adapter."
            )
        return embeddings[:, :, None]

    def rows(self, embeddings: Tensor, guidance: bool) -> Tensor:
        """Features (B, D), (B, S, D) or (B, n, S, D) -> (1 + B, n, S, D), the other half first if there is one.

        A photo whose features are all zero is "no person" and seen as the other half sees it.
        """
        photos = by_photo(embeddings)
        nothing = self.nothing(photos)
        photos = torch.where((photos == 0).flatten(2).all(-1)[..., None, None], nothing, photos)
        if not guidance:
            return photos
        return torch.cat([nothing.expand_as(photos[:1]), photos])


def fitting_clip(folder: Path, width: int, *, pooled: bool = False) -> CLIPVisionModelWithProjection | None:
    """The encoder of this width among those in or beside a folder of adapters, else the hub's if it fits; else None.

    pooled: the width is that of the pooled embedding. Raises WrongAdapter where others lie beside the adapters.
    """
    places = [folder / IMAGE_ENCODER, folder.parent / IMAGE_ENCODER, folder.parent / "models" / IMAGE_ENCODER]
    found = [place for place in places if (place / "config.json").is_file()]
    beside = bool(found)
    if not found:
        from facegen.hub import resolve

        try:
            found = [Path(resolve("clip-vit-h"))]
        except WeightsMissing:
            return None
    widths = []
    for place in found:
        config = json.loads((place / "config.json").read_text("utf-8"))
        config = config.get("vision_config", config) | {k: v for k, v in config.items() if k == "projection_dim"}
        widths.append(config.get("projection_dim" if pooled else "hidden_size"))
        if widths[-1] == width:
            return load_clip_from(place)
    if not beside:
        return None
    raise WrongAdapter(
        f"The adapter in {folder} reads CLIP features {width} wide, the image encoder in {found[0]} gives {widths[0]};"
        f" put the right one into {folder / IMAGE_ENCODER}."
    )


def load_clip(folder: Path) -> CLIPVisionModelWithProjection:
    """The encoder in `image_encoder/` in or beside the folder, else the one the hub calls clip-vit-h.

    Raises WeightsMissing, CheckpointBroken.
    """
    places = [folder / IMAGE_ENCODER, folder.parent / IMAGE_ENCODER]
    place = next((one for one in places if (one / "config.json").is_file()), None)
    if place is None:
        from facegen.hub import resolve

        place = Path(resolve("clip-vit-h"))
    return load_clip_from(place)


def load_clip_from(place: Path) -> CLIPVisionModelWithProjection:
    """The encoder that lies in this folder; CheckpointBroken."""
    from transformers import CLIPVisionModelWithProjection

    try:
        # transformers maps old key names by class name: the class itself, not one of ours.
        encoder, report = cast(
            Any,
            CLIPVisionModelWithProjection.from_pretrained(str(place), local_files_only=True, output_loading_info=True),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointBroken(
            f"The image encoder in {place} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    lacking = [key for key in report["missing_keys"] if not key.endswith("position_ids")]
    if lacking:
        raise CheckpointBroken(f"The image encoder in {place} lacks {lacking[0]}; fetch it again.")
    return cast("CLIPVisionModelWithProjection", encoder)


def vision_config(shapes: Shapes, heads: int | None = None) -> CLIPVisionConfig:
    """The configuration of an OpenAI CLIP encoder inside a file, from its shapes without the prefix `vision_model.`.

    heads: their number is not written there; None for that of the published encoder of this width. Raises KeyError for
    a key that is missing, WrongRequest where the heads cannot be told or do not divide the width.
    """
    from transformers import CLIPVisionConfig

    hidden, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    patches = shapes["embeddings.position_embedding.weight"][0] - 1
    heads = HEADS.get(hidden) if heads is None else heads
    if heads is None:
        raise WrongRequest(
            f"The image encoder in the file is {hidden} wide, as no published one is, and the file does not say how"
            " many heads it has; give heads=, as in PhotoMaker.from_pretrained(file, model, heads=2)."
        )
    if heads < 1 or hidden % heads:
        raise WrongRequest(f"An image encoder {hidden} wide cannot have {heads} heads; they must divide its width.")
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=count(shapes, "encoder.layers"),
        num_attention_heads=heads,
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
    )
