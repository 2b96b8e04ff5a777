"""Independent judges of the embedded model's pictures: who is it, what does it show, which pixel is what.

The judge of likeness is another net than the recogniser that conditions generation, trained from another seed, so that
a generator cannot please it by pleasing its own recogniser.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from facegen.errors import CheckpointBroken, WeightsMissing
from facegen.face.networks import (
    AMOUNTS,
    STRIDES,
    AttributeJudge,
    DetectorNet,
    JudgeNet,
    ParsingNet,
    network,
)
from facegen.face.warp import aligned_crops
from facegen.training.objectives.reconstruction import feature_loss
from facegen.world.facts import UNSEEN

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "mini"
SIDE = 128  # pixels; what the judges were trained on


def load_network(stem: Path) -> nn.Module:
    """The net of ``stem.json`` with the weights of ``stem.safetensors``, float32, ready to be used."""
    weights, config = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    missing = [path for path in (weights, config) if not path.exists()]
    if missing:
        raise WeightsMissing(
            f"{missing[0]} is missing; reinstall facegen, or train it: python -m facegen.training.perception"
        )
    try:
        net = network(json.loads(config.read_text("utf-8")))
        found, unknown = net.load_state_dict({n: v.float() for n, v in load_file(weights).items()}, strict=False)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointBroken(f"{weights} does not hold the net that {config.name} describes ({error}).") from error
    lacking = [name for name in found if not name.endswith("num_batches_tracked")]
    if lacking or unknown:
        raise CheckpointBroken(f"{weights} does not hold the net that {config.name} describes: {lacking or unknown}.")
    return net.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Judges:
    """All judges. Pictures are (B, 3, H, W) in [0, 1], of any size from 64 pixels; nothing here keeps gradients."""

    likeness: JudgeNet
    attributes_net: AttributeJudge
    parsing_net: ParsingNet
    detector: DetectorNet
    same_person: float  # cosine that one in a thousand pairs of strangers reaches

    @property
    def device(self) -> torch.device:
        return next(self.likeness.parameters()).device

    @torch.no_grad()
    def points(self, images: Tensor, threshold: float = 0.3) -> tuple[Tensor, Tensor]:
        """The five points (B, 5, 2), in pixels, of the most face-like face, and whether there is one at all, (B,)."""
        return strongest(self.detector, images.to(self.device), threshold)

    @torch.no_grad()
    def embed(self, images: Tensor, points: Tensor | None = None) -> Tensor:
        """Unit vectors (B, D) of who is shown; zero, so like nobody, where no face is found.

        ``points`` (B, 5, 2) in pixels spares the search for faces.
        """
        images = images.to(self.device).float()
        found = torch.ones(len(images), dtype=torch.bool, device=self.device)
        if points is None:
            points, found = self.points(images)
        crops = aligned_crops(images, points.to(images), self.likeness.config["size"])
        return F.normalize(self.likeness(crops * 2 - 1).float(), dim=1) * found[:, None]

    @torch.no_grad()
    def attributes(self, images: Tensor) -> dict[str, Tensor]:
        """By name: probabilities (B, classes) of each of ``CATEGORIES``, amounts (B,) in [0, 1], values (B,)."""
        answers = self.attributes_net(resized(images.to(self.device)) * 2 - 1)
        return {
            name: answer.softmax(1) if answer.ndim == 2 else answer.sigmoid() if name in AMOUNTS else answer
            for name, answer in answers.items()
            if not name.startswith("fact.")
        }

    @torch.no_grad()
    def facts(self, images: Tensor) -> dict[str, Tensor]:
        """Probabilities (B, classes) of each kind of fact that can be seen, as in ``facegen.world.facts.FACTS``."""
        answers = self.attributes_net.facts(resized(images.to(self.device)) * 2 - 1)
        return {kind: answer.softmax(1) for kind, answer in answers.items() if kind not in UNSEEN}

    @torch.no_grad()
    def parse(self, images: Tensor) -> Tensor:
        """Class of each pixel, (B, H, W) int64, index into ``facegen.world.render.PARSING``."""
        logits = self.parsing_net(resized(images.to(self.device)) * 2 - 1)
        return F.interpolate(logits, images.shape[-2:], mode="bilinear").argmax(1)

    @torch.no_grad()
    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """How differently pictures look, (B,): 0 for the same, as LPIPS without its learnt weights (Zhang et al. 2018),
        in what the layers of the judge of attributes see.
        """
        layers = self.attributes_net.seen(resized(torch.cat([images, others]).to(self.device)) * 2 - 1)
        rows = [
            torch.cat([one[row : row + 1] for one in layer.chunk(2)]) for row in range(len(images)) for layer in layers
        ]
        found = [feature_loss(rows[i : i + len(layers)]) for i in range(0, len(rows), len(layers))]
        return torch.stack(found)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the last layer of the judge of attributes sees, averaged over places, (B, F)."""
        parts = resized(images.to(self.device)).split(64)
        return torch.cat([self.attributes_net.body(part * 2 - 1).mean((2, 3)).float() for part in parts])

    def to(self, device: torch.device | str) -> Judges:
        """Move all nets; returns these judges."""
        nets = (self.likeness, self.attributes_net, self.parsing_net, self.detector)
        a, b, c, d = (net.to(device) for net in nets)
        return Judges(
            cast(JudgeNet, a), cast(AttributeJudge, b), cast(ParsingNet, c), cast(DetectorNet, d), self.same_person
        )


def strongest(detector: DetectorNet, images: Tensor, threshold: float = 0.3) -> tuple[Tensor, Tensor]:
    """The five points (B, 5, 2), in pixels, of the most face-like face of pictures (B, 3, H, W) in [0, 1], and whether
    there is one at all, (B,)."""
    pictures = (resized(images) * 255 - 127.5) / 128
    scores, _, offsets = (torch.cat(part, 1).float() for part in detector(pictures))
    places = torch.cat([_centres(SIDE // stride, stride) for stride in STRIDES]).to(images.device)  # (N, 3)
    best = scores[..., 0].argmax(1)
    chosen = offsets[torch.arange(len(best)), best].view(-1, 5, 2)
    found = scores[torch.arange(len(best)), best, 0].sigmoid() > threshold
    points = places[best, None, :2] + chosen * places[best, None, 2:]
    height, width = images.shape[-2:]
    ratio = torch.tensor([width / SIDE, height / SIDE], device=images.device)
    return (points + 0.5) * ratio - 0.5, found


def load_judges(assets: Path = ASSETS) -> Judges:
    """The embedded model's judges; raises :class:`WeightsMissing` when a file is not there."""
    folder = assets / "judges"
    measured = assets / "mini.json"
    figures = json.loads(measured.read_text("utf-8")) if measured.exists() else {}
    return Judges(
        cast(JudgeNet, load_network(folder / "judge")),
        cast(AttributeJudge, load_network(folder / "attributes")),
        cast(ParsingNet, load_network(folder / "parsing")),
        cast(DetectorNet, load_network(assets / "pack" / "det")),
        float(figures.get("judge", {}).get("threshold_1e3", 0.5)),
    )


def resized(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) as large as the judges see them."""
    if images.shape[-2:] == (SIDE, SIDE):
        return images.float()
    return F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True)


def _centres(cells: int, stride: int) -> Tensor:
    """(cells² · 2, 3): x, y and stride of one level's anchors, in the detector's order."""
    y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    centres = torch.stack([x * stride, y * stride, torch.full_like(x, stride)], -1).float()
    return centres.reshape(-1, 3).repeat_interleave(2, 0)
