"""W+ adapter: StyleGAN's code of a face as four tokens, in a gated attention that follows the text's.

The code (18 rows of 512 numbers, coarse to fine) comes from the e4e encoder, its mean code added; there is no
normalisation. Adding a direction of StyleGAN to the code edits the face (smile, age, glasses). Source: github
csxmli2016/w-plus-adapter (S-Lab licence, non-commercial), CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL.Image import Resampling, fromarray
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import (
    Adapter,
    AdapterRequest,
    FaceLike,
    delayed,
    halves,
    ready,
    seen,
    stacked,
    trainable,
    weight_files,
    with_zeros,
)
from facegen.checkpoints import SAFE, Shapes, Tensors, base_name, section
from facegen.conditions import Condition, TokenCondition
from facegen.errors import CheckpointBroken, WrongRequest
from facegen.face.align import ffhq_crop
from facegen.face.parsing_networks import Parser
from facegen.images import to_tensor
from facegen.models.directions import Directions
from facegen.models.streams import Streams, dtype_of, initialise
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from PIL import Image

    from facegen.models.base import Model
    from facegen.models.e4e import E4E

GROUPS = (4, 4, 4, 6)  # rows of the code that make one token
ROWS = sum(GROUPS)
ENCODER, PARSER = "e4e_ffhq_encode.pt", "parse_multi_iter_90000.pth"
BEHIND = ("background", "cloth")
DELAY = 0.2
# accelerate's checkpoints of the official training say it otherwise
OLD_NAMES = {"w_proj_model.": "w_proj.", "adapter_modules.": "wplus_adapter."}


class CodeProjection(nn.Module):
    """Code (B, 18, D) -> four tokens (B, 4, width): a linear layer per group of rows, one LayerNorm for all."""

    def __init__(self, row_width: int, width: int) -> None:
        super().__init__()
        self.row_width = row_width
        for place, rows in enumerate(GROUPS):
            self.add_module(f"proj_{place}", nn.Linear(rows * row_width, width, bias=False))
        self.norm = nn.LayerNorm(width)

    def forward(self, codes: Tensor) -> Tensor:
        groups = codes.split(GROUPS, dim=1)
        projections = (self.get_submodule(f"proj_{place}") for place in range(len(GROUPS)))
        tokens = [project(group.flatten(1)) for project, group in zip(projections, groups, strict=True)]
        out: Tensor = self.norm(torch.stack(tokens, dim=1))
        return out


class WPlus(Adapter):
    """See the module's text.

    Its embeddings are the codes, flat (B, 18 · 512) or (B, 18, 512). encoder: e4e, to read photos; None where the faces
    bring the code as their embedding. parser: ParseNet, which tells it what is not the person and is painted white;
    directions: for AdapterRequest.edits.
    """

    name = "wplus"
    title = "W+ adapter"
    sees = preprocessing("wplus")
    pack = sees.pack  # only to find the face; who it is, e4e sees
    needs = frozenset({"face", "points", "photo"})
    strength = 1.0

    def __init__(self, projector: CodeProjection, streams: Streams, encoder: E4E | None = None) -> None:
        self.projector = projector
        self.streams = streams
        self.encoder = encoder
        self.parser: Parser | None = None
        self.directions = Directions({})

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        return any(key.endswith("to_k_wplus.weight") or key.startswith("w_proj.") for key in shapes)

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        width = next((shape[1] for key, shape in shapes.items() if key.endswith("to_k_wplus.weight")), 0)
        return {"tokens": len(GROUPS), "base": base_name(width), "token width": width}

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model) -> WPlus:
        """From `wplus_adapter.bin`, or a folder with it.

        Beside it count `e4e_ffhq_encode.pt`, `parse_multi_iter_90000.pth` and `w_direction/`.
        """
        file = cls.choose(source, model)
        tensors = _renamed(checkpoints.read(file))
        streams = Streams.from_tensors(
            section(tensors, "wplus_adapter"), model, file, word="wplus", section="wplus_adapter"
        )
        if any(kv.to_q is None for kv in streams.layers.values()):
            raise CheckpointBroken(f"{file} lacks to_q_wplus weights; fetch the file again.")
        parts = section(tensors, "w_proj")
        checkpoints.require(parts, "proj_0.weight", "norm.weight", path=file)
        projector = CodeProjection(parts["proj_0.weight"].shape[1] // GROUPS[0], parts["norm.weight"].shape[0])
        checkpoints.load_into(projector, parts, path=file, prefix="w_proj.")
        adapter = cls(projector, streams)
        adapter.directions = Directions.beside(file.parent)
        ready(adapter.modules(), model)
        if (place := file.parent / ENCODER).is_file():
            from facegen.models.e4e import E4E

            adapter.encoder = model.memory.keep(E4E.from_file(place))
        if (place := file.parent / PARSER).is_file():
            adapter.parser = Parser.from_file(place)
        return adapter

    @classmethod
    def find(cls, folder: Path) -> list[Path]:
        """See Adapter.find; the encoder beside it, a gigabyte, is not looked into."""
        files = [path for path in weight_files(folder) if path.name != ENCODER]
        return [path for path in files if cls.detect(checkpoints.shapes(path), path.name)]

    @classmethod
    def fresh(cls, model: Model, embedding_dim: int = ROWS * 512, *, seed: int = 0) -> WPlus:
        """To be trained, in float32; embedding_dim: numbers in a code, 18 times the width of a row."""
        if embedding_dim % ROWS:
            raise WrongRequest(f"A W+ code has {ROWS} rows; {embedding_dim} numbers cannot be one.")
        generator = torch.Generator().manual_seed(seed)
        projector = CodeProjection(embedding_dim // ROWS, model.text_width)
        initialise(projector, generator)
        adapter = cls(projector, Streams.fresh(model, own_query=True, generator=generator))
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`wplus_adapter.bin`; see Adapter.save."""
        nested = {"w_proj": self.projector.state_dict(), "wplus_adapter": self.streams.tensors(word="wplus")}
        return checkpoints.write(folder / f"wplus_adapter{SAFE if safe else '.bin'}", checkpoints.cast(nested, dtype))

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        return ROWS * self.projector.row_width

    def modules(self) -> nn.Module:
        return nn.ModuleDict({"w_proj": self.projector, "wplus_adapter": self.streams})

    def tokens(self, codes: Tensor, guidance: bool = True) -> Tensor:
        """Codes (B, 18 · D) or (B, 18, D) -> Pair (2, B, 4, width); the other half sees a code of zeros."""
        if codes.shape[-1] == self.projector.row_width and codes.ndim == 3:
            codes = codes.flatten(1)
        self.check_embeddings(codes)
        codes = codes.to(*dtype_of(self.projector)).reshape(-1, ROWS, self.projector.row_width)
        return halves(self.projector(with_zeros(codes, guidance)), guidance)

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """See Adapter. Unless the request says otherwise the first fifth of the run is left to the prompt."""
        request = request or AdapterRequest()
        self.check_embeddings(embeddings.flatten(1))
        codes = self.directions.edited(embeddings.reshape(-1, ROWS, self.projector.row_width), request.edits)
        return [
            TokenCondition(
                tokens=self.tokens(codes, request.guidance),
                layers=self.streams.layers,
                mix="gated",
                scale=self.strength if request.scale is None else request.scale,
                span=request.acts(delayed(DELAY)),
                mask=request.mask,
            )
        ]

    @property
    def knows(self) -> frozenset[str]:
        return frozenset({"edits"})

    def gather(self, faces: Sequence[FaceLike]) -> Tensor:
        """The mean code of the photos, (1, 18 · D)."""
        if self.encoder is None:
            return stacked(faces).mean(dim=1)
        photos = [seen([face], "The W+ adapter looks at the photo; give one.") for face in faces]
        pixels = torch.stack(
            [self.view(ffhq_crop(photo.image, photo.points, self.sees.sight.side)) for photo in photos]
        )
        codes = self.encoder(pixels.to(next(self.encoder.parameters()).device))
        return codes.flatten(1).mean(dim=0, keepdim=True)

    def view(self, crop: Image.Image) -> Tensor:
        """An aligned face of 512 pixels as e4e sees it, (3, 256, 256) in [-1, 1]: white behind the person."""
        seen = (self.sees.sight.seen, self.sees.sight.seen)
        pixels = self.sees.sight.normal(to_tensor(crop.resize(seen, Resampling.BICUBIC)))
        if self.parser is None:
            return pixels
        import cv2  # type: ignore[import-not-found, unused-ignore]

        behind = self.parser.mask(to_tensor(crop)[None], BEHIND)[0, 0].numpy().astype(np.uint8) * 255
        soft = fromarray(cv2.GaussianBlur(behind, (5, 5), 0)).resize(seen, Resampling.BICUBIC)
        mask = torch.from_numpy(np.array(soft, np.float32)) / 255
        return pixels * (1 - mask) + mask


def _renamed(tensors: Tensors) -> Tensors:
    for old, new in OLD_NAMES.items():
        tensors = {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in tensors.items()}
    return tensors
