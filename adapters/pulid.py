"""PuLID for SDXL, v1 and v1.1: tokens of a face in a decoupled attention that leaves the prompt its picture.

ArcFace's vector (RAW) and EVA-CLIP's (unit) of the grey face on white, with five of EVA-CLIP's hidden states, become
10 tokens per photo (v1) or 32 (v1.1). Of the tokens' attention is taken out, by `Manner`, what lies along the prompt's;
tokens of zeros beside them let a place of the picture look at nobody. Source: github ToTheBeginning/PuLID, hub
guozinan/PuLID (Apache-2.0), arXiv 2404.16022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import Adapter, AdapterRequest, FaceLike, SeenFace, ready, seen, stacked, trainable, weight_files
from facegen.checkpoints import SAFE, Shapes, Tensors, base_name, section
from facegen.conditions import Condition, Mix, TokenCondition
from facegen.errors import CheckpointBroken, FacegenError, WeightsMissing, WrongAdapter, WrongBaseModel, WrongRequest
from facegen.models.eva import FILE as EVA_FILE
from facegen.models.eva import EvaTower
from facegen.models.id_tokens import IDEncoder, IDFormer, TokenSizes
from facegen.models.streams import Streams, dtype_of, initialise
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from facegen.face.parsing_networks import Parser
    from facegen.models.base import Model

Version = Literal["v1", "v1.1"]

ENCODER, STREAMS = "id_adapter", "id_adapter_attn_layers"
PARSER_FILE = "parsing_bisenet.pth"
LONGEST = 1024
ASIDE = ("background", "cloth", "hat", "l_ear", "r_ear", "earring", "neck", "necklace")
GREY = (0.299, 0.587, 0.114)
WORDS = {"id_to_k": "to_k_id", "id_to_v": "to_v_id"}


@dataclass(frozen=True)
class Manner:
    """How the tokens act: what is taken out of their attention (`TokenCondition.mix`), how many zeros stand beside."""

    mix: Mix
    zeros: int


MANNERS: Mapping[Version, Mapping[str, Manner]] = {
    "v1": {"fidelity": Manner("ortho_v2", 8), "style": Manner("ortho", 16), "plain": Manner("add", 0)},
    "v1.1": {"fidelity": Manner("ortho_v2", 20), "style": Manner("ortho", 20), "plain": Manner("add", 0)},
}


class PuLID(Adapter):
    """See the module's text.

    Embeddings (B, D) are one photo for each of B pictures, (B, n, D) are n photos of one person. manner: by default
    "fidelity" of MANNERS. blend: v1 takes all tokens of every photo, so that several people become one; otherwise of
    the photos after the first only those of the vector. eva, parser: to read photos.
    """

    name = "pulid"
    title = "PuLID"
    sees = preprocessing("pulid")
    pack = sees.pack
    needs = frozenset({"face", "points", "photo"})
    strength = 0.8
    blend = False

    def __init__(
        self,
        encoder: IDEncoder | IDFormer,
        streams: Streams,
        eva: EvaTower | None = None,
        parser: Parser | None = None,
    ) -> None:
        self.encoder = encoder
        self.streams = streams
        self.eva = eva
        self.parser = parser
        self.manner = MANNERS[self.version]["fidelity"]

    @property
    def version(self) -> Version:
        return "v1" if isinstance(self.encoder, IDEncoder) else "v1.1"

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        return any(key.startswith((f"{ENCODER}.", f"{STREAMS}.")) for key in shapes)

    @classmethod
    def find(cls, folder: Path) -> list[Path]:
        """See Adapter.find; EVA-CLIP and the parsing network beside it are not looked into."""
        files = [path for path in weight_files(folder) if path.name not in (EVA_FILE, PARSER_FILE)]
        return [path for path in files if cls.detect(checkpoints.shapes(path), path.name)]

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        width = next(shape[1] for key, shape in shapes.items() if key.startswith(f"{STREAMS}."))
        found: dict[str, int | str] = {"base": base_name(width), "token width": width}
        if f"{ENCODER}.latents" in shapes:
            return {**found, "variant": "v1.1", "tokens": shapes[f"{ENCODER}.latents"][1]}
        return {**found, "variant": "v1", "tokens": 2 * shapes[f"{ENCODER}.body.6.weight"][0] // width}

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model) -> PuLID:
        """From `pulid_v1.bin` or `pulid_v1.1.safetensors`, or a folder with one of them.

        `EVA02_CLIP_L_336_psz14_s6B.pt` and `parsing_bisenet.pth` are taken from beside it or from the hub's
        eva02-clip-l-336 and bisenet; without them photos cannot be read.
        """
        file = cls.choose(source, model)
        tensors = checkpoints.read(file)
        strange = [key for key in tensors if not key.startswith((f"{ENCODER}.", f"{STREAMS}."))]
        if strange:
            raise CheckpointBroken(f"{file} holds keys that do not belong there: {strange[0]}.")
        streams = _streams(section(tensors, STREAMS), model, file)
        parts = section(tensors, ENCODER)
        shapes = {key: tuple(value.shape) for key, value in parts.items()}
        kind = IDFormer if "latents" in shapes else IDEncoder
        try:
            encoder = kind.from_shapes(shapes)
        except KeyError as missing:
            raise CheckpointBroken(f"{file} lacks {ENCODER}.{missing.args[0]}; fetch the file again.") from missing
        checkpoints.load_into(encoder, parts, path=file, prefix=f"{ENCODER}.")
        eva, parser = _readers(file.parent)
        if eva is not None and eva.sizes.width != encoder.sizes.view:
            raise WrongAdapter(
                f"{file} reads EVA-CLIP's states {encoder.sizes.view} wide, the tower beside it gives"
                f" {eva.sizes.width}; put {EVA_FILE} there."
            )
        adapter = cls(encoder, streams, eva, parser)
        ready(adapter.modules(), model)
        if eva is not None:
            ready(eva, model)
        return adapter

    @classmethod
    def fresh(
        cls,
        model: Model,
        embedding_dim: int = 512,
        *,
        eva: EvaTower,
        parser: Parser | None = None,
        version: Version = "v1.1",
        sizes: TokenSizes | None = None,
        seed: int = 0,
    ) -> PuLID:
        """To be trained, in float32; eva, parser: see the class; sizes: None for the official ones."""
        generator = torch.Generator().manual_seed(seed)
        vector = embedding_dim + eva.sizes.output
        sizes = sizes or TokenSizes(vector=vector, view=eva.sizes.width, output=model.text_width)
        if (sizes.vector, sizes.view, sizes.output) != (vector, eva.sizes.width, model.text_width):
            raise WrongRequest(
                f"The encoder must read {vector} and {eva.sizes.width} numbers and give {model.text_width}, not"
                f" {sizes}."
            )
        encoder = IDFormer(sizes) if version == "v1.1" else IDEncoder(sizes)
        initialise(encoder, generator)
        if isinstance(encoder, IDFormer):
            for parameter in (encoder.latents, encoder.proj_out):
                nn.init.normal_(parameter, std=sizes.dim**-0.5, generator=generator)
        adapter = cls(encoder, Streams.fresh(model, generator=generator), eva, parser)
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`pulid_v1.bin` or `pulid_v1.1.safetensors`, flat, as they were published; see Adapter.save."""
        names = {new: old for old, new in WORDS.items()}
        flat = {f"{ENCODER}.{key}": value for key, value in self.encoder.state_dict().items()}
        flat |= {f"{STREAMS}.{_renamed(key, names)}": one for key, one in self.streams.tensors(word="id").items()}
        name = f"pulid_{self.version}{SAFE if safe or self.version == 'v1.1' else '.bin'}"
        return checkpoints.write(folder / name, checkpoints.cast(flat, dtype))

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        seen_by_eva = 768 if self.eva is None else self.eva.sizes.output
        return self.encoder.sizes.vector - seen_by_eva

    def modules(self) -> nn.Module:
        return nn.ModuleDict({ENCODER: self.encoder, STREAMS: self.streams})

    @property
    def knows(self) -> frozenset[str]:
        return frozenset({"manner"})

    def chosen(self, request: AdapterRequest) -> Manner:
        """The manner that a request asks for by name, else the adapter's own; WrongRequest."""
        if request.manner is None:
            return self.manner
        manners = MANNERS[self.version]
        if request.manner not in manners:
            raise WrongRequest(f"{self.title} has the manners {', '.join(manners)}, not {request.manner!r}.")
        return manners[request.manner]

    def tokens(self, vectors: Tensor, views: Sequence[Tensor], guidance: bool = True) -> Tensor:
        """vectors (B, n, ArcFace ‖ EVA-CLIP) of n photos of a person, views 5 × (B, n, S, C) -> Pair (2, B, N, width).

        In the other half the encoder reads one photo's zeros.
        """
        cond = self._read(vectors, views)
        uncond = cond[:1]
        if guidance:
            photos = 1 if isinstance(self.encoder, IDFormer) else vectors.shape[1]
            nothing = torch.zeros_like(vectors[:1, :photos])
            uncond = self._read(nothing, [torch.zeros_like(view[:1, :photos]) for view in views])
        return torch.stack([uncond.expand_as(cond), cond])

    def _read(self, vectors: Tensor, views: Sequence[Tensor]) -> Tensor:
        if isinstance(self.encoder, IDFormer):
            found: Tensor = self.encoder(vectors, [view.flatten(1, 2) for view in views])
            return found
        photos = vectors.shape[1]
        each = self.encoder(vectors.flatten(0, 1), [view.flatten(0, 1) for view in views])
        each = each.unflatten(0, (-1, photos))  # (B, n, 10, width)
        if self.blend:
            return each.flatten(1, 2)
        return torch.cat([each[:, 0], each[:, 1:, : self.encoder.own].flatten(1, 2)], dim=1)

    def conditions_from_tokens(self, tokens: Tensor, request: AdapterRequest | None = None) -> list[Condition]:
        """What `tokens` gave, ready to act: with the zeros beside them that the manner wants."""
        request = request or AdapterRequest()
        manner = self.chosen(request)
        return [
            TokenCondition(
                tokens=F.pad(tokens, (0, 0, 0, manner.zeros)),
                layers=self.streams.layers,
                mix=manner.mix,
                scale=self.strength if request.scale is None else request.scale,
                span=request.acts(),
                mask=request.mask,
            )
        ]

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """See Adapter; needs `request.clip`, (n or B · n, 3, S, S) EVA-CLIP's pixels of the faces."""
        request = request or AdapterRequest()
        self.check_embeddings(embeddings)
        if request.clip is None:
            raise WrongRequest("PuLID needs the photo of the face, not its embedding alone.")
        if self.eva is None:
            raise _missing(EVA_FILE, "eva02-clip-l-336")
        people = embeddings if embeddings.ndim == 3 else embeddings[:, None]  # (B, n, D)
        batch, photos = people.shape[:2]
        if request.clip.shape[0] not in (photos, batch * photos):
            raise WrongRequest(f"{request.clip.shape[0]} faces do not fit {batch} pictures of {photos} photos each.")
        whole, views = self.eva(request.clip.to(*dtype_of(self.eva)))
        whole = whole / torch.linalg.vector_norm(whole, dim=1, keepdim=True)
        where = dtype_of(self.encoder)
        people = people.to(*where)
        present = (people != 0).any(dim=-1, keepdim=True)  # of a zero row, "no person", EVA-CLIP saw nobody
        seen_whole, *seen_views = (
            one.to(*where).unflatten(0, (-1, photos)).expand(batch, *[-1] * one.ndim) for one in (whole, *views)
        )
        vectors = torch.cat([people, seen_whole * present], dim=-1)
        rows = [view * present[..., None] for view in seen_views]
        return self.conditions_from_tokens(self.tokens(vectors, rows, request.guidance), request)

    def gather(self, faces: Sequence[FaceLike]) -> Tensor:
        """The photos side by side, (1, n, D)."""
        return stacked(faces)

    def complete(self, faces: Sequence[FaceLike], request: AdapterRequest) -> AdapterRequest:
        """EVA-CLIP's pixels of every photo's face."""
        if request.clip is not None:
            return request
        if self.eva is None:
            raise _missing(EVA_FILE, "eva02-clip-l-336")
        if self.parser is None:
            raise _missing(PARSER_FILE, "bisenet")
        why = "PuLID looks at the photos; give them, not embeddings alone."
        photos = [seen([face], why) for face in faces]
        return replace(request, clip=torch.cat([grey_face(one, self.parser, self.eva.sizes.image) for one in photos]))


def start(scheduler: Any, noise: Tensor) -> Tensor:
    """Latents (B, 4, h, w) to begin with as v1.1 was published, from unit-variance noise.

    Its loop is facegen's scheduler "dpm++ karras", but the noise at the first level σ is σ/√(σ² + 1) of what diffusers
    begins with: 0.2 % less for SDXL.
    """
    first = float(scheduler.sigmas[0])
    return noise * (first / (first * first + 1) ** 0.5)


def grey_face(face: SeenFace, parser: Parser, size: int) -> Tensor:
    """The aligned face in grey, all that is not face or hair white -> EVA-CLIP's pixels (1, 3, size, size).

    Resized without smoothing, as torchvision 0.15 did it, with which PuLID was published.
    """
    import cv2  # type: ignore[import-not-found, unused-ignore]

    from facegen.restoration.faces import cut_ffhq

    image, points = face.image.convert("RGB"), np.asarray(face.points, np.float64)
    shrink = LONGEST / max(image.size)
    if shrink < 1:
        sides = int(image.width * shrink), int(image.height * shrink)
        image = Image.fromarray(cv2.resize(np.asarray(image), sides, interpolation=cv2.INTER_LANCZOS4))
        points = points * shrink
    crop = torch.from_numpy(np.array(cut_ffhq(image, points).image)).permute(2, 0, 1)[None].float() / 255
    grey = (crop * torch.tensor(GREY).view(1, 3, 1, 1)).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    pixels = torch.where(parser.mask(crop, ASIDE).bool(), torch.ones_like(crop), grey)
    small = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False)
    return PuLID.sees.sight.normal(small)


def _streams(tensors: Tensors, model: Model, file: Path) -> Streams:
    """PuLID writes id_to_k for what others call to_k_ip."""
    try:
        return Streams.from_tensors(
            {_renamed(key, WORDS): value for key, value in tensors.items()}, model, file, word="id", section=STREAMS
        )
    except (CheckpointBroken, WrongBaseModel) as error:
        names = {new: old for old, new in WORDS.items()}
        raise type(error)(_renamed(str(error), names)) from error


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


def _readers(folder: Path) -> tuple[EvaTower | None, Parser | None]:
    """What reads photos, where it is: beside the adapter, or where the hub knows it."""
    from facegen.face.parsing_networks import Parser
    from facegen.hub import resolve

    found: list[Path | None] = []
    for file, name in ((EVA_FILE, "eva02-clip-l-336"), (PARSER_FILE, "bisenet")):
        place = folder / file
        if not place.is_file():
            try:
                place = resolve(name, part=file)
            except WeightsMissing:
                found.append(None)
                continue
        found.append(place)
    eva, parser = found
    return None if eva is None else EvaTower.from_file(eva), None if parser is None else Parser.from_file(parser)


def _missing(file: str, name: str) -> FacegenError:
    from facegen.hub import WEIGHTS

    return WeightsMissing(
        f"PuLID reads photos with {file}, which is not on this machine; put it beside the adapter's file"
        f" ({WEIGHTS[name].source}) and load the adapter again."
    )
