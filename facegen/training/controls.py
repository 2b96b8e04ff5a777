"""The stages that teach controls beside a finished base model: `facegen train mini --stages expression landmarks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from facegen.models.geometry import KINDS
from facegen.training.loop import Budget, LoopSettings, run
from facegen.training.record import record

if TYPE_CHECKING:
    from facegen.training.mini import Workshop

STEPS = 4000
SETTINGS = LoopSettings(learning_rate=1e-3, warmup=100, weight_decay=0.01, average=0.998, bfloat16=True, seed=12)
STAGES = ("expression", *KINDS)


def train_control(name: str, shop: Workshop) -> None:
    """One control beside the base and the identity adapter that lie in the output folder; then written beside them."""
    from facegen.adapter import load_adapter
    from facegen.adapters.expression import Expression
    from facegen.models.base import Model
    from facegen.models.geometry import Geometry
    from facegen.training.mini import learn_from
    from facegen.training.objectives.controls import ControlObjective

    model = Model.from_pretrained(shop.output, dtype=torch.float32, device="cpu")
    person = load_adapter(shop.output / "adapters" / "ip_adapter_faceid", model)
    person.modules().requires_grad_(False)
    control: Any = Expression.fresh(model) if name == "expression" else Geometry.fresh(name, model)
    lessons, held_out = (learn_from(shop, place, model.vae) for place in (shop.pictures, shop.held_out))
    objective = ControlObjective(model, control, lessons, person=person, held_out=held_out)
    measured = run(objective, shop.work / name, Budget(max(1, round(STEPS * shop.budget))), SETTINGS)
    folder = shop.output / "adapters" / name if name == "expression" else shop.output / "controls"
    control.save(folder)
    record(name, measured, shop.output / "mini.json")
