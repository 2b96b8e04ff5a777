"""Controls learn beside a base model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from facegen.adapters.expression import UNITS, Expression
from facegen.models.base import Model
from facegen.models.geometry import KINDS, Geometry
from facegen.training.cache import Cache
from facegen.training.diffusion import DiffusionSettings, Lessons, new_adapters, new_model
from facegen.training.mini import EXTRA
from facegen.training.objectives.controls import ControlObjective, ControlSettings, _others
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


@pytest.mark.parametrize("name", ["expression", "landmarks", "sketch"])
def test_only_the_control_learns(model: Model, lessons: Lessons, name: str) -> None:
    assert name in EXTRA
    control: Any = Expression.fresh(model) if name == "expression" else Geometry.fresh(name, model)
    person = new_adapters(model, 128, SIZES)["ip_adapter_faceid"]
    person.modules().requires_grad_(False)
    settings = ControlSettings(batch=3, with_person=1.0)
    objective = ControlObjective(model, control, lessons, settings, person=person, held_out=lessons)
    before = [value.clone() for value in model.unet.parameters()]
    optimizer = torch.optim.AdamW(objective.parameter_groups(), lr=3e-3)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(6):
        same = torch.Generator().manual_seed(3)  # one batch, one noise: what is learnt shows at once
        loss = objective.loss(objective.batch(0, same), 0, generator.manual_seed(4))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.unet.parameters(), strict=True))
    with torch.no_grad():
        assert set(objective.figures()) == {"held_out_with", "held_out_without"}


def test_the_person_comes_from_another_picture(lessons: Lessons) -> None:
    rows = torch.arange(len(lessons.pictures))
    others = _others(lessons, rows)
    assert (lessons.pictures.label[others] == lessons.pictures.label).all()
    assert (others != rows).all()


def test_what_is_learnt_is_saved_and_loaded(model: Model, tmp_path: Path) -> None:
    geometry = Geometry.fresh("landmarks", model)
    path = geometry.save(tmp_path)
    assert path.name in KINDS
    again = Geometry.from_pretrained(path, model)
    first = next(geometry.net.parameters())
    assert torch.allclose(first, next(again.net.parameters()), atol=1e-3)
    adapter = Expression.fresh(model)
    adapter.save(tmp_path / "expression")
    loaded = Expression.from_pretrained(tmp_path / "expression", model)
    assert loaded.embedding_dim == len(UNITS)
    assert loaded.layers.keys() == adapter.layers.keys()
