"""FaceChain-FACT: a face's patch tokens enter each block ahead of its text attention, behind learned gates.

The tokens are those of a recogniser that is a transformer (TransFace-S, 144 of them for a face), brought to 16 by a
resampler; nothing is normalised. The official demo cuts the head out of the photo first (human parsing, all else
black); a photo with a quiet background comes near to that. Source: github modelscope/facechain `face_adapter`,
ModelScope yucheng1996/FaceChain-FACT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    stacked,
    trainable,
    weight_files,
    with_zeros,
)
from facegen.checkpoints import SAFE, Shapes, Tensors, base_name, section
from facegen.conditions import Condition, GatedSelf, TokenCondition
from facegen.errors import CheckpointBroken, WrongBaseModel, WrongRequest
from facegen.models.resampler import PerceiverSizes, Resampler, by_photo
from facegen.models.streams import dtype_of, initialise
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from facegen.models.base import Model
    from facegen.models.transface import TransFace

ENCODER = "ms1mv2_model_TransFace_S.pt"
PROJECTOR = "local_fac_prj"
MARK = ".attn2.processor."


class FaceChainFACT(Adapter):
    """See the module's text.

    Its embeddings are the recogniser's patch tokens: (B, D) for one token, (B, S, D), or (B, n, S, D) for n photos.
    layers: weights by cross-attention layer; encoder: TransFace, to read photos; None where the faces bring a token as
    their embedding. cfg_face: False shows the face to the unconditional half, too (as the official class can).
    """

    name = "facechain_fact"
    title = "FaceChain-FACT"
    sees = preprocessing("facechain_fact")
    pack = sees.pack  # only to find the face
    needs = frozenset({"face", "points", "photo"})
    strength = 0.5
    cfg_face = True

    def __init__(
        self, projector: Resampler, layers: Mapping[int, GatedSelf], names: Mapping[int, str], encoder: TransFace | None
    ) -> None:
        self.projector = projector
        self.layers = dict(layers)
        self.names = dict(names)  # of the layers in the file
        self.encoder = encoder

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        return any(key.startswith(f"{PROJECTOR}.") or key.endswith(f"{MARK}alpha_attn") for key in shapes)

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        width = shapes[f"{PROJECTOR}.proj_out.weight"][0]
        return {
            "tokens": shapes[f"{PROJECTOR}.latents"][1],
            "embedding": shapes[f"{PROJECTOR}.proj_in.weight"][1],
            "base": base_name(width),
            "token width": width,
        }

    @classmethod
    def find(cls, folder: Path) -> list[Path]:
        """See Adapter.find; the recogniser beside it is not looked into."""
        files = [path for path in weight_files(folder) if path.name != ENCODER]
        return [path for path in files if cls.detect(checkpoints.shapes(path), path.name)]

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model) -> FaceChainFACT:
        """From `adapter_….ckpt`, or a folder with it; `ms1mv2_model_TransFace_S.pt` beside it is loaded too."""
        file = cls.choose(source, model)
        tensors = checkpoints.read(file)
        parts = section(tensors, PROJECTOR)
        checkpoints.require(parts, "latents", "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", path=file)
        projector = Resampler.from_shapes({key: tuple(value.shape) for key, value in parts.items()})
        checkpoints.load_into(projector, parts, path=file, prefix=f"{PROJECTOR}.")
        rest = {key: value for key, value in tensors.items() if not key.startswith(f"{PROJECTOR}.")}
        adapter = cls(projector, _layers(rest, model, file), _names(model), None)
        ready(adapter.modules(), model)
        if (place := file.parent / ENCODER).is_file():
            from facegen.models.transface import TransFace

            adapter.encoder = TransFace.from_file(place)
            if (width := adapter.encoder.norm.weight.shape[0]) != adapter.embedding_dim:
                raise CheckpointBroken(
                    f"{file} reads tokens {adapter.embedding_dim} wide, but {place} gives {width}; fetch both again."
                )
            ready(adapter.encoder, model)
        return adapter

    @classmethod
    def fresh(
        cls, model: Model, embedding_dim: int, *, sizes: PerceiverSizes | None = None, queries: int = 16, seed: int = 0
    ) -> FaceChainFACT:
        """To be trained, in float32; sizes: of the resampler, by default the official ones. Its gates are closed."""
        generator = torch.Generator().manual_seed(seed)
        width = model.text_width
        sizes = sizes or PerceiverSizes(embedding_dim, 1024, width, depth=4, heads=12)
        if sizes.context != embedding_dim or sizes.output != width:
            raise WrongRequest(f"The resampler must read {embedding_dim} and give {width} numbers, not {sizes}.")
        projector = Resampler(sizes, queries)
        initialise(projector, generator)
        nn.init.normal_(projector.latents, std=sizes.dim**-0.5, generator=generator)
        layers = {layer.index: GatedSelf(width, layer.width) for layer in model.attention_layers if layer.cross}
        for weights in layers.values():
            initialise(weights, generator)
        adapter = cls(projector, layers, _names(model), None)
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`adapter_fact.ckpt`; see Adapter.save."""
        tensors = {f"{PROJECTOR}.{key}": value for key, value in self.projector.state_dict().items()}
        for index, weights in self.layers.items():
            tensors |= {f"{self.names[index]}.{key}": value for key, value in weights.state_dict().items()}
        return checkpoints.write(folder / f"adapter_fact{SAFE if safe else '.ckpt'}", checkpoints.cast(tensors, dtype))

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        return self.projector.input_dim

    def modules(self) -> nn.Module:
        layers = nn.ModuleDict({str(index): weights for index, weights in self.layers.items()})
        return nn.ModuleDict({PROJECTOR: self.projector, "layers": layers})

    def tokens(self, embeddings: Tensor, guidance: bool = True) -> Tensor:
        """Patch tokens (B, D), (B, S, D) or (B, n, S, D) -> Pair (2, B, n · 16, width); the other half sees zeros."""
        self.check_embeddings(embeddings)
        photos = with_zeros(by_photo(embeddings.to(*dtype_of(self.projector))), guidance)
        tokens = self.projector(photos.flatten(0, 1)).unflatten(0, photos.shape[:2])  # (1 + B, n, 16, width)
        both = halves(tokens.flatten(1, 2), guidance)
        return both if self.cfg_face else both[1:].expand_as(both)

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        request = request or AdapterRequest()
        return [
            TokenCondition(
                tokens=self.tokens(embeddings, request.guidance),
                layers=self.layers,
                mix="ahead",
                scale=self.strength if request.scale is None else request.scale,
                span=request.acts(),
                mask=request.mask,
            )
        ]

    def gather(self, faces: Sequence[FaceLike]) -> Tensor:
        """The patch tokens of each photo, (1, n, S, D)."""
        if self.encoder is None:
            return stacked(faces)[:, :, None]
        from facegen.face.align import norm_crop

        why = "FaceChain-FACT looks at the photo; give one, not an embedding alone."
        photos = [seen([face], why) for face in faces]
        view = self.sees.sight
        crops = [torch.tensor(np.asarray(norm_crop(photo.image, photo.points, view.side))) for photo in photos]
        pixels = view.normal(torch.stack(crops).permute(0, 3, 1, 2).float() / 255)  # (n, 3, 112, 112)
        tokens: Tensor = self.encoder(pixels.to(*dtype_of(self.encoder)))
        return tokens[None]


def _names(model: Model) -> dict[int, str]:
    """The model's cross-attention layers by number, as the file calls them."""
    return {layer.index: layer.name for layer in model.attention_layers if layer.cross}


def _layers(tensors: Tensors, model: Model, path: Path) -> dict[int, GatedSelf]:
    """Weights by layer; CheckpointBroken and WrongBaseModel as for every adapter."""
    names = _names(model)
    widths = {layer.index: layer.width for layer in model.attention_layers}
    own_places = {name + "." for name in names.values()}
    strange = [key for key in tensors if MARK in key and key.partition(MARK)[0] + MARK not in own_places]
    if strange:
        raise WrongBaseModel(
            f"{path} has the key {strange[0]} of a layer that the loaded base model does not have; load the base"
            " model it was made for (SD 1.5)."
        )
    layers: dict[int, GatedSelf] = {}
    own: Tensors = {}
    for index, name in names.items():
        shape = tensors[f"{name}.linear.weight"].shape if f"{name}.linear.weight" in tensors else None
        if shape is not None and tuple(shape) != (widths[index], model.text_width):
            raise WrongBaseModel(
                f"{path} was made for a base model whose layer {name} maps {shape[1]} to {shape[0]} channels, the"
                f" loaded one's maps {model.text_width} to {widths[index]}; load the base model it was made for."
            )
        # The block's own norm may have been moved into the file; then it takes that one's place.
        weights = GatedSelf(model.text_width, widths[index], own_norm=f"{name}.ln.weight" in tensors)
        layers[index] = weights
        own |= {f"{name}.{key}": value for key, value in weights.state_dict().items()}
    checkpoints.check(own, tensors, path=path)
    for key, value in own.items():
        value.copy_(tensors[key])
    return layers
