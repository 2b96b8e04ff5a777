"""The stage that teaches a swap beside a finished base model: `facegen train mini --stages swap`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from facegen.training.loop import Budget, LoopSettings, run
from facegen.training.record import record

if TYPE_CHECKING:
    from facegen.training.cache import Cache
    from facegen.training.mini import Workshop
    from facegen.training.objectives.swap import SwapObjective

STEPS = 6000
TWINS, HELD_OUT_TWINS = 20_000, 240
SETTINGS = LoopSettings(
    learning_rate=8e-4, warmup=50, weight_decay=0.01, average=0.998, bfloat16=True, seed=14
)  # fmt: skip


def swap_objective(shop: Workshop, twins: Cache, held_out: Cache | None = None) -> SwapObjective:
    """The swap before it has learnt, beside the base and the adapter that lie in the output folder.

    It is also told what the stage "shapes" learnt to read, if that ran.
    """
    from facegen.adapter import load_adapter
    from facegen.models.base import Model
    from facegen.models.swap import BESIDE, KIND, Swap
    from facegen.training.mini import finished_reader, learn_from
    from facegen.training.objectives.swap import SwapObjective, TwinLessons
    from facegen.training.shapes import finished_reader as finished_shapes
    from facegen.training.twins import twin_latents

    model = Model.from_pretrained(shop.output, dtype=torch.float32, device="cpu")
    person = load_adapter(shop.output / "adapters" / BESIDE, model)

    def learnt(place: Path, drawn: Cache) -> TwinLessons:
        return TwinLessons.of(learn_from(shop, place, model.vae), drawn, twin_latents(model.vae, drawn))

    lessons = learnt(shop.pictures, twins)
    measured = None if held_out is None else learnt(shop.held_out, held_out)
    return SwapObjective(
        model,
        Swap.fresh(KIND, model),
        person,
        lessons,
        held_out=measured,
        reader=finished_reader(shop, lessons.lessons),
        shapes=finished_shapes(lessons.lessons, shop.work / "shapes"),
    )


def train_swap(shop: Workshop) -> None:
    """Draw the twins, teach the ControlNet, write it beside the other controls."""
    from facegen.training.cache import Cache
    from facegen.training.twins import render_twins

    def drawn(pictures: Path, count: int) -> Cache:
        folder = shop.work / f"twins_{pictures.name}"
        return render_twins(Cache(pictures), folder, max(1, round(count * min(1.0, shop.budget))), shop.seed)

    objective = swap_objective(shop, drawn(shop.pictures, TWINS), drawn(shop.held_out, HELD_OUT_TWINS))
    measured = run(objective, shop.work / "swap", Budget(max(1, round(STEPS * shop.budget))), SETTINGS)
    objective.swap.save(shop.output / "controls")
    record("swap", measured, shop.output / "mini.json")
