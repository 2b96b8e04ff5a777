"""IP-Adapter: what CLIP sees of a photo as tokens in a decoupled attention; the forefather of the FaceID family.

| variant | reads | tokens |
|---|---|---|
| plain | CLIP's pooled embedding | 4 |
| plus, plus-face | patch tokens of the last layer but one, through a resampler | 16 |
| full-face | the same, each by itself | one per patch |

Plus and plus-face have the same keys, only the name tells them: the face variants see the face cut out of the photo,
the others the whole photo. Source: github tencent-ailab/IP-Adapter, hub h94/IP-Adapter (Apache-2.0), arXiv 2308.06721.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import (
    Adapter,
    AdapterRequest,
    FaceLike,
    beside_text,
    halves,
    ready,
    said,
    seen,
    stacked,
    trainable,
)
from facegen.checkpoints import SAFE, Shapes, Tensors, base_name, section
from facegen.conditions import Condition
from facegen.errors import WrongRequest
from facegen.models.clip import (
    CLIP_WIDTHS,
    EXPRESSION_WIDTH,
    FACE_WIDTH,
    ClipView,
    Sight,
    centre,
    clip_pixels,
    fitting_clip,
)
from facegen.models.projections import LinearProjection, PatchProjection
from facegen.models.resampler import PerceiverSizes, Resampler
from facegen.models.streams import Streams, dtype_of, initialise
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from PIL import Image

    from facegen.models.base import Model

Variant = Literal["plain", "plus", "plus-face", "full-face"]
Projector = LinearProjection | Resampler | PatchProjection

AIR = 2.0  # the cut-out face: so many times the distance from the eyes to the mouth, to each side of their middle


class IPAdapter(Adapter):
    """See the module's text.

    Its embeddings are what CLIP sees: (B, D) pooled, (B, S, D) patch tokens of one photo, (B, n, S, D) of n photos,
    whose tokens stand side by side. clip: None where the faces bring a feature as their embedding.
    """

    name = "ip_adapter"
    title = "IP-Adapter"
    variants = get_args(Variant)
    sees = preprocessing("ip_adapter")
    pack = sees.pack  # only to find the face
    needs = frozenset({"face", "points", "photo"})
    strength = 1.0

    def __init__(self, variant: Variant, projector: Projector, streams: Streams, clip: ClipView | None = None) -> None:
        self.variant = variant
        self.projector = projector
        self.streams = streams
        self.sight = Sight(clip, pooled=isinstance(projector, LinearProjection))

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        if not any(key.startswith("ip_adapter.") and key.endswith(".to_k_ip.weight") for key in shapes):
            return False
        if any("_lora." in key for key in shapes):
            return False
        plain = shapes.get("image_proj.proj.weight", (0, EXPRESSION_WIDTH))[1] != EXPRESSION_WIDTH
        # InstantID and FaceID-unnorm have the same keys as Plus but read face embeddings; a width that is neither
        # CLIP's nor a recogniser's says nothing, so that the name must.
        reads = shapes.get("image_proj.proj_in.weight", (0, 0))[1]
        named = "plus" in file_name.lower() and "faceid" not in file_name.lower() and reads != FACE_WIDTH
        plus = "image_proj.latents" in shapes and (reads in CLIP_WIDTHS or named)
        return plain or plus or "image_proj.proj.3.weight" in shapes

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        variant = variant_of(shapes, file_name)
        width = next(shape[1] for key, shape in shapes.items() if key.endswith(".to_k_ip.weight"))
        found: dict[str, int | str] = {"variant": variant, "base": base_name(width), "token width": width}
        if variant == "plain":
            found["tokens"] = shapes["image_proj.proj.weight"][0] // width
        elif variant != "full-face":
            found["tokens"] = shapes["image_proj.latents"][1]
        return found

    @classmethod
    def find(cls, folder: Path) -> list[Path]:
        """See Adapter.find; also of the whole repository, where the files lie in `models/` and `sdxl_models/`."""
        places = [place for place in (folder, folder / "models", folder / "sdxl_models") if place.is_dir()]
        return [path for place in places for path in super(IPAdapter, cls).find(place)]

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model, *, variant: Variant | None = None) -> IPAdapter:
        """From one file, or a folder with one; `image_encoder/` is looked for in the folder and beside it.

        variant: where the keys leave it open (plus or plus-face), instead of what the file's name says. Raises
        WrongRequest for one that the keys rule out.
        """
        file = cls.choose(source, model)
        tensors = checkpoints.read(file)
        read = variant_of({key: tuple(value.shape) for key, value in tensors.items()}, file.name)
        variant = said(variant, read, file, ("plus", "plus-face"))
        streams = Streams.from_tensors(section(tensors, "ip_adapter"), model, file, section="ip_adapter")
        projector = _projector(variant, section(tensors, "image_proj"), file)
        encoder = fitting_clip(file.parent, projector.input_dim, pooled=variant == "plain")
        adapter = cls(variant, projector, streams, None if encoder is None else ClipView(encoder, bgr=False))
        ready(adapter.modules(), model)
        if encoder is not None:
            ready(encoder, model)
        return adapter

    @classmethod
    def fresh(
        cls,
        model: Model,
        embedding_dim: int,
        *,
        variant: Variant = "plain",
        projector: Projector | None = None,
        clip: ClipView | None = None,
        seed: int = 0,
    ) -> IPAdapter:
        """To be trained (float32); embedding_dim: width of what CLIP gives; projector: None for the official sizes."""
        generator = torch.Generator().manual_seed(seed)
        projector = projector or _official_projector(variant, embedding_dim, model.text_width)
        initialise(projector, generator)
        if isinstance(projector, Resampler):
            nn.init.normal_(projector.latents, std=projector.sizes.dim**-0.5, generator=generator)
        if projector.input_dim != embedding_dim:
            raise WrongRequest(f"The projector reads {projector.input_dim} numbers, not {embedding_dim}.")
        adapter = cls(variant, projector, Streams.fresh(model, generator=generator), clip)
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`ip-adapter[-plus][-face]_{sd15,sdxl}….bin`, the official names; see Adapter.save."""
        stem = "ip-adapter" if self.variant == "plain" else f"ip-adapter-{self.variant}"
        base = "sd15" if self.streams.token_width != 2048 else "sdxl" if self.variant == "plain" else "sdxl_vit-h"
        nested = {"image_proj": self.projector.state_dict(), "ip_adapter": self.streams.tensors()}
        return checkpoints.write(folder / f"{stem}_{base}{SAFE if safe else '.bin'}", checkpoints.cast(nested, dtype))

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        return self.projector.input_dim

    def modules(self) -> nn.Module:
        return nn.ModuleDict({"image_proj": self.projector, "ip_adapter": self.streams})

    def tokens(self, embeddings: Tensor, guidance: bool = True) -> Tensor:
        """What CLIP sees, (B, D), (B, S, D) or (B, n, S, D) -> Pair (2, B, n · tokens, width)."""
        self.check_embeddings(embeddings)
        photos = self.sight.rows(embeddings.to(*dtype_of(self.projector)), guidance)
        tokens = self.projector(photos.flatten(0, 1)).unflatten(0, photos.shape[:2])  # (1 + B, n, tokens, width)
        return halves(tokens.flatten(1, 2), guidance)

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        request = request or AdapterRequest()
        return [beside_text(self.tokens(embeddings, request.guidance), self.streams, request, self.strength)]

    def gather(self, faces: Sequence[FaceLike]) -> Tensor:
        """What CLIP sees of each photo, (1, n, S, D)."""
        clip = self.sight.clip
        if clip is None:
            return self.sight.given(stacked(faces), self.embedding_dim, self.title)
        photos = [seen([face], f"{self.title} looks at the photo; give one, not an embedding alone.") for face in faces]
        face = self.variant.endswith("face")
        views = [cut_out(photo.image, photo.points) if face else photo.image for photo in photos]
        return self.sight.features(torch.cat([clip_pixels(centre(view, clip.size)) for view in views]))[None]


def cut_out(image: Image.Image, points: np.ndarray) -> Image.Image:
    """The upright square around a face with its points (5, 2); black where the photo ends."""
    eyes, mouth = points[:2].mean(axis=0), points[3:5].mean(axis=0)
    side = AIR * max(float(np.hypot(*(mouth - eyes))), float(np.hypot(*(points[1] - points[0]))))
    x, y = (eyes + mouth) / 2
    return image.crop((round(x - side), round(y - side), round(x + side), round(y + side)))


def variant_of(shapes: Shapes, file_name: str) -> Variant:
    """From the keys; only the name tells plus-face from plus."""
    if "image_proj.proj.3.weight" in shapes:
        return "full-face"
    if "image_proj.latents" in shapes:
        return "plus-face" if "face" in file_name.lower() else "plus"
    return "plain"


def _projector(variant: Variant, tensors: Tensors, file: Path) -> Projector:
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    projector: Projector
    if variant == "plain":
        checkpoints.require(shapes, "proj.weight", "norm.weight", path=file)
        projector = LinearProjection.from_shapes(shapes)
    elif variant == "full-face":
        checkpoints.require(shapes, "proj.2.weight", path=file)
        projector = PatchProjection.from_shapes(shapes)
    else:
        checkpoints.require(shapes, "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", path=file)
        projector = Resampler.from_shapes(shapes)
    checkpoints.load_into(projector, tensors, path=file, prefix="image_proj.")
    return projector


def _official_projector(variant: Variant, embedding_dim: int, width: int) -> Projector:
    if variant == "plain":
        return LinearProjection(embedding_dim, 4, width)
    if variant == "full-face":
        return PatchProjection(embedding_dim, width)
    dim = 1280 if width == 2048 else width
    return Resampler(PerceiverSizes(embedding_dim, dim, width, depth=4, heads=max(dim // 64, 1)), queries=16)
