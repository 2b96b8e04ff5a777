"""A toy world: discs for heads, eyes and mouths, drawn in a moment, whose looks follow from the person's parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from facegen.training.cache import Cache, CachePlan
from facegen.training.diffusion import DiffusionObjective, DiffusionSettings, Lessons, new_adapters, new_model
from facegen.training.vae import VAESettings, new_vae
from facegen.world.parameters import GROUPS, HAIR_COLORS
from facegen.world.sampling import scenes_for


def _draw_cache(folder: Path, people: int = 8, pictures: int = 4, first: int = 0, size: int = 128) -> Path:
    """A cache of one shard in the renderer's place."""
    plan = CachePlan(first, people, pictures, shard_people=people)
    scenes = scenes_for(0, *plan.names(0))
    b = len(scenes)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def column(name: str) -> torch.Tensor:
        return scenes.column(name).view(b, 1, 1)

    def oval(cx: torch.Tensor, cy: torch.Tensor, rx: torch.Tensor, ry: torch.Tensor) -> torch.Tensor:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1

    cx, cy = 64 + 30 * column("shift_x"), 64 - 30 * column("shift_y")
    width, height = 28 + 3 * column("face_width"), 38 + 3 * column("face_length")
    apart = 13 + 2 * column("eye_spacing")
    rgb = torch.full((b, 3, size, size), 0.5)
    parsing = torch.zeros(b, size, size, dtype=torch.uint8)
    tone = 1 - 0.7 * column("skin_tone")
    hair = torch.tensor(list(HAIR_COLORS.values()))[scenes.column("hair_color").long()].view(b, 3, 1, 1)
    red = torch.tensor([0.8, 0.2, 0.2]).view(1, 3, 1, 1)
    for where, color, index in (
        (oval(cx, cy - 12, width + 6, height), hair, 17),
        (oval(cx, cy, width, height), torch.stack([tone, 0.8 * tone, 0.7 * tone], 1), 1),
        (oval(cx - apart, cy - 8, 3 + 0 * cx, 2 + 0 * cx), torch.tensor([0.1, 0.3, 0.9]).view(1, 3, 1, 1), 4),
        (oval(cx + apart, cy - 8, 3 + 0 * cx, 2 + 0 * cx), torch.tensor([0.1, 0.3, 0.9]).view(1, 3, 1, 1), 5),
        (
            oval(cx, cy + 22, 9 + 2 * column("mouth_width"), 3 + 0 * cx),
            red,
            12,
        ),
    ):
        rgb = torch.where(where[:, None], color, rgb)
        parsing = torch.where(where, torch.tensor(index, dtype=torch.uint8), parsing)
    corners = [(-apart, -8), (apart, -8), (0 * apart, 8), (-9 + 0 * apart, 22), (9 + 0 * apart, 22)]
    points = torch.stack([torch.stack([(cx + dx).flatten(), (cy + dy).flatten()], 1) for dx, dy in corners], 1)
    box = torch.cat([cx - width, cy - height, cx + width, cy + height], 1)[:, :, 0]
    shard = folder / "00000"
    shard.mkdir(parents=True)
    arrays = {
        "rgb": (rgb * 255).byte().permute(0, 2, 3, 1).numpy(),
        "parsing": parsing.numpy(),
        "landmarks5": points.half().numpy(),
        "landmarks68": points.repeat(1, 14, 1)[:, :68].half().numpy(),
        "box": box.half().numpy(),
        "person": np.asarray(plan.names(0)[0], np.int32),
        "picture": np.asarray(plan.names(0)[1], np.int32),
    } | {group: getattr(scenes, group).numpy() for group in GROUPS}
    for name, array in arrays.items():
        np.save(shard / f"{name}.npy", array)
    return folder


@pytest.fixture(scope="session")
def draw_cache() -> Callable[..., Path]:
    """``draw_cache(folder, people=8, pictures=4)`` makes a picture cache of the toy world."""
    return _draw_cache


@pytest.fixture(scope="session")
def tiny_teaching(tmp_path_factory: pytest.TempPathFactory) -> Callable[[DiffusionSettings], DiffusionObjective]:
    """``tiny_teaching(sizes)``: the diffusion's lessons on nine pictures of the toy world, with tiny random nets."""

    def make(sizes: DiffusionSettings) -> DiffusionObjective:
        from facegen.world.tokenizer import build_tokenizer

        pictures = Cache(_draw_cache(tmp_path_factory.mktemp("pictures"), people=3, pictures=3))
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(len(pictures), 4, 16, 16, generator=generator).half()
        lessons = Lessons(pictures, latents, torch.randn(len(pictures), 128, generator=generator))
        torch.manual_seed(0)
        vae = new_vae(VAESettings(channels=(16, 16, 32, 32), latent_channels=4)).requires_grad_(False)
        model = new_model(vae, build_tokenizer(tmp_path_factory.mktemp("tokenizer")), sizes)
        return DiffusionObjective(model, new_adapters(model, 128, sizes), lessons, sizes, lessons)

    return make
