"""What became of a picture: is it the same person, was the prompt obeyed, and where does the picture come from.

Likeness is the cosine of two embeddings of a judging recogniser that never conditions anything; beside it stand what
that judge gives two pictures of one person (ceiling) and two strangers (floor), for the number means little alone.
What cannot be judged says so, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

NO_FACE = "no face found"


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """cosine: generated against reference, -1 to 1; threshold: above it the judge takes two faces for one person."""

    cosine: float
    judge: str
    ceiling: float | None = None  # mean cosine of two pictures of one person
    floor: float | None = None  # mean cosine of two strangers
    threshold: float | None = None

    @property
    def same(self) -> bool | None:
        """Whether the judge takes it for the same person; None when it has no threshold."""
        return None if self.threshold is None else self.cosine >= self.threshold

    def __str__(self) -> str:
        word = {True: "same person", False: "another person", None: "likeness"}[self.same]
        return f"{word} {self.cosine:.2f}{self._context()}"

    def _context(self) -> str:
        if self.ceiling is None or self.floor is None:
            return ""
        return f" (photos of one person {self.ceiling:.2f}, strangers {self.floor:.2f})"


@dataclass(frozen=True, kw_only=True)
class Matched:
    """One of several people asked for: the likeness of the face that was matched to them; None where none was left.

    at_home: whether that face lies in the part of the picture that was meant for them; None where any part was.
    """

    likeness: Likeness | None
    at_home: bool | None = None

    def __str__(self) -> str:
        if self.likeness is None:
            return "nobody"
        told = f"{self.likeness.cosine:.2f}"
        return f"{told} (elsewhere)" if self.at_home is False else told


@dataclass(frozen=True, kw_only=True)
class Obedience:
    """asked: what the prompt asks for, as far as the judge knows the words; hit: those that the picture shows."""

    asked: tuple[str, ...]
    hit: tuple[str, ...]

    @property
    def missed(self) -> tuple[str, ...]:
        return tuple(one for one in self.asked if one not in self.hit)

    def __str__(self) -> str:
        told = f"prompt {len(self.hit)} of {len(self.asked)}"
        return f"{told} (not {', '.join(self.missed)})" if self.missed else told


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the picture comes from; `licence` is what the weights allow."""

    facegen: str
    model: str
    model_sha256: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)  # name → SHA-256
    licence: str = ""
    seed: int | None = None
    ai_generated: bool = True


@dataclass(frozen=True, kw_only=True)
class Report:
    """One picture's report; `str()` is one line, :meth:`to_json` plain data."""

    likeness: Likeness | None = None
    faces: int | None = None
    obedience: Obedience | None = None
    people: tuple[Matched, ...] = ()  # where several were asked for, each one's best face (Hungarian matching)
    measures: Mapping[str, float] = field(default_factory=dict)  # what the task measured itself: name → number
    provenance: Provenance | None = None
    not_judged: Mapping[str, str] = field(default_factory=dict)  # what → why
    warnings: tuple[str, ...] = ()
    seconds: float | None = None

    @property
    def merit(self) -> tuple[float, float]:
        """How well the picture came out, to compare it with others of the same wish, the more the better.

        First the people asked for (each 1 from the judge's threshold on) and the share of the prompt's things that are
        shown, 0 to 2 together; then the mean cosine. A judge without a threshold is never content.
        """
        wanted = [one.likeness for one in self.people] or ([] if self._nobody else [self.likeness])
        cosines = [0.0 if one is None else one.cosine for one in wanted]
        there = [0.0 if one is None else max(0.0, min(one.cosine / (one.threshold or 2.0), 1.0)) for one in wanted]
        asked = self.obedience.asked if self.obedience else ()
        shown = len(self.obedience.hit) / len(asked) if self.obedience and asked else 1.0
        return (sum(there) / len(there) if there else 1.0) + shown, sum(cosines) / max(len(cosines), 1)

    @property
    def faultless(self) -> bool:
        """Whether the judges find nothing to better: everybody is there, and all that the prompt asks for."""
        return self.merit[0] >= 2.0

    @property
    def _nobody(self) -> bool:
        """Whether nobody was asked for, or nobody could judge who it is."""
        return self.likeness is None and self.not_judged.get("likeness") != NO_FACE

    def __str__(self) -> str:
        parts = [str(part) for part in (self.likeness,) if part]
        if self.people:
            parts.append(f"people {', '.join(map(str, self.people))}")
        parts += [f"faces {self.faces}"] if self.faces is not None else []
        parts += [str(self.obedience)] if self.obedience and self.obedience.asked else []
        parts += [f"{what} {value:.4g}" for what, value in self.measures.items()]
        parts += [f"seed {self.provenance.seed}"] if self.provenance and self.provenance.seed is not None else []
        parts += [f"{what} not judged: {why}" for what, why in self.not_judged.items()]
        parts += list(self.warnings)
        return " · ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = asdict(self)
        if self.likeness is not None:
            plain["likeness"]["same"] = self.likeness.same
        return plain


class LikenessJudge(Protocol):
    """A recogniser that is used for judging only."""

    @property
    def name(self) -> str: ...
    @property
    def ceiling(self) -> float | None: ...
    @property
    def floor(self) -> float | None: ...
    @property
    def threshold(self) -> float | None: ...
    def cosine(self, face: Any, references: Sequence[Any]) -> float:
        """Likeness of a face to the person of the reference faces (facegen.face.Face each)."""
        ...


class PromptJudge(Protocol):
    """Tells which of the things a prompt asks for a picture shows."""

    def obedience(self, prompt: str, image: Any) -> Obedience:
        """What the prompt asks for, as far as it is understood, and what of it the picture shows."""
        ...


class ShapeJudge(Protocol):
    """Tells how far apart the expressions and the poses of two portraits are."""

    def apart(self, image: Any, other: Any) -> Mapping[str, float]:
        """What → how far."""
        ...

    def expression(self, image: Any) -> Mapping[str, float]:
        """The coefficients of a portrait's expression, as far as the judge knows them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Who judges; what is None is not judged, for the reason in `reasons`."""

    detector: Any = None  # facegen.face.FaceAnalyzer
    likeness: LikenessJudge | None = None
    prompt: PromptJudge | None = None
    shape: ShapeJudge | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def report(
        self,
        image: Any,
        references: Sequence[Any],
        prompt: str,
        provenance: Provenance,
        warnings: Sequence[str] = (),
        near: Sequence[float] | None = None,
    ) -> Report:
        """Judge one picture; `references` are the faces it should show, empty when nobody was asked for.

        near: the part (x0, y0, x1, y1, pixels) in which the face is to be looked for; None: the largest face counts.
        """
        missing: dict[str, str] = {}
        found = self.faces(image)
        if found is None:
            missing["faces"] = self.reasons.get("faces", "no detector fits these weights")
        likeness = None
        if references:
            if found is None or self.likeness is None:
                missing["likeness"] = self.reasons.get("likeness", "no judge fits these weights")
            elif not found:
                missing["likeness"] = NO_FACE
            else:
                face = max(found, key=_size) if near is None else min(found, key=lambda one: _distance(one, near))
                likeness = self.of(self.likeness.cosine(face, references))
        obedience = None
        if self.prompt is not None:
            obedience = self.prompt.obedience(prompt, image)
        elif prompt:
            missing["prompt"] = self.reasons.get("prompt", "no judge fits these weights")
        return Report(
            likeness=likeness,
            faces=None if found is None else len(found),
            obedience=obedience,
            provenance=provenance,
            not_judged=missing,
            warnings=tuple(warnings),
        )

    def faces(self, image: Any) -> list[Any] | None:
        """The faces of a picture; None where there is no detector."""
        return None if self.detector is None else list(self.detector.faces(image, what="generated picture"))

    def of(self, cosine: float) -> Likeness:
        """A cosine of the judge with what is known of the judge."""
        assert self.likeness is not None
        judge = self.likeness
        return Likeness(
            cosine=cosine, judge=judge.name, ceiling=judge.ceiling, floor=judge.floor, threshold=judge.threshold
        )

    def people(
        self, image: Any, people: Sequence[Sequence[Any]], homes: Sequence[Sequence[float] | None]
    ) -> tuple[Matched, ...]:
        """Whom of several `people` (the faces of each one's photos) each face of a picture shows best.

        One face to a person, so that the cosines sum to the most (Hungarian matching); homes: the part (x0, y0, x1,
        y1, pixels) meant for each, or None. Empty where faces cannot be found or told apart.
        """
        found = self.faces(image)
        if found is None or self.likeness is None or not people:
            return ()
        judge = self.likeness
        cosines = [[judge.cosine(face, references) for face in found] for references in people]
        chosen = assign(cosines)
        return tuple(
            Matched(likeness=None)
            if place is None
            else Matched(
                likeness=self.of(cosines[person][place]),
                at_home=None if (home := homes[person]) is None else _inside(found[place], home),
            )
            for person, place in enumerate(chosen)
        )


def assign(scores: Sequence[Sequence[float]]) -> list[int | None]:
    """For each row the column that is its own, so that the scores sum to the most; None where columns are too few."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    chosen: list[int | None] = [None] * len(scores)
    if scores and scores[0]:
        rows, columns = linear_sum_assignment(np.asarray(scores), maximize=True)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            chosen[row] = column
    return chosen


def _size(face: Any) -> float:
    return float((face.box[2] - face.box[0]) * (face.box[3] - face.box[1]))


def _middle(box: Sequence[float]) -> tuple[float, float]:
    return (float(box[0]) + float(box[2])) / 2, (float(box[1]) + float(box[3])) / 2


def _distance(face: Any, box: Sequence[float]) -> float:
    (x, y), (u, v) = _middle(face.box), _middle(box)
    return (x - u) ** 2 + (y - v) ** 2


def _inside(face: Any, box: Sequence[float]) -> bool:
    x, y = _middle(face.box)
    return box[0] <= x < box[2] and box[1] <= y < box[3]


# judges that exist


@dataclass(frozen=True, kw_only=True)
class MiniLikeness:
    """mini's judging recogniser, of another architecture than the one that conditions."""

    nets: Any  # facegen.evaluation.judges.Judges
    name: str
    ceiling: float | None
    floor: float | None
    threshold: float | None

    def cosine(self, face: Any, references: Sequence[Any]) -> float:
        import torch

        from facegen.images import to_tensor

        def embedded(one: Any) -> Any:
            points = torch.from_numpy(one.points)[None]
            return self.nets.embed(to_tensor(one.image)[None], points)[0].cpu()

        known = torch.stack([embedded(reference) for reference in references]).mean(0)
        return float(torch.nn.functional.cosine_similarity(embedded(face), known, dim=0))


@dataclass(frozen=True, kw_only=True)
class MiniPrompt:
    """mini's judge of attributes; it knows the words of the face world's captions."""

    nets: Any

    def obedience(self, prompt: str, image: Any) -> Obedience:
        from facegen.images import to_tensor
        from facegen.world.captions import say
        from facegen.world.facts import probability
        from facegen.world.words import parse_prompt

        judged = self.nets.facts(to_tensor(image)[None])
        known = [fact for fact in parse_prompt(prompt) if fact.kind in judged]
        return Obedience(
            asked=tuple(say(fact) for fact in known),
            hit=tuple(say(fact) for fact in known if float(probability(fact, judged[fact.kind])) > 0.5),
        )


@dataclass(frozen=True, kw_only=True)
class MiniShape:
    """mini's judge of attributes, asked for coefficients of the expression (0 to 1) and turns of the head."""

    nets: Any

    def apart(self, image: Any, other: Any) -> Mapping[str, float]:
        from facegen.evaluation.shape import difference, shapes

        units, turns = shapes(self.nets, (image, other))
        return {
            "expression error": difference(units[0], units[1]),
            "pose error, degrees": difference(turns[0], turns[1]),
        }

    def expression(self, image: Any) -> Mapping[str, float]:
        from facegen.evaluation.shape import shapes
        from facegen.world.parameters import EXPRESSION

        units = shapes(self.nets, (image,))[0][0]
        return {unit.name: value for unit, value in zip(EXPRESSION, units.tolist(), strict=True) if value == value}


@dataclass(frozen=True, kw_only=True)
class PackLikeness:
    """A second face pack as judge; its recogniser is another one than the conditioning pack's."""

    analyzer: Any
    name: str
    ceiling: float | None = None
    floor: float | None = None
    threshold: float | None = None

    def cosine(self, face: Any, references: Sequence[Any]) -> float:
        import numpy as np

        def embedded(one: Any) -> Any:
            return self.analyzer.face(one.image, select="largest").unit

        known = np.stack([embedded(reference) for reference in references]).mean(0)
        return float(embedded(face) @ known / np.linalg.norm(known))


OFFICIAL_PACKS = ("antelopev2", "buffalo_l")


def judges_for(packs: Sequence[str], analyzer: Callable[[str], Any], assets: Path | None) -> Judges:
    """The judges that fit pictures conditioned through these face packs.

    analyzer: loads a pack by name; assets: the folder of a model that brings its own judges, such as mini.
    """
    from facegen.errors import WeightsMissing

    reasons: dict[str, str] = {}
    likeness: LikenessJudge | None = None
    prompt: PromptJudge | None = None
    shape: ShapeJudge | None = None
    if assets is not None:
        try:
            likeness, prompt, shape = _mini_judges(assets)
        except WeightsMissing:
            reasons = dict.fromkeys(("likeness", "prompt"), f"{assets / 'judges'} lacks the judges")
    else:
        second = next((pack for pack in OFFICIAL_PACKS if pack not in packs), None)
        try:
            if second is None:
                reasons["likeness"] = f"both {' and '.join(OFFICIAL_PACKS)} conditioned it"
            else:
                likeness = PackLikeness(analyzer=analyzer(second), name=second)
        except WeightsMissing:
            reasons["likeness"] = f"the second face pack {second} is not on this machine"
        reasons["prompt"] = "there is a judge for mini's drawn pictures only"
    try:
        detector = analyzer(packs[0])
    except WeightsMissing as error:  # words alone made the picture, without any pack
        detector, reasons["faces"] = None, str(error)
    return Judges(detector=detector, likeness=likeness, prompt=prompt, shape=shape, reasons=reasons)


def _mini_judges(assets: Path) -> tuple[LikenessJudge, PromptJudge, ShapeJudge]:
    import json

    from facegen.evaluation.judges import load_judges

    nets = load_judges(assets)
    measured = assets / "mini.json"
    judge = json.loads(measured.read_text("utf-8")).get("judge", {}) if measured.exists() else {}
    likeness = MiniLikeness(
        nets=nets,
        name="mini's judge",
        ceiling=judge.get("same_cosine"),
        floor=judge.get("other_cosine"),
        threshold=nets.same_person,
    )
    return likeness, MiniPrompt(nets=nets), MiniShape(nets=nets)
