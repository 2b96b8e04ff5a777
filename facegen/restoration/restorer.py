"""A published restoration network from its file, whichever it is: an aligned face in, a restored one out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facegen import checkpoints
from facegen.errors import WeightsMissing
from facegen.face.types import Array
from facegen.hub import check_commercial, resolve
from facegen.preprocessing import preprocessing
from facegen.restoration.codeformer import CodeFormer
from facegen.restoration.dfdnet import DFDNet, boxes_of_points, read_dictionary
from facegen.restoration.faces import SIDE
from facegen.restoration.gfpgan import GFPGAN
from facegen.restoration.restoreformer import RestoreFormer

DICTIONARY = "DictionaryCenter512"
_WANTED = "a restoration network (CodeFormer, RestoreFormer, GFPGAN or DFDNet)"
_FAMILIES = (CodeFormer, RestoreFormer, GFPGAN, DFDNet)  # called in the manifest as here, in small letters

Run = Callable[[Tensor, "Wish"], Tensor]
"""Faces (1, 3, S, S) in [-1, 1] to restored ones of about that range."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Wish:
    """What a face is restored with.

    fidelity: 0 the cleanest, 1 closest to the damaged face; of the networks CodeFormer alone has such a knob.
    points: (5, 2) in pixels of the aligned face, which DFDNet needs; generator: draws GFPGAN's noise; None: the
    file's own, so that the same face gives the same picture.
    """

    fidelity: float = 0.5
    points: Array | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True, eq=False)
class Restorer:
    """A network, the file it came from, and the side of the faces it was made for."""

    title: str
    net: torch.nn.Module
    run: Run
    path: Path
    side: int = SIDE

    @classmethod
    def from_pretrained(cls, source: str | Path, *, commercial_only: bool = False) -> Restorer:
        """CodeFormer, RestoreFormer(++), GFPGAN or DFDNet: a file or folder, told by its keys, or a name of the hub's.

        A folder stands for the one network in it; DFDNet's dictionary lies beside its weights or above them.
        Raises WeightsMissing, CheckpointBroken, WrongAdapter, and with commercial_only NotCommercial.
        """
        path = Path(source).expanduser()
        if not path.exists() and path.suffix not in checkpoints.SUFFIXES:
            if commercial_only:
                check_commercial(str(source))
            path = resolve(str(source))
        path = _file(path)
        keys = checkpoints.unwrapped(checkpoints.shapes(path))
        family = _family(keys)
        if family is None:
            raise checkpoints.refuse(path, keys, _WANTED)
        if commercial_only:
            check_commercial(family.__name__.lower())
        tensors = checkpoints.read(path)
        if family is DFDNet:
            faces = DFDNet.of(tensors, read_dictionary(_dictionary(path)), path)
            return cls(faces.title, faces, lambda face, wish: faces(face, boxes_of_points(_points(wish))), path)
        if family is CodeFormer:
            former = CodeFormer.of(tensors, path)
            return cls(former.title, former, lambda face, wish: former(face, wish.fidelity), path)
        if family is GFPGAN:
            gan = GFPGAN.of(tensors, path)
            return cls(gan.title, gan, lambda face, wish: gan(face, wish.generator), path, gan.sizes.side)
        net = RestoreFormer.of(tensors, path)
        return cls(net.title, net, lambda face, wish: net(face), path)

    @torch.no_grad()
    def __call__(self, face: Tensor, wish: Wish | None = None) -> Tensor:
        """An aligned face (3, S, S) RGB in [0, 1] to the restored one, clamped to [0, 1]; S is `side`."""
        made = self.run(preprocessing("restorer").sight.normal(face[None]), wish or Wish())
        return (made[0].clamp(-1, 1) + 1) / 2


def _family(keys: Mapping[str, Any]) -> type[CodeFormer | RestoreFormer | GFPGAN | DFDNet] | None:
    return next((family for family in _FAMILIES if family.detect(keys)), None)


def _file(path: Path) -> Path:
    """The file of a network in a folder; a file is itself."""
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in checkpoints.SUFFIXES)
    for file in files:
        if _family(checkpoints.unwrapped(checkpoints.shapes(file))) is not None:
            return file
    raise WeightsMissing(f"{path} holds no weights of {_WANTED}; put the official file there.")


def _dictionary(path: Path) -> Path:
    """The folder of DFDNet's dictionary: beside the weights, or where the official repository has it."""
    for above in list(path.absolute().parents)[:3]:
        if (above / DICTIONARY).is_dir():
            return above / DICTIONARY
    raise WeightsMissing(
        f"{path.parent / DICTIONARY} is not there; put DFDNet's folder {DICTIONARY} beside {path.name}."
    )


def _points(wish: Wish) -> Array:
    if wish.points is None:
        raise ValueError("DFDNet needs the points of the face.")
    return wish.points
