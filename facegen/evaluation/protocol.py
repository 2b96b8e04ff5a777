"""Is it the same person, and was the prompt obeyed: the identity adapters measured on people who were never trained on.

The face world draws each held-out person twice. The first picture is the reference that an adapter gets; the second,
with everything but the person drawn anew, shows what the judge gives two true pictures of one person (the ceiling).
Pairs of different people's pictures are the floor and set the threshold. The judge's net conditions nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.errors import WrongRequest
from facegen.files import write_json

if TYPE_CHECKING:
    from facegen.adapter import Adapter
    from facegen.conditions import Condition, LoraCondition
    from facegen.evaluation.judges import Judges
    from facegen.face.head import Head
    from facegen.models.base import Model
    from facegen.world.parameters import Scenes

ADAPTERS = ("none", "arc2face", "instantid", "ip_adapter_faceid")
POSED = "+pose"  # behind the name of an adapter that follows key points: they are turned to the pose of what is asked
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What is measured: `prompts` pictures of each of `people` held-out people, by each adapter ("none": no face)."""

    model: str = "mini"
    adapters: tuple[str, ...] = ADAPTERS
    people: int = 200
    prompts: int = 2
    steps: int = 20
    guidance: float = 3.0
    seed: int = 0
    batch: int = 20
    scheduler: str = "model"


@dataclass(frozen=True)
class Row:
    """likeness: mean cosine of picture and reference by the judge; tar: share of pictures above the threshold.

    obeyed: share of the prompts' attributes that the judge finds; found: share of pictures with a face in them.
    """

    name: str
    likeness: float
    tar: float
    obeyed: float
    found: float


@dataclass(frozen=True)
class Result:
    """The table; ceiling: a second render of each person, whose obedience is the judge's own accuracy."""

    plan: Plan
    ceiling: Row
    floor: float
    threshold: float
    rows: tuple[Row, ...] = field(default=())

    def __str__(self) -> str:
        head = f"{'':20}{'likeness':>10}{'TAR@1e-2':>10}{'prompt':>10}{'face':>10}"
        lines = [
            f"{row.name:20}{row.likeness:10.3f}{row.tar:10.1%}{row.obeyed:10.1%}{row.found:10.1%}"
            for row in (self.ceiling, *self.rows)
        ]
        plan = self.plan
        told = (
            f"{plan.people} held-out people x {plan.prompts} prompts, {plan.steps} steps, guidance {plan.guidance}; "
            f"strangers {self.floor:.3f}, threshold at FAR 1e-2 {self.threshold:.3f}"
        )
        return "\n".join([told, head, *lines])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Cast:
    """The people: pictures (N, 3, H, W), their points (N, 5, 2), who they are by the judge (N, J)."""

    pictures: Tensor
    points: Tensor
    judged: Tensor

    @cached_property
    def embeddings(self) -> Tensor:
        """(N, D), RAW, by the pack's recogniser: what the adapters are given."""
        from facegen.evaluation.judges import ASSETS, load_network
        from facegen.face.warp import aligned_crops

        net = load_network(ASSETS / "pack" / "rec")
        return torch.cat([net(part * 2 - 1) for part in aligned_crops(self.pictures, self.points).split(64)])

    @cached_property
    def heads(self) -> list[Head]:
        """The heads that the pictures show, by the pack's 68 points."""
        from facegen.face.head import fit
        from facegen.face.landmarks import LandmarkFinder

        found = LandmarkFinder.from_pretrained().located(self.pictures.mean(1, keepdim=True), self.points)
        return [fit(one.numpy()) for one in found]

    def turned(self, rows: Tensor, pose: Tensor) -> Tensor:
        """The five points (B, 5, 2) of the people in these rows (B,) as seen in these poses (B, columns of POSE)."""
        from facegen.models.geometry import posed_points
        from facegen.world.parameters import POSE

        size = (self.pictures.shape[-2], self.pictures.shape[-1])
        seen = [
            # Half a bit beyond a limit is still the limit.
            posed_points(
                {part.name: min(max(value, part.low), part.high) for part, value in zip(POSE, one, strict=True)},
                size,
                self.heads[row],
            )
            for row, one in zip(rows.tolist(), pose.tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack(seen))


def run(
    model: str = "mini",
    adapters: Sequence[str] = ADAPTERS,
    people: int = 200,
    prompts: int = 2,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
    output: Path | None = None,
    on_progress: Progress | None = None,
) -> Result:
    """Measure and, with `output`, write the table as JSON. Raises WrongRequest, WeightsMissing, OutputUnwritable."""
    from facegen.evaluation.judges import load_judges
    from facegen.models.base import Model

    if people < 2 or prompts < 1:
        raise WrongRequest(f"At least 2 people and 1 prompt are needed, not {people} and {prompts}.")
    plan = Plan(model, tuple(adapters), people, prompts, steps, guidance, seed)
    judges = load_judges()
    base = Model.from_pretrained(model)
    loaded = {name: load(name, base) for name in plan.adapters}
    with torch.no_grad():
        result = _measure(plan, judges, base, loaded, on_progress or (lambda done, total: None))
    if output is not None:
        write_json(output, result.to_json())
    return result


def load(name: str, model: Model) -> Adapter | None:
    """The adapter of a row's name; None for "none". Raises WrongRequest for a pose that it could not follow."""
    from facegen.adapter import load_adapter

    if name == "none":
        return None
    adapter = load_adapter(name.removesuffix(POSED), model)
    if name.endswith(POSED) and "points" not in adapter.needs:
        raise WrongRequest(f"{adapter.name} follows no key points, so it cannot be given a pose; leave out {POSED}.")
    return adapter


def _measure(plan: Plan, judges: Judges, model: Model, adapters: dict[str, Adapter | None], tell: Progress) -> Result:
    from facegen.world.captions import captions_for
    from facegen.world.sampling import HELD_OUT_FROM, scenes_for

    names = range(HELD_OUT_FROM, HELD_OUT_FROM + plan.people)
    first = drawn(judges, scenes_for(plan.seed, names, [0] * plan.people), model.default_size[0])
    total, done = plan.people * plan.prompts * (1 + len(adapters)), 0
    tallies = {name: Tally(first.judged) for name in ("renders", *adapters)}
    strangers: list[Tensor] = []
    for number in range(1, plan.prompts + 1):
        # What is asked is what another picture of the same person happens to show: always possible, never the same.
        scenes = scenes_for(plan.seed, names, [number] * plan.people)
        texts = captions_for(plan.seed, names, [number] * plan.people, scenes, subject="person")
        second = drawn(judges, scenes, model.default_size[0])
        tallies["renders"].add(judges, second.pictures, texts)
        strangers.append(apart(first, second))
        tell(done := done + plan.people, total)
        for name, adapter in adapters.items():
            for rows in torch.arange(plan.people).split(plan.batch):
                seeds = [plan.seed + 1_000_003 * number + int(row) for row in rows]
                asked = [texts[row] for row in rows.tolist()]
                pose = scenes.pose[rows] if name.endswith(POSED) else None
                made = generate(plan, model, adapter, first, (rows, asked, seeds), pose=pose)
                tallies[name].add(judges, made, asked, rows)
                tell(done := done + len(rows), total)
    cosines = torch.cat(strangers)
    threshold = float(torch.quantile(cosines, 0.99))
    return Result(
        plan,
        tallies["renders"].row("renders (ceiling)", threshold),
        float(cosines.mean()),
        threshold,
        tuple(tallies[name].row(name, threshold) for name in adapters),
    )


def apart(first: Cast, second: Cast) -> Tensor:
    """The judge's cosines of all pairs of different people's pictures, (N·(N - 1),)."""
    cosines = second.judged @ first.judged.T
    return cosines[~torch.eye(len(cosines), dtype=torch.bool)]


def drawn(judges: Judges, scenes: Scenes, size: int) -> Cast:
    """The people of these scenes, drawn `size` pixels wide."""
    from facegen.world.render import render

    drawn = [render(scenes[rows], size) for rows in torch.arange(len(scenes)).split(20)]
    pictures = torch.cat([one.rgb for one in drawn])
    points = torch.cat([one.landmarks5 for one in drawn])
    return Cast(pictures, points, judges.embed(pictures, points))


def generate(
    plan: Plan,
    model: Model,
    adapter: Adapter | None,
    cast: Cast,
    asked: tuple[Tensor, list[str], list[int]],
    loras: Sequence[LoraCondition] = (),
    *,
    pose: Tensor | None = None,
) -> Tensor:
    """Pictures (B, 3, H, W): asked are the people's places in the cast, their prompts and their seeds.

    pose: where adapters that follow key points are to have the heads, (B, columns of POSE); None: where the photos do.
    """
    rows, texts, seeds = asked
    from facegen import schedulers
    from facegen.denoise import Guidance, denoise, noise

    height, width = model.default_size
    conditions: list[Condition] = [model.encode_text(texts, loras=loras), *loras]
    host = model
    if adapter is not None:
        points = cast.points[rows] if pose is None else cast.turned(rows, pose)
        conditions += adapter.conditions_from_embeddings(
            cast.embeddings[rows], model, _request(adapter, points, texts, (height, width))
        )
        host = adapter.host(model)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scheduler = schedulers.build(plan.scheduler, model.scheduler_config, plan.steps, device=model.device)
    start = noise(model.latent_shape(height, width), generators, device=model.device, dtype=model.dtype)
    latents = denoise(
        host, schedulers.start(scheduler, start), scheduler, conditions, Guidance(plan.guidance), generators
    )
    return model.decode(latents).float().cpu()


def _request(adapter: Adapter, points: Tensor, texts: list[str], size: tuple[int, int]) -> Any:
    from facegen.adapter import AdapterRequest

    control = None
    if "points" in adapter.needs:
        from facegen.adapters.instantid import draw

        drawn = [torch.from_numpy(draw(one.numpy(), (size[1], size[0]))) for one in points]
        control = torch.stack(drawn).permute(0, 3, 1, 2).float() / 255
    return AdapterRequest(height=size[0], width=size[1], prompt=texts, control=control)


class Tally:
    """Counts of one way of making pictures."""

    def __init__(self, references: Tensor) -> None:
        self.references = references
        self.cosines: list[Tensor] = []
        self.found: list[Tensor] = []
        self.asked = self.hit = 0

    def add(self, judges: Judges, pictures: Tensor, texts: Sequence[str], rows: Tensor | None = None) -> None:
        from facegen.world.facts import probability
        from facegen.world.words import parse_prompt

        references = self.references if rows is None else self.references[rows]
        points, found = judges.points(pictures)
        self.found.append(found)
        judged = judges.embed(pictures, points) * found[:, None]
        self.cosines.append(F.cosine_similarity(judged, references))
        seen = judges.facts(pictures)
        for place, text in enumerate(texts):
            facts = [fact for fact in parse_prompt(text) if fact.kind in seen]
            self.asked += len(facts)
            self.hit += sum(bool(probability(fact, seen[fact.kind][place]) > 0.5) for fact in facts)

    def row(self, name: str, threshold: float) -> Row:
        cosines = torch.cat(self.cosines)
        return Row(
            name,
            float(cosines.mean()),
            float((cosines > threshold).float().mean()),
            self.hit / max(1, self.asked),
            float(torch.cat(self.found).float().mean()),
        )
