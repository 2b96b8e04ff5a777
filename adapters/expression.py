"""An expression by numbers or from a photo: coefficients like action units become tokens of their own attention.

The stream is carried by the UNet's later half alone, where a face's features move, and stands beside any adapter that
brings the person. Its "embedding" is the row of coefficients; a photo's are read by a small net, so that the expression
is copied and nothing else. After EmojiDiff (arXiv 2412.01254) and SynFER's intensities of action units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    with_zeros,
)
from facegen.attention.weights import KV
from facegen.checkpoints import SAFE, Shapes, base_name, section
from facegen.conditions import Condition, TokenCondition
from facegen.errors import CheckpointBroken, WrongBaseModel, WrongRequest
from facegen.face.networks import AMOUNTS
from facegen.models.projections import FaceProjection, ProjectionSizes
from facegen.models.streams import dtype_of, initialise
from facegen.world.parameters import EXPRESSION

if TYPE_CHECKING:
    from facegen.models.base import Model

UNITS: tuple[str, ...] = tuple(one.name for one in EXPRESSION)
TOKENS = 8
HIDDEN = 128
_CODE, _STREAM = "expression_proj", "expression_adapter"


def coefficients(values: Mapping[str, float]) -> Tensor:
    """(1, units) float32 from some of them by name, the others at rest; WrongRequest for a name or value that is none.

    Values lie in the range of `facegen.world.parameters.EXPRESSION`: 0 to 1, the gaze -1 to 1.
    """
    row = torch.zeros(1, len(UNITS))
    for name, value in values.items():
        if name not in UNITS:
            raise WrongRequest(f"There is no expression '{name}'; there are: {', '.join(UNITS)}.")
        unit = EXPRESSION[UNITS.index(name)]
        if not unit.low <= value <= unit.high:
            raise WrongRequest(f"{name} must be from {unit.low:g} to {unit.high:g}, not {value:g}.")
        row[0, UNITS.index(name)] = value
    return row


class Expression(Adapter):
    """See the module's text. reader: reads coefficients off a face; None where faces bring them as their embedding."""

    name = "expression"
    title = "expression adapter"
    pack = "mini"
    needs = frozenset({"face", "points", "photo"})
    strength = 1.0

    def __init__(self, projector: FaceProjection, layers: Mapping[int, KV], reader: nn.Module | None = None) -> None:
        self.projector = projector
        self.layers = dict(layers)
        self.reader = reader
        self._stream = nn.ModuleDict({str(index): kv for index, kv in self.layers.items()})

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        return any(key.startswith(f"{_CODE}.") for key in shapes)

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        width = shapes.get(f"{_CODE}.norm.weight", (0,))[0]
        embedding = shapes.get(f"{_CODE}.proj.0.weight", (0, 0))[1]
        return {"base": base_name(width), "token width": width, "embedding": embedding}

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model) -> Expression:
        """From `expression_adapter.bin`, or a folder with it; the reader is the base model's own judge, if any."""
        file = cls.choose(source, model)
        tensors = checkpoints.read(file)
        code, stream = section(tensors, _CODE), section(tensors, _STREAM)
        checkpoints.require(code, "proj.0.weight", "proj.2.weight", "norm.weight", path=file)
        projector = FaceProjection.from_shapes({key: tuple(value.shape) for key, value in code.items()})
        width = projector.sizes.output
        if width != model.text_width:
            raise WrongBaseModel(
                f"{file} was made for {base_name(width)}, but the loaded base model is {base_name(model.text_width)};"
                " load the base model it was made for."
            )
        checkpoints.load_into(projector, code, path=file, prefix=f"{_CODE}.")
        adapter = cls(projector, _layers(model, stream, file))
        checkpoints.load_into(adapter._stream, stream, path=file, prefix=f"{_STREAM}.")
        ready(adapter.modules(), model)
        adapter.reader = _reader(file, model)
        return adapter

    @classmethod
    def fresh(cls, model: Model, embedding_dim: int = len(UNITS), *, tokens: int = TOKENS, seed: int = 0) -> Expression:
        """To be trained, in float32: keys start as the text's, values as nothing, so that it changes nothing yet."""
        generator = torch.Generator().manual_seed(seed)
        projector = FaceProjection(ProjectionSizes(embedding_dim, HIDDEN, tokens, model.text_width))
        initialise(projector, generator)
        layers = {}
        for layer in model.attention_layers:
            if layer.cross and layer.name.startswith("up_blocks"):
                kv = KV(model.text_width, layer.width)
                with torch.no_grad():
                    kv.to_k.weight.copy_(layer.module.get_submodule("to_k").get_parameter("weight"))
                    kv.to_v.weight.zero_()
                layers[layer.index] = kv
        adapter = cls(projector, layers)
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`expression_adapter.bin`; see Adapter.save."""
        nested = {_CODE: self.projector.state_dict(), _STREAM: self._stream.state_dict()}
        return checkpoints.write(
            folder / f"expression_adapter{SAFE if safe else '.bin'}", checkpoints.cast(nested, dtype)
        )

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        return self.projector.sizes.embedding

    def modules(self) -> nn.Module:
        return nn.ModuleDict({_CODE: self.projector, _STREAM: self._stream})

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """embeddings (B, units): coefficients; the unconditional half sees a face at rest."""
        request = request or AdapterRequest()
        self.check_embeddings(embeddings)
        rows = with_zeros(embeddings.to(*dtype_of(self.projector))[:, None], request.guidance)  # (1 + B, 1, units)
        return [
            TokenCondition(
                tokens=halves(self.projector(rows), request.guidance),
                layers=self.layers,
                scale=self.strength if request.scale is None else request.scale,
                span=request.acts(),
                mask=request.mask,
            )
        ]

    def gather(self, faces: Sequence[FaceLike]) -> Tensor:
        """The mean coefficients of the photos' faces, (1, units)."""
        if self.reader is None:
            return stacked(faces).mean(dim=1)
        return torch.stack([self.read(face) for face in faces]).mean(0, keepdim=True)

    def read(self, face: FaceLike) -> Tensor:
        """The coefficients (units,) that a face shows, as far as the reader knows them."""
        from facegen.face.parse import portrait
        from facegen.images import to_tensor

        assert self.reader is not None
        photo = seen([face], "The expression adapter looks at the photo; give one.")
        device = next(self.reader.parameters()).device
        answers = self.reader(to_tensor(portrait(photo.image, photo.points))[None].to(device) * 2 - 1)
        row = torch.zeros(len(UNITS))
        for place, name in enumerate(UNITS):
            if name in answers:
                row[place] = answers[name][0].sigmoid() if name in AMOUNTS else answers[name][0].clamp(-1, 1)
        return row


def _layers(model: Model, stream: Mapping[str, Tensor], file: Path) -> dict[int, KV]:
    """The attention layers that a file has weights for; CheckpointBroken, WrongBaseModel."""
    known = {layer.index: layer for layer in model.attention_layers if layer.cross}
    found: dict[int, KV] = {}
    for key, value in stream.items():
        index, _, rest = key.partition(".")
        if not index.isdecimal() or rest not in ("to_k.weight", "to_v.weight"):
            raise CheckpointBroken(f"{file} holds keys that do not belong there: {_STREAM}.{key}.")
        layer = known.get(int(index))
        if layer is None or tuple(value.shape) != (layer.width, model.text_width):
            raise WrongBaseModel(
                f"{file} has weights {tuple(value.shape)} for attention layer {index}, which the loaded base model has"
                " not; load the base model it was made for."
            )
        found[int(index)] = KV(model.text_width, layer.width)
    if not found:
        raise CheckpointBroken(f"{file} lacks {_STREAM}; fetch the file again.")
    return found


def _reader(file: Path, model: Model) -> nn.Module | None:
    """The net that reads expressions, beside the adapter's model where there is one."""
    from facegen.face.parse import small_net

    stem = file.parent.parent.parent / "judges" / "attributes"
    if not stem.with_suffix(SAFE).is_file():
        return None
    return model.memory.keep(small_net(stem, "so expressions cannot be read"))
