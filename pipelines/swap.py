"""The face of one person in a photo of another; expression, pose, light and all around the face stay the target's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from facegen.errors import WeightsMissing, WrongRequest
from facegen.pipeline import Painted, PersonRequest, Pipeline, Watch
from facegen.request import Photo, Request, choice, mask, number, photo, photos

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    from facegen.conditions import Condition
    from facegen.face.paste import Box, Crop
    from facegen.face.types import Face
    from facegen.loading import Person
    from facegen.models.swap import Swap

TRAINED, BOTH, ADAPTERS, GUIDANCE = "trained", "both", "adapters", "guidance"
# They stay in front of the new face, as hands and things do; where one is not seen, the request's `front` says so.
OCCLUDERS = ("glasses", "hair", "hat", "clothes")
_SURELY = 0.3  # chance from which on a pixel shows one of them: a frame left standing is better than one cut through
_CHANGE = {TRAINED: 1.0}  # the photo is seen by the net: there is no need to begin with it
_RIM = 0.03  # of a face's width: how far its edge, where the old skin shines through, belongs to it
_MOST = 0.4  # share of a face that must be free of them for the net to be believed


@dataclass(frozen=True, kw_only=True)
class _Onto(Request):
    """Whose face goes where."""

    source: Photo = photo("The photo of the person whose face it will be.", positional=True)
    target: Photo = photo("The photo into which the face goes.", positional=True)
    front: Photo = mask(
        "White over what stands before the face and stays, where it is not found: hands, glasses, hair and hats are.",
        of="target",
    )


@dataclass(frozen=True, kw_only=True)
class SwapRequest(PersonRequest, _Onto):
    """Everything that decides what the face looks like."""

    task: ClassVar[str] = "Put the face of one person into a photo of another; all around the face stays as it is."

    faces: tuple[Photo, ...] = photos("More photos of the same source person.")
    guidance_scale: float = number(
        2.5, "How closely to follow person and prompt; more is glaring in photographs, 1 or less turns guidance off.",
        low=0, high=50, slider=(1, 15, 0.5), alias="guidance",
    )  # fmt: skip
    method: str | None = choice(
        None, "How the person is brought in: by a net that learnt to swap, by adapters, by guidance without any"
        " training, or by these two; by default trained where the model has such a net, else both.",
        (TRAINED, BOTH, ADAPTERS, GUIDANCE), optional=True,
    )  # fmt: skip
    change: float | None = number(
        None, "How much of the target's face goes: less keeps more of its expression, 0 changes nothing; by default 1"
        " where the swap is trained, else 0.7.",
        low=0, high=1, optional=True,
    )  # fmt: skip
    likeness: float = number(
        0.1, "Guidance: how far each step goes towards the source's likeness.",
        low=0, high=5, slider=(0, 0.5, 0.01), advanced=True,
    )  # fmt: skip
    layout: float = number(
        0.05, "Guidance: how far each step goes towards the target's layout of eyes, nose and mouth.",
        low=0, high=5, slider=(0, 0.5, 0.01), advanced=True,
    )  # fmt: skip
    tones: float = number(
        0.5, "How far the new face goes towards the target's skin tones and contrast: 0 leaves it as the model made it,"
        " 1 goes the whole way, which costs likeness.",
        low=0, high=1, slider=(0, 1, 0.05), advanced=True,
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
        method = request.method or (TRAINED if self._can_swap(request) else BOTH)
        if method == TRAINED and not self._net.is_dir():
            raise WeightsMissing(
                f"The loaded model has no net that learnt to swap ({self._net}); choose the method {ADAPTERS},"
                f" {GUIDANCE} or {BOTH}, or take mini."
            )
        change = request.change if request.change is not None else _CHANGE.get(method, 0.7)
        return super().resolve(replace(request, method=method, change=change))

    @property
    def _net(self) -> Path:
        from facegen.models.base import locate
        from facegen.models.swap import KIND

        return locate(self.loaded.loading.model).parent / "controls" / KIND

    def _can_swap(self, request: SwapRequest) -> bool:
        """Whether the model has learnt to swap, and the adapter that belongs to it is not left out."""
        from facegen.models.swap import BESIDE

        if not self._net.is_dir():
            return False
        if request.adapters or self.loaded.adapters:
            return not {BESIDE, *self._beside()}.isdisjoint(request.adapters or self._beside())
        return self.loaded.assets is not None

    def _beside(self) -> tuple[str, ...]:
        """Under which names the adapter is loaded whose tokens the trained net understands."""
        from facegen.models.swap import BESIDE

        return tuple(name for name, worn in self.loaded.adapters.items() if worn.adapter.name == BESIDE)

    def _resolved_adapters(self, request: SwapRequest) -> tuple[str, ...]:
        from facegen.models.swap import BESIDE

        if request.method == GUIDANCE:
            return ()
        if request.method == BOTH and not (request.adapters or self.loaded.adapters or self.loaded.assets):
            return ()
        asked = request.adapters
        if request.method == TRAINED:
            asked = asked or self._beside()[:1] or (BESIDE,)
        found = super()._resolved_adapters(replace(request, faces=self._photos(request), adapters=asked))
        if request.method == TRAINED and not set(found) & set(self._beside()):
            raise WrongRequest(f"The trained swap learnt beside {BESIDE} alone; name it among the adapters, or none.")
        return found

    @staticmethod
    def _photos(request: SwapRequest) -> tuple[Photo, ...]:
        return (*(() if request.source is None else (request.source,)), *request.faces)

    def _plan(self, request: SwapRequest) -> _Plan:
        from facegen.face import paste
        from facegen.face.parse import AROUND
        from facegen.images import load_mask

        canvas = self.photo(request.target)
        face = self.one_face(canvas, request.select, "the target photo")
        crop = paste.cut(
            canvas, paste.square(face.box.tolist(), canvas.size, around=AROUND), max(self.model.default_size)
        )
        free = self._face_mask(canvas, face)
        if request.front is not None:
            free = free * (1 - load_mask(request.front, canvas.size, what="mask of what stays in front"))
        return _Plan(canvas, face, free, crop)

    def _face_mask(self, canvas: Image.Image, face: Face) -> Tensor:
        """The face without what stands before it, (1, H, W); where no net can tell, an ellipse."""
        from facegen.face.parse import REGIONS, usual
        from facegen.face.paste import dilate

        try:
            parser = self.parser
        except WeightsMissing:
            return usual("face", face.points, canvas.size)
        mask = parser.region(canvas, [face], "face")
        before = [one for name in OCCLUDERS for one in REGIONS[name]]
        wide = dilate(mask, round(_RIM * float(face.box[2] - face.box[0])))
        free = wide * (parser.around(canvas, face, before) < _SURELY) * (1 - parser.before(canvas, face))
        return free if float((free * mask).sum()) > _MOST * float(mask.sum()) else mask

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
                matched = self._near_tones(request, paste.match_colours(one, seen, (hole == 0).float()), seen, hole)
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

    def _near_tones(self, request: SwapRequest, made: Tensor, seen: Tensor, hole: Tensor) -> Tensor:
        """What was made (3, S, S) nearer to the target's skin tones: it continues into the target's neck and light."""
        from facegen.face import tones

        try:
            return tones.near_skin(made, seen, hole, tones.skin(self.parser, made, seen), much=request.tones)
        except WeightsMissing:  # no net can tell where skin is
            return made

    def _steering(self, request: SwapRequest, plan: _Plan, person: Person, hole: Tensor) -> list[Condition]:
        """What brings the person in and keeps the target's layout."""
        import torch

        from facegen.face.embed import ArcFace
        from facegen.images import to_tensor
        from facegen.models.swap import KIND
        from facegen.steering import likeness_guidance, parsing_guidance

        points = plan.crop.points(plan.face.points)
        conditions: list[Condition] = []
        if request.method == TRAINED:
            seen = self.model.encode_image(to_tensor(plan.crop.image)[None])
            own = self.identity(person, request, (plan.crop.size, plan.crop.size), self._beside(), points=points)
            conditions.append(cast("Swap", self.control(KIND)).beside(own, seen))
        if request.adapters:
            conditions += self.identity(person, request, (plan.crop.size, plan.crop.size), points=points)
        if request.method in (TRAINED, ADAPTERS):
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
        """What changed and what did not: pixels, points, how like the target's own face the new one still is, and how
        far the expression and the pose are from the target's, where a judge can read them.
        """
        import numpy as np

        from facegen.face import paste
        from facegen.images import to_pil, to_tensor

        judges = self.judges(request.adapters)
        told: dict[str, float] = dict(paste.measured(plan.canvas, made, plan.mask))
        middle = (plan.face.box[:2] + plan.face.box[2:]) / 2
        found = self.faces_in(made)
        if not found:
            return told
        now: Any = min(found, key=lambda face: float(abs((face.box[:2] + face.box[2:]) / 2 - middle).sum()))
        eyes = float(np.linalg.norm(plan.face.points[0] - plan.face.points[1]))
        moved = np.linalg.norm(now.points - plan.face.points, axis=1).mean()
        told["points moved, in eye distances"] = round(float(moved) / max(eyes, 1e-6), 4)
        if judges.likeness is not None:
            told["likeness to the target"] = round(judges.likeness.cosine(now, (plan.face,)), 4)
        if judges.shape is not None:
            crops = [to_pil(plan.crop.take(to_tensor(one))) for one in (made, plan.canvas)]
            told |= {name: round(value, 4) for name, value in judges.shape.apart(*crops).items()}
        return told
