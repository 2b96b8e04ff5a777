"""The aligner learns from damaged pictures; the autoencoder does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from facegen.models.alignment import Aligner
from facegen.models.base import Model
from facegen.restoration.degrade import LEVELS, NONE
from facegen.training.cache import Cache
from facegen.training.diffusion import DiffusionSettings, Lessons, new_model
from facegen.training.mini import EXTRA
from facegen.training.objectives.restore import RestoreObjective, RestoreSettings, first_order, seen_from_near
from facegen.training.reader import LatentReader
from facegen.training.vae import VAESettings, encode_all, new_vae

SIZES = DiffusionSettings(channels=(32, 64), text_width=128, text_layers=1, queries=2, resampler_depth=1, rank=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from facegen.world.tokenizer import build_tokenizer

    torch.manual_seed(0)
    vae = new_vae(VAESettings(channels=(16, 16, 16, 16), latent_channels=4)).requires_grad_(False)
    return new_model(vae, build_tokenizer(tmp_path_factory.mktemp("tokenizer")), SIZES)


@pytest.fixture(scope="module")
def lessons(model: Model, draw_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    pictures = Cache(draw_cache(tmp_path_factory.mktemp("pictures"), people=3, pictures=3))
    embeddings = torch.randn(len(pictures), 6, generator=torch.Generator().manual_seed(1))
    return Lessons(pictures, encode_all(model.vae, pictures), embeddings)


def objective(model: Model, lessons: Lessons, **settings: float) -> RestoreObjective:
    aligner = Aligner.fresh(model, 6, width=16, deep=16, codes=8, code=4)
    chosen = RestoreSettings(batch=4, pixels=1, **settings)  # type: ignore[arg-type]
    return RestoreObjective(model, aligner, lessons, chosen, held_out=lessons)


def test_the_clean_latents_come_nearer_and_the_autoencoder_stays(model: Model, lessons: Lessons) -> None:
    assert "restore" in EXTRA
    learning = objective(model, lessons, clean=0.0)
    learning.reader = LatentReader(4, 6).eval().requires_grad_(False)
    before = [value.clone() for value in model.vae.parameters()]
    optimiser = torch.optim.AdamW([one for group in learning.parameter_groups() for one in group["params"]], lr=2e-3)
    batch = learning.batch(0, torch.Generator().manual_seed(3))
    losses = []
    for _ in range(8):
        found = learning.loss(batch, 0, torch.Generator())
        optimiser.zero_grad()
        found["loss"].backward()
        optimiser.step()
        losses.append(float(found["loss"].detach()))
    assert losses[-1] < losses[0]
    assert set(found) == {"loss", "latents", "codebook", "shown", "unlike", "rebuilt"}
    assert all(torch.equal(a, b) for a, b in zip(before, model.vae.parameters(), strict=True))
    assert all(weight.grad is None for weight in model.vae.parameters())


def test_better_photos_are_other_pictures_of_the_same_person(model: Model, lessons: Lessons) -> None:
    learning = objective(model, lessons, referenced=1.0, photos=1)
    batch = learning.batch(0, torch.Generator().manual_seed(1))
    others = torch.nn.functional.normalize(lessons.embeddings, dim=1)
    for row, who in enumerate(batch.who):
        found = int((others @ who).argmax())
        shown = int((lessons.latents.float() - batch.latents[row]).flatten(1).abs().sum(1).argmin())
        assert torch.allclose(others[found], who, atol=1e-6)
        assert found != shown
        assert lessons.pictures.label[found] == lessons.pictures.label[shown]
    assert not objective(model, lessons, referenced=0.0).batch(0, torch.Generator().manual_seed(1)).who.any()


def test_pictures_are_damaged_or_left_alone(model: Model, lessons: Lessons) -> None:
    clean = objective(model, lessons, clean=1.0).batch(0, torch.Generator().manual_seed(1))
    assert torch.equal(clean.damaged, clean.pictures)
    damaged = objective(model, lessons, clean=0.0).batch(0, torch.Generator().manual_seed(1))
    assert (damaged.damaged - damaged.pictures).abs().mean() > 0.005
    assert seen_from_near(LEVELS["heavy"], 2.0).factor == (3.0, 4.0)
    assert seen_from_near(NONE, 100.0).factor == (1.0, 1.0)


def test_first_order_finds_what_is_linear(lessons: Lessons) -> None:
    """Latents that are a linear map of the pictures' blocks are undone, up to what eight by eight pixels vary."""
    pictures = lessons.pictures.rgb(torch.arange(len(lessons.pictures))) * 2 - 1
    means = torch.nn.functional.avg_pool2d(pictures, 8)
    linear = Lessons(lessons.pictures, means, lessons.embeddings)
    weight = first_order(linear, 8)
    assert weight.shape == (192, 3, 3, 3)
    padded = torch.nn.functional.pad(means, (1, 1, 1, 1), mode="replicate")
    found = torch.nn.functional.pixel_shuffle(torch.nn.functional.conv2d(padded, weight), 8)
    nearest = torch.nn.functional.interpolate(means, scale_factor=8)
    assert (found - pictures).square().mean() < (nearest - pictures).square().mean()


def test_figures_for_each_degree(model: Model, lessons: Lessons) -> None:
    with torch.no_grad():
        figures = objective(model, lessons).figures()
    assert set(figures) == {f"{level}_{way}" for level in LEVELS for way in ("damaged", "aligned", "referenced")}
    assert figures["light_damaged"] == figures["light_aligned"] < figures["heavy_damaged"]
