"""What the judges see in the pictures of several people, and figures made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from facegen.evaluation.judges import Judges
    from facegen.world.facts import Fact

TURNS = ("yaw", "pitch", "roll")
MOST_FACTS = 5


@dataclass(frozen=True, eq=False)
class Seen:
    """Of N pictures: who it is (N, D), pose and expression in units of their spread, what the whole looks like."""

    who: Tensor
    pose: Tensor  # (N, 3)
    expression: Tensor  # (N, units)
    features: Tensor  # (N, F)


def look(judges: Judges, pictures: Tensor, scale: Mapping[str, Tensor] | None, points: Tensor | None = None) -> Seen:
    """What the judges see in pictures (N, 3, H, W); scale None: pose and expression in their own units."""
    from facegen.world.parameters import EXPRESSION

    answers = judges.attributes(pictures)
    pose = torch.stack([answers[name].cpu() for name in TURNS], 1)
    units = [one.name for one in EXPRESSION if one.name in answers]
    expression = torch.stack([answers[name].cpu() for name in units], 1)
    if scale is not None:
        pose, expression = pose / scale["pose"], expression / scale["expression"]
    return Seen(judges.embed(pictures, points).cpu(), pose, expression, judges.features(pictures).cpu())


def copied(made: Tensor, photo: Tensor, others: Tensor) -> float:
    """How much nearer pictures (P, N, D) are to the photo (N, D) than to the person's other pictures (P, N, D): 0 not
    at all, 1 wholly. The picture whose caption was asked for is left out: it is meant to be near.
    """
    to_photo = (made - photo).norm(dim=2)  # (P, N)
    apart = (made[:, None] - others[None]).norm(dim=3)  # (P, P, N)
    elsewhere = ~torch.eye(len(made), dtype=torch.bool)
    return float(1 - to_photo.mean() / apart[elsewhere].mean().clamp(min=1e-6))


def spread_of_looks(judges: Judges, pictures: Sequence[Tensor]) -> float:
    """Mean feature distance of two pictures of one person."""
    pairs = [(a, b) for place, a in enumerate(pictures) for b in pictures[:place]]
    return float(torch.cat([judges.distance(a, b).cpu() for a, b in pairs]).mean())


def obedience(
    judges: Judges, pictures: Sequence[Tensor], asked: Sequence[Sequence[tuple[Fact, ...]]]
) -> dict[str, float]:
    """The share of the facts asked for that the judge finds: in all, and by the number asked for."""
    from facegen.world.facts import probability

    hits: dict[int, list[bool]] = {}
    for part, own in zip(pictures, asked, strict=True):
        shown = judges.facts(part)
        for place, facts in enumerate(own):
            known = [fact for fact in facts if fact.kind in shown]
            found = [bool(probability(fact, shown[fact.kind][place]) > 0.5) for fact in known]
            hits.setdefault(min(len(facts), MOST_FACTS), []).extend(found)
    everything = [hit for found in hits.values() for hit in found]
    by_count = {f"{count} asked": sum(found) / len(found) for count, found in sorted(hits.items()) if found}
    return {"obeyed": sum(everything) / max(1, len(everything)), **by_count}
