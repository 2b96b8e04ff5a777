"""The judge of attributes: what a whole picture shows, learnt from the parameters that it was drawn from.

The judge of likeness is trained by :class:`facegen.training.recogniser.RecogniserObjective` with another net.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.face.networks import AMOUNTS, CATEGORIES, KINDS, VALUES, AttributeJudge
from facegen.face.warp import warp
from facegen.training.augment import GENTLE, Wear, uniform, wear
from facegen.training.cache import Cache, shuffled
from facegen.training.loop import Objective
from facegen.training.muon import muon_groups
from facegen.world.facts import UNKNOWN, labels
from facegen.world.parameters import GLASSES, Scenes

# What changes its sign, and what changes places, in a mirrored picture.
_MIRRORED = ("gaze_x", "yaw", "roll", "shift_x", "light_x")
_SWAPPED = ("eye_close_left", "eye_close_right")


@dataclass(frozen=True)
class JudgeSettings:
    batch: int = 96
    wear: Wear = GENTLE
    shift: float = 0.04  # of the side; the pictures to be judged are not centred like the world's
    seed: int = 0


def targets_of(scenes: Scenes) -> dict[str, Tensor]:
    """What :class:`AttributeJudge` should answer: class indices (B,) int64, amounts and values (B,) float32.

    And, as ``seen.{name}``, whether the picture shows hair enough to tell (B,), 0 or 1.
    """
    categories = {name: scenes.column(name).round().long() for name in CATEGORIES}
    numbers = {name: scenes.column(name) for name in (*AMOUNTS, *VALUES)}
    facts = labels(scenes)
    seen = {f"seen.{name}": (facts[name] != UNKNOWN).float() for name in ("hair_style", "hair_color")}
    return {**categories, **numbers, **seen, **{f"fact.{kind}": facts[kind].long() for kind in KINDS}}


def mirrored(scenes: Scenes, which: Tensor) -> Scenes:
    """The scenes of pictures of which those in ``which`` (B,) bool were mirrored, as far as the judge is asked."""
    left, right = (scenes.column(name) for name in _SWAPPED)
    changes = {name: torch.where(which, -scenes.column(name), scenes.column(name)) for name in _MIRRORED}
    changes[_SWAPPED[0]] = torch.where(which, right, left)
    changes[_SWAPPED[1]] = torch.where(which, left, right)
    return scenes.with_values(**changes)


def visible(targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights (B,) of the categories: colours of what is not worn, and hair that nobody can see, are not asked."""
    return dict.fromkeys(CATEGORIES, torch.ones(len(targets["hat"]))) | {
        "hair_style": targets["seen.hair_style"],
        "hair_color": targets["seen.hair_color"],
        "hat_color": (targets["hat"] > 0).float(),
        "glasses_color": ((targets["glasses"] > 0) & (targets["glasses"] < GLASSES.index("sunglasses"))).float(),
    }


class AttributeObjective(Objective):
    """Trains an :class:`AttributeJudge`."""

    name = "attributes"

    def __init__(self, net: AttributeJudge, cache: Cache, held_out: Cache | None, settings: JudgeSettings) -> None:
        self.cache, self.held_out, self.settings = cache, held_out, settings
        self.module: AttributeJudge = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Muon moves what lies between the first layer and the answers."""
        return muon_groups(self.module, ("body.0", "head"))

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = shuffled(len(self.cache), self.settings.batch, step, self.settings.seed)
        b, size = len(rows), 128
        pictures = self.cache.rgb(rows)
        shift = uniform((b, 2), -self.settings.shift, self.settings.shift, generator) * size
        matrices = torch.cat([torch.eye(2).expand(b, 2, 2) * (size / pictures.shape[-1]), shift[:, :, None]], 2)
        pictures = warp(pictures, matrices, size, padding="border")
        flip = torch.rand(b, generator=generator) < 0.5
        pictures = torch.where(flip[:, None, None, None], pictures.flip(3), pictures)
        pictures = wear(pictures, self.settings.wear, generator) * 2 - 1
        targets = targets_of(mirrored(self.cache.scenes(rows), flip))
        targets["shift_x"] = targets["shift_x"] + shift[:, 0] / (size / 2)
        targets["shift_y"] = targets["shift_y"] - shift[:, 1] / (size / 2)
        return {"pictures": pictures.contiguous(memory_format=torch.channels_last), **targets}

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        answers = self.module(batch["pictures"])
        weights = visible(batch)
        kinds = torch.zeros(())
        for name in CATEGORIES:
            weight = weights[name].to(answers[name])
            wrong = F.cross_entropy(answers[name], batch[name], reduction="none")
            kinds = kinds.to(weight) + (wrong * weight).sum() / weight.sum().clamp(min=1)
        facts = torch.zeros(()).to(kinds)
        for kind in KINDS:
            truth = batch[f"fact.{kind}"]
            wrong = F.cross_entropy(answers[f"fact.{kind}"], truth, ignore_index=UNKNOWN, reduction="sum")
            facts = facts + wrong / (truth != UNKNOWN).sum().clamp(min=1)
        amounts = torch.stack(
            [F.binary_cross_entropy_with_logits(answers[name], batch[name].clamp(0, 1)) for name in AMOUNTS]
        ).sum()
        # In units of each value's usual spread, about a third of its range's half.
        values = torch.stack([(answers[n] - batch[n]).square().mean() / _spread(n) ** 2 for n in VALUES]).sum()
        return {
            "loss": kinds + facts + amounts + 0.5 * values,
            "kinds": kinds,
            "facts": facts,
            "amounts": amounts,
            "values": values,
        }

    def figures(self) -> dict[str, float]:
        return {} if self.held_out is None else judge_figures(self.module, self.held_out)


def _spread(name: str) -> float:
    return {"yaw": 0.28, "pitch": 0.13, "roll": 0.08, "shift_x": 0.05, "shift_y": 0.05, "zoom": 0.1}.get(name, 0.4)


@torch.no_grad()
def judge_figures(net: AttributeJudge, cache: Cache, batch: int = 128) -> dict[str, float]:
    """Accuracy of each category and fact, correlation of each amount and value, on the cache's pictures."""
    answers: dict[str, list[Tensor]] = {}
    truths: dict[str, list[Tensor]] = {}
    device = next(net.parameters()).device
    for rows in torch.arange(len(cache)).split(batch):
        for name, answer in net((cache.rgb(rows) * 2 - 1).to(device)).items():
            answers.setdefault(name, []).append(answer.float().cpu())
        for name, target in targets_of(cache.scenes(rows)).items():
            truths.setdefault(name, []).append(target)
    truth = {name: torch.cat(parts) for name, parts in truths.items()}
    seen = visible(truth)
    figures: dict[str, float] = {}
    for name, parts in answers.items():
        answer = torch.cat(parts)
        if name in CATEGORIES:
            right = (answer.argmax(1) == truth[name]).float()
            figures[f"accuracy_{name}"] = ((right * seen[name]).sum() / seen[name].sum().clamp(min=1)).item()
            continue
        if name.startswith("fact."):
            known = truth[name] != UNKNOWN
            right = (answer.argmax(1) == truth[name])[known].float()
            figures[f"accuracy_{name}"] = right.mean().nan_to_num().item()
            continue
        value = answer.sigmoid() if name in AMOUNTS else answer
        pair = torch.stack([value, truth[name]])
        figures[f"correlation_{name}"] = torch.corrcoef(pair)[0, 1].nan_to_num().item()
    return {name: round(value, 4) for name, value in figures.items()}
