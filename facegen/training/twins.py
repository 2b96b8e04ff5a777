"""Twins: drawn pictures once more, the scene to the last parameter the same, the face somebody else's.

What a swap is to give is thereby known exactly: from the twin and a photo of the person, the picture itself. A cache of
pictures made the other way round, from swaps of a poorer net, is what Yuan et al. 2023 (ReliableSwap) learn from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from facegen.training.cache import Cache, keep_shard, stored_pixels
from facegen.world.parameters import IDENTITY, Scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# What lies around a face stays with the picture, as it does in a swap. Beard, age and make-up are the picture's anyway.
AROUND_THE_FACE = ("ear_size", "ear_stickout", "neck_width", "forehead_height")
SHARD = 160  # pictures


def twins(scenes: Scenes, others: Tensor) -> Scenes:
    """The scenes with the faces of other people, whose identities are (B, len(IDENTITY))."""
    stays = torch.tensor([parameter.name in AROUND_THE_FACE for parameter in IDENTITY])
    mixed = torch.where(stays, scenes.identity, others)
    return Scenes(mixed, scenes.expression, scenes.pose, scenes.attributes, scenes.light)


def render_twins(pictures: Cache, folder: Path, count: int, seed: int = 0) -> Cache:
    """Draw twins of `count` pictures, evenly spread, that are not there yet; killed, it goes on where it stopped.

    The cache that comes back has ``rgb`` of the twins and ``row``, the picture's place in `pictures`.
    """
    from tqdm import tqdm

    rows = torch.linspace(0, len(pictures) - 1, min(count, len(pictures))).long().unique()
    parts = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))].split(SHARD)
    for shard, part in enumerate(tqdm(parts, desc="twins", mininterval=20.0)):
        if not (folder / f"{shard:05d}").is_dir():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + shard)
            keep_shard(folder, shard, _draw(pictures, part.sort().values, generator))
    return Cache(folder, slice(len(parts)))


@torch.no_grad()
def twin_latents(vae: AutoencoderKL, twins: Cache) -> Tensor:
    """Latents (T, C, h, w) float16 of twins, kept beside them."""
    from safetensors.torch import load_file

    from facegen.training.checkpoint import save_tensors
    from facegen.training.vae import encode_all, encodes_so

    path = twins.folder / "latents.safetensors"
    kept = load_file(path)["latents"] if path.exists() else None
    if kept is None or not encodes_so(vae, twins, kept):
        kept = encode_all(vae, twins)
        save_tensors({"latents": kept}, path)
    return kept


def _draw(pictures: Cache, rows: Tensor, generator: torch.Generator, batch: int = 20) -> dict[str, np.ndarray]:
    from facegen.world.render import render

    size = pictures.field("rgb", rows[:1]).shape[1]
    people = len(pictures.people)
    step = torch.randint(1, max(2, people), (len(rows),), generator=generator)
    someone = torch.zeros(people, dtype=torch.long)
    someone[pictures.label] = torch.arange(len(pictures))  # a picture of each
    others = someone[(pictures.label[rows] + step) % people]
    scenes = twins(pictures.scenes(rows), pictures.scenes(others).identity)
    drawn = [render(scenes[start : start + batch], size).rgb for start in range(0, len(rows), batch)]
    return {
        "rgb": np.concatenate([stored_pixels(one) for one in drawn]),
        "row": rows.numpy(),
        "person": pictures.person[rows].numpy().astype(np.int32),
        "picture": pictures.picture[rows].numpy().astype(np.int32),
        "other": pictures.person[others].numpy().astype(np.int32),
    }
