from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from facegen.errors import Cancelled, CheckpointBroken, WrongRequest
from facegen.training.checkpoint import load_tensors
from facegen.training.loop import STATE, Average, Budget, LoopSettings, Objective, run, step_seed, wear_average
from facegen.training.record import record


class Tiny(Objective):
    """A net with all that has state: batch statistics, dropout, an auxiliary head of its own learning rate."""

    name = "tiny"

    def __init__(self, interrupt_at: int = -1) -> None:
        torch.manual_seed(3)
        self.module = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.PReLU(12), nn.Dropout(0.2), nn.Linear(12, 2)
        )
        self.interrupt_at = interrupt_at

    def batch(self, step: int, generator: torch.Generator) -> Tensor:
        if step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.randn(16, 6, generator=generator)

    def loss(self, batch: Tensor, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        noise = 0.01 * torch.randn(len(batch), 2, generator=generator)
        target = torch.stack([batch.sum(1), batch[:, 0] * batch[:, 1]], 1) + noise
        loss = (self.module(batch) - target).square().mean()
        return {"loss": loss, "half": loss / 2}

    def figures(self) -> dict[str, float]:
        return {"answer": 42.0}


SETTINGS = LoopSettings(learning_rate=1e-2, warmup=5, average=0.9, save_every=1e9)


def _same(first: Path, second: Path) -> None:
    a, b = load_tensors(first / STATE).tensors, load_tensors(second / STATE).tensors
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    run(Tiny(), tmp_path / "whole", Budget(steps=30), SETTINGS)
    with pytest.raises(Cancelled, match="stopped at step 12 of 30"):
        run(Tiny(interrupt_at=11), tmp_path / "parts", Budget(steps=30), SETTINGS)
    assert load_tensors(tmp_path / "parts" / STATE).facts["step"] == 12
    torch.manual_seed(99)  # a new process would not have the old random state either
    measured = run(Tiny(), tmp_path / "parts", Budget(steps=30), SETTINGS)
    assert measured["steps"] == 30
    _same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_out_of_time_goes_on_where_it_stopped(tmp_path: Path) -> None:
    run(Tiny(), tmp_path / "whole", Budget(steps=8), SETTINGS)
    first = run(Tiny(), tmp_path / "parts", Budget(steps=8, seconds=0.0), SETTINGS)
    assert first["steps"] == 1
    assert "answer" not in first
    last = run(Tiny(), tmp_path / "parts", Budget(steps=8), SETTINGS)
    assert last["answer"] == 42.0
    _same(tmp_path / "whole", tmp_path / "parts")


def test_seconds_become_a_number_of_steps_that_a_resumed_run_keeps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run(Tiny(), tmp_path, Budget(seconds=0.3), SETTINGS)
    steps = load_tensors(tmp_path / STATE).facts["steps"]
    assert steps > 1
    assert run(Tiny(), tmp_path, Budget(seconds=100.0), SETTINGS)["steps"] == steps


def test_training_lowers_the_loss_and_leaves_the_averaged_weights(tmp_path: Path) -> None:
    objective = Tiny()
    before = objective.module.state_dict()["0.weight"].clone()
    measured = run(objective, tmp_path, Budget(steps=200), SETTINGS)
    assert measured["train_loss"] < 3.0
    state = load_tensors(tmp_path / STATE).tensors
    assert torch.equal(objective.module.state_dict()["0.weight"], state["average.0.weight"])
    assert not torch.equal(state["average.0.weight"], before)
    other = Tiny()
    wear_average(other.module, tmp_path)
    assert torch.equal(other.module.state_dict()["1.running_mean"], state["average.1.running_mean"])


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    settings = LoopSettings(accumulate=3, average=0.0, save_every=1e9)
    assert run(Tiny(), tmp_path, Budget(steps=4), settings)["steps"] == 4


def test_the_average_is_worn_only_inside(tmp_path: Path) -> None:
    module = nn.Linear(3, 3)
    average = Average(module, 0.9)
    own = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    with average.worn():
        assert torch.equal(module.weight, own)
    assert torch.equal(module.weight, own + 1.0)


def test_the_learning_rate_rises_then_falls_with_the_steps() -> None:
    settings = LoopSettings(warmup=10, final_rate=0.1)
    rates = [settings.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.11
    assert LoopSettings(warmup=0, schedule="constant").rate(70, 100) == 1.0


def test_seeds_differ_by_step_and_process() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(2)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointBroken, match=STATE):
        run(Tiny(), tmp_path, Budget(steps=1), SETTINGS)
    with pytest.raises(WrongRequest):
        Budget()


def test_figures_of_stages_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "mini.json"
    record("a", {"x": 1}, path)
    record("b", {"y": 2}, path)
    record("a", {"z": 3}, path)
    assert '"z": 3' in path.read_text()
    assert '"x": 1' in path.read_text()
    assert '"y": 2' in path.read_text()
    assert list(tmp_path.iterdir()) == [path]
