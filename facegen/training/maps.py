"""Maps of depth and normals for training, drawn once: rendering them anew for each step would take longer than it.

They are kept at half the pictures' size, which a control of 16 x 16 latents does not miss.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.models.geometry import drawn
from facegen.training.cache import Cache
from facegen.training.checkpoint import load_tensors, save_tensors

MAPPED = ("depth", "normals")


@dataclass(frozen=True, eq=False)
class Maps:
    """Of the pictures ``rows`` (N,), ascending: depth (N, 1, h, w) and normals (N, 3, h, w), uint8."""

    rows: Tensor
    depth: Tensor
    normals: Tensor

    def of(self, kind: str, rows: Tensor, size: int) -> Tensor:
        """(B, 3, size, size) in [0, 1] of pictures that have maps."""
        place = torch.searchsorted(self.rows, rows)
        assert torch.equal(self.rows[place], rows)
        found = (self.depth if kind == "depth" else self.normals)[place].float() / 255
        if found.shape[-1] != size:
            found = F.interpolate(found, (size, size), mode="bilinear", antialias=True)
        return found.expand(-1, 3, -1, -1)


def draw_maps(pictures: Cache, rows: Tensor, size: int, batch: int = 8) -> Maps:
    """Maps of these pictures, ``size`` pixels wide, from the truth: about .03 s a picture of 64 pixels."""
    from tqdm import tqdm

    from facegen.world.render import render

    found: dict[str, list[Tensor]] = {kind: [] for kind in MAPPED}
    with torch.inference_mode():
        for part in tqdm(rows.split(batch), desc="maps", mininterval=20.0, leave=False, disable=len(rows) < 1000):
            made = render(pictures.scenes(part), size, supersample=1)
            for kind in MAPPED:
                found[kind] += [(drawn(kind, made, row) * 255).round().byte() for row in range(len(part))]
    return Maps(rows, torch.stack([one[:1] for one in found["depth"]]), torch.stack(found["normals"]))


def maps_for(pictures: Cache, path: Path, count: int = 3000, size: int = 64) -> Maps:
    """Maps of ``count`` pictures spread over the cache; kept in ``path``, which is whole or not there."""
    rows = torch.arange(0, len(pictures), max(1, len(pictures) // count))[:count]
    if path.exists():
        kept = load_tensors(path).tensors
        if torch.equal(kept["rows"], rows):
            return Maps(**kept)
    maps = draw_maps(pictures, rows, size)
    save_tensors({"rows": maps.rows, "depth": maps.depth, "normals": maps.normals}, path)
    return maps
