"""ID-Animator's face adapter: CLIP's view of the aligned face as tokens in a decoupled attention, LoRA on its layers.

Only what acts on a single picture is here, which is all that the file `animator.ckpt` holds; for a video every frame
gets the same tokens. Source: github ID-Animator/ID-Animator `faceadapter/`, arXiv 2404.15275.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import (
    Adapter,
    AdapterRequest,
    FaceLike,
    beside_text,
    halves,
    ready,
    seen,
    stacked,
    trainable,
)
from facegen.checkpoints import SAFE, Shapes, base_name, section
from facegen.conditions import Condition
from facegen.errors import CheckpointBroken, WrongRequest
from facegen.models.clip import ClipView, Sight, centre, clip_pixels, fitting_clip
from facegen.models.resampler import PerceiverSizes, Resampler
from facegen.models.streams import Streams, dtype_of, initialise
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from facegen.models.base import Model

Value = TypeVar("Value")

# Whole checkpoints of the training say it otherwise; the file's own two sections are the values.
OLD_NAMES = {"image_proj_model.": "image_proj.", "adapter_modules.": "face_adapter."}


class IDAnimator(Adapter):
    """See the module's text.

    Its embeddings are CLIP's patch tokens of the aligned face: (B, D) for one token, (B, S, D), or (B, n, S, D) for n
    photos, whose tokens are averaged. clip: None where the faces bring a token as their embedding.
    """

    name = "id_animator"
    title = "ID-Animator"
    sees = preprocessing("id_animator")
    pack = sees.pack  # only to find the face
    needs = frozenset({"face", "points", "photo"})
    strength = 0.8

    def __init__(self, projector: Resampler, streams: Streams, clip: ClipView | None = None) -> None:
        self.projector = projector
        self.streams = streams
        self.sight = Sight(clip)

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        return any(key.endswith(".to_k_face.weight") for key in shapes)

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        shapes = _renamed(shapes)
        width = next(shape[1] for key, shape in shapes.items() if key.endswith(".to_k_face.weight"))
        rank = next((shape[0] for key, shape in shapes.items() if key.endswith("_lora.down.weight")), 0)
        tokens = shapes["image_proj.latents"][1]
        return {"tokens": tokens, "LoRA rank": rank, "base": base_name(width), "token width": width}

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model) -> IDAnimator:
        """From `animator.ckpt`, or a folder with it; `image_encoder/` is looked for in the folder and beside it."""
        file = cls.choose(source, model)
        tensors = _renamed(checkpoints.read(file))
        strange = [key for key in tensors if not key.startswith(tuple(OLD_NAMES.values()))]
        if strange:
            raise CheckpointBroken(f"{file} holds keys that do not belong there: {strange[0]}.")
        streams = Streams.from_tensors(
            section(tensors, "face_adapter"), model, file, word="face", section="face_adapter"
        )
        parts = section(tensors, "image_proj")
        checkpoints.require(parts, "latents", "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", path=file)
        projector = Resampler.from_shapes({key: tuple(value.shape) for key, value in parts.items()})
        checkpoints.load_into(projector, parts, path=file, prefix="image_proj.")
        encoder = fitting_clip(file.parent, projector.input_dim)
        adapter = cls(projector, streams, None if encoder is None else ClipView(encoder, bgr=False))
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
        sizes: PerceiverSizes | None = None,
        clip: ClipView | None = None,
        rank: int = 128,
        seed: int = 0,
    ) -> IDAnimator:
        """To be trained (float32); sizes: of the resampler, by default the official ones; LoRA changes nothing yet."""
        generator = torch.Generator().manual_seed(seed)
        width = model.text_width
        sizes = sizes or PerceiverSizes(embedding_dim, width, width, depth=4, heads=max(width // 64, 1))
        if sizes.context != embedding_dim or sizes.output != width:
            raise WrongRequest(f"The resampler must read {embedding_dim} and give {width} numbers, not {sizes}.")
        projector = Resampler(sizes, queries=16)
        initialise(projector, generator)
        nn.init.normal_(projector.latents, std=sizes.dim**-0.5, generator=generator)
        streams = Streams.fresh(model, rank=rank, generator=generator)
        crossing = {index: low for index, low in (streams.lora or {}).items() if index in streams.layers}
        adapter = cls(projector, Streams(streams.layers, crossing), clip)
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`animator.ckpt` with the sections image_proj and face_adapter; see Adapter.save."""
        nested = {"image_proj": self.projector.state_dict(), "face_adapter": self.streams.tensors(word="face")}
        return checkpoints.write(folder / f"animator{SAFE if safe else '.ckpt'}", checkpoints.cast(nested, dtype))

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        return self.projector.input_dim

    def modules(self) -> nn.Module:
        return nn.ModuleDict({"image_proj": self.projector, "face_adapter": self.streams})

    def tokens(self, embeddings: Tensor, guidance: bool = True) -> Tensor:
        """Patch tokens (B, D), (B, S, D) or (B, n, S, D) -> Pair (2, B, 16, width), the mean over n photos."""
        self.check_embeddings(embeddings)
        photos = self.sight.rows(embeddings.to(*dtype_of(self.projector)), guidance)
        tokens = self.projector(photos.flatten(0, 1)).unflatten(0, photos.shape[:2])  # (1 + B, n, 16, width)
        return halves(tokens.mean(dim=1), guidance)

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        request = request or AdapterRequest()
        return [beside_text(self.tokens(embeddings, request.guidance), self.streams, request, self.strength)]

    def gather(self, faces: Sequence[FaceLike]) -> Tensor:
        """What CLIP sees of each aligned face, (1, n, S, D); aligned at 112 pixels and enlarged, as it was trained."""
        clip = self.sight.clip
        if clip is None:
            return self.sight.given(stacked(faces), self.embedding_dim, self.title)
        from facegen.face.align import norm_crop

        photos = [seen([face], f"{self.title} looks at the photo; give one, not an embedding alone.") for face in faces]
        crops = [
            Image.fromarray(np.asarray(norm_crop(photo.image, photo.points, self.sees.sight.side))) for photo in photos
        ]
        return self.sight.features(torch.cat([clip_pixels(centre(crop, clip.size)) for crop in crops]))[None]


def _renamed(entries: Mapping[str, Value]) -> dict[str, Value]:
    """Under the names of the sections image_proj and face_adapter, whatever wrapped them."""
    found = {}
    for key, value in entries.items():
        plain = key.removeprefix("state_dict.").removeprefix("module.")
        for old, new in OLD_NAMES.items():
            if plain.startswith(old):
                plain = new + plain.removeprefix(old)
        found[plain] = value
    return found
