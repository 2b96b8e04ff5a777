"""The face of one person in a photo of another; expression, pose, light and all around the face stay the target's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from facegen.errors import WeightsMissing, WrongRequest
from facegen.pipeline import Painted, PersonRequest, Pipeline, Watch
from facegen.request import Photo, Request, choice, number, photo, photos

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from facegen.conditions import Condition
    from facegen.face.paste import Box, Crop
    from facegen.face.types import Face
    from facegen.pipeline import Person

BOTH, ADAPTERS, GUIDANCE = "both", "adapters", "guidance"
OCCLUDERS = ("glasses", "hair", "hat")  # they stay in front of the new face
_SURELY = 0.3  # chance from which on a pixel shows one of them: a frame left standing is better than one cut through
_MOST = 0.4  # share of a face that must be free of them for the net to be believed


@dataclass(frozen=True, kw_only=True)
class _Onto(Request):
    """Whose face goes where."""

    source: Photo = photo("The photo of the person whose face it will be.", positional=True)
    target: Photo = photo("The photo into which the face goes.", positional=True)


@dataclass(frozen=True, kw_only=True)
class SwapRequest(PersonRequest, _Onto):
    """Everything that decides what the face looks like."""

    task: ClassVar[str] = "Put the face of one person into a photo of another; all around the face stays as it is."

    faces: tuple[Photo, ...] = photos("More photos of the same source person.")
    method: str = choice(
        BOTH, "How the person is brought in: by adapters, by guidance without any training, or by both.",
        (BOTH, ADAPTERS, GUIDANCE),
    )  # fmt: skip
    change: float = number(
        0.7, "How much of the target's face goes: less keeps more of its expression, 0 changes nothing.",
        low=0, high=1, slider=(0, 1, 0.05),
    )  # fmt: skip
    likeness: float = number(
        0.1, "Guidance: how far each step goes towards the source's likeness.",
        low=0, high=5, slider=(0, 0.5, 0.01), advanced=True,
    )  # fmt: skip
    layout: float = number(
        0.05, "Guidance: how far each step goes towards the target's layout of eyes, nose and mouth.",
        low=0, high=5, slider=(0, 0.5, 0.01), advanced=True,
    )  # fmt: skip
    soft: float = number(
        0.06, "Over what share of its size the new face fades in.",
        low=0, high=0.5, slider=(0, 0.2, 0.01), advanced=True,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Plan:
    """The target photo, its face, the pixels that may change (1, H, W), and the crop in which they are painted."""

    canvas: Image.Image
    face: Face
    mask: Tensor
    crop: Crop


class SwapPipeline(Pipeline[SwapRequest]):
    """``pipe(source="me.jpg", target="party.jpg", seed=7)``"""

    request_class = SwapRequest

    def resolve(self, request: SwapRequest) -> SwapRequest:
        if request.target is None:
            raise WrongRequest("Give the photo into which the face goes, as target.")
        if not self._photos(request):
            raise WrongRequest("Give a photo of the person whose face it will be, as source.")
        return super().resolve(request)

    def _resolved_adapters(self, request: SwapRequest) -> tuple[str, ...]:
        if request.method == GUIDANCE:
            return ()
        if request.method == BOTH and not (request.adapters or self.loaded.adapters or self.loaded.assets):
            return ()
        return super()._resolved_adapters(replace(request, faces=self._photos(request)))

    @staticmethod
    def _photos(request: SwapRequest) -> tuple[Photo, ...]:
        return (*(() if request.source is None else (request.source,)), *request.faces)

    def _plan(self, request: SwapRequest) -> _Plan:
        from facegen.face import paste
        from facegen.face.parse import AROUND

        canvas = self.photo(request.target)
        face = self.one_face(canvas, request.select, "the target photo")
        crop = paste.cut(
            canvas, paste.square(face.box.tolist(), canvas.size, around=AROUND), max(self.model.default_size)
        )
        return _Plan(canvas, face, self._face_mask(canvas, face), crop)

    def _face_mask(self, canvas: Image.Image, face: Face) -> Tensor:
        """The face without what stands before it, (1, H, W); where no net can tell, an ellipse."""
        from facegen.face.parse import REGIONS, usual

        try:
            parser = self.parser
        except WeightsMissing:
            return usual("face", face.points, canvas.size)
        mask = parser.region(canvas, [face], "face")
        before = [one for name in OCCLUDERS for one in REGIONS[name]]
        free = mask * (parser.around(canvas, face, before) < _SURELY)
        return free if float(free.sum()) > _MOST * float(mask.sum()) else mask

    def paint(
        self, request: SwapRequest, conditions: Sequence[Condition], watch: Watch, indices: Sequence[int] | None
    ) -> Iterator[Painted]:
        import torch

        from facegen.face import paste
        from facegen.images import to_tensor

        person = cast("Person", self.person(self._photos(request), request.select, request.adapters))
        plan = self._plan(request)
        seen, hole = to_tensor(plan.crop.image), plan.crop.take(plan.mask)
        steering = [*self._steering(request, plan, person, hole), *conditions]
        soft = request.soft * float(plan.face.box[2] - plan.face.box[0])
        for batch, made in self.repaint(request, seen, hole, steering, watch, indices):
            pasted: list[Image.Image] = []
            for one in made:
                if request.change == 0:
                    pasted.append(plan.canvas)
                    continue
                matched = paste.match_colours(one, seen, (hole == 0).float())
                pasted.append(paste.paste(plan.canvas, plan.crop, matched, plan.mask, soft=soft))
            yield Painted(
                indices=batch,
                pixels=torch.stack([to_tensor(one) for one in pasted]),
                references=person.references,
                prompt=request.prompt,
                warnings=person.warnings,
                near=cast("Box", tuple(plan.face.box.tolist())),
                measures=tuple(self._measured(request, plan, one) for one in pasted),
            )

    def _steering(self, request: SwapRequest, plan: _Plan, person: Person, hole: Tensor) -> list[Condition]:
        """What brings the person in and keeps the target's layout."""
        import torch

        from facegen.face.embed import ArcFace
        from facegen.images import to_tensor
        from facegen.steering import likeness_guidance, parsing_guidance

        points = plan.crop.points(plan.face.points)
        conditions: list[Condition] = []
        if request.adapters:
            conditions += self.identity(person, request, (plan.crop.size, plan.crop.size), points=points)
        if request.method == ADAPTERS:
            return conditions
        if request.likeness:
            pack, fused = next(iter(person.fused.items()))
            recogniser = ArcFace.from_pretrained(self.analyzer(pack).folder).to(self.model.device)
            wanted, where = torch.from_numpy(fused.embedding), torch.from_numpy(points).float()
            conditions.append(likeness_guidance(self.model, recogniser, wanted, where, scale=request.likeness))
        if request.layout:
            picture = to_tensor(plan.crop.image)
            self.parser.net.to(self.model.device)
            conditions.append(
                parsing_guidance(
                    self.model, self.parser, picture.to(self.model.device), hole.to(self.model.device),
                    scale=request.layout,
                )
            )  # fmt: skip
        return conditions

    def _measured(self, request: SwapRequest, plan: _Plan, made: Image.Image) -> Mapping[str, float]:
        """What changed and what did not: pixels, points, and how like the target's own face the new one still is."""
        import numpy as np

        from facegen.face import paste

        told: dict[str, float] = dict(paste.measured(plan.canvas, made, plan.mask))
        middle = (plan.face.box[:2] + plan.face.box[2:]) / 2
        found = self.faces_in(made)
        if not found:
            return told
        now: Any = min(found, key=lambda face: float(abs((face.box[:2] + face.box[2:]) / 2 - middle).sum()))
        eyes = float(np.linalg.norm(plan.face.points[0] - plan.face.points[1]))
        moved = np.linalg.norm(now.points - plan.face.points, axis=1).mean()
        told["points moved, in eye distances"] = round(float(moved) / max(eyes, 1e-6), 4)
        if (judge := self.judges(request.adapters).likeness) is not None:
            told["likeness to the target"] = round(judge.cosine(now, (plan.face,)), 4)
        return told
