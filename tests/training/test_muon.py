"""Muon beside AdamW: directions are orthogonal, other groups are AdamW's to the bit, killed runs go on to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facegen.training.checkpoint import load_tensors
from facegen.training.loop import STATE, Budget, LoopSettings, Objective, run
from facegen.training.muon import MuonAdamW, orthogonalised


class Fit(Objective):
    """A small net whose matrices Muon moves."""

    name = "fit"

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))

    def parameter_groups(self) -> list[dict[str, Any]]:
        weights = list(self.module.parameters())
        return [
            {"params": [w for w in weights if w.ndim > 1], "muon": True},
            {"params": [w for w in weights if w.ndim == 1], "scale": 2.0},
        ]

    def batch(self, step: int, generator: torch.Generator) -> Tensor:
        return torch.randn(16, 3, 4, 4, generator=generator)

    def loss(self, batch: Tensor, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        return {"loss": (self.module(batch) - batch.mean((2, 3)).sum(1, keepdim=True)).square().mean()}


SETTINGS = LoopSettings(learning_rate=1e-2, warmup=2, average=0.9, save_every=1e9)


@pytest.mark.parametrize("shape", [(24, 4, 3, 3), (8, 64), (64, 8)])
def test_directions_have_singular_values_of_one(shape: tuple[int, ...]) -> None:
    found = orthogonalised(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    values = torch.linalg.svdvals(found.reshape(shape[0], -1))
    assert found.shape == shape
    assert values.min() > 0.9
    assert values.max() < 1.1


def test_other_groups_are_adamw_to_the_bit() -> None:
    found = []
    for kind in (torch.optim.AdamW, MuonAdamW):
        weight = nn.Parameter(torch.ones(4, 3))
        optimiser = kind([weight], lr=0.1, weight_decay=0.05)
        for step in range(3):
            weight.grad = torch.arange(12.0).reshape(4, 3) - step
            optimiser.step()
        found.append(weight.detach())
    assert torch.equal(*found)


def test_it_learns_and_a_run_in_two_parts_is_the_same_to_the_bit(tmp_path: Path) -> None:
    def error(fit: Fit) -> float:
        return fit.loss(fit.batch(0, torch.Generator().manual_seed(0)), 0, torch.Generator())["loss"].item()

    whole = Fit()
    before = error(whole)
    run(whole, tmp_path / "whole", Budget(steps=60), SETTINGS)
    assert error(whole) < before / 2
    run(Fit(), tmp_path / "parts", Budget(steps=60, seconds=0.0), SETTINGS)
    run(Fit(), tmp_path / "parts", Budget(steps=60), SETTINGS)
    one, other = (load_tensors(tmp_path / name / STATE).tensors for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
