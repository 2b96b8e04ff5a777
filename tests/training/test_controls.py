"""Controls learn beside a base model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from facegen.adapters.expression import UNITS, Expression
from facegen.models.base import Model
from facegen.models.geometry import ALL, KINDS, Geometry
from facegen.training.cache import Cache
from facegen.training.controls import write_control
from facegen.training.diffusion import DiffusionSettings, Lessons, new_adapters, new_model
from facegen.training.maps import draw_maps, maps_for
from facegen.training.mini import EXTRA
from facegen.training.objectives.controls import ControlObjective, ControlSettings
from facegen.training.reader import ReaderSettings
from facegen.training.shapes import ShapeReader, ShapeReaderObjective, apart, new_reader, points_of
from facegen.training.vae import VAESettings, new_vae

SIZES = DiffusionSettings(channels=(32, 64), text_width=128, text_layers=1, queries=2, resampler_depth=1, rank=2)


@pytest.fixture(scope="module")
def lessons(draw_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    pictures = Cache(draw_cache(tmp_path_factory.mktemp("pictures"), people=3, pictures=3))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(pictures), 4, 16, 16, generator=generator).half()
    return Lessons(pictures, latents, torch.randn(len(pictures), 128, generator=generator))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from facegen.world.tokenizer import build_tokenizer

    torch.manual_seed(0)
    vae = new_vae(VAESettings(channels=(16, 16, 32, 32), latent_channels=4)).requires_grad_(False)
    return new_model(vae, build_tokenizer(tmp_path_factory.mktemp("tokenizer")), SIZES)


def made(name: str, model: Model) -> Any:
    return Expression.fresh(model) if name == "expression" else Geometry.fresh(name, model)


@pytest.mark.parametrize("name", ["expression", "landmarks", ALL])
def test_only_the_control_learns(model: Model, lessons: Lessons, name: str) -> None:
    assert name in EXTRA
    person = new_adapters(model, 128, SIZES)["ip_adapter_faceid"]
    person.modules().requires_grad_(False)
    torch.manual_seed(5)
    teacher = new_reader(lessons).eval().requires_grad_(False)
    settings = ControlSettings(batch=4, with_person=1.0)
    objective = ControlObjective(
        model, made(name, model), lessons, settings, person=person, held_out=lessons, teacher=teacher
    )
    before = [value.clone() for value in model.unet.parameters()]
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in objective.parameter_groups()], lr=3e-3)
    losses = []
    for _ in range(6):
        same = torch.Generator().manual_seed(3)  # one batch, one noise: what is learnt shows at once
        loss = objective.loss(objective.batch(0, same), 0, torch.Generator().manual_seed(4))
        assert set(loss) == {"loss", "error", "amiss"}
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        losses.append(float(loss["loss"].detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.unet.parameters(), strict=True))
    with torch.no_grad():
        figures = objective.figures()
    kinds = {"expression": ("",), ALL: tuple(f"{kind}_" for kind in KINDS)}.get(name, (f"{name}_",))
    assert set(figures) == {
        f"held_out_{kind}{part}_{way}" for kind in kinds for part in ("error", "amiss") for way in ("with", "without")
    }


def test_muon_moves_a_controlnets_blocks_and_no_adapter(model: Model, lessons: Lessons) -> None:
    for name, expected in ((ALL, {True, False}), ("expression", {False})):
        objective = ControlObjective(model, made(name, model), lessons)
        groups = objective.parameter_groups()
        assert {group["muon"] for group in groups} == expected
        assert sum(len(group["params"]) for group in groups) == len(list(objective.module.parameters()))


def test_one_net_sees_every_kind(model: Model, lessons: Lessons, tmp_path: Path) -> None:
    maps = maps_for(lessons.pictures, tmp_path / "maps.safetensors", count=4, size=32)
    again = maps_for(lessons.pictures, tmp_path / "maps.safetensors", count=4, size=32)
    assert torch.equal(maps.depth, again.depth)
    assert torch.equal(maps.rows, torch.tensor([0, 2, 4, 6]))
    objective = ControlObjective(model, made(ALL, model), lessons, ControlSettings(batch=9, left_out=0.0), maps=maps)
    batch = objective.batch(0, torch.Generator().manual_seed(1))
    assert batch.control.shape == (9, 3, 128, 128)
    assert batch.acts.all()
    assert batch.embeddings is None
    rows = torch.tensor([0, 2, 4, 6])
    seen = objective._maps(lessons, rows, list(KINDS))
    gray = [bool((one - one.mean(0)).abs().max() < 1e-6) for one in seen]
    assert gray == [False, True, False, True]  # landmarks and normals are coloured, depth and sketches are not
    assert set(seen[3].unique().tolist()) == {0.0, 1.0}
    sharp = draw_maps(lessons.pictures, rows[1:2], 128)
    assert (sharp.of("depth", rows[1:2], 128)[0] - seen[1]).abs().mean() < 0.05


def test_a_row_without_the_control_says_so(model: Model, lessons: Lessons) -> None:
    objective = ControlObjective(model, made("expression", model), lessons, ControlSettings(batch=9, left_out=0.5))
    batch = objective.batch(0, torch.Generator().manual_seed(1))
    assert 0 < int(batch.acts.sum()) < 9
    assert torch.equal(batch.control.any(1), batch.acts)
    assert torch.equal(batch.control[batch.acts], batch.shown[batch.acts])


def test_expressions_and_points_are_learnt_from_latents(lessons: Lessons) -> None:
    torch.manual_seed(3)
    objective = ShapeReaderObjective(new_reader(lessons), lessons, lessons, ReaderSettings(batch=9))
    optimizer = torch.optim.AdamW(objective.parameter_groups(), lr=3e-3)
    losses = []
    for _ in range(12):
        generator = torch.Generator().manual_seed(4)
        loss = objective.loss(objective.batch(0, generator), 0, generator)
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        losses.append(float(loss["loss"].detach()))
    assert losses[-1] < 0.8 * losses[0]
    figures = objective.figures()
    assert -1 <= figures["correlation"] <= 1
    assert figures["distance"] > 0


def test_points_lie_between_the_pictures_borders_and_errors_are_measured(lessons: Lessons) -> None:
    rows = torch.arange(3)
    points = points_of(lessons.pictures, rows)
    assert points.shape == (3, 68, 2)
    assert points.abs().median() < 1
    pixels = (points + 1) / 2 * 128 - 0.5
    assert torch.allclose(pixels, lessons.pictures.field("landmarks68", rows).float(), atol=1e-3)
    assert apart(points, points).max() == 0
    assert (apart(points + 0.1, points) > 1).all()
    reader = ShapeReader(4, torch.full((18,), 0.5))
    assert torch.allclose(reader.unlike(torch.ones(2, 18), torch.zeros(2, 18)), torch.full((2,), 1.5))


def test_what_is_learnt_is_saved_and_loaded(model: Model, lessons: Lessons, tmp_path: Path) -> None:
    for name in ("landmarks", ALL):
        objective = ControlObjective(model, made(name, model), lessons)
        path = write_control(objective, tmp_path)
        assert path == tmp_path / "controls" / name
        again = Geometry.from_pretrained(path, model)
        first = next(objective.module.parameters())
        assert torch.allclose(first, next(again.net.parameters()), atol=1e-3)
    objective = ControlObjective(model, made("expression", model), lessons)
    write_control(objective, tmp_path)
    loaded = Expression.from_pretrained(tmp_path / "adapters" / "expression", model)
    assert loaded.embedding_dim == len(UNITS)
    assert isinstance(objective.control, Expression)
    assert loaded.layers.keys() == objective.control.layers.keys()
