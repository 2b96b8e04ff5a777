"""A swap is learnt from twins: the scene of a picture with somebody else's face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from facegen.errors import WrongRequest
from facegen.models.base import Model
from facegen.models.swap import KIND, Swap
from facegen.training.cache import Cache
from facegen.training.diffusion import DiffusionSettings, Lessons, new_adapters, new_model
from facegen.training.mini import EXTRA
from facegen.training.objectives.swap import SwapObjective, SwapSettings, TwinLessons
from facegen.training.reader import LatentReader
from facegen.training.shapes import new_reader
from facegen.training.twins import AROUND_THE_FACE, render_twins, twin_latents, twins
from facegen.training.vae import VAESettings, new_vae
from facegen.world.parameters import IDENTITY

SIZES = DiffusionSettings(channels=(32, 64), text_width=128, text_layers=1, queries=2, resampler_depth=1, rank=2)


@pytest.fixture(scope="module")
def learnt(draw_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> TwinLessons:
    folder = tmp_path_factory.mktemp("pictures")
    pictures = Cache(draw_cache(folder / "pictures", people=3, pictures=3, size=128))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(pictures), 4, 16, 16, generator=generator).half()
    lessons = Lessons(pictures, latents, torch.randn(len(pictures), 128, generator=generator))
    drawn = render_twins(pictures, folder / "twins", 4)
    return TwinLessons.of(lessons, drawn, torch.randn(len(drawn), 4, 16, 16, generator=generator).half())


@pytest.fixture(scope="module")
def parts(learnt: TwinLessons, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from facegen.world.tokenizer import build_tokenizer

    torch.manual_seed(0)
    vae = new_vae(VAESettings(channels=(16, 16, 32, 32), latent_channels=4)).requires_grad_(False)
    model = new_model(vae, build_tokenizer(tmp_path_factory.mktemp("tokenizer")), SIZES)
    return {"model": model, "person": new_adapters(model, 128, SIZES)["ip_adapter_faceid"], "lessons": learnt}


def test_a_twin_has_the_scene_and_another_face(draw_cache: Callable[..., Path], tmp_path: Path) -> None:
    pictures = Cache(draw_cache(tmp_path / "pictures", people=3, pictures=2))
    drawn = render_twins(pictures, tmp_path / "twins", 4)
    rows = drawn.whole("row")
    assert len(rows) == 4
    assert torch.equal(pictures.person[rows], drawn.person)
    assert (drawn.whole("other") != drawn.person).all()
    scenes = pictures.scenes(rows)
    made = twins(scenes, torch.zeros_like(scenes.identity))
    for parameter in IDENTITY:
        stays = parameter.name in AROUND_THE_FACE
        assert torch.equal(made.column(parameter.name), scenes.column(parameter.name) * stays)
    assert torch.equal(made.expression, scenes.expression)
    assert torch.equal(made.attributes, scenes.attributes)
    assert (drawn.rgb(torch.arange(4)).flatten(1).std(1) > 0.02).all()
    (tmp_path / "twins" / "00000" / "rgb.npy").rename(tmp_path / "twins" / "00000" / "seen.npy")
    assert torch.equal(render_twins(pictures, tmp_path / "twins", 4).whole("row"), rows), "what is there stays"
    assert not (tmp_path / "twins" / "00000" / "rgb.npy").exists()


def test_twins_are_encoded_once_for_each_encoder(draw_cache: Callable[..., Path], tmp_path: Path) -> None:
    drawn = Cache(draw_cache(tmp_path, people=2, pictures=2))
    torch.manual_seed(0)
    vae = new_vae(VAESettings(channels=(16, 16, 32, 32), latent_channels=4)).eval()
    first = twin_latents(vae, drawn)
    assert first.shape == (4, 4, 16, 16)
    written = (drawn.folder / "latents.safetensors").stat().st_mtime_ns
    assert torch.equal(twin_latents(vae, drawn), first)
    assert (drawn.folder / "latents.safetensors").stat().st_mtime_ns == written
    with torch.no_grad():
        next(vae.encoder.parameters()).zero_()
    assert not torch.equal(twin_latents(vae, drawn), first)


def test_only_the_controlnet_learns(parts: dict[str, Any], learnt: TwinLessons) -> None:
    assert KIND in EXTRA
    swap = Swap.fresh(KIND, parts["model"])
    reader = LatentReader(4, 128).eval().requires_grad_(False)
    shapes = new_reader(learnt.lessons).eval().requires_grad_(False)
    objective = SwapObjective(
        parts["model"],
        swap,
        parts["person"],
        learnt,
        SwapSettings(batch=3),
        held_out=learnt,
        reader=reader,
        shapes=shapes,
    )
    frozen = [*parts["model"].unet.parameters(), *parts["person"].modules().parameters()]
    before = [value.clone() for value in frozen]
    optimizer = torch.optim.AdamW(
        [{"params": group["params"], "lr": 2e-3} for group in objective.parameter_groups()], lr=2e-3
    )
    generator = torch.Generator()
    losses = []
    for _ in range(6):
        same = torch.Generator().manual_seed(3)  # one batch, one noise: what is learnt shows at once
        loss = objective.loss(objective.batch(0, same), 0, generator.manual_seed(4))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    with torch.no_grad():
        found = objective.figures()
    assert {"held_out_from_twin_error", "held_out_from_nothing_unlike", "held_out_from_twin_shape"} <= set(found)


@pytest.mark.parametrize(("kind", "share"), [("twin", {}), ("itself", {"same": 1.0}), ("nobody", {"no_face": 1.0}),
                                             ("nothing", {"no_photo": 1.0})])  # fmt: skip
def test_what_each_row_sees(parts: dict[str, Any], learnt: TwinLessons, kind: str, share: dict[str, float]) -> None:
    none = SwapSettings(batch=4, same=0, no_face=0, no_photo=0, no_prompt=0)
    swap = Swap.fresh(KIND, parts["model"])
    objective = SwapObjective(parts["model"], swap, parts["person"], learnt, replace(none, **share))
    batch = objective.batch(0, torch.Generator().manual_seed(2))
    pictures, latents = learnt.lessons.pictures, learnt.lessons.latents.float()
    rows = torch.stack([(latents == one).flatten(1).all(1).nonzero()[0, 0] for one in batch.latents])
    assert set(rows.tolist()) == set(learnt.rows.tolist())
    own = (batch.photos == latents[rows]).flatten(1).all(1)
    assert own.all() == (kind in ("itself", "nobody"))
    assert batch.seen.all() == (batch.photos != 0).flatten(1).any(1).all() == (kind != "nothing")
    brought = (batch.embeddings != 0).any(1)
    assert brought.all() == (batch.who != 0).any(1).all() == (kind != "nobody")
    for row, embedding in zip(rows[brought], batch.embeddings[brought], strict=True):
        given = (learnt.lessons.embeddings == embedding).all(1).nonzero()[0, 0]
        assert pictures.label[given] == pictures.label[row]
        assert given != row, "the person comes from another picture"


def test_it_is_saved_and_loaded_under_its_own_name(parts: dict[str, Any], tmp_path: Path) -> None:
    model: Model = parts["model"]
    swap = Swap.fresh(KIND, model)
    path = swap.save(tmp_path)
    assert path.name == KIND
    again = Swap.from_pretrained(path, model)
    assert torch.allclose(next(swap.net.parameters()), next(again.net.parameters()), atol=1e-3)
    with pytest.raises(WrongRequest, match="no control 'landmarks'"):
        Swap.fresh("landmarks", model)
    with pytest.raises(WrongRequest, match="needs the person's tokens"):
        swap.beside([], torch.zeros(1, 4, 16, 16))
