"""The stages that teach controls beside a finished model: `facegen train mini --stages shapes expression geometry`.

"geometry" is one net that follows every kind; a kind can also have one of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from facegen.models.geometry import ALL, KINDS, Geometry
from facegen.training.loop import Budget, LoopSettings, run
from facegen.training.record import record

if TYPE_CHECKING:
    from facegen.training.mini import Workshop
    from facegen.training.objectives.controls import ControlObjective

STEPS = 4000
SHAPES_STEPS = 2000
SETTINGS = LoopSettings(learning_rate=8e-4, warmup=100, weight_decay=0.01, average=0.998, bfloat16=True, seed=12)
STAGES = ("expression", ALL, *KINDS)


def train_shapes(shop: Workshop) -> None:
    """The controls' teacher: the small net that reads expressions and points off latents; not part of the model."""
    from facegen.training.mini import READER_SETTINGS, learn_from
    from facegen.training.reader import ReaderSettings
    from facegen.training.shapes import ShapeReaderObjective, new_reader

    lessons, held_out = learn_from(shop, shop.pictures), learn_from(shop, shop.held_out)
    torch.manual_seed(READER_SETTINGS.seed)
    objective = ShapeReaderObjective(new_reader(lessons, shop.work / "reader"), lessons, held_out, ReaderSettings())
    steps = max(1, round(SHAPES_STEPS * shop.budget))
    measured = run(objective, shop.work / "shapes", Budget(steps), READER_SETTINGS)
    record("shapes", measured, shop.output / "mini.json")


def control_objective(name: str, shop: Workshop, folder: Path) -> ControlObjective:
    """One control beside the base and the identity adapter that lie in the output folder, as before its own run.

    folder: where that run is kept, and the maps it learns from. The teacher is that of the stage "shapes", if it ran.
    """
    from facegen.adapter import load_adapter
    from facegen.adapters.expression import Expression
    from facegen.training.maps import MAPPED, maps_for
    from facegen.training.mini import opened
    from facegen.training.objectives.controls import ControlObjective
    from facegen.training.shapes import finished_reader

    model, lessons, held_out = opened(shop)
    person = load_adapter(shop.output / "adapters" / "ip_adapter_faceid", model)
    person.modules().requires_grad_(False)
    control: Any = Expression.fresh(model) if name == "expression" else Geometry.fresh(name, model)
    teacher = finished_reader(lessons, shop.work / "shapes")
    maps = None
    if name in (ALL, *MAPPED):
        maps = maps_for(lessons.pictures, folder / "maps.safetensors")
    return ControlObjective(model, control, lessons, person=person, held_out=held_out, teacher=teacher, maps=maps)


def train_control(name: str, shop: Workshop) -> None:
    """One control beside the base and the identity adapter in the output folder; then written beside them."""
    objective = control_objective(name, shop, shop.work / name)
    measured = run(objective, shop.work / name, Budget(max(1, round(STEPS * shop.budget))), SETTINGS)
    write_control(objective, shop.output)
    record(name, measured, shop.output / "mini.json")


def write_control(objective: ControlObjective, output: Path) -> Path:
    """Write what was learnt in float16 beside the model in ``output``; returns the folder or file."""
    control = objective.control
    if isinstance(control, Geometry):
        return control.save(output / "controls")
    return control.save(output / "adapters" / control.name, dtype=torch.float16)
