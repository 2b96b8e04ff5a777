"""The nets that see, measured on held-out people of the drawn world, where the truth about each picture is known.

Recognisers are asked about pairs that differ in one respect alone (pose, hair, light, …) and in all at once; the
ceiling of every figure here is 1, and its floor is what guessing gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from facegen.evaluation.judges import Judges
    from facegen.world.parameters import Scenes
    from facegen.world.render import Rendering

_HAIR = ("hair_style", "hair_color", "hair_r", "hair_g", "hair_b", "hair_length", "hair_volume", "hair_part")
_TURNS = ("yaw", "pitch", "roll")
_OLDER = 0.3  # of the span from 20 to 80 years
_SURE = 0.5  # the detector's own threshold


def verification(judges: Judges, first: Scenes, second: Scenes, size: int = 128) -> dict[str, dict[str, float]]:
    """AUC and TAR at FAR 1e-3 by row: recogniser and judge, by what differs between two pictures of a person.

    first and second: the same people, everything but the person drawn anew.
    """
    from facegen.evaluation.judges import ASSETS, load_network

    nets = {"recogniser": load_network(ASSETS / "pack" / "rec").to(judges.device), "judge": judges.likeness}
    crops = {name: _crops(scenes, size) for name, scenes in _varied(first, second)}
    rows = {}
    for name, net in nets.items():
        found = {what: _embedded(net, one.to(judges.device)) for what, one in crops.items()}
        base = found.pop("itself")
        for what, other in found.items():
            rows[f"{name}: {what}"] = _told_apart(base, other)
    return rows


def _varied(first: Scenes, second: Scenes) -> Iterator[tuple[str, Scenes]]:
    """The people as they are, and with one thing after the other as in their second pictures."""
    from facegen.world.parameters import EXPRESSION, GLASSES, LIGHT

    def taken(*names: str) -> Scenes:
        return first.with_values(**{name: second.column(name) for name in names})

    yield "itself", first
    yield "pose", taken(*_TURNS)
    yield "expression", taken(*(one.name for one in EXPRESSION))
    yield "hair", taken(*_HAIR)
    yield "light", taken(*(one.name for one in LIGHT))
    age = first.column("age")
    yield "ageing", first.with_values(age=torch.where(age < 0.5, age + _OLDER, age - _OLDER))
    glasses = torch.where(first.column("glasses") == 0, GLASSES.index("square"), 0)
    yield "glasses", first.with_values(glasses=glasses.float())
    yield "everything", second


def _crops(scenes: Scenes, size: int) -> Tensor:
    from facegen.face.warp import aligned_crops

    drawn = list(rendered(scenes, size))
    return torch.cat([aligned_crops(one.rgb, one.landmarks5) for one in drawn])


def _embedded(net: nn.Module, crops: Tensor) -> Tensor:
    return torch.cat([F.normalize(net(part * 2 - 1).float(), dim=1).cpu() for part in crops.split(64)])


def _told_apart(base: Tensor, other: Tensor) -> dict[str, float]:
    cosines = other @ base.T
    same = torch.eye(len(base), dtype=torch.bool)
    own, strangers = cosines[same], cosines[~same].sort()[0]
    threshold = strangers.quantile(0.999)
    below = torch.searchsorted(strangers, own)
    return {
        "AUC": float(below.double().mean() / len(strangers)),
        "TAR@1e-3": float((own > threshold).float().mean()),
        "same person": float(own.mean()),
    }


def detection(judges: Judges, scenes: Scenes, size: int = 128) -> dict[str, float]:
    """Share of the faces of portraits found at IoU 0.5, the mean overlap, and false faces a picture."""
    from facegen.training.detector import anchors, boxes_of, iou, suppress

    overlaps: list[float] = []
    wrong = 0
    centres, strides = anchors(size)[:2]
    for one in rendered(scenes, size):
        answer = judges.detector((one.rgb.to(judges.device) * 255 - 127.5) / 128)
        logits, distances, _ = (torch.cat(part, 1).float().cpu() for part in answer)
        for row, truth in enumerate(one.box):
            boxes = boxes_of(distances[row], centres, strides)
            shared = [iou(boxes[i], truth) for i in suppress(boxes, logits[row, :, 0].sigmoid(), _SURE)]
            overlaps.append(max(shared, default=0.0))
            wrong += len(shared) - int(overlaps[-1] >= 0.5)
    found = torch.tensor(overlaps)
    return {
        "found": float((found >= 0.5).float().mean()),
        "false faces": wrong / len(scenes),
        "overlap": float(found.mean()),
    }


def parsing(judges: Judges, scenes: Scenes, size: int = 128) -> dict[str, float]:
    """Mean F1 over the classes that are to be seen, F1 of the worst, and the share of pixels that are right."""
    from facegen.world.render import PARSING

    both, found, true = (torch.zeros(len(PARSING)) for _ in range(3))
    for one in rendered(scenes, size):
        seen = judges.parse(one.rgb).cpu()
        truth = one.parsing.long()
        both += torch.bincount(truth[seen == truth], minlength=len(PARSING))
        found += torch.bincount(seen.flatten(), minlength=len(PARSING))
        true += torch.bincount(truth.flatten(), minlength=len(PARSING))
    there = true > 0
    scores = 2 * both[there] / (found + true)[there]
    return {
        "mean F1": float(scores.mean()),
        "worst F1": float(scores.min()),
        "pixels right": float(both.sum() / true.sum()),
    }


def attributes(judges: Judges, scenes: Scenes, size: int = 128) -> dict[str, float]:
    """Share of all settled facts that the judge reads right, its worst kind, and what always saying the commonest
    value would get.
    """
    from facegen.world.facts import UNKNOWN, labels

    truth = labels(scenes)
    seen: dict[str, list[Tensor]] = {}
    for one in rendered(scenes, size):
        for kind, chances in judges.facts(one.rgb).items():
            seen.setdefault(kind, []).append(chances.argmax(1).cpu())
    right: dict[str, Tensor] = {}
    guessed = []
    for kind, parts in seen.items():
        settled = truth[kind] != UNKNOWN
        if bool(settled.any()):
            right[kind] = (torch.cat(parts) == truth[kind])[settled].float()
            guessed.append(torch.bincount(truth[kind][settled]).amax())
    told = torch.cat(list(right.values()))
    return {
        "facts right": float(told.mean()),
        "mean over kinds": float(torch.stack([one.mean() for one in right.values()]).mean()),
        "worst kind": float(min(one.mean() for one in right.values())),
        "guessing": float(torch.stack(guessed).sum() / len(told)),
    }


def rendered(scenes: Scenes, size: int, batch: int = 20) -> Iterator[Rendering]:
    """The scenes drawn `size` pixels wide, some at a time."""
    from facegen.world.render import render

    for rows in torch.arange(len(scenes)).split(batch):
        yield render(scenes[rows], size)
