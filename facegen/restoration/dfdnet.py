"""DFDNet: eyes, nose and mouth of a damaged face exchanged for the most fitting ones of a dictionary of features.

Source: arXiv 2008.00418; github csxmli2016/DFDNet (`latest_net_G.pth` and the folder `DictionaryCenter512`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen import checkpoints
from facegen.errors import CheckpointBroken, WeightsMissing
from facegen.face.types import Array
from facegen.restoration.codeformer import take_statistics

SIDE = 512
SLOPE = 0.2
PARTS: Mapping[str, tuple[str, int]] = {  # prefix of the attention's keys, side of the part in pixels
    "left_eye": ("le", 80),
    "right_eye": ("re", 80),
    "nose": ("no", 50),
    "mouth": ("mo", 110),
}
WIDTHS: Mapping[int, int] = {256: 128, 128: 256, 64: 512, 32: 512}  # side of a map: its channels
TAPS = (8, 17, 26, 35)  # VGG-19's maps before these layers
VGG: tuple[int, ...] = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512)
MARKS = ("MSDilate.convi.weight_orig", "le_256.0.weight_orig", "up0.convup.1.weight_orig")
# Points (iBUG's 68) of each part.
LANDMARKS: Mapping[str, tuple[int, ...]] = {
    "left_eye": (*range(17, 22), *range(36, 42)),
    "right_eye": (*range(22, 27), *range(42, 48)),
    "nose": tuple(range(29, 36)),
    "mouth": tuple(range(48, 68)),
}

Dictionary = Mapping[str, Mapping[int, Tensor]]
"""By part and side of the map: the dictionary's entries (K, C, h, w)."""
Boxes = Mapping[str, tuple[int, int, int, int]]
"""By part: x0, y0, x1, y1 in pixels of the aligned face."""


class SpectralConv(nn.Module):
    """A convolution divided by its largest singular value, which the vectors in the file tell."""

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, before: int, after: int, dilation: int = 1) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight_orig = nn.Parameter(torch.empty(after, before, 3, 3))
        self.bias = nn.Parameter(torch.empty(after))
        self.register_buffer("weight_u", torch.empty(after))
        self.register_buffer("weight_v", torch.empty(before * 9))

    def forward(self, x: Tensor) -> Tensor:
        sigma = self.weight_u @ (self.weight_orig.flatten(1) @ self.weight_v)
        return F.conv2d(x, self.weight_orig / sigma, self.bias, padding=self.dilation, dilation=self.dilation)


def _pair(before: int, after: int, dilation: int = 1) -> nn.Sequential:
    """Two convolutions with a leaky ReLU between them."""
    return nn.Sequential(
        SpectralConv(before, after, dilation), nn.LeakyReLU(SLOPE), SpectralConv(after, after, dilation)
    )


class Dilated(nn.Module):
    """Four looks of different reach side by side, added to what they look at."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (_pair(width, width, reach) for reach in (4, 3, 2, 1))
        self.convi = SpectralConv(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        looks = [conv(x) for conv in (self.conv1, self.conv2, self.conv3, self.conv4)]
        out: Tensor = self.convi(torch.cat(looks, 1)) + x
        return out


class Blur(nn.Module):
    """The binomial kernel of 3 × 3, one copy per channel as it stands in the file."""

    def __init__(self, width: int) -> None:
        super().__init__()
        kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
        for name in ("weight", "weight_flip"):
            self.register_buffer(name, kernel.expand(width, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.get_buffer("weight"), padding=1, groups=x.shape[1])


class Up(nn.Module):
    """Scaled and shifted by a map of features, then doubled."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(Blur(before), SpectralConv(before, after), nn.LeakyReLU(SLOPE))
        self.convup = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            SpectralConv(after, after),
            nn.LeakyReLU(SLOPE),
        )
        self.ScaleModel1 = _pair(before, after)
        self.ShiftModel1 = nn.Sequential(*_pair(before, after), nn.Sigmoid())

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), SLOPE)  # a second time, as published
        out: Tensor = self.convup(x * self.ScaleModel1(style) + self.ShiftModel1(style))
        return out


class Refine(nn.Module):
    """A plain residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Model = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1), nn.LeakyReLU(SLOPE), nn.Conv2d(width, width, 3, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.Model(x)
        return out


class Features(nn.Module):
    """VGG-19's maps at sides 256, 128, 64, 32 of a face of 512 pixels in [-1, 1].

    The ReLU that follows a tapped convolution works in place in the published code, so all but the last map are taken
    behind it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.RGB_mean = nn.Parameter(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.RGB_std = nn.Parameter(torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        layers: list[nn.Module] = []
        before = 3
        for width in VGG:
            layers += [nn.Conv2d(before, width, 3, 1, 1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            before = width or before
        self.features = nn.ModuleList()
        for start, end in zip((0, *TAPS[:-1]), TAPS, strict=True):
            stage = nn.Sequential()
            for place in range(start, end):
                stage.add_module(str(place), layers[place])
            self.features.append(stage)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = ((x + 1) / 2 - self.RGB_mean) / self.RGB_std
        maps = []
        for stage in self.features:
            x = stage(x)
            maps.append(x)
        return [*(F.relu(one) for one in maps[:-1]), maps[-1]]


class DFDNet(nn.Module):
    """One aligned face (1, 3, 512, 512) RGB in [-1, 1] with the boxes of its parts to the restored one in [-1, 1]."""

    title = "DFDNet"

    def __init__(self, dictionary: Dictionary, width: int = 64) -> None:
        super().__init__()
        self.dictionary = dictionary
        for prefix, _ in PARTS.values():
            for side, channels in WIDTHS.items():
                self.add_module(f"{prefix}_{side}", _pair(channels, channels))
        self.VggExtract = Features()
        self.MSDilate = Dilated(8 * width)
        widths = [8 * width, 8 * width, 4 * width, 2 * width, width]
        self.up0, self.up1, self.up2, self.up3 = (Up(widths[i], widths[i + 1]) for i in range(4))
        self.up4 = nn.Sequential(
            SpectralConv(width, width),
            nn.LeakyReLU(SLOPE),
            Refine(width),
            Refine(width),
            nn.Conv2d(width, 3, 3, 1, 1),
            nn.Tanh(),
        )

    @classmethod
    def detect(cls, keys: Mapping[str, object]) -> bool:
        """Whether unwrapped keys are of this family."""
        return all(mark in keys for mark in MARKS)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], dictionary: Dictionary, path: Path = Path("the state dict")) -> DFDNet:
        """From a state dict; what it holds of VGG's classifier and of unused outputs is left. Raises CheckpointBroken.

        VGG's layers stand in the file twice; `VggExtract.features` is what the published code ends up with.
        """
        own = checkpoints.unwrapped(tensors)
        layers = checkpoints.section(own, "VggExtract.model.features")
        bounds = (0, *TAPS)
        for stage in range(len(TAPS)):
            for key, value in layers.items():
                if bounds[stage] <= int(key.split(".")[0]) < bounds[stage + 1]:
                    own.setdefault(f"VggExtract.features.{stage}.{key}", value)
        unused = ("VggExtract.model.", "to_rgb0.", "to_rgb1.", "to_rgb2.", "to_rgb3.")
        own = {key: value for key, value in own.items() if not key.startswith(unused)}
        checkpoints.require(own, "up3.conv1.1.weight_orig", path=path)
        with torch.device("meta"):
            net = cls(dictionary, own["up3.conv1.1.weight_orig"].shape[0])
        return checkpoints.fill(net, own, path)

    def forward(self, x: Tensor, boxes: Boxes) -> Tensor:
        if len(x) != 1:
            raise ValueError(f"DFDNet restores one face at a time, not {len(x)}.")
        maps = self.VggExtract(x)
        styles = [self._exchanged(one, side, boxes) for one, side in zip(maps, WIDTHS, strict=True)]
        y = self.MSDilate(maps[-1])
        for up, style in zip((self.up0, self.up1, self.up2, self.up3), reversed(styles), strict=True):
            y = up(y, style)
        face: Tensor = self.up4(y)
        return face

    def _exchanged(self, features: Tensor, side: int, boxes: Boxes) -> Tensor:
        """A map (1, C, side, side) in which each part carries what the dictionary knows of it."""
        made = features.clone()
        for part, (prefix, _) in PARTS.items():
            x0, y0, x1, y1 = (int(value // (SIDE / side)) for value in boxes[part])
            here = features[:, :, y0:y1, x0:x1]
            entries = self.dictionary[part][side].to(here)
            alike = F.interpolate(here, entries.shape[2:], mode="bilinear", align_corners=False)
            entries = take_statistics(entries, alike)
            best = int(F.conv2d(alike, entries).flatten().argmax())
            taken = F.interpolate(entries[best : best + 1], here.shape[2:], mode="nearest")
            made[:, :, y0:y1, x0:x1] = self.get_submodule(f"{prefix}_{side}")(taken - here) * taken + here
        return made


def read_dictionary(folder: Path) -> Dictionary:
    """`DictionaryCenter512`: {part}_{side}_center.npy, arrays (K, C·h·w). Raises WeightsMissing, CheckpointBroken."""
    found: dict[str, dict[int, Tensor]] = {}
    for part, (_, pixels) in PARTS.items():
        found[part] = {}
        for side, channels in WIDTHS.items():
            path = folder / f"{part}_{side}_center.npy"
            if not path.is_file():
                raise WeightsMissing(
                    f"{path} is not there; put DFDNet's folder DictionaryCenter512 beside its weights."
                )
            try:
                array = np.load(path, allow_pickle=False).astype(np.float32)
            except (OSError, ValueError) as error:
                raise CheckpointBroken(f"{path} is damaged, or holds Python objects; fetch the file again.") from error
            size = pixels * side // SIDE
            if array.size == 0 or array.size % (channels * size * size):
                raise CheckpointBroken(
                    f"{path} holds {array.shape}, not rows of {channels} × {size} × {size}; fetch the file again."
                )
            found[part][side] = torch.from_numpy(array).reshape(-1, channels, size, size)
    return found


def boxes_of_landmarks(points: Array) -> Boxes:
    """The boxes of the parts from 68 landmarks (68, 2) in pixels of the aligned face, as the official script has."""
    boxes: dict[str, tuple[int, int, int, int]] = {}
    for part, numbers in LANDMARKS.items():
        own = np.asarray(points, np.float64)[list(numbers)]
        centre, half = own.mean(0), max(float((own.max(0) - own.min(0)).max()) / 2, 16.0)
        x0, y0, x1, y1 = np.hstack([centre - half + 1, centre + half]).astype(int).tolist()
        boxes[part] = (x0, y0, x1, y1)
    return boxes


def boxes_of_points(points: Array) -> Boxes:
    """Boxes of the dictionary's own sizes around five points (5, 2): where there are no 68 landmarks.

    The eyes' boxes reach higher than the eyes, for they hold the brows too.
    """
    left, right, nose, *corners = np.asarray(points, np.float64)
    centres = {
        "left_eye": left - (0, 10),
        "right_eye": right - (0, 10),
        "nose": nose,
        "mouth": np.mean(corners, axis=0),
    }
    boxes: dict[str, tuple[int, int, int, int]] = {}
    for part, centre in centres.items():
        half = PARTS[part][1] / 2
        low = np.clip(centre - half, 0, SIDE - 2 * half).astype(int)
        boxes[part] = (int(low[0]), int(low[1]), int(low[0] + 2 * half), int(low[1] + 2 * half))
    return boxes
