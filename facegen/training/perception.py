"""Trains, measures and exports the small nets: ``python -m facegen.training.perception recogniser --minutes 20``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from facegen.errors import WrongRequest
from facegen.face.networks import network
from facegen.face.parse import small_net
from facegen.training.cache import Cache
from facegen.training.export import export, stem_of
from facegen.training.loop import Budget, LoopSettings, Objective, planned_steps, run, steps_for, wear_average
from facegen.training.record import MINI, record
from facegen.world.shading import PARSING

logger = logging.getLogger(__name__)
Maker = Callable[[nn.Module, Cache, Cache | None, int], Objective]


@dataclass(frozen=True)
class Stage:
    """One net's training: how the net and its objective are made, how the loop is set, and whether the net ships."""

    net: Mapping[str, object]
    objective: Maker
    settings: LoopSettings
    ships: bool = True


def _recogniser(net: nn.Module, cache: Cache, held_out: Cache | None, steps: int) -> Objective:
    from facegen.training.recogniser import RecogniserObjective, RecogniserSettings

    return RecogniserObjective(net, cache, held_out, RecogniserSettings(steps, seed=1))


def _judge(net: nn.Module, cache: Cache, held_out: Cache | None, steps: int) -> Objective:
    from facegen.training.augment import GENTLE
    from facegen.training.recogniser import RecogniserObjective, RecogniserSettings

    settings = RecogniserSettings(steps, margin=0.25, scale=20.0, wear=replace(GENTLE, gray=0.1, erase=0.3), seed=2)
    objective = RecogniserObjective(net, cache, held_out, settings)
    objective.name = "judge"  # type: ignore[misc]
    return objective


def _attributes(net: nn.Module, cache: Cache, held_out: Cache | None, steps: int) -> Objective:
    from facegen.training.judges import AttributeObjective, JudgeSettings

    return AttributeObjective(net, cache, held_out, JudgeSettings(seed=3))  # type: ignore[arg-type]


def _teacher(net: nn.Module, cache: Cache, held_out: Cache | None, steps: int) -> Objective:
    from facegen.training.judges import AttributeObjective, JudgeSettings

    objective = AttributeObjective(net, cache, held_out, JudgeSettings(shift=0.03, seed=113))  # type: ignore[arg-type]
    objective.name = "teacher"  # type: ignore[misc]
    return objective


def _parsing(net: nn.Module, cache: Cache, held_out: Cache | None, steps: int) -> Objective:
    from facegen.training.parsing import ParsingObjective, ParsingSettings

    return ParsingObjective(net, cache, held_out, ParsingSettings(seed=4))  # type: ignore[arg-type]


def _detector(net: nn.Module, cache: Cache, held_out: Cache | None, steps: int) -> Objective:
    from facegen.training.detector import DetectorObjective, DetectorSettings

    return DetectorObjective(net, cache, held_out, DetectorSettings(seed=5))  # type: ignore[arg-type]


def _points(net: nn.Module, cache: Cache, held_out: Cache | None, steps: int) -> Objective:
    from facegen.training.points import PointsObjective, PointsSettings

    return PointsObjective(net, cache, held_out, PointsSettings(seed=6))  # type: ignore[arg-type]


def _points68(net: nn.Module, cache: Cache, held_out: Cache | None, steps: int) -> Objective:
    from facegen.training.points68 import Points68Objective, Points68Settings

    return Points68Objective(net, cache, held_out, Points68Settings(seed=7))  # type: ignore[arg-type]


_FAST = LoopSettings(learning_rate=2e-3, warmup=200, weight_decay=0.05, clip=5.0, bfloat16=True)
STAGES: Mapping[str, Stage] = {
    "recogniser": Stage({"net": "recogniser"}, _recogniser, replace(_FAST, learning_rate=3e-3, seed=1)),
    "judge": Stage({"net": "judge"}, _judge, replace(_FAST, learning_rate=1.5e-3, seed=2)),
    "attributes": Stage({"net": "attributes"}, _attributes, replace(_FAST, seed=3)),
    # Larger than the judge, from another start: it teaches what the judge will judge, and does not ship.
    "teacher": Stage(
        {"net": "attributes", "widths": (24, 56, 112, 144), "hidden": 192},
        _teacher,
        replace(_FAST, seed=113),
        ships=False,
    ),
    "parsing": Stage(
        {"net": "parsing", "classes": len(PARSING), "detail": 8},
        _parsing,
        replace(_FAST, warmup=100, average=0.995, seed=4),
    ),
    "detector": Stage({"net": "detector"}, _detector, replace(_FAST, seed=5)),
    "points": Stage({"net": "points"}, _points, replace(_FAST, seed=6)),
    "points68": Stage({"net": "points", "size": 96, "count": 68}, _points68, replace(_FAST, warmup=50, seed=7)),
}


@dataclass(frozen=True)
class Places:
    """Where the pictures are, where the run is kept, and where the finished net goes (None: nowhere)."""

    pictures: Path
    held_out: Path | None
    run: Path
    assets: Path | None = MINI


def take_over(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Begin with the weights of an earlier net; what it did not have, such as a last class, keeps its fresh start.

    Raises WrongRequest where they belong to a net of other sizes.
    """
    own = net.state_dict()
    for name, value in weights.items():
        if name not in own or own[name].shape[1:] != value.shape[1:] or (value.ndim and len(value) > len(own[name])):
            raise WrongRequest(f"The finished net to begin with is of other sizes ({name}); begin without one.")
        if value.ndim:
            own[name][: len(value)] = value


def train(name: str, places: Places, budget: Budget, start: Path | None = None) -> dict[str, float]:
    """Train one stage (going on from its folder), export its net and record what was measured.

    ``start`` is the run folder of an earlier training whose net to begin with, or the folder of finished nets. A budget
    of seconds becomes a number of steps at the first call, which later calls keep.
    """
    stage = STAGES[name]
    cache = Cache(places.pictures)
    held_out = Cache(places.held_out) if places.held_out is not None else None
    torch.manual_seed(stage.settings.seed)
    net = network(stage.net)
    if start is not None and stem_of(name, start).with_suffix(".safetensors").is_file():
        take_over(net, small_net(stem_of(name, start), f"so {name} cannot go on").state_dict())
    elif start is not None:
        probe = stage.objective(net, cache, None, 1)
        wear_average(probe.module, start, only="net." if isinstance(probe.module, nn.ModuleDict) else "")
    steps = budget.steps or planned_steps(places.run)
    if steps is None:
        assert budget.seconds is not None
        steps = steps_for(stage.objective(net, cache, None, 1), places.run, 0.95 * budget.seconds, stage.settings)
    objective = stage.objective(net, cache, held_out, steps)
    logger.info("%s: %d pictures of %d people, %d steps", name, len(cache), len(cache.people), steps)
    measured = run(objective, places.run, Budget(steps), stage.settings)
    measured |= {"pictures": len(cache), "people": len(cache.people)}
    if places.assets is not None:
        if stage.ships:
            export(name, net.eval(), places.assets)
        record(name, measured, places.assets / "mini.json")
        if name == "recogniser" and "threshold_1e2" in measured:
            about = {"same_person": measured["threshold_1e2"]}
            (places.assets / "pack" / "pack.json").write_text(json.dumps(about) + "\n", "utf-8")
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the small nets of the embedded model's perception.")
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--pictures", type=Path, required=True, help="folder of a picture cache")
    parser.add_argument("--held-out", type=Path, help="folder of a cache of people who are never trained on")
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--assets", type=Path, help="folder for the finished net; default: nowhere")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--start", type=Path, help="run folder of an earlier training to begin with, or finished nets")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)  # a thread per training: two trainings on two cores disturb each other less
    torch.set_flush_denormal(True)
    seconds = options.minutes * 60 if options.minutes is not None else None
    places = Places(options.pictures, options.held_out, options.run, options.assets)
    logger.info("%s", train(options.stage, places, Budget(options.steps, seconds), options.start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
