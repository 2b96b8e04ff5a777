"""Which scheduler, how many steps and how much guidance a distilled LoRA wants, told by its name.

Such files do not say in their weights what they are; everybody goes by their names. Sources: the model cards of
latent-consistency/lcm-lora-*, h1t/TCD-*-LoRA, ByteDance/SDXL-Lightning and ByteDance/Hyper-SD.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facegen.errors import CheckpointBroken

OWN = "few"
"""The LoRA that a model may bring, as loras/few.safetensors beside its adapters; the fastest way wears it."""


ALONE = "few_steps.json"
"""Beside a model's adapters: how few steps it takes without any LoRA, as the fields of FewSteps."""


@dataclass(frozen=True)
class FewSteps:
    """scheduler: a name of facegen.schedulers; guidance: 1 is none."""

    scheduler: str
    steps: int
    guidance: float = 1.0

    def fields(self) -> dict[str, Any]:
        """As fields of a request."""
        return {
            "scheduler": self.scheduler,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }


def told_by(name: str | Path) -> FewSteps | None:
    """By the name of a LoRA's file, or of its folder where the file is called as all are; None for any other LoRA."""
    path = Path(name)
    generic = path.stem in ("pytorch_lora_weights", "adapter_model", "model")
    word = (path.parent.name if generic else path.stem).lower()
    parts = re.split(r"[^a-z0-9]+", word)
    said = re.search(r"(\d+)[-_ ]?steps?", word)
    steps = int(said[1]) if said else None
    if "lightning" in parts:
        return FewSteps("euler trailing", steps or 4)
    if "hyper" in parts:
        if "cfg" in parts:
            return FewSteps("ddim trailing", steps or 8, 5.0)
        return FewSteps("tcd", 1) if steps == 1 else FewSteps("ddim trailing", steps or 8)
    if "tcd" in parts:
        return FewSteps("tcd", steps or 4)
    if "lcm" in parts:
        return FewSteps("lcm", steps or 4)
    if word == OWN:  # facegen.training.distil's
        return FewSteps("ddim trailing", steps or 4)
    return None


def of_model(folder: Path) -> FewSteps | None:
    """What a model by itself takes the fastest way, if its folder says so. Raises CheckpointBroken."""
    path = folder / ALONE
    if not path.is_file():
        return None
    try:
        return FewSteps(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointBroken(
            f"{path} does not say scheduler, steps and guidance ({error}); delete it or get it anew."
        ) from error


def hurried(
    speed: str, folder: Path | None, loras: Mapping[str, Any] | None = None
) -> tuple[Mapping[str, Any], FewSteps | None]:
    """What a run of this speed wears, and what it wants; None for a run that is as long as it is asked for.

    speed: a name of facegen.economy.PRESETS; folder: of the model's adapters and LoRAs, None for a model without;
    loras: worn already, None where none can be worn. The fastest way wears the model's own where nothing else is
    worn, both fast ways take as few steps as the model says. Raises CheckpointBroken.
    """
    own = folder if speed in ("fast", "fastest") else None
    if own is not None and speed == "fastest" and loras is not None and not loras:
        loras = {OWN: 1.0} if (own / "loras" / f"{OWN}.safetensors").is_file() else {}
    found = wanted(loras or {})
    if found is None and own is not None:
        found = of_model(own)
    return loras or {}, found


def wanted(loras: Mapping[str, Any] | Iterable[str]) -> FewSteps | None:
    """What the first of these LoRAs wants that wants anything; one worn at strength 0 wants nothing."""
    for name in loras:
        if isinstance(loras, Mapping) and loras[name] == 0:
            continue
        found = told_by(name)
        if found is not None:
            return found
    return None
