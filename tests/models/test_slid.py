"""A slider moves what its words change most and nothing else, by degrees; at strength 0 it is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen.conditions import LoraCondition, TextCondition
from facegen.denoise import Guidance, denoise, noise
from facegen.economy import PRESETS
from facegen.errors import WrongRequest
from facegen.models.base import Model
from facegen.models.slid import PAIRS, WORDS, Slid, Slide, most_changed
from facegen.models.sliders import SLIDERS, by_pairs, files, slides, words
from facegen.models.sliders import asked as asked_in_words
from facegen.schedulers import build, start
from facegen.training.objectives.slider import SliderNet
from facegen.training.sliders import save

STEPS, PROMPT = 5, "a face"


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model.from_pretrained(request.getfixturevalue(request.param), device="cpu", dtype=torch.float32)


def asked(model: Model, sliders: Mapping[str, float], learnt: Mapping[str, LoraCondition] | None = None) -> list[Slide]:
    return slides(lambda text: model.encode_text([text]), PROMPT, model.encode_text([PROMPT]), sliders, learnt or {})


def run(model: Any, *, seen: list[Tensor] | None = None, guidance: float = 2.0) -> Tensor:
    text = model.encode_text([PROMPT])
    scheduler = build("ddim", model.scheduler_config, STEPS)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    begin = start(scheduler, noise(model.latent_shape(64, 64), generators))

    def on_step(step: Any) -> None:
        if seen is not None:
            seen.append(step.latents)

    return denoise(model, begin, scheduler, [text], Guidance(guidance), generators, on_step)


def slid(model: Model, asked: list[Slide], guidance: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Plain latents, slid ones, and where the sliders acted."""
    kept: list[Tensor] = []
    plain = run(model, seen=kept, guidance=guidance)
    moving = Slid(model, asked, kept)
    made = run(moving, guidance=guidance)
    assert moving.mask is not None
    return plain, made, moving.mask


def test_only_where_it_acts_does_anything_change(model: Model) -> None:
    plain, made, mask = slid(model, asked(model, {"age": 1.0}))
    assert mask.shape == (2, 1, *plain.shape[-2:])
    outside, inside = (mask == 0).expand_as(plain), (mask == 1).expand_as(plain)
    assert bool(outside.any())
    assert bool(inside.any())
    assert torch.equal(made[outside], plain[outside])
    assert not torch.allclose(made[inside], plain[inside], atol=1e-4)


def test_further_with_more_strength_and_the_other_way_with_less(model: Model) -> None:
    assert asked(model, {"age": 0.0, "smile": 0.0}) == []
    moves = {}
    for strength in (0.1, 0.2, -0.1):
        plain, made, _ = slid(model, asked(model, {"beard": strength}))
        moves[strength] = (made - plain).flatten()
    assert 0 < moves[0.1].norm() < moves[0.2].norm()
    assert torch.cosine_similarity(moves[0.1], moves[0.2], dim=0) > 0.7
    assert torch.cosine_similarity(moves[0.1], moves[-0.1], dim=0) < -0.5


def test_without_guidance_and_in_a_hurry_it_acts_too(model: Model) -> None:
    model.economy = replace(PRESETS["fast"], least=0)
    for guidance in (1.0, 2.0):
        plain, made, _ = slid(model, asked(model, {"glasses": 1.0}), guidance)
        assert not torch.allclose(made, plain, atol=1e-4)


def test_weights_that_learnt_a_slider_go_the_same_way_and_are_taken_off(model: Model) -> None:
    net = SliderNet(model.unet, rank=2)
    with torch.no_grad():
        for seed, up in enumerate(net.up):
            up += 0.3 * torch.randn(up.shape, generator=torch.Generator().manual_seed(seed))
    learnt = {"mine.safetensors": net.condition(1.0)}
    assert asked(model, {"mine.safetensors": 0.0}, learnt) == []
    before = run(model)
    plain, made, mask = slid(model, asked(model, {"mine.safetensors": 0.5}, learnt))
    assert torch.equal(plain, before)
    assert torch.equal(run(model), before)
    outside = (mask == 0).expand_as(plain)
    assert torch.equal(made[outside], plain[outside])
    assert not torch.allclose(made, plain, atol=1e-4)


def test_words_come_behind_the_prompt(model: Model) -> None:
    text = model.encode_text([PROMPT])
    (old,), (young,), (bald,) = (asked(model, one) for one in ({"age": 2.0}, {"age": -2.0}, {"beard": -0.5}))
    assert isinstance(old.toward, TextCondition)
    assert torch.equal(old.toward.embeds, model.encode_text([f"{PROMPT}, old"]).embeds)
    assert torch.equal(young.toward.embeds, model.encode_text([f"{PROMPT}, young"]).embeds)  # type: ignore[union-attr]
    assert (old.gain, young.gain, bald.gain) == (2.0, 2.0, -0.5)
    # What stands before them is read as ever: the start, and both words.
    assert torch.allclose(old.toward.embeds[1, :, :3], text.embeds[1, :, :3], atol=1e-6)
    assert all(words(name) == pair for name, pair in SLIDERS.items())
    assert words("freckled | pale") == ("freckled", "pale")
    with pytest.raises(WrongRequest, match="leaves no room"):
        slides(lambda prompt: text, PROMPT, text, {"age": 1.0}, {})


def test_what_sliders_ask_for_in_words() -> None:
    asking = {"smile": -1.0, "age": 0.9, "beard": -2.0, "mine.safetensors": 1.0, "with a scarf|without a scarf": 1.0}
    assert asked_in_words("a face", asking) == "a face, sad, with a scarf"  # away from a beard has no words
    assert asked_in_words("", {"smile": 1.5}) == "smiling"


def test_a_model_brings_weights_for_what_its_words_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    for name in ("skin", "few"):
        (tmp_path / "loras" / f"{name}.safetensors").touch()
    asked = {"skin": 0.5, "age": 1.0, "few": 1.0, "mine.safetensors": -1.0}
    assert files(asked, tmp_path) == {"skin": 0.5, "mine.safetensors": -1.0}
    assert files(asked) == {"mine.safetensors": -1.0}
    # What weights do is not counted by the words.
    assert asked_in_words("a face", {"skin": 1.0, "age": 1.0}, tmp_path) == "a face, old"


def test_what_pairs_taught_acts_wherever_they_differ(model: Model, tmp_path: Path) -> None:
    net = SliderNet(model.unet, rank=1)
    limits = []
    for header in ({"pairs": "mine"}, {"more": "old"}):
        path = save(net, tmp_path / "mine.safetensors", header)
        learnt = {"mine": net.condition(1.0)}
        pairs = [name for name in learnt if by_pairs(path)]
        (one,) = slides(lambda text: model.encode_text([text]), PROMPT, model.encode_text([PROMPT]), {"mine": 1.0},
            learnt, pairs)  # fmt: skip
        limits.append(one.limits)
    assert limits == [PAIRS, WORDS]
    assert not by_pairs(tmp_path)


def test_a_prompt_that_an_adapter_wrote_moves_as_the_plain_one(model: Model) -> None:
    plain, there = model.encode_text([PROMPT]), model.encode_text([f"{PROMPT}, smiling"])
    step = there.embeds - plain.embeds
    for at in (None, lambda steps: plain.embeds + steps[0]):
        written = replace(plain, embeds=plain.embeds + 1, at=at)
        (slide,) = slides(lambda text: model.encode_text([text]), PROMPT, written, {"smile": 1.0}, {})
        assert isinstance(slide.toward, TextCondition)
        assert torch.equal(slide.toward.embeds[0], written.embeds[0])
        assert torch.allclose(slide.toward.embeds[1] - written.embeds[1], step[1], atol=1e-5)
        if at is not None:
            assert slide.toward.at is not None
            found = slide.toward.at(torch.tensor([3])) - at(torch.tensor([3]))
            assert torch.allclose(found[1], step[1], atol=1e-5)
            assert not found[0].any()


def test_where_a_difference_is_largest_is_told_for_each_picture_alone() -> None:
    way = torch.full((2, 4, 16, 16), 1e-3)
    way[0, :, 2:7, 2:7] = 1.0
    way[1, :, 9:14, 9:14] = 100.0
    mask = most_changed(way)
    assert mask[0, 0, 4, 4] == mask[1, 0, 11, 11] == 1
    assert mask[0, 0, 9:, 9:].max() == mask[1, 0, :7, :7].max() == 0
    wider = most_changed(way, PAIRS)
    assert bool((wider >= mask).all())
    assert wider.sum() > mask.sum()
    assert wider[0, 0, 11:, 11:].max() == 0
