"""Everything that says how good the embedded model is, in one command: ``facegen eval --task quality -o quality.json``.

Each table has a ceiling (fresh renders of the same held-out people) and a floor (another person's renders; one picture
again and again; noise through the autoencoder) beside what the model makes. What a killed run had finished stands in
the output file and is not measured again, as long as plan and weights are the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.errors import WrongRequest
from facegen.evaluation.edits import Table
from facegen.evaluation.ledger import Figures, Ledger, weights_of
from facegen.evaluation.protocol import ADAPTERS, POSED, Cast, Plan, Progress, apart, drawn, generate, load
from facegen.evaluation.sight import MOST_FACTS, Seen, copied, look, obedience, spread_of_looks

if TYPE_CHECKING:
    from facegen.adapter import Adapter
    from facegen.evaluation.judges import Judges
    from facegen.models.base import Model
    from facegen.world.facts import Fact
    from facegen.world.parameters import Scenes

PHRASINGS = ("captions", "lists", "sentences", "words")
_TRIES = 48  # captions drawn to find one with the wanted number of facts
_DETAILS: Mapping[str, tuple[str, ...]] = {
    "eyes": ("l_eye", "r_eye"), "mouth and teeth": ("mouth", "u_lip", "l_lip"), "glasses": ("eye_g",),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """All tables."""

    plan: Plan
    tables: tuple[Table, ...]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Stage:
    """The held-out people, `first`: the pictures that adapters are given, `others`: further ones, one by one."""

    plan: Plan
    judges: Judges
    model: Model
    first: Cast
    others: tuple[Cast, ...]
    texts: tuple[list[str], ...]
    asked: tuple[list[tuple[Fact, ...]], ...]

    @cached_property
    def scale(self) -> Mapping[str, Tensor]:
        """How much pose and expression vary over renders, by name."""
        read = [look(self.judges, one.pictures, None) for one in (self.first, *self.others)]
        return {
            name: torch.cat([getattr(one, name) for one in read]).std(0).clamp(min=1e-3)
            for name in ("pose", "expression")
        }

    @cached_property
    def renders(self) -> tuple[Seen, ...]:
        """The first pictures and the others, as the judges see them."""
        return tuple(look(self.judges, one.pictures, self.scale, one.points) for one in (self.first, *self.others))

    @cached_property
    def threshold(self) -> float:
        """The cosine that one pair of strangers in a hundred reaches."""
        return float(torch.cat([apart(self.first, one) for one in self.others]).quantile(0.99))

    @cached_property
    def spread(self) -> float:
        """The mean feature distance of two renders of one person."""
        return spread_of_looks(self.judges, [one.pictures for one in self.others])

    @cached_property
    def strangers(self) -> Tensor:
        """Features of renders of other held-out people, as many as are made of these: what FID and KID compare with."""
        from facegen.world.sampling import HELD_OUT_FROM

        begin = HELD_OUT_FROM + 10_000
        found = []
        for number in range(1, self.plan.prompts + 1):
            scenes = _scenes(self.plan, number, begin)
            found.append(self.judges.features(drawn(self.judges, scenes, self.model.default_size[0]).pictures).cpu())
        return torch.cat(found)


def run(
    model: str = "mini",
    adapters: Sequence[str] = ADAPTERS,
    people: int = 50,
    prompts: int = 5,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
    output: Path | None = None,
    on_progress: Progress | None = None,
) -> Result:
    """Measure, keep what is measured in `output`, and give the tables.

    Raises WrongRequest, WeightsMissing, OutputUnwritable.
    """
    from facegen.evaluation.judges import load_judges
    from facegen.models.base import Model

    if people < 2 or prompts < 2:
        raise WrongRequest(f"At least 2 people and 2 prompts are needed, not {people} and {prompts}.")
    names = ("none", *(name for name in adapters if name != "none"))
    plan = Plan(model, names, people, prompts, steps, guidance, seed)
    base = Model.from_pretrained(model)
    ledger = Ledger(output, {**asdict(plan), "weights": weights_of(_folder(model))})
    with torch.no_grad():
        stage = set_out(plan, load_judges(), base)
        loaded = {name: load(name, base) for name in names}
        return measure(stage, loaded, ledger, on_progress or (lambda done, total: None))


def set_out(plan: Plan, judges: Judges, model: Model) -> Stage:
    """Draw the people and word the prompts."""
    size = model.default_size[0]
    first = drawn(judges, _scenes(plan, 0), size)
    others, texts, asked = [], [], []
    for number in range(1, plan.prompts + 1):
        scenes = _scenes(plan, number)
        others.append(drawn(judges, scenes, size))
        rows = [worded(plan, scenes, row, number) for row in range(plan.people)]
        texts.append([text for text, _ in rows])
        asked.append([facts for _, facts in rows])
    return Stage(plan, judges, model, first, tuple(others), tuple(texts), tuple(asked))


@dataclass(eq=False)
class Painter:
    """Makes the pictures, and tells how far it is."""

    stage: Stage
    tell: Progress
    total: int
    done: int = 0

    def paint(self, adapter: Adapter | None, texts: Sequence[list[str]], posed: bool = False) -> list[Tensor]:
        """For each prompt's texts, one a person, the pictures (people, 3, H, W).

        posed: the adapter's points are the photo's, turned to the pose that the prompt's picture has.
        """
        plan, made = self.stage.plan, []
        for number, own in enumerate(texts, 1):
            parts = []
            pose = _scenes(plan, number).pose if posed else None
            for rows in torch.arange(plan.people).split(plan.batch):
                seeds = [plan.seed + 1_000_003 * number + int(row) for row in rows]
                asked = [own[row] for row in rows.tolist()]
                own_pose = None if pose is None else pose[rows]
                how = (rows, asked, seeds)
                parts.append(generate(plan, self.stage.model, adapter, self.stage.first, how, pose=own_pose))
                self.skip(len(rows))
            made.append(torch.cat(parts))
        return made

    def skip(self, count: int) -> None:
        """So many pictures more are done with."""
        self.done += count
        self.tell(self.done, self.total)


def measure(stage: Stage, adapters: Mapping[str, Adapter | None], ledger: Ledger, tell: Progress) -> Result:
    """All tables."""
    plan = stage.plan
    painter = Painter(stage, tell, plan.people * (plan.prompts * len(adapters) + len(PHRASINGS)))
    _way(stage, ledger, "renders (ceiling)", lambda: [one.pictures for one in stage.others])
    _way(stage, ledger, "another person's (floor)", lambda: [one.pictures.roll(1, 0) for one in stage.others])
    _way(stage, ledger, "the photo itself", lambda: [stage.first.pictures] * plan.prompts)
    # What latents do not hold, or the decoder does not paint, nothing that is learnt from them can show.
    _way(stage, ledger, "renders, autoencoded", lambda: [_through(stage.model, one.pictures) for one in stage.others])
    for name, adapter in adapters.items():
        before = painter.done
        posed = name.endswith(POSED)
        _way(stage, ledger, name, lambda adapter=adapter, posed=posed: painter.paint(adapter, stage.texts, posed))  # type: ignore[misc]
        painter.skip(before + plan.people * plan.prompts - painter.done)  # where it had been measured before
    ledger.row("look/noise (floor)", lambda: _noise(stage))
    _autoencoded(stage, ledger)
    for phrasing in PHRASINGS:
        ledger.row(f"phrasing/{phrasing}", lambda way=phrasing: _phrased(stage, way, painter))  # type: ignore[misc]
    painter.skip(painter.total - painter.done)
    _nets(stage, ledger)
    ledger.row("size/mini", lambda: _size_and_speed(stage))
    return Result(plan, _tables(stage, ledger))


def _tables(stage: Stage, ledger: Ledger) -> tuple[Table, ...]:
    plan = stage.plan
    told = f"{plan.people} held-out people x {plan.prompts} prompts, {plan.steps} steps, guidance {plan.guidance}"
    return (
        ledger.table("look", f"Look ({told})", ("FID and KID of what the judge of attributes sees",)),
        ledger.table("autoencoder", "Autoencoder: held-out renders through it and back"),
        ledger.table("likeness", "Likeness, diversity and copying", (f"cosine at FAR 1e-2: {stage.threshold:.3f}",)),
        ledger.table("prompt", "Prompts obeyed, by how many things they ask for"),
        ledger.table(
            "phrasing", "Prompts in other words, no adapter (ceiling: the person's renders, floor: another's)"
        ),
        ledger.table("pairs", "Recognisers: same person, by what differs"),
        ledger.table("nets", "The nets that see"),
        ledger.table("size", "Size and speed"),
    )


def _way(stage: Stage, ledger: Ledger, name: str, make: Callable[[], Sequence[Tensor]]) -> None:
    """One row of each of the three tables about pictures."""
    if f"look/{name}" in ledger.rows:
        return
    pictures = make()
    found = _seen(stage, pictures, name)
    ledger.row(f"likeness/{name}", lambda: likeness(stage, pictures, found))
    ledger.row(f"prompt/{name}", lambda: obedience(stage.judges, pictures, stage.asked))
    ledger.row(f"look/{name}", lambda: look_alike(stage, found))


# what is asked


def _scenes(plan: Plan, number: int, begin: int | None = None) -> Scenes:
    from facegen.world.sampling import HELD_OUT_FROM, scenes_for

    begin = HELD_OUT_FROM if begin is None else begin
    return scenes_for(plan.seed, range(begin, begin + plan.people), [number] * plan.people)


def worded(plan: Plan, scenes: Scenes, row: int, number: int) -> tuple[str, tuple[Fact, ...]]:
    """A caption of this picture with one to five facts, in turn over people and numbers, and the facts it tells."""
    from facegen.world.captions import caption, parse_prompt

    wanted = 1 + (row + number) % MOST_FACTS
    generator = torch.Generator().manual_seed(1_009 * (1_000_003 * plan.seed + row) + number)
    tries = caption(scenes[[row]].repeat_interleave(_TRIES), generator, subject="person")
    told = [(text, parse_prompt(text)) for text in tries]
    return min(told, key=lambda one: abs(len(one[1]) - wanted))


# what is measured


def _seen(stage: Stage, pictures: Sequence[Tensor], name: str) -> list[Seen]:
    """Of each prompt's pictures what the judges see; true renders keep their true points."""
    if name == "renders (ceiling)":
        return list(stage.renders[1:])
    return [look(stage.judges, one, stage.scale) for one in pictures]


def look_alike(stage: Stage, found: Sequence[Seen]) -> Figures:
    """FID and KID against renders of other people."""
    from facegen.evaluation.frechet import fid, kid

    own = torch.cat([one.features for one in found])
    return {"FID": fid(own, stage.strangers), "KID": kid(own, stage.strangers)}


def likeness(stage: Stage, pictures: Sequence[Tensor], found: Sequence[Seen]) -> Figures:
    """Whether it is the person, how much their pictures vary, and whether the photo's pose and expression are copied.

    diversity: as a share of what renders of the same people and prompts have. copied: 0 as near to the photo as to
    another picture of the person, 1 the same as the photo.
    """
    reference, *renders = stage.renders
    cosines = torch.stack([F.cosine_similarity(one.who, reference.who) for one in found])  # (prompts, people)
    ceiling = torch.stack([F.cosine_similarity(one.who, reference.who) for one in renders]).mean()
    figures = {
        "likeness": float(cosines.mean()),
        "of ceiling": float(cosines.mean() / ceiling),
        "TAR@1e-2": float((cosines > stage.threshold).float().mean()),
        "diverse look": spread_of_looks(stage.judges, pictures) / stage.spread,
    }
    for name in ("pose", "expression"):
        own, true = (torch.stack([getattr(one, name) for one in part]) for part in (found, renders))
        figures[f"diverse {name}"] = float(own.std(0).mean() / true.std(0).mean())
        figures[f"{name} copied"] = copied(own, getattr(reference, name), true)
    return figures


def _noise(stage: Stage) -> Figures:
    """FID and KID of noise through the autoencoder."""
    from facegen.denoise import noise
    from facegen.evaluation.frechet import fid, kid

    model, count = stage.model, stage.plan.people
    generators = [torch.Generator().manual_seed(stage.plan.seed + place) for place in range(count)]
    start = noise(model.latent_shape(*model.default_size), generators, device=model.device, dtype=model.dtype)
    decoded = [model.decode(part).float().cpu() for part in start.split(stage.plan.batch)]
    own = stage.judges.features(torch.cat(decoded)).cpu()
    return {"FID": fid(own, stage.strangers), "KID": kid(own, stage.strangers)}


def _autoencoded(stage: Stage, ledger: Ledger) -> None:
    """PSNR, whole and by detail, feature distance and likeness: through the autoencoder, and of another picture."""
    from facegen.evaluation.frechet import fid
    from facegen.evaluation.nets import rendered

    model, size = stage.model, stage.model.default_size[0]
    scenes = _scenes(stage.plan, 1)
    true = stage.others[0].pictures

    def compared(made: Tensor, points: Tensor) -> dict[str, float]:
        parsing = torch.cat([one.parsing for one in rendered(scenes, size)])
        error = (made - true).square().mean(1)
        figures = {
            "PSNR, dB": float((-10 * error.mean((1, 2)).clamp(min=1e-10).log10()).mean()),
            **{f"{name}, dB": _psnr(error, parsing, classes) for name, classes in _DETAILS.items()},
            "distance": float(stage.judges.distance(made, true).mean()),
            "likeness": float(
                F.cosine_similarity(stage.judges.embed(made, points).cpu(), stage.others[0].judged).mean()
            ),
        }
        return {name: value for name, value in figures.items() if value == value}  # no glasses, no figure

    def through() -> Figures:
        back = _through(model, true)
        looks = {"FID": fid(stage.judges.features(back).cpu(), stage.judges.features(true).cpu())}
        return {**compared(back, stage.others[0].points), **looks}

    ledger.row("autoencoder/mini", through)
    ledger.row("autoencoder/another picture (floor)", lambda: compared(stage.first.pictures, stage.first.points))


def _through(model: Model, pictures: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] as the autoencoder gives them back."""
    return torch.cat([model.decode(model.encode_image(part)).float().cpu() for part in pictures.split(20)])


def _psnr(error: Tensor, parsing: Tensor, classes: Sequence[str]) -> float:
    """Over the pixels (N, H, W) of some classes; NaN where there are none."""
    from facegen.world.render import PARSING

    inside = torch.isin(parsing, torch.tensor([PARSING.index(name) for name in classes], dtype=parsing.dtype))
    return float(-10 * error[inside].mean().clamp(min=1e-10).log10())


def _phrased(stage: Stage, way: str, painter: Painter) -> Figures:
    """Prompts of one to three facts in a way that captions do not have.

    "captions": the same facts in theirs; "lists": the words of captions with nothing around them but strokes.
    """
    from facegen.evaluation.phrasings import phrased
    from facegen.world.captions import describe, say
    from facegen.world.facts import FACTS

    scenes = _scenes(stage.plan, 1)
    texts, asked = [], []
    for row in range(stage.plan.people):
        facts = [fact for fact in describe(scenes, row) if fact.value in FACTS[fact.kind]]
        generator = torch.Generator().manual_seed(1_000_003 * stage.plan.seed + row)
        # The facts are those that both other ways can tell, so that three rows speak of much the same.
        found = None
        for count in (1 + row % 3, 1):
            found = found or phrased(facts, "words" if way == "words" else "sentences", count, generator)
        text, told = found or ("a portrait of a person", ())
        usual = list(map(say, told))
        texts.append(
            ", ".join(["a portrait of a person", *usual]) if way == "captions"
            else " / ".join(usual or ["person"]) if way == "lists" else text
        )  # fmt: skip
        asked.append(told)
    (pictures,) = painter.paint(None, [texts])
    true = stage.others[0].pictures
    return {
        "obeyed": obedience(stage.judges, [pictures], [asked])["obeyed"],
        "ceiling": obedience(stage.judges, [true], [asked])["obeyed"],
        "floor": obedience(stage.judges, [true.roll(1, 0)], [asked])["obeyed"],
    }


def _nets(stage: Stage, ledger: Ledger) -> None:
    """Recognisers, detector, parsing and the judge of attributes."""
    from facegen.evaluation import nets
    from facegen.world.parameters import Scenes

    judges, first, second = stage.judges, _scenes(stage.plan, 0), _scenes(stage.plan, 1)
    if "pairs/judge: everything" not in ledger.rows:
        for name, figures in nets.verification(judges, first, second).items():
            ledger.row(f"pairs/{name}", lambda figures=figures: figures)  # type: ignore[misc]
    ledger.row("nets/detector", lambda: nets.detection(judges, first))
    ledger.row("nets/parsing", lambda: nets.parsing(judges, first))
    ledger.row("nets/attributes", lambda: nets.attributes(judges, Scenes.cat([first, second])))


def _folder(model: str) -> Path:
    """Where all of a model is: adapters, judges and all, where it brings them."""
    from facegen.models.base import locate

    base = locate(model)
    return base.parent if (base.parent / "pack").is_dir() else base


def _size_and_speed(stage: Stage) -> Figures:
    """Megabytes of the model's folder, and seconds a portrait: 20 steps, and the model's own few."""
    from facegen.few_steps import ALONE

    folder = _folder(stage.plan.model)
    figures = {"MB": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6}
    few = json.loads((folder / ALONE).read_text("utf-8")) if (folder / ALONE).is_file() else {}
    ways = {"20 steps, s": Plan(steps=20, guidance=stage.plan.guidance)}
    if few:
        ways["few steps, s"] = Plan(
            steps=int(few["steps"]), guidance=float(few["guidance"]), scheduler=str(few["scheduler"])
        )
    for name, plan in ways.items():
        start = time.perf_counter()
        generate(plan, stage.model, None, stage.first, (torch.tensor([0]), stage.texts[0][:1], [stage.plan.seed]))
        figures[name] = time.perf_counter() - start
    return figures
