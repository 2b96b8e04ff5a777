"""Distillation: only the LoRA learns, from the guided teacher along short walks, and its file is worn as any LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from facegen.models.lora import load_lora
from facegen.schedulers import build
from facegen.training import walks
from facegen.training.checkpoint import save_tensors
from facegen.training.diffusion import (
    SCHEDULER,
    Batch,
    DiffusionObjective,
    DiffusionSettings,
)
from facegen.training.distil import DistilObjective, DistilSettings, LowRankSet, nearest
from facegen.training.mini import EXTRA
from facegen.training.reader import LatentReader

SIZES = DiffusionSettings(
    channels=(32, 64), text_width=128, text_layers=1, queries=2, resampler_depth=1, rank=2, batch=6, base=False,
    ways={"prompt": 0.4, "ip_adapter_faceid": 0.3, "instantid": 0.3},
)  # fmt: skip


@pytest.fixture(scope="module")
def objective(tiny_teaching: Callable[[DiffusionSettings], DiffusionObjective]) -> DistilObjective:
    teaching = tiny_teaching(SIZES)
    return DistilObjective(teaching, DistilSettings(rank=4, batch=6, walks=(2, 3), ways=SIZES.ways))


def test_it_is_a_stage_on_demand() -> None:
    assert "distil" in EXTRA


def _batch(objective: DistilObjective, way: str) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return objective.teaching._gather(objective.teaching.lessons, torch.arange(6) % 9, way, generator)


def test_a_fresh_lora_changes_nothing(objective: DistilObjective) -> None:
    batch = _batch(objective, "ip_adapter_faceid")
    asked = objective.teaching.conditions(batch)
    steps = torch.full((6,), 499)
    with torch.no_grad():
        fresh = DistilObjective(objective.teaching, objective.settings)
        plain, student = (
            side(asked)(batch.latents, steps) for side in (partial(walks.plain, fresh.model), fresh.student)
        )
    assert torch.allclose(plain, student, atol=1e-5)


@torch.no_grad()
def test_a_walk_is_the_scheduler_s(objective: DistilObjective) -> None:
    batch = _batch(objective, "prompt")
    velocity = objective.taught(batch)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(3))
    places, end = walks.walk(velocity, objective.velocity, noise, 1000, 4)
    scheduler = build("ddim trailing", SCHEDULER, 4)
    latents = noise
    for place, step in zip(places, scheduler.timesteps, strict=True):
        assert place.steps.tolist() == [int(step)] * 6
        assert torch.allclose(place.noisy, latents, atol=1e-4)
        latents = scheduler.step(place.found, step, latents, return_dict=False)[0]
    assert torch.allclose(end, latents, atol=1e-4)


@torch.no_grad()
def test_painted_latents_are_the_same_every_time(objective: DistilObjective) -> None:
    made = [walks.painted(objective.teaching, 8, seed=seed) for seed in (1, 1, 2)]
    assert made[0].shape == (8, 4, 16, 16)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@torch.no_grad()
def test_the_teacher_is_guided(objective: DistilObjective) -> None:
    batch = _batch(objective, "ip_adapter_faceid")
    steps = torch.full((6,), 499)
    unguided = DistilObjective(objective.teaching, replace(objective.settings, guidance=1.0))
    plain = walks.plain(objective.model, objective.teaching.conditions(batch))(batch.latents, steps)
    assert torch.allclose(unguided.taught(batch)(batch.latents, steps), plain, atol=1e-5)
    assert not torch.allclose(objective.taught(batch)(batch.latents, steps), plain, atol=1e-3)


@pytest.mark.parametrize("way", ["prompt", "ip_adapter_faceid", "instantid"])
def test_only_the_lora_learns_under_every_way(objective: DistilObjective, way: str) -> None:
    batch = _batch(objective, way)
    before = [value.clone() for value in objective.model.unet.parameters()]
    optimizer = torch.optim.AdamW(objective.parameter_groups(), lr=2e-3)
    losses = []
    for _ in range(6):
        loss = objective.loss(batch, 0, torch.Generator().manual_seed(4))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, objective.model.unet.parameters(), strict=True))
    assert not any(part._forward_hooks for part in objective.model.unet.modules())


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_lower_rank_keeps_the_most_of_a_product(kernel: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(6)
    down, up = torch.randn(6, 12, *kernel, generator=generator), torch.randn(20, 6, generator=generator)
    up = up.view(20, 6, *[1] * len(kernel))
    whole = up.flatten(1) @ down.flatten(1)
    values = torch.linalg.svdvals(whole)
    for rank in (2, 4, 6):
        small_down, small_up = nearest(down, up, rank)
        assert small_down.shape == (rank, *down.shape[1:])
        assert small_up.shape == (20, rank, *up.shape[2:])
        lost = (small_up.flatten(1) @ small_down.flatten(1) - whole).square().sum()
        torch.testing.assert_close(lost, values[rank:].square().sum(), rtol=1e-3, atol=1e-3)


def test_the_file_is_worn_as_it_was_learnt(objective: DistilObjective, tmp_path: Path) -> None:
    lora = objective.module
    assert isinstance(lora, LowRankSet)
    with torch.no_grad():
        for value in lora.up:
            value.normal_(generator=torch.Generator().manual_seed(5))
    path = tmp_path / "few.safetensors"
    save_tensors(lora.tensors(), path)
    worn = load_lora(path, objective.model)
    assert worn.layers.keys() == lora.layers().keys()
    for name, low in lora.layers().items():
        assert worn.layers[name].gain == 1.0
        assert torch.allclose(worn.layers[name].up.float().flatten(), low.up.flatten(), rtol=1e-2)


def test_what_is_measured(objective: DistilObjective) -> None:
    found = objective.figures()
    assert set(found) == {"held_out_with", "held_out_without"}
    assert all(value > 0 for value in found.values())


def test_what_the_reader_says_is_learnt_too(objective: DistilObjective) -> None:
    teaching = objective.teaching
    reader = LatentReader(4, 128).eval().requires_grad_(False)
    read = DistilObjective(
        DiffusionObjective(teaching.model, teaching.adapters, teaching.lessons, SIZES, teaching.lessons, reader),
        replace(objective.settings, likeness=1.0, obedience=1.0),
    )
    losses = read.loss(_batch(read, "ip_adapter_faceid"), 0, torch.Generator().manual_seed(4))
    assert losses["loss"] > losses["gap"] + 0.5
    losses["loss"].backward()
    assert all(value.grad is not None for value in read.module.parameters())
    assert {"unlike_with", "unlike_teacher", "amiss_without"} <= set(read.figures())
