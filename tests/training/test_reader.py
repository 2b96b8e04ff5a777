"""The short lessons before the diffusion: reading latents and reading prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from facegen.adapters.arc2face import Arc2Face
from facegen.training.cache import Cache
from facegen.training.diffusion import DiffusionObjective, DiffusionSettings, Lessons, new_adapters, new_model
from facegen.training.loop import Budget, LoopSettings, run
from facegen.training.reader import (
    SIZES,
    LatentReader,
    LatentReaderObjective,
    ReaderSettings,
    WordsObjective,
    asked,
    disobedience,
    person_means,
)
from facegen.training.vae import VAESettings, new_vae
from facegen.world.facts import FACTS

TINY = DiffusionSettings(channels=(32, 64), text_width=128, text_layers=1, rank=2, batch=4)


@pytest.fixture(scope="module")
def lessons(draw_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    """Four people whose latents and embeddings say who they are."""
    pictures = Cache(draw_cache(tmp_path_factory.mktemp("pictures"), people=4, pictures=4))
    generator = torch.Generator().manual_seed(1)
    who = torch.randn(4, 128, generator=generator)[pictures.label]
    latents = who[:, :4, None, None] + 0.3 * torch.randn(16, 4, 16, 16, generator=generator)
    return Lessons(pictures, latents, who + 0.1 * torch.randn(16, 128, generator=generator))


def _place(kind: str, value: str) -> int:
    return sum(SIZES[: list(FACTS).index(kind)]) + FACTS[kind].index(value)


def test_what_prompts_leave_open() -> None:
    table = asked(["a smiling woman with red hair", "", "a person wearing glasses"])
    assert table[1].all()
    assert table[0, _place("hair_color", "red")]
    assert not table[0, _place("hair_color", "black")]
    assert not table[0, _place("gender", "man")]
    assert table[0, _place("hat", "cap")]
    assert table[2, _place("glasses", "round")]
    assert table[2, _place("glasses", "square")]
    assert not table[2, _place("glasses", "none")]


def test_disobedience_is_the_chance_of_what_was_asked() -> None:
    wanted = asked(["red hair", "", "glasses"])
    answers = torch.zeros(3, sum(SIZES))
    found = disobedience(answers, wanted)
    sizes = dict(zip(FACTS, SIZES, strict=True))
    torch.testing.assert_close(found[0], torch.tensor(float(sizes["hair_color"])).log())
    assert found[1] == 0
    torch.testing.assert_close(found[2], torch.tensor(sizes["glasses"] / 2).log())
    answers[0, _place("hair_color", "red")] = 50.0
    assert disobedience(answers, wanted)[0] < 1e-6


def test_the_reader_learns_who_it_is(lessons: Lessons, tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective = LatentReaderObjective(LatentReader(4, 128), lessons, lessons, ReaderSettings(batch=16))
    measured = run(objective, tmp_path, Budget(40), LoopSettings(learning_rate=3e-3, warmup=5, average=0.8))
    assert measured["same_cosine"] > 0.8
    assert measured["same_cosine"] > measured["other_cosine"] + 0.5


def test_means_are_unit_vectors_of_people(lessons: Lessons) -> None:
    means = person_means(lessons)
    torch.testing.assert_close(means.norm(dim=1), torch.ones(16))
    assert len(means.unique(dim=0)) == 4
    assert F.cosine_similarity(means, lessons.embeddings).min() > 0.9


def _model(lessons: Lessons, tmp_path: Path) -> DiffusionObjective:
    from facegen.world.tokenizer import build_tokenizer

    torch.manual_seed(0)
    vae = new_vae(VAESettings(channels=(16, 16, 32, 32), latent_channels=4)).requires_grad_(False)
    model = new_model(vae, build_tokenizer(tmp_path / "tokenizer"), TINY)
    reader = LatentReader(4, 128).eval().requires_grad_(False)
    return DiffusionObjective(model, new_adapters(model, 128, TINY), lessons, TINY, lessons, reader)


def test_the_text_encoder_learns_to_keep_what_is_asked(lessons: Lessons, tmp_path: Path) -> None:
    objective = _model(lessons, tmp_path)
    arc2face = objective.adapters["arc2face"]
    assert isinstance(arc2face, Arc2Face)
    words = WordsObjective(objective.model, arc2face, lessons, batch=16)
    batch = words.batch(0, torch.Generator().manual_seed(0))
    before = words.loss(batch, 0, torch.Generator())
    run(words, tmp_path / "run", Budget(30), LoopSettings(learning_rate=2e-3, warmup=5, average=0.0))
    after = words.loss(batch, 0, torch.Generator())
    assert after["facts"] < 0.8 * before["facts"]
    assert after["unlike"] < before["unlike"]


@pytest.mark.parametrize("way", ["prompt", "ip_adapter_faceid"])
def test_the_diffusion_hears_the_reader(lessons: Lessons, tmp_path: Path, way: str) -> None:
    objective = _model(lessons, tmp_path)
    batch = objective._gather(lessons, torch.arange(8), way, torch.Generator().manual_seed(3))
    faces = (batch.embeddings != 0).any(1)
    assert torch.equal((batch.who != 0).any(1), faces)
    losses = objective.loss(batch, 0, torch.Generator().manual_seed(4))
    settings = objective.settings
    whole = losses[f"loss_{way}"] + settings.likeness * losses[f"unlike_{way}"] + settings.obedience * losses["amiss"]
    torch.testing.assert_close(losses["loss"], whole)
    assert losses[f"unlike_{way}"] > 0
    objective.settings = replace(settings, likeness=0.0, obedience=0.0)
    alone = objective.loss(batch, 0, torch.Generator().manual_seed(4))
    torch.testing.assert_close(alone["loss"], losses[f"loss_{way}"])
    assert "unlike" not in objective.figures()
