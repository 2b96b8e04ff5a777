"""IP-Adapter-FaceID: a face embedding as tokens in a decoupled attention, most variants with LoRA on every layer.

| variant | embedding | tokens | besides |
|---|---|---|---|
| faceid | unit | 4 | LoRA |
| plus, plusv2 | unit | 4, read from CLIP's view of the aligned face | LoRA |
| portrait | unit, several photos side by side | 16 per photo | |
| unnorm | RAW | 16, from a resampler | |

Source: github tencent-ailab/IP-Adapter, hub h94/IP-Adapter-FaceID (non-commercial).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    fused,
    given,
    halves,
    ready,
    said,
    seen,
    stacked,
    trainable,
    with_zeros,
)
from facegen.checkpoints import SAFE, Shapes, Tensors, base_name, section
from facegen.conditions import Condition
from facegen.errors import WrongAdapter, WrongRequest
from facegen.models.clip import CLIP_WIDTHS, EXPRESSION_WIDTH, IMAGE_ENCODER, ClipView, load_clip
from facegen.models.projections import FacePlusProjection, FaceProjection, ProjectionSizes
from facegen.models.resampler import PerceiverSizes, Resampler
from facegen.models.streams import Streams, dtype_of, initialise
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from facegen.models.base import Model

Variant = Literal["faceid", "plus", "plusv2", "portrait", "unnorm"]
Projector = FaceProjection | FacePlusProjection | Resampler


class IPAdapterFaceID(Adapter):
    """See the module's text."""

    name = "ip_adapter_faceid"
    title = "IP-Adapter-FaceID"
    variants = get_args(Variant)
    sees = preprocessing("ip_adapter_faceid")
    pack = sees.pack
    needs = frozenset({"face"})
    strength = 1.0

    def __init__(self, variant: Variant, projector: Projector, streams: Streams, clip: ClipView | None = None) -> None:
        self.variant = variant
        self.projector = projector
        self.streams = streams
        self.clip = clip
        if clip is not None:
            self.needs = frozenset({"face", "points", "photo"})

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        mlp = "image_proj.proj.0.weight" in shapes and "image_proj.proj.3.weight" not in shapes
        mlp = mlp and shapes["image_proj.proj.0.weight"][1] != EXPRESSION_WIDTH
        reads = shapes.get("image_proj.proj_in.weight", (0, 0))[1]
        unnorm = "image_proj.latents" in shapes and "faceid" in file_name.lower() and reads not in CLIP_WIDTHS
        storymaker = any(key.startswith("image_proj_model.") for key in shapes)  # it has the same LoRA
        lora = not storymaker and any("_lora." in key and key.startswith("ip_adapter.") for key in shapes)
        return mlp or unnorm or lora

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        variant = variant_of(shapes, file_name)
        found: dict[str, int | str] = {"variant": variant}
        if variant == "unnorm":
            found["tokens"] = shapes["image_proj.latents"][1]
            found["embedding"] = shapes["image_proj.proj_in.weight"][1]
            width = shapes["image_proj.proj_out.weight"][0]
        else:
            sizes = ProjectionSizes.from_shapes(section(shapes, "image_proj"))
            found |= {"tokens": sizes.tokens, "embedding": sizes.embedding}
            width = sizes.output
        rank = next((s[0] for key, s in shapes.items() if key.endswith("_lora.down.weight")), 0)
        return {**found, "LoRA rank": rank, "base": base_name(width), "token width": width}

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model, *, variant: Variant | None = None) -> IPAdapterFaceID:
        """From one file, or a folder with one; the Plus variants also need `image_encoder/` beside it.

        The companions `…_lora.safetensors` repeat what the file holds and are not read. variant: where the keys leave
        it open (plus or plusv2; unnorm or InstantID), instead of what the file's name says. Raises WrongRequest for one
        that the keys rule out.
        """
        file = Path(source).expanduser()
        latents = file.is_file() and "image_proj.latents" in checkpoints.shapes(file)
        file = file if variant == "unnorm" and latents else cls.choose(source, model)
        tensors = checkpoints.read(file)
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        variant = said(variant, variant_of(shapes, file.name), file, ("plus", "plusv2"))
        streams = Streams.from_tensors(section(tensors, "ip_adapter"), model, file, section="ip_adapter")
        projector = _projector(variant, section(tensors, "image_proj"), file)
        clip = None
        if isinstance(projector, FacePlusProjection):
            clip = ClipView(load_clip(file.parent), bgr=cls.sees.sight.channels == "bgr")
            wanted = projector.perceiver_resampler.sizes.context
            if clip.width != wanted:
                raise WrongAdapter(
                    f"{file} reads CLIP tokens {wanted} wide, the image encoder beside it gives {clip.width};"
                    f" put the right one into {file.parent / IMAGE_ENCODER}."
                )
        adapter = cls(variant, projector, streams, clip)
        ready(adapter.modules(), model)
        if clip is not None:
            ready(clip.encoder, model)
        return adapter

    @classmethod
    def fresh(
        cls,
        model: Model,
        embedding_dim: int,
        *,
        variant: Variant = "faceid",
        projector: Projector | None = None,
        clip: ClipView | None = None,
        rank: int = 128,
        seed: int = 0,
    ) -> IPAdapterFaceID:
        """To be trained, in float32; projector: None for the official sizes.

        Keys and values start as the text's, the LoRA (rank 0: none; the official portrait and unnorm variants have
        none) changes nothing at first.
        """
        generator = torch.Generator().manual_seed(seed)
        projector = projector or _official_projector(variant, embedding_dim, model.text_width, clip)
        initialise(projector, generator)
        if isinstance(projector, Resampler):
            nn.init.normal_(projector.latents, std=projector.sizes.dim**-0.5, generator=generator)
        rank = 0 if variant in ("portrait", "unnorm") else rank
        adapter = cls(variant, projector, Streams.fresh(model, rank=rank, generator=generator), clip)
        if adapter.embedding_dim != embedding_dim:
            raise WrongRequest(f"The projector reads {adapter.embedding_dim} numbers, not {embedding_dim}.")
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`ip-adapter-faceid…_{sd15,sdxl}.bin`, the official name, for it alone tells Plus from PlusV2."""
        stem = {"plus": "faceid-plus", "plusv2": "faceid-plusv2", "portrait": "faceid-portrait"}.get(
            self.variant, "faceid"
        )
        base = "sdxl" if self.streams.token_width == 2048 else "sd15"
        name = f"ip-adapter-{stem}_{base}" if self.variant != "unnorm" else f"ip-adapter-faceid-portrait_{base}_unnorm"
        nested = {"image_proj": self.projector.state_dict(), "ip_adapter": self.streams.tensors()}
        return checkpoints.write(folder / f"{name}{SAFE if safe else '.bin'}", checkpoints.cast(nested, dtype))

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        return self.projector.input_dim if isinstance(self.projector, Resampler) else self.projector.sizes.embedding

    def modules(self) -> nn.Module:
        return nn.ModuleDict({"image_proj": self.projector, "ip_adapter": self.streams})

    def tokens(self, embeddings: Tensor, request: AdapterRequest | None = None) -> Tensor:
        """RAW embeddings (B, D) or (B, n, D) -> Pair (2, B, N, width); N = n · tokens, but tokens alone for unnorm."""
        request = request or AdapterRequest()
        self.check_embeddings(embeddings)
        inputs = embeddings if embeddings.ndim == 3 else embeddings[:, None]  # (B, n, D)
        sees = preprocessing("ip_adapter_faceid_unnorm") if self.variant == "unnorm" else self.sees
        inputs = with_zeros(given(inputs, sees).to(*dtype_of(self.projector)), request.guidance)
        if not isinstance(self.projector, FacePlusProjection):
            return halves(self.projector(inputs), request.guidance)
        assert self.clip is not None, "Plus variants are made with a CLIP encoder"
        if request.clip is None:
            raise WrongRequest("IP-Adapter-FaceID-Plus needs the photo of the face, not its embedding alone.")
        # Zeros after CLIP's normalisation: the unconditional half sees a grey picture, not a black one.
        pixels = with_zeros(request.clip, request.guidance)
        features = self.clip.features(pixels)
        if features.shape[0] != inputs.shape[0]:
            features = _expand(features, inputs.shape[0], request.guidance)
        tokens = self.projector(inputs, features, shortcut=self.variant == "plusv2", structure=request.structure)
        return halves(tokens, request.guidance)

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """See Adapter; the Plus variants need `request.clip`."""
        request = request or AdapterRequest()
        return [beside_text(self.tokens(embeddings, request), self.streams, request, self.strength)]

    def gather(self, faces: Sequence[FaceLike]) -> Tensor:
        """Portrait takes the photos side by side, (1, n, D); the others fuse them, (1, D)."""
        return stacked(faces) if self.variant == "portrait" else fused(faces)

    def complete(self, faces: Sequence[FaceLike], request: AdapterRequest) -> AdapterRequest:
        """For the Plus variants: CLIP's pixels of the first photo's face, aligned to 224."""
        if self.clip is None or request.clip is not None:
            return request
        from facegen.face.align import norm_crop

        face = seen(faces, "IP-Adapter-FaceID-Plus looks at the photo; give one, not an embedding alone.")
        crop = np.asarray(norm_crop(face.image, face.points, self.clip.size))
        return replace(request, clip=self.clip.pixels(crop))


def variant_of(shapes: Shapes, file_name: str) -> Variant:
    """From the keys; only the name tells PlusV2 from Plus."""
    if "image_proj.latents" in shapes:
        return "unnorm"
    if any(key.startswith("image_proj.perceiver_resampler.") for key in shapes):
        return "plusv2" if "plusv2" in file_name.lower() else "plus"
    return "faceid" if any("_lora." in key for key in shapes) else "portrait"


def _projector(variant: Variant, tensors: Tensors, file: Path) -> Projector:
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    reader = ("proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight")
    projector: Projector
    if variant == "unnorm":
        checkpoints.require(shapes, "latents", *reader, path=file)
        projector = Resampler.from_shapes(shapes)
    else:
        checkpoints.require(shapes, "proj.0.weight", "proj.2.weight", "norm.weight", path=file)
        if variant in ("plus", "plusv2"):
            checkpoints.require(section(shapes, "perceiver_resampler"), *reader, path=file)
            projector = FacePlusProjection.from_shapes(shapes)
        else:
            projector = FaceProjection.from_shapes(shapes)
    checkpoints.load_into(projector, tensors, path=file, prefix="image_proj.")
    return projector


def _official_projector(variant: Variant, embedding_dim: int, width: int, clip: ClipView | None) -> Projector:
    if variant == "unnorm":
        return Resampler(PerceiverSizes(embedding_dim, 1280, width, depth=4, heads=20), queries=16)
    sizes = ProjectionSizes(embedding_dim, 1024, 16 if variant == "portrait" else 4, width)
    if variant not in ("plus", "plusv2"):
        return FaceProjection(sizes)
    if clip is None:
        raise WrongRequest(f"The variant {variant!r} reads CLIP; give its encoder as clip.")
    return FacePlusProjection(sizes, PerceiverSizes(clip.width, width, width, depth=4, heads=max(width // 64, 1)))


def _expand(features: Tensor, rows: int, guidance: bool) -> Tensor:
    """One photo's features (with the zero row before them when there is one) for several embeddings."""
    if not guidance:
        return features.expand(rows, -1, -1)
    return torch.cat([features[:1], features[1:].expand(rows - 1, -1, -1)])
