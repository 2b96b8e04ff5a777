"""StoryMaker: faces, hair, clothes and bodies of up to three people as one row of tokens, with LoRA on every layer.

Per person four tokens of the face (embedding and CLIP's view of the aligned face, as FaceID-PlusV2) and sixteen of the
body (CLIP's view of the person cut out in front of white), told apart by position embeddings; twenty learned tokens of
the background come first. Source: github RedAIGC/StoryMaker, hub RED-AIGC/StoryMaker, arXiv 2409.12576.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import (
    Adapter,
    AdapterRequest,
    FaceLike,
    Guest,
    SeenFace,
    beside_text,
    fused,
    given,
    halves,
    ready,
    seen,
    trainable,
    with_zeros,
)
from facegen.checkpoints import SAFE, Shapes, base_name, section
from facegen.conditions import Condition
from facegen.errors import CheckpointBroken, WrongAdapter, WrongMask, WrongRequest
from facegen.models.clip import IMAGE_ENCODER, ClipView, clip_pixels, load_clip
from facegen.models.projections import FacePlusProjection, ProjectionSizes
from facegen.models.resampler import PerceiverSizes, Resampler
from facegen.models.streams import PARTS, Streams, dtype_of, initialise
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from facegen.attention.weights import LowRank
    from facegen.models.base import Model

PROJECTOR = "image_proj_model"
PEOPLE = 3
LOOK = "StoryMaker looks at the photo; give one, not an embedding alone."


@dataclass(frozen=True, eq=False, kw_only=True)
class Character:
    """One person of a picture.

    face: with its photo; mask: (1, H, W) in [0, 1] in the size of the photo, where the person is in it, None for a
    photo that shows nothing else; clothes: a picture of what is worn instead of the clothes in the photo.
    """

    face: SeenFace
    mask: Tensor | None = None
    clothes: Image.Image | None = None


class PeopleProjection(FacePlusProjection):
    """Embeddings (B, P, D) and CLIP's features of P faces and bodies -> (B, (1 + P) · tokens, width).

    body: the resampler of the bodies; people: how many there are position embeddings for.
    """

    def __init__(self, sizes: ProjectionSizes, face: PerceiverSizes, body: PerceiverSizes, queries: int) -> None:
        super().__init__(sizes, face)
        self.resample = Resampler(body, queries)
        self.pos_embed = nn.Parameter(torch.zeros(PEOPLE, sizes.tokens + queries, sizes.output))
        self.bg_embed = nn.Parameter(torch.zeros(1, sizes.tokens + queries, sizes.output))
        self.proj_out = nn.Linear(sizes.output, sizes.output)
        self.norm_out = nn.LayerNorm(sizes.output)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> PeopleProjection:
        body = section(shapes, "resample")
        face = PerceiverSizes.from_shapes(section(shapes, "perceiver_resampler"))
        return cls(ProjectionSizes.from_shapes(shapes), face, PerceiverSizes.from_shapes(body), body["latents"][1])

    def people(self, embeddings: Tensor, faces: Tensor, bodies: Tensor) -> Tensor:
        """embeddings (B, P, D), faces and bodies (B, P, S, C), CLIP's features -> (B, (1 + P) · tokens, width)."""
        batch, count = embeddings.shape[:2]
        face = self(embeddings.flatten(0, 1)[:, None], faces.flatten(0, 1), shortcut=True)  # (B · P, 4, width)
        body = self.resample(bodies.flatten(0, 1))  # (B · P, 16, width)
        tokens = torch.cat([face, body], dim=1).unflatten(0, (batch, count)) + self.pos_embed[:count]
        tokens = self.norm_out(self.proj_out(tokens)) + tokens
        whole = torch.cat([self.bg_embed.expand(batch, 1, -1, -1), tokens], dim=1)
        return whole.flatten(1, 2)


class StoryMaker(Adapter):
    """See the module's text.

    Embeddings (B, D) are one person in each of B pictures, (B, P, D) are P people in each. lora_scale: strength of the
    adapter's LoRA while its tokens act.
    """

    name = "storymaker"
    title = "StoryMaker"
    sees = preprocessing("storymaker")
    pack = sees.pack
    needs = frozenset({"face", "points", "photo"})
    strength = 0.8
    together = PEOPLE

    def __init__(
        self, projector: PeopleProjection, streams: Streams, clip: ClipView, *, lora_scale: float = 0.8
    ) -> None:
        self.projector = projector
        self.streams = streams
        self.clip = clip
        self.lora_scale = lora_scale

    @property
    def lora_scale(self) -> float:
        return self._lora_scale

    @lora_scale.setter
    def lora_scale(self, value: float) -> None:
        self._lora_scale = value
        for layer in (self.streams.lora or {}).values():
            for part in PARTS:
                low: LowRank | None = getattr(layer, part)
                if low is not None:
                    low.gain = value

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        return any(key.startswith(f"{PROJECTOR}.") for key in shapes)

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        people, tokens, width = shapes[f"{PROJECTOR}.pos_embed"]
        rank = next((shape[0] for key, shape in shapes.items() if key.endswith("_lora.down.weight")), 0)
        return {
            "base": base_name(width),
            "token width": width,
            "tokens": tokens,
            "people": people,
            "embedding": shapes[f"{PROJECTOR}.proj.0.weight"][1],
            "LoRA rank": rank,
        }

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model) -> StoryMaker:
        """From `mask.bin` (or .safetensors), or the folder with it; CLIP from `image_encoder/` beside it, or the hub's
        clip-vit-h.
        """
        file = cls.choose(source, model)
        tensors = checkpoints.read(file)
        streams = Streams.from_tensors(section(tensors, "ip_adapter"), model, file, section="ip_adapter")
        parts = section(tensors, PROJECTOR)
        shapes = {key: tuple(value.shape) for key, value in parts.items()}
        checkpoints.require(shapes, "proj.0.weight", "proj.2.weight", "norm.weight", "resample.latents", path=file)
        for reader in ("perceiver_resampler", "resample"):
            names = [f"{reader}.{key}.weight" for key in ("proj_in", "proj_out", "layers.0.0.to_q")]
            checkpoints.require(shapes, *names, path=file)
        projector = PeopleProjection.from_shapes(shapes)
        checkpoints.load_into(projector, parts, path=file, prefix=f"{PROJECTOR}.")
        if projector.sizes.output != streams.token_width:
            raise CheckpointBroken(
                f"{file} holds a projector of tokens {projector.sizes.output} wide and attention weights for"
                f" {streams.token_width}; fetch the file again."
            )
        clip = ClipView(load_clip(file.parent), bgr=False)
        wanted = projector.resample.sizes.context
        if clip.width != wanted:
            raise WrongAdapter(
                f"{file} reads CLIP tokens {wanted} wide, the image encoder beside it gives {clip.width};"
                f" put the right one into {file.parent / IMAGE_ENCODER}."
            )
        adapter = cls(projector, streams, clip)
        ready(adapter.modules(), model)
        ready(clip.encoder, model)
        return adapter

    @classmethod
    def fresh(
        cls,
        model: Model,
        embedding_dim: int,
        *,
        clip: ClipView,
        projector: PeopleProjection | None = None,
        rank: int = 128,
        seed: int = 0,
    ) -> StoryMaker:
        """To be trained, in float32; projector: None for the official sizes. The LoRA changes nothing at first."""
        generator = torch.Generator().manual_seed(seed)
        width = model.text_width
        projector = projector or PeopleProjection(
            ProjectionSizes(embedding_dim, 2 * embedding_dim, 4, width),
            PerceiverSizes(clip.width, width, width, depth=4, heads=max(width // 64, 1)),
            PerceiverSizes(clip.width, 1280, width, depth=4, heads=20),
            queries=16,
        )
        initialise(projector, generator)
        nn.init.normal_(projector.resample.latents, std=projector.resample.sizes.dim**-0.5, generator=generator)
        nn.init.zeros_(projector.proj_out.weight)
        nn.init.zeros_(projector.proj_out.bias)
        adapter = cls(projector, Streams.fresh(model, rank=rank, generator=generator), clip)
        if adapter.embedding_dim != embedding_dim:
            raise WrongRequest(f"The projector reads {adapter.embedding_dim} numbers, not {embedding_dim}.")
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`mask.bin`, the official name; see Adapter.save. The image encoder is not written."""
        nested = {PROJECTOR: self.projector.state_dict(), "ip_adapter": self.streams.tensors()}
        return checkpoints.write(folder / f"mask{SAFE if safe else '.bin'}", checkpoints.cast(nested, dtype))

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        return self.projector.sizes.embedding

    def modules(self) -> nn.Module:
        return nn.ModuleDict({PROJECTOR: self.projector, "ip_adapter": self.streams})

    def tokens(self, embeddings: Tensor, request: AdapterRequest) -> Tensor:
        """RAW embeddings (B, D) or (B, P, D) -> Pair (2, B, (1 + P) · 20, width).

        request.clip and request.body: (P or B · P, 3, S, S), CLIP's pixels of the faces and of the bodies. In the other
        half the projector reads zeros in place of embeddings and of CLIP's features.
        """
        self.check_embeddings(embeddings)
        if request.clip is None or request.body is None:
            raise WrongRequest("StoryMaker needs the photo of the person, not its embedding alone.")
        people = given(embeddings if embeddings.ndim == 3 else embeddings[:, None], self.sees)  # (B, P, D)
        batch, count = people.shape[:2]
        most = self.projector.pos_embed.shape[0]
        if count > most:
            raise WrongRequest(f"StoryMaker knows at most {most} people in a picture, not {count}.")
        views = []
        for pixels in (request.clip, request.body):
            if pixels.shape[0] not in (count, batch * count):
                raise WrongRequest(f"{pixels.shape[0]} crops do not fit {batch} pictures of {count} people.")
            features = self.clip.features(pixels).unflatten(0, (-1, count))  # (1 or B, P, S, C)
            # Of a zero row, "no person", CLIP saw nobody.
            features = features * (people != 0).any(dim=-1)[..., None, None].to(features.device)
            views.append(with_zeros(features, request.guidance))
        people = with_zeros(people.to(*dtype_of(self.projector)), request.guidance)
        return halves(self.projector.people(people, *views), request.guidance)

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """See Adapter; needs `request.clip` and `request.body`."""
        request = request or AdapterRequest()
        return [beside_text(self.tokens(embeddings, request), self.streams, request, self.strength)]

    def complete(self, faces: Sequence[FaceLike], request: AdapterRequest) -> AdapterRequest:
        """CLIP's pixels of the first photo's face and, where the request has none, of the whole photo as the body."""
        if request.clip is not None and request.body is not None:
            return request
        return self.views([Character(face=seen(faces, LOOK))], request)

    def conditions_together(self, people: Sequence[Guest], request: AdapterRequest, model: Model) -> list[Condition]:
        """See Adapter; the masks of the bodies and the clothes are looked at, too."""
        characters = [Character(face=seen(one.faces, LOOK), mask=one.body, clothes=one.clothes) for one in people]
        return self.people(characters, model, request)

    def people(
        self, characters: Sequence[Character], model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """Several people in one picture, in the order in which their position embeddings are given out."""
        if not characters:
            raise WrongRequest("StoryMaker needs at least one photo of a face.")
        embeddings = torch.stack([fused([one.face]) for one in characters], dim=1)  # (1, P, D)
        request = self.views(characters, request or AdapterRequest())
        with torch.no_grad():
            return self.conditions_from_embeddings(embeddings, model, request)

    def views(self, characters: Sequence[Character], request: AdapterRequest) -> AdapterRequest:
        """The request with CLIP's pixels of the faces and of the bodies, (P, 3, S, S) each, where it has none."""
        from facegen.face.align import norm_crop

        size = self.clip.size
        faces = [np.asarray(norm_crop(one.face.image, one.face.points, size)) for one in characters]
        bodies = [cut_out(one.face.image, one.mask) if one.clothes is None else one.clothes for one in characters]
        scaled = [np.asarray(body.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for body in bodies]
        return replace(
            request,
            clip=torch.cat([self.clip.pixels(face) for face in faces]) if request.clip is None else request.clip,
            body=torch.cat([clip_pixels(body) for body in scaled]) if request.body is None else request.body,
        )


def cut_out(photo: Image.Image, mask: Tensor | None) -> Image.Image:
    """The person in front of white, cut to where the mask (1, H, W) in [0, 1] is not empty; its edge is softened.

    Raises WrongMask for a mask of another size, or one without a person in it.
    """
    if mask is None:
        return photo
    import cv2  # type: ignore[import-not-found, unused-ignore]

    if tuple(mask.shape) != (1, photo.height, photo.width):
        raise WrongMask(
            f"The person's mask is {mask.shape[-1]}×{mask.shape[-2]} pixels but the photo is"
            f" {photo.width}×{photo.height}; draw it on a copy of the photo."
        )
    levels = (mask[0] * 255).round().to(torch.uint8).cpu().numpy()
    rows, columns = np.nonzero(levels.any(axis=1))[0], np.nonzero(levels.any(axis=0))[0]
    if not len(rows):
        raise WrongMask("The person's mask is empty; paint white where the person is.")
    place = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    soft = cv2.GaussianBlur(levels[place], (5, 5), 0)[..., None] / 255.0
    person = np.asarray(photo.convert("RGB"))[place]
    return Image.fromarray((255 * (1 - soft) + soft * person).astype(np.uint8))
