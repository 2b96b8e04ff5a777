"""Which pixel is what: parts of a face by name, as masks of the photo.

A small net names the pixels of a square around each face. It learnt from drawings, so on photographs it is believed
only where it agrees with what the five points say; elsewhere a part is where it lies in nearly every face. Left and
right are the picture's. The published networks, BiSeNet and ParseNet, are in `parsing_networks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from facegen import checkpoints
from facegen.errors import CheckpointBroken, NoFaceFound, WeightsMissing, WrongRequest
from facegen.face.align import ARCFACE_POINTS, similarity
from facegen.face.networks import ParsingNet, network
from facegen.face.paste import cut, dilate, square
from facegen.face.types import Array, Detection, Face
from facegen.hub import resolve
from facegen.images import to_tensor

# The classes that the net was taught (facegen.world.render.PARSING), in its order.
CLASSES: tuple[str, ...] = (
    "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r", "nose", "mouth",
    "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat", "beard",
    "front",
)  # fmt: skip
_INNER = ("skin", "l_brow", "r_brow", "l_eye", "r_eye", "nose", "mouth", "u_lip", "l_lip", "beard")
# What a person calls a part → the net's classes. What stands before the face (glasses, hair, a hand) is not the face.
REGIONS: Mapping[str, tuple[str, ...]] = {
    "face": _INNER,
    "skin": ("skin", "nose", "l_ear", "r_ear", "neck"),
    "eyes": ("l_eye", "r_eye"),
    "brows": ("l_brow", "r_brow"),
    "nose": ("nose",),
    "mouth": ("mouth", "u_lip", "l_lip"),
    "ears": ("l_ear", "r_ear"),
    "earrings": ("ear_r",),
    "glasses": ("eye_g",),
    "beard": ("beard",),
    "hair": ("hair",),
    "hat": ("hat",),
    "head": (*_INNER, "l_ear", "r_ear", "ear_r", "eye_g", "hair", "hat"),
    "neck": ("neck", "neck_l"),
    "clothes": ("cloth",),
    "person": tuple(name for name in CLASSES if name != "background"),
    "background": ("background",),
    "front": ("front",),  # a hand, a cup, a cloth: what is held before a face
}
SIDE = 128  # pixels; what the net was trained on
AROUND = 0.75  # the square that is looked at: as much air around the face as the drawings have
# What stands in front, by the chance that a pixel shows it. A hand comes from beyond the face or is sure for the most
# part: then all of it counts, however faint. Wrinkles and stubble of photographs are neither, and count where sure.
_FAINT, _LIKELY, _SURE = 0.1, 0.7, 0.9
_BEYOND, _SOLID = 0.4, 0.3  # shares of what is seen at all: outside the face, sure
_EDGE = 0.02  # of a face's width: what the net of 128 pixels cannot see of an edge
_AGREES = 0.5  # share of its usual place in which the net must find a part to be believed

# Where parts lie in ArcFace's 112-pixel crop: ellipses (x, y, half width, half height).
_USUAL: Mapping[str, tuple[tuple[float, float, float, float], ...]] = {
    "face": ((56, 66, 40, 54),),
    "eyes": ((38.3, 51.7, 11, 7), (73.5, 51.5, 11, 7)),
    "brows": ((37, 40, 14, 5), (75, 40, 14, 5)),
    "nose": ((56, 66, 11, 17),),
    "mouth": ((56, 92.3, 21, 11),),
    "glasses": ((37, 51.5, 20, 15), (75, 51.5, 20, 15), (56, 49, 8, 5)),
    "beard": ((56, 100, 31, 20),),
    "hat": ((56, 0, 52, 26),),
    "earrings": ((10, 84, 7, 14), (102, 84, 7, 14)),
    "ears": ((12, 62, 9, 17), (100, 62, 9, 17)),
}
# Parts that a person may not have yet: the mask is the usual place and whatever of it is there.
_ADDED = ("glasses", "hat", "beard", "earrings")


def small_net(stem: Path, why: str) -> nn.Module:
    """The net of `stem`.json with the weights of `stem`.safetensors, in float32, frozen.

    Raises CheckpointBroken, and WeightsMissing with `why` it is needed.
    """
    weights, config = stem.with_suffix(checkpoints.SAFE), stem.with_suffix(".json")
    if not (weights.is_file() and config.is_file()):
        raise WeightsMissing(f"{weights} is missing, {why}.")
    try:
        net = network(json.loads(config.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointBroken(f"{config} does not describe a net ({error}); fetch the file again.") from error
    tensors = checkpoints.read(weights)
    for key, value in net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            tensors.setdefault(key, value)
    checkpoints.load_into(net, tensors, path=weights)
    return net.float().eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class FaceParser:
    """The net, ready to be used. `from_pretrained` is the way in."""

    net: ParsingNet

    @classmethod
    def from_pretrained(cls, assets: Path | None = None) -> FaceParser:
        """The embedded model's, or that of another model laid out like it. Raises WeightsMissing, CheckpointBroken."""
        stem = (assets or resolve("mini")) / "judges" / "parsing"
        return cls(cast(ParsingNet, small_net(stem, "so parts of a face cannot be found by name; give a mask")))

    def chances(self, pictures: Tensor) -> Tensor:
        """Probabilities (B, classes, H, W) of pictures (B, 3, H, W) in [0, 1] that show a portrait; differentiable.

        They come back on the pictures' device, wherever the net is.
        """
        own = (SIDE, SIDE)
        small = pictures.to(next(self.net.parameters()).device, torch.float32)
        if pictures.shape[-2:] != own:
            small = F.interpolate(small, own, mode="bilinear", antialias=True)
        logits: Tensor = self.net(small * 2 - 1)
        return F.interpolate(logits, pictures.shape[-2:], mode="bilinear").softmax(1).to(pictures.device)

    @torch.no_grad()
    def around(self, photo: Image.Image, face: Detection | Face, names: Sequence[str]) -> Tensor:
        """How probably each pixel of the photo near a face is of one of these classes, (1, H, W); 0 further away."""
        side = cut(photo, square(face.box.tolist(), photo.size, around=AROUND), SIDE)
        chances = self.chances(to_tensor(side.image)[None])[0]
        # A net of before the last class was taught sees none of it.
        wanted = [index for index in map(CLASSES.index, names) if index < len(chances)]
        return side.back(chances[wanted].sum(0, keepdim=True))

    def before(self, photo: Image.Image, face: Detection | Face) -> Tensor:
        """Where a hand or a thing stands in front of a face, (1, H, W); it is no part of it, wherever points lie."""
        chance = self.around(photo, face, REGIONS["front"])
        inside = self.around(photo, face, REGIONS["face"]) > 0.5
        if face.points is not None:
            inside |= usual("face", face.points, photo.size) > 0
        labels, count = _pieces(chance > _FAINT)
        size, beyond, sure = (
            torch.bincount(labels[where], minlength=count).float()
            for where in (labels >= 0, ~inside[0], chance[0] > _SURE)
        )
        believed = ((beyond >= _BEYOND * size) & (sure > 0)) | (sure >= _SOLID * size)
        believed[0] = False  # no piece
        width = float(face.box[2] - face.box[0])
        whole = dilate(believed[labels][None].float(), round(_EDGE * width))
        return torch.maximum(whole, (chance > _LIKELY).float())

    def region(self, photo: Image.Image, faces: Sequence[Detection | Face], name: str) -> Tensor:
        """The mask (1, H, W) of a named part of these faces.

        Raises WrongRequest for an unknown name, NoFaceFound without a face, or where the part is not to be seen.
        """
        if name not in REGIONS:
            raise WrongRequest(f"There is no part of a face called '{name}'; there are: {', '.join(REGIONS)}.")
        if not faces:
            raise NoFaceFound(f"No face was found in the photo, so its {name} cannot be found either; give a mask.")
        if name in ("person", "background"):
            person = self._people(photo, faces)
            return person if name == "person" else 1 - person
        mask = torch.stack([self._part(photo, face, name) for face in faces]).amax(0)
        if not bool(mask.any()):
            raise NoFaceFound(f"There is no {name} to be seen in the photo; name another part, or give a mask.")
        return mask

    def _part(self, photo: Image.Image, face: Detection | Face, name: str) -> Tensor:
        found = (self.around(photo, face, REGIONS[name]) > 0.5).float()
        if face.points is None or name == "clothes":
            return found
        if name not in _USUAL:
            return _joined(found, _near("face", face, photo.size))
        place = usual(name, face.points, photo.size)
        place = place * (1 - self.before(photo, face))
        found = found * _near(name, face, photo.size)
        if name in _ADDED:
            return torch.maximum(place, found)
        agrees = float((found * place).sum() / place.sum().clamp(min=1)) >= _AGREES
        return found if agrees else place

    def _people(self, photo: Image.Image, faces: Sequence[Detection | Face]) -> Tensor:
        """Everybody, (1, H, W): seen near each face, and below it down to the photo's edge."""
        person = torch.zeros(1, photo.height, photo.width)
        for face in faces:
            near = (self.around(photo, face, REGIONS["person"]) > 0.5).float()
            last = int(near[0].any(1).nonzero().amax()) if bool(near.any()) else photo.height
            near[:, last + 1 :] = near[:, min(last, photo.height - 1)].clone()  # a body goes on downwards
            person = torch.maximum(person, _joined(near, _near("face", face, photo.size)))
        return person


def usual(name: str, points: Array, size: tuple[int, int]) -> Tensor:
    """Where a part lies in nearly every face with these points (5, 2), (1, H, W); size is the photo's (width, height).

    Raises WrongRequest for a part that has no usual place, such as hair.
    """
    if name not in _USUAL:
        raise WrongRequest(f"Where the {name} is differs from face to face; it cannot be told from five points.")
    matrix = torch.from_numpy(similarity(points, ARCFACE_POINTS)).float()
    x = torch.arange(size[0]).float()
    y = torch.arange(size[1]).float()[:, None]
    u = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
    v = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
    mask = torch.zeros(size[1], size[0])
    for centre_x, centre_y, across, down in _USUAL[name]:
        mask = torch.maximum(mask, (((u - centre_x) / across) ** 2 + ((v - centre_y) / down) ** 2 <= 1).float())
    return mask[None]


def _near(name: str, face: Detection | Face, size: tuple[int, int]) -> Tensor:
    """A part's usual place and what lies a fifth of a face around it; the face's box where its points are unknown."""
    if face.points is None:
        x0, y0, x1, y1 = (int(value) for value in face.box)
        mask = torch.zeros(1, size[1], size[0])
        mask[:, max(y0, 0) : y1, max(x0, 0) : x1] = 1
        return mask
    return dilate(usual(name, face.points, size), max(1, round(0.2 * float(face.box[2] - face.box[0]))))


def _joined(found: Tensor, start: Tensor) -> Tensor:
    """The pieces of a mask (1, H, W) that reach into another one: specks far away are mistakes of the net."""
    pieces, _ = _pieces(found > 0)
    kept = torch.unique(pieces[(start[0] > 0) & (found[0] > 0)])
    return torch.isin(pieces, kept[kept > 0])[None].float()


def _pieces(found: Tensor) -> tuple[Tensor, int]:
    """The number (H, W) of the piece that each pixel of a mask (1, H, W) belongs to, 0 for none; how many numbers."""
    import cv2  # type: ignore[import-not-found, unused-ignore]

    count, labels = cv2.connectedComponents(found[0].numpy().astype("uint8"))
    return torch.from_numpy(labels).long(), count


def portrait(photo: Image.Image, points: Array) -> Image.Image:
    """The face with these points (5, 2) framed as the drawings are, SIDE pixels a side: what the small nets look at."""
    matrix = similarity(ARCFACE_POINTS, points)  # from ArcFace's crop to the photo
    x, y, across, down = _USUAL["face"][0]
    centre = matrix[:, :2] @ [x, y] + matrix[:, 2]
    half = max(across, down) * float((matrix[0, 0] ** 2 + matrix[1, 0] ** 2) ** 0.5)
    box = (centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half)
    return cut(photo, square(box, photo.size, around=AROUND), SIDE).image
