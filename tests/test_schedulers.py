"""Schedulers by name: fresh for each call, refused in a sentence, convertible between noise and clean latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from facegen.errors import WrongRequest
from facegen.schedulers import NAMES, build, from_clean, levels, start, to_clean, walk

CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_clean_latents_and_outputs_convert_both_ways(name: str, prediction: str) -> None:
    if name == "pndm" and prediction == "sample":
        pytest.skip("diffusers' PNDM knows no sample prediction")
    scheduler = build(name, {**CONFIG, "prediction_type": prediction}, 6)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=generator)
    index = 2
    timestep = walk(scheduler)[index]
    noisy = scheduler.add_noise(clean, noise, timestep.reshape(1))
    level = levels(scheduler, index, timestep)
    a, s, _ = level
    output = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}[prediction]
    assert torch.allclose(to_clean(scheduler, output, noisy, level), clean, atol=2e-3)
    assert torch.allclose(from_clean(scheduler, clean, noisy, level), output, atol=2e-3)


def test_each_call_gets_its_own() -> None:
    config = dict(CONFIG)
    first, second = build("euler", config, 5), build("euler", config, 9)
    assert first is not second
    assert (len(walk(first)), len(walk(second))) == (5, 9)
    assert config == CONFIG


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++", "lcm"])
def test_strength_walks_the_last_part(name: str) -> None:
    whole = walk(build(name, CONFIG, 10))
    part = build(name, CONFIG, 10, strength=0.35)
    assert torch.equal(walk(part), whole[-3:])
    noise = torch.ones(1, 4, 2, 2)
    begun = start(part, noise, torch.zeros_like(noise))
    assert 0 < begun.abs().max() < start(build(name, CONFIG, 10), noise).abs().max()


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"name": "nonsense"}, {"steps": 0}, {"strength": 0.0}, {"strength": 1.5}, {"strength": 0.01}):
        arguments: dict[str, Any] = {"name": "ddim", "config": CONFIG, "steps": 10, **wrong}
        with pytest.raises(WrongRequest):
            build(**arguments)
    with pytest.raises(WrongRequest, match="at most 50"):
        build("lcm", CONFIG, 60)
    with pytest.raises(WrongRequest, match="NoSuchScheduler"):
        build("model", {**CONFIG, "_class_name": "NoSuchScheduler"}, 5)
