"""Every training computes where it is told to: all its nets and tables move there, and what it hears is the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen.adapters.expression import Expression
from facegen.errors import WrongRequest
from facegen.face.networks import AttributeJudge, DetectorNet, RecogniserNet, network
from facegen.lending import moved
from facegen.models.alignment import Aligner
from facegen.models.geometry import ALL, Geometry
from facegen.models.swap import KIND, Swap
from facegen.training.cache import Cache
from facegen.training.critics import BeholderObjective
from facegen.training.diffusion import DiffusionObjective, DiffusionSettings, Lessons, new_adapters
from facegen.training.distil import DistilObjective, DistilSettings
from facegen.training.loop import Budget, LoopSettings, Objective, run, training_device, use_device
from facegen.training.objectives.controls import ControlObjective, ControlSettings
from facegen.training.objectives.restore import RestoreObjective, RestoreSettings
from facegen.training.objectives.swap import SwapObjective, SwapSettings, TwinLessons
from facegen.training.perception import STAGES
from facegen.training.reader import LatentReader, LatentReaderObjective, ReaderSettings, WordsObjective
from facegen.training.reward import RewardObjective, RewardSettings
from facegen.training.shapes import ShapeReaderObjective, new_reader
from facegen.training.tokens import TokensObjective
from facegen.training.vae import AutoencoderObjective, DecoderObjective, VAEObjective, VAESettings, encode_all, new_vae
from tests.training.pretended import GPU, Generator, pretended_gpu

SIZES = DiffusionSettings(
    channels=(32, 64), text_width=128, text_layers=1, queries=2, resampler_depth=1, rank=2, batch=6,
    ways={"prompt": 0.4, "ip_adapter_faceid": 0.3, "instantid": 0.3},
)  # fmt: skip
VAE = VAESettings(channels=(16, 16, 32, 32), latent_channels=4, batch=2)


@dataclass(frozen=True, eq=False)
class Bench:
    """What objectives are made of."""

    teaching: Callable[[DiffusionSettings], DiffusionObjective]
    pictures: Cache

    def taught(self, **settings: Any) -> DiffusionObjective:
        objective = self.teaching(replace(SIZES, **settings))
        torch.manual_seed(2)
        objective.reader = LatentReader(4, 128).eval().requires_grad_(False)
        return objective

    def way(self, name: str) -> DiffusionObjective:
        return self.taught(ways={name: 1.0})

    def autoencoder(self, kind: type[DecoderObjective]) -> DecoderObjective:
        vae = new_vae(VAE)
        latents = encode_all(vae, self.pictures)
        painted = latents[:4] + 1 if kind is DecoderObjective else None
        return kind(vae, self.pictures, None, VAE, recogniser(), latents, teacher(), painted, detector())

    def control(self, name: str) -> ControlObjective:
        lessons, model = self.lessons, self.taught().model
        person = new_adapters(model, 128, SIZES)["ip_adapter_faceid"]
        person.modules().requires_grad_(False)
        control: Any = Expression.fresh(model) if name == "expression" else Geometry.fresh(name, model)
        reader = new_reader(lessons).eval().requires_grad_(False)
        return ControlObjective(
            model, control, lessons, ControlSettings(batch=4, with_person=1.0), person=person, teacher=reader
        )

    @property
    def lessons(self) -> Lessons:
        return self.taught().lessons

    def tokens(self) -> TokensObjective:
        adapters = self.taught(queries=4).adapters
        return TokensObjective(adapters["instantid"], adapters["ip_adapter_faceid"], self.lessons.embeddings)  # type: ignore[arg-type]

    def swap(self) -> SwapObjective:
        base = self.taught()
        latents = torch.randn(4, 4, 16, 16)
        people = torch.nn.functional.normalize(torch.randn(len(base.lessons.latents), 128), dim=1)
        learnt = TwinLessons(base.lessons, latents, torch.arange(4), people)
        person = base.adapters["ip_adapter_faceid"]
        shapes = new_reader(base.lessons).eval().requires_grad_(False)
        return SwapObjective(
            base.model, Swap.fresh(KIND, base.model), person, learnt, SwapSettings(batch=3), reader=base.reader,
            shapes=shapes,
        )  # fmt: skip

    def restore(self) -> RestoreObjective:
        base = self.taught()
        aligner = Aligner.fresh(base.model, 128, width=16, deep=16, codes=8, code=4)
        return RestoreObjective(base.model, aligner, base.lessons, RestoreSettings(batch=2), reader=base.reader)


def recogniser() -> RecogniserNet:
    return RecogniserNet(16, widths=(8, 8, 8), size=32).eval().requires_grad_(False)


def teacher() -> AttributeJudge:
    return AttributeJudge(widths=(8, 8, 16, 16), hidden=16).eval().requires_grad_(False)


def detector() -> DetectorNet:
    net = DetectorNet(widths=(4, 4, 8, 8, 8), neck=8).eval().requires_grad_(False)
    torch.nn.init.constant_(net.score.bias, 4.0)  # untrained it sees no faces; now it sees them anywhere
    return net


def rewarded(bench: Bench) -> RewardObjective:
    seeing = RecogniserNet(widths=(8, 8, 16)).eval().requires_grad_(False)
    settings = RewardSettings(painted=3, walks=(2,), guidance=2.0, last=1.0)
    return RewardObjective(bench.way("ip_adapter_faceid"), seeing, detector(), settings, teacher())


OBJECTIVES: Mapping[str, Callable[[Bench], Objective]] = {
    **{
        name: lambda bench, stage=stage: stage.objective(network(stage.net), bench.pictures, None, 9)
        for name, stage in STAGES.items()
    },
    "vae": lambda bench: VAEObjective(new_vae(VAE), bench.pictures, None, VAE, recogniser()),
    "decoder": lambda bench: bench.autoencoder(DecoderObjective),
    "autoencoder": lambda bench: bench.autoencoder(AutoencoderObjective),
    "reader": lambda bench: LatentReaderObjective(LatentReader(4, 128), bench.lessons, None, ReaderSettings(batch=8)),
    "shapes": lambda bench: ShapeReaderObjective(
        new_reader(bench.lessons), bench.lessons, None, ReaderSettings(batch=8)
    ),
    "words": lambda bench: WordsObjective(
        (base := bench.taught()).model,
        base.adapters["arc2face"],  # type: ignore[arg-type]
        base.lessons,
        batch=4,
    ),
    "prompt": lambda bench: bench.way("prompt"),
    "ip_adapter_faceid": lambda bench: bench.way("ip_adapter_faceid"),
    "tokens": lambda bench: bench.tokens(),
    "instantid": lambda bench: bench.taught(ways={"instantid": 1.0}, base=False),
    "reward": rewarded,
    "critic": lambda bench: BeholderObjective(
        (base := bench.taught()).model,
        teacher(),
        recogniser(),
        detector(),
        base.lessons.latents,
        base.lessons.latents + 1,
        batch=3,
    ),
    "distil": lambda bench: DistilObjective(
        bench.taught(base=False), DistilSettings(rank=4, batch=6, walks=(2, 3), ways=SIZES.ways)
    ),
    "expression": lambda bench: bench.control("expression"),
    "geometry": lambda bench: bench.control(ALL),
    "swap": Bench.swap,
    "restore": Bench.restore,
}


@pytest.fixture(scope="module")
def bench(
    tiny_teaching: Callable[[DiffusionSettings], DiffusionObjective],
    draw_cache: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bench:
    return Bench(tiny_teaching, Cache(draw_cache(tmp_path_factory.mktemp("pictures"), people=3, pictures=3)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_is_left_on_the_cpu(name: str, bench: Bench) -> None:
    torch.manual_seed(3)
    objective = OBJECTIVES[name](bench)
    objective.module.train()
    random = torch.get_rng_state()
    batch = objective.batch(0, torch.Generator().manual_seed(4))
    before = {part: value.clone() for part, value in objective.module.state_dict().items()}
    with torch.no_grad():
        here = objective.loss(batch, 0, torch.Generator().manual_seed(5))
    objective.module.load_state_dict(before)  # normalisations remember what they saw
    torch.set_rng_state(random)
    with pretended_gpu() as gpu:
        objective.to(GPU)
        assert all(gpu.has(one) for one in objective.module.state_dict().values())
        generator = Generator()
        generator.manual_seed(5)
        there = objective.loss(moved(batch, GPU), 0, generator)
        assert gpu.has(there["loss"])
    there["loss"].backward()
    assert any(one.grad is not None and bool(one.grad.any()) for one in objective.module.parameters())
    assert set(here) == set(there)
    for part, value in here.items():
        assert float(there[part].detach()) == pytest.approx(float(value), rel=2e-3, abs=1e-4), part


def test_what_is_mixed_with_the_cpu_is_seen() -> None:
    table = torch.arange(4.0)
    with pretended_gpu() as gpu:
        there = table.to(GPU)
        assert there.device == GPU
        assert table.device.type == there.cpu().device.type == "cpu"
        assert gpu.has(there * 2 + torch.zeros(()))
        for wrong in (lambda: there + table, lambda: table[there.long()], lambda: torch.cat([there, table])):
            with pytest.raises(RuntimeError, match="cpu"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, generator=torch.Generator(), device=GPU)


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    yield
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(own_environment: None) -> None:
    with pytest.raises(WrongRequest, match="No CUDA device"):
        use_device("cuda")
    use_device("cpu")
    assert training_device() == torch.device("cpu")


class Weighed(Objective):
    """Learns the mean of numbers that are drawn."""

    name = "weighed"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(3, 3)
        self.drawn_by: set[int] = set()

    def batch(self, step: int, generator: torch.Generator) -> tuple[Tensor, int]:
        return torch.randn(4, 3, generator=generator) + step, os.getpid()

    def loss(self, batch: tuple[Tensor, int], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        self.drawn_by.add(batch[1])
        return {"loss": (self.module(batch[0]) - torch.rand(3, generator=generator)).square().mean()}


def test_batches_that_others_draw_are_the_same_ones(tmp_path: Path) -> None:
    settings = LoopSettings(warmup=2, accumulate=2)
    alone, ahead = Weighed(), Weighed()
    run(alone, tmp_path / "alone", Budget(steps=7), settings)
    run(ahead, tmp_path / "ahead", Budget(steps=4), replace(settings, workers=2))
    assert alone.drawn_by == {os.getpid()}
    assert len(ahead.drawn_by) == 2
    assert os.getpid() not in ahead.drawn_by
    # The schedule of four steps ends lower; a run that goes on begins with the batch of its next step.
    again, further = Weighed(), Weighed()
    run(again, tmp_path / "again", Budget(steps=4), settings)
    assert torch.equal(again.module.weight, ahead.module.weight)  # type: ignore[arg-type]
    run(further, tmp_path / "ahead", Budget(steps=7), replace(settings, workers=2))
    run(again, tmp_path / "again", Budget(steps=7), settings)
    assert torch.equal(again.module.weight, further.module.weight)  # type: ignore[arg-type]
