"""Change one thing and keep the rest: the tasks measured on drawn people who were never trained on.

Each protocol asks the tasks for pictures as anybody would (`call("inpaint", image=…)`) and has them judged by nets that
condition nothing, against what the world knows to be true. A table per task: `facegen eval --task swap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.errors import WeightsMissing
from facegen.evaluation.shape import difference, shapes
from facegen.images import to_pil, to_tensor

if TYPE_CHECKING:
    from PIL import Image

    from facegen.evaluation.judges import Judges
    from facegen.world.parameters import Scenes

Call = Callable[..., Any]
"""call(task, **fields) → the Output of that task: pictures and reports."""
Progress = Callable[[int, int], None]

# What an identity adapter likes to overrule.
WISHES = (
    "with red hair", "wearing glasses", "smiling", "wearing a hat", "with black hair", "surprised", "with blond hair",
    "angry",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How many held-out people, with which settings of the run."""

    people: int = 50
    steps: int = 20
    guidance: float = 3.0
    seed: int = 0
    size: int = 256  # pixels of the drawn photos

    @property
    def run(self) -> dict[str, Any]:
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "seed": self.seed + 1}


@dataclass(frozen=True)
class Table:
    """Numbers by row and column; a column that a row has nothing for is left out of it."""

    title: str
    rows: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows.values() for column in row))
        first = max(map(len, self.rows), default=0) + 2
        widths = [max(len(column), 7) + 2 for column in columns]
        head = " " * first + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True))
        lines = [
            f"{name:<{first}}"
            + "".join(
                f"{row[column]:>{width}.3f}" if column in row else " " * (width - 1) + "–"
                for column, width in zip(columns, widths, strict=True)
            )
            for name, row in self.rows.items()
        ]
        return "\n".join([self.title, head, *lines, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Drawn:
    """People drawn once: their scenes, photos, and who they are by the judge (N, D)."""

    scenes: Scenes
    photos: tuple[Image.Image, ...]
    judged: Tensor


@dataclass(eq=False)
class Bench:
    """What every protocol needs: who asks, who judges, who is drawn."""

    call: Call
    judges: Judges
    plan: Plan
    tell: Progress
    done: int = 0
    total: int = 1

    def drawn(self, picture: int) -> Drawn:
        """Each person's picture of this number."""
        from facegen.world.render import render
        from facegen.world.sampling import HELD_OUT_FROM, scenes_for

        names = range(HELD_OUT_FROM, HELD_OUT_FROM + self.plan.people)
        scenes = scenes_for(self.plan.seed, names, [picture] * self.plan.people)
        made = [render(scenes[[row]], self.plan.size) for row in range(len(scenes))]
        pixels, points = (torch.cat([getattr(one, name) for one in made]) for name in ("rgb", "landmarks5"))
        return Drawn(scenes, tuple(to_pil(one) for one in pixels), self.judges.embed(pixels, points).cpu())

    def make(self, task: str, **fields: Any) -> Any:
        """One call of a task, told to whoever waits."""
        out = self.call(task, **{**self.plan.run, **fields})
        self.skip()
        return out

    def skip(self) -> None:
        """A call that could not be made counts as done."""
        self.done += 1
        self.tell(self.done, self.total)

    def who(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D) unit vectors; zero where there is no face."""
        return torch.cat([self.judges.embed(to_tensor(one)[None]).cpu() for one in pictures])

    def expression(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, units) as the judge of attributes reads them, NaN for units it does not know."""
        return shapes(self.judges, pictures)[0]

    def threshold(self, first: Drawn, second: Drawn) -> float:
        """The cosine that one pair of strangers in a hundred reaches."""
        cosines = second.judged @ first.judged.T
        return float(cosines[~torch.eye(len(cosines), dtype=torch.bool)].quantile(0.99))


def inpaint(bench: Bench) -> Table:
    """A face painted anew by whoever has a photo of the person, and by whoever has none."""
    first, second = bench.drawn(0), bench.drawn(1)
    threshold = bench.threshold(first, second)
    ways: dict[str, dict[str, Any]] = {
        "without the person": {"identity": "nobody"},
        "from the photo itself": {"identity": "photo"},
        "from another photo": {},
    }
    bench.total = bench.plan.people * len(ways)
    rows = {"the photo (ceiling)": _likeness(F.cosine_similarity(second.judged, first.judged), threshold)}
    for name, fields in ways.items():
        made, outside = [], 0.0
        for row, photo in enumerate(second.photos):
            given = fields if fields else {"faces": (first.photos[row],)}
            out = bench.make("inpaint", image=photo, region="face", select="largest", **given)
            made.append(out.images[0])
            outside = max(outside, out.reports[0].measures["pixels changed outside"])
        cosines = F.cosine_similarity(bench.who(made), first.judged)
        rows[name] = {**_likeness(cosines, threshold), "changed outside": outside}
    return Table(f"Inpaint: the face of {bench.plan.people} people painted anew", rows)


def _likeness(cosines: Tensor, threshold: float) -> dict[str, float]:
    return {"likeness": float(cosines.mean()), "TAR@1e-2": float((cosines > threshold).float().mean())}


def swap(bench: Bench) -> Table:
    """Each person into the photo of the next one, against the target as it is and the swap as the world draws it."""
    from facegen.training.twins import twins
    from facegen.world.render import render

    first, second = bench.drawn(0), bench.drawn(1)
    targets = [*second.photos[1:], second.photos[0]]
    judged = second.judged.roll(-1, 0)
    shown = shapes(bench.judges, targets)
    ways = ("trained", "adapters", "guidance", "both")
    bench.total = bench.plan.people * len(ways)
    places = torch.arange(len(targets)).roll(-1)
    true = twins(second.scenes[places], first.scenes.identity)
    drawn = [to_pil(render(true[[row]], bench.plan.size).rgb) for row in range(len(true))]
    rows = {
        "the target itself": _swapped(targets, bench, (first.judged, judged), shown),
        "drawn (ceiling)": _swapped(drawn, bench, (first.judged, judged), shown),
    }
    notes = []
    for way in ways:
        made, outside = [], 0.0
        for source, target in zip(first.photos, targets, strict=True):
            try:
                out = bench.make("swap", source=source, target=target, method=way, select="largest")
            except WeightsMissing as missing:
                bench.skip()
                notes += [str(missing)] if str(missing) not in notes else []
                continue
            made.append(out.images[0])
            outside = max(outside, out.reports[0].measures["pixels changed outside"])
        if made:
            rows[way] = {**_swapped(made, bench, (first.judged, judged), shown), "changed outside": outside}
    return Table(f"Swap: {bench.plan.people} people, each into the photo of the next", rows, tuple(notes))


def _swapped(
    made: Sequence[Image.Image], bench: Bench, people: tuple[Tensor, Tensor], shown: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """people: sources and targets by the judge; shown: the targets' expressions and turns."""
    who = bench.who(made)
    right = (who @ people[0].T).argmax(1) == torch.arange(len(who))
    units, turns = shapes(bench.judges, made)
    return {
        "to source": float(F.cosine_similarity(who, people[0]).mean()),
        "to target": float(F.cosine_similarity(who, people[1]).mean()),
        f"found among {len(who)}": float(right.float().mean()),
        "expression error": difference(units, shown[0]),
        "pose error, degrees": difference(turns, shown[1]),
    }


def people(bench: Bench) -> Table:
    """Two and three people in one picture, kept apart or not."""
    first, second = bench.drawn(0), bench.drawn(1)
    threshold = bench.threshold(first, second)
    rows = {}
    bench.total = 2 * 3 * (bench.plan.people // 3)
    for count in (2, 3):
        for way in ("none", "masks", "windows"):
            asked = found = right = matched = 0
            cosines = []
            for start in range(0, bench.plan.people - count + 1, 3):
                chosen = [(first.photos[row],) for row in range(start, start + count)]
                size = bench.call("size", count=count)
                out = bench.make("generate", people=chosen, isolation=way, height=size[0], width=size[1],
                    prompt="a portrait of a person", select="largest")  # fmt: skip
                report = out.reports[0]
                found += report.faces == count
                asked += 1
                likeness = [one.likeness.cosine if one.likeness else 0.0 for one in report.people]
                cosines += likeness or [0.0] * count
                matched += sum(cosine > threshold for cosine in likeness)
                right += sum(bool(one.at_home) for one in report.people)
            rows[f"{count} people, {way}"] = {
                "right count": found / asked,
                "likeness": sum(cosines) / len(cosines),
                "matched": matched / (asked * count),
                "in their place": right / (asked * count),
            }
    return Table("Several people in one picture", rows)


def repair(bench: Bench) -> Table:
    """What the prompt asks for and the person's photo does not show: with the person as ever, kept apart from the
    prompt in two ways, repaired, and without the person.
    """
    first = bench.drawn(0)
    prompts = [[f"a portrait of a person {words}" for words in row] for row in not_shown(first.scenes)]
    ways: dict[str, dict[str, Any]] = {
        "as it is": {},
        "apart in the layers": {"apart": "layers"},
        "apart in the predictions": {"apart": "predictions"},
        "repaired": {"repair": True},
        "nobody": {"strength": 0.0},
    }
    bench.total = len(ways) * sum(map(len, prompts))
    rows = {}
    for name, fields in ways.items():
        hit = asked = changed = 0
        cosines = []
        for row, texts in enumerate(prompts):
            for text in texts:
                out = bench.make("generate", faces=(first.photos[row],), prompt=text, select="largest", **fields)
                obedience = out.reports[0].obedience
                asked += len(obedience.asked) if obedience else 0
                hit += len(obedience.hit) if obedience else 0
                changed += int(out.reports[0].measures.get("repaired", 0))
                cosines.append(F.cosine_similarity(bench.who(out.images), first.judged[[row]]))
        rows[name] = {
            "prompt": hit / max(asked, 1),
            "likeness": float(torch.cat(cosines).mean()),
            "pictures repaired": changed / len(cosines),
        }
    return Table(f"The prompt against the person: {bench.plan.people} people, what their photos do not show", rows)


def not_shown(scenes: Scenes, count: int = 2) -> list[list[str]]:
    """For each scene `count` wishes, taken in turn, that its picture does not fulfil."""
    from facegen.world.facts import describe
    from facegen.world.words import parse_prompt

    wishes: list[list[str]] = []
    turn = 0
    for row in range(len(scenes)):
        shown = describe(scenes, row)
        chosen: list[str] = []
        while len(chosen) < count:
            words = WISHES[turn % len(WISHES)]
            turn += 1
            if not set(parse_prompt(words)) <= set(shown):
                chosen.append(words)
        wishes.append(chosen)
    return wishes


def sliders(bench: Bench) -> Table:
    """Each slider moved, every attribute measured: its own should move, the others and the person should not."""
    from facegen.evaluation.sliding import OWN, matrix

    rows = matrix(bench, bench.drawn(0), tuple(OWN))
    notes = ("Columns up to 'looks right' in spreads over people.",)
    return Table(f"Sliders from -1 to 1: {bench.plan.people} people, by how much each attribute moves", rows, notes)


def expression(bench: Bench) -> Table:
    """The expressions of other people's pictures, asked for by numbers and copied from these pictures, beside the
    person, against no control and the truth.

    error: mean absolute; correlation: mean over the units, r …: that of each over the people.
    """
    from facegen.world.parameters import EXPRESSION

    first, second = bench.drawn(0), bench.drawn(1)
    wanted = second.scenes.expression.roll(1, 0)  # somebody else's: the person's own photo cannot give it away
    units = [unit.name for unit in EXPRESSION]
    known = ~bench.expression(first.photos[:1])[0].isnan()
    named = [unit for unit, is_known in zip(units, known.tolist(), strict=True) if is_known]
    bench.total = 3 * bench.plan.people
    rows: dict[str, dict[str, float]] = {}

    def judge(name: str, pictures: Sequence[Image.Image], true: Tensor) -> None:
        found = bench.expression(pictures)[:, known]
        goal = true[:, known]
        both = torch.stack([found - found.mean(0), goal - goal.mean(0)])
        correlation = (both[0] * both[1]).sum(0) / both.square().sum(1).prod(0).sqrt().clamp(min=1e-6)
        rows[name] = {
            "error": difference(found, goal),
            "correlation": float(correlation.mean()),
            **{f"r {unit}": float(value) for unit, value in zip(named, correlation, strict=True)},
            "likeness": float(F.cosine_similarity(bench.who(pictures), first.judged).mean()),
        }

    from facegen.world.render import render

    truth = first.scenes.with_values(**{name: wanted[:, place] for place, name in enumerate(units)})
    judge("drawn (ceiling)", [to_pil(render(truth[[row]], 128).rgb) for row in range(len(truth))], wanted)
    ways: dict[str, Callable[[int], dict[str, Any]]] = {
        "no control": lambda row: {},
        "adapter": lambda row: {"expression": dict(zip(units, wanted[row].tolist(), strict=True))},
        "copied from a photo": lambda row: {"expression_from": second.photos[row - 1]},
    }
    for name, asked in ways.items():
        made = []
        for row, photo in enumerate(first.photos):
            out = bench.make("generate", faces=(photo,), prompt="a portrait of a person", select="largest",
                **asked(row))  # fmt: skip
            made.append(out.images[0])
        judge(name, made, wanted)
    return Table(f"Expression by numbers and from photos: {bench.plan.people} people", rows)


def geometry(bench: Bench) -> Table:
    """Each person in the geometry of another picture of theirs, by every kind of control, against none and the truth.

    own head: the landmarks of the photo of the person, turned to that picture's pose.
    """
    from facegen.evaluation.geometry import Goal, followed
    from facegen.face.landmarks import LandmarkFinder
    from facegen.models.geometry import KINDS, drawn
    from facegen.world.parameters import POSE
    from facegen.world.render import render

    first, second = bench.drawn(0), bench.drawn(1)
    truth = [render(second.scenes[[row]], 128) for row in range(len(second.scenes))]
    goals = [Goal(one, second.scenes.pose[row, :3].rad2deg()) for row, one in enumerate(truth)]
    finder = LandmarkFinder.from_pretrained()
    photos = [to_pil(one.rgb) for one in truth]
    rows: dict[str, dict[str, float]] = {}

    def judge(name: str, pictures: Sequence[Image.Image]) -> None:
        likeness = float(F.cosine_similarity(bench.who(pictures), first.judged).mean())
        rows[name] = {**followed(bench.judges, finder, pictures, goals), "likeness": likeness}

    def asked(way: str, row: int) -> dict[str, Any]:
        if way in KINDS:
            picture = photos[row] if way == "sketch" else to_pil(drawn(way, truth[row]))
            return {"geometry": picture, "geometry_kind": way}
        if way == "own head, turned":
            pose = dict(zip([one.name for one in POSE], second.scenes.pose[row].tolist(), strict=True))
            return {"geometry_kind": "landmarks", "pose": pose}
        return {}

    judge("drawn (ceiling)", photos)
    ways = ("no control", *KINDS, "own head, turned")
    bench.total = bench.plan.people * len(ways)
    for way in ways:
        made = [
            bench.make("generate", faces=(photo,), prompt="a portrait of a person", select="largest", **asked(way, row))
            for row, photo in enumerate(first.photos)
        ]
        judge(way, [out.images[0] for out in made])
    return Table(f"Geometry: {bench.plan.people} people, each as another picture of theirs has it", rows)


def restore(bench: Bench) -> Table:
    """Photos damaged to three degrees: as they are (enlarged bicubically); restored as ever, without the aligner,
    without diffusion, and with another photo of the person.
    """
    from facegen.errors import NoFaceFound
    from facegen.restoration.degrade import LEVELS, degrade

    first, second = bench.drawn(0), bench.drawn(1)
    ways: dict[str, dict[str, Any]] = {
        "without the aligner": {"alignment": 0.0},
        "aligned alone": {"fidelity": 1.0},
        "restored": {},
        "with another photo": {},
    }
    bench.total = len(LEVELS) * len(ways) * bench.plan.people
    rows: dict[str, dict[str, float]] = {}
    for degree, damage in LEVELS.items():
        damaged = []
        for row, photo in enumerate(second.photos):
            generator = torch.Generator().manual_seed(bench.plan.seed * 100_003 + row)
            damaged.append(degrade(photo, damage, generator))
        rows[f"{degree}: bicubic"] = _restored(bench, damaged, second)
        for name, fields in ways.items():
            made, lost = [], 0
            for row, photo in enumerate(damaged):
                given = {"faces": (first.photos[row],)} if name == "with another photo" else fields
                try:
                    made.append(bench.make("restore", image=photo, select="largest", **given).images[0])
                except NoFaceFound:  # so badly damaged that no face is seen: it stays as it is
                    made.append(photo)
                    lost += 1
                    bench.skip()
            rows[f"{degree}: {name}"] = {**_restored(bench, made, second), "no face found": lost / len(damaged)}
    return Table(f"Restore: the photos of {bench.plan.people} people, damaged to three degrees", rows)


def _restored(bench: Bench, made: Sequence[Image.Image], true: Drawn) -> dict[str, float]:
    """How near pictures are to the undamaged photos: as numbers, as they look, and as a person."""
    found, goal = (torch.stack([to_tensor(one) for one in pictures]) for pictures in (made, true.photos))
    psnr = -10 * (found - goal).square().mean((1, 2, 3)).clamp(min=1e-10).log10()
    distance = torch.cat([bench.judges.distance(a[None], b[None]) for a, b in zip(found, goal, strict=True)])
    return {
        "PSNR, dB": float(psnr.mean()),
        "distance": float(distance.mean()),
        "likeness": float(F.cosine_similarity(bench.who(made), true.judged).mean()),
    }


PROTOCOLS: Mapping[str, Callable[[Bench], Table]] = {
    "inpaint": inpaint,
    "swap": swap,
    "people": people,
    "repair": repair,
    "sliders": sliders,
    "expression": expression,
    "geometry": geometry,
    "restore": restore,
}


@torch.no_grad()
def run(name: str, call: Call, plan: Plan, on_progress: Progress | None = None) -> Table:
    """One protocol's table. Raises WeightsMissing, and whatever the task raises."""
    from facegen.evaluation.judges import load_judges

    return PROTOCOLS[name](Bench(call, load_judges(), plan, on_progress or (lambda done, total: None)))
