"""The stage that teaches the restoring of damaged faces: `facegen train mini --stages restore`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from facegen.training.loop import Budget, LoopSettings, run
from facegen.training.record import record

if TYPE_CHECKING:
    from facegen.training.mini import Workshop

STEPS = 3000
SETTINGS = LoopSettings(learning_rate=2e-3, warmup=50, weight_decay=0.01, average=0.99, bfloat16=True, seed=13)


def train_restore(shop: Workshop) -> None:
    """The aligner of damaged faces' latents beside the frozen autoencoder; then written beside the controls."""
    from facegen.models.alignment import Aligner
    from facegen.training.mini import finished_reader, opened
    from facegen.training.objectives.restore import RestoreObjective

    model, lessons, held_out = opened(shop)
    aligner = Aligner.fresh(model, lessons.embeddings.shape[1])
    reader = finished_reader(shop, lessons)
    objective = RestoreObjective(model, aligner, lessons, reader=reader, held_out=held_out)
    measured = run(objective, shop.work / "restore", Budget(max(1, round(STEPS * shop.budget))), SETTINGS)
    aligner.save(shop.output / "controls" / "restore")
    record("restore", measured, shop.output / "mini.json")
