"""A part of a photo painted anew, or the photo continued beyond its edges; every other pixel stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from facegen.errors import NoFaceFound, WeightsMissing, WrongMask, WrongRequest
from facegen.pipeline import Painted, PersonRequest, Pipeline, Watch
from facegen.request import Photo, Request, choice, integer, mask, names, number, photo, photos, switch

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from facegen.conditions import Condition
    from facegen.face.paste import Box, Crop
    from facegen.face.types import Face
    from facegen.loading import Person

OWN, NOBODY, AUTO = "photo", "nobody", "auto"


@dataclass(frozen=True, kw_only=True)
class _Where(Request):
    """What is painted anew, and where."""

    image: Photo = photo("The photo of which a part is painted anew.", positional=True)
    mask: Photo = mask("White where to paint, black where every pixel stays; as large as the photo.", of="image")
    region: tuple[str, ...] = names(
        (),
        "Parts to paint, such as eyes, hair, glasses, mouth, beard, hat, clothes, face or background.",
        choices=("face", "eyes", "mouth", "hair", "glasses", "beard", "hat", "clothes", "background"),
    )
    left: int = integer(0, "Pixels to add at the left.", low=0, high=2048, advanced=True)
    right: int = integer(0, "Pixels to add at the right.", low=0, high=2048, advanced=True)
    top: int = integer(0, "Pixels to add at the top.", low=0, high=2048, advanced=True)
    bottom: int = integer(0, "Pixels to add at the bottom.", low=0, high=2048, advanced=True)


@dataclass(frozen=True, kw_only=True)
class InpaintRequest(PersonRequest, _Where):
    """Everything that decides what the part looks like."""

    task: ClassVar[str] = "Paint a part of a photo anew, or continue it beyond its edges; all else stays as it is."

    faces: tuple[Photo, ...] = photos("Other photos of the person whose face is painted; none: the photo's own face.")
    identity: str = choice(
        AUTO, "Whose face where no other photos are given; auto: the photo's own, if a face is painted.",
        (AUTO, OWN, NOBODY), advanced=True,
    )  # fmt: skip
    change: float = number(
        1.0, "How much of the part's old look goes: 1 all of it, near 0 hardly any, 0 nothing is changed.",
        low=0, high=1, slider=(0, 1, 0.05),
    )  # fmt: skip
    guidance_scale: float = number(
        5.0, "How closely to follow the prompt; 1 or less turns guidance off.",
        low=0, high=50, slider=(1, 15, 0.5), alias="guidance",
    )  # fmt: skip
    invert: bool = switch(False, "Paint everything but the mask.", advanced=True)
    grow: float = number(
        0.0, "Widen the mask by this share of its size; less than 0 leaves a rim of it, so that its outline is kept.",
        low=-0.5, high=0.5, slider=(-0.2, 0.2, 0.01), advanced=True,
    )  # fmt: skip
    around: float = number(
        0.75, "How much of its surroundings is seen while painting, as a share of the size of mask and face.",
        low=0, high=10, slider=(0, 2, 0.1), advanced=True,
    )  # fmt: skip
    soft: float = number(
        0.03, "Over what share of its size the painted part fades in, inside the mask.",
        low=0, high=0.5, slider=(0, 0.2, 0.01), advanced=True,
    )  # fmt: skip
    resolution: int | None = integer(
        None, "Side in pixels at which the part is painted, however small it is; the model's own by default.",
        low=8, high=4096, multiple=8, optional=True, advanced=True,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Plan:
    """Where what is painted: the canvas, the pixels that may change (1, H, W), and the crop in which it is painted."""

    canvas: Image.Image
    mask: Tensor
    crop: Crop
    box: Box
    face: Face | None  # whose face the mask touches


class InpaintPipeline(Pipeline[InpaintRequest]):
    """``pipe(image="me.jpg", region="hair", prompt="portrait of a person with red hair", seed=7)``"""

    request_class = InpaintRequest

    def _resolved_adapters(self, request: InpaintRequest) -> tuple[str, ...]:
        """As ever where photos are given; with the photo's own face those that are loaded or that the model brings."""
        if request.image is None:
            raise WrongRequest("Give the photo of which a part is to be painted, as image.")
        plan = self._plan(request)
        own = request.identity == OWN or (request.identity == AUTO and (request.adapters or self._can_carry()))
        if request.faces or request.identity == NOBODY or plan.face is None or not own:
            if request.identity == OWN and plan.face is None:
                raise NoFaceFound("The mask touches no face of the photo, so there is none to keep; say nobody.")
            return super()._resolved_adapters(request)
        return super()._resolved_adapters(replace(request, faces=(plan.canvas,)))

    def _can_carry(self) -> bool:
        return bool(self.loaded.adapters) or self.loaded.assets is not None

    def _plan(self, request: InpaintRequest) -> _Plan:
        from facegen.face import paste

        before = self.photo(request.image)
        canvas, mask = self._canvas(request, before)
        if request.grow:
            x0, y0, x1, y1 = paste.mask_box(mask)
            radius = round(abs(request.grow) * max(x1 - x0, y1 - y0))
            mask = (paste.dilate if request.grow > 0 else paste.erode)(mask, radius)
            if not bool(mask.any()):
                raise WrongMask(f"With grow {request.grow:g} nothing is left of the mask; move it towards 0.")
        box = paste.mask_box(mask)
        face = self._touched(canvas, mask)
        size = request.resolution or max(self.model.default_size)
        self.model.latent_shape(size, size)
        # Eyes are painted better by who sees the face around them.
        seen = box if face is None else paste.around_both(box, face.box.tolist())
        crop = paste.cut(canvas, paste.square(seen, canvas.size, around=request.around), size)
        return _Plan(canvas, mask, crop, box, face)

    def _canvas(self, request: InpaintRequest, before: Image.Image) -> tuple[Image.Image, Tensor]:
        """The photo with room for what is added, and the mask (1, H, W) over it. Raises WrongMask, NoFaceFound."""
        import torch
        import torch.nn.functional as F

        from facegen.images import load_mask, to_pil, to_tensor

        edges = (request.left, request.right, request.top, request.bottom)
        if request.mask is None and not request.region and not any(edges):
            raise WrongRequest(
                "Say what is to be painted: a mask, a part by name as region, or pixels to add at an edge."
            )
        marked = torch.zeros(1, before.height, before.width)
        if request.mask is not None:
            marked = load_mask(request.mask, before.size)
            if not bool(marked.any()):
                raise WrongMask("The mask is empty, so there is nothing to paint; mark the part to change in white.")
        for name in request.region:
            marked = torch.maximum(marked, self.region(before, name, request.select))
        if request.invert:
            marked = 1 - marked
        if not any(edges):
            return before, marked
        # Replicated edges are a better start for what lies beyond them than any colour.
        grown = F.pad(to_tensor(before)[None], edges, mode="replicate")[0]
        return to_pil(grown), F.pad(marked, edges, value=1.0)

    def _touched(self, canvas: Image.Image, mask: Tensor) -> Face | None:
        """The face of which the mask covers most, if it covers a tenth of one at all."""

        def covered(face: Face) -> float:
            x0, y0, x1, y1 = (max(0, round(float(value))) for value in face.box)
            part = mask[:, y0:y1, x0:x1]
            return float(part.mean()) if part.numel() else 0.0

        found = max(self.faces_in(canvas), key=covered, default=None)
        return found if found is not None and covered(found) > 0.1 else None

    def paint(
        self, request: InpaintRequest, conditions: Sequence[Condition], watch: Watch, indices: Sequence[int] | None
    ) -> Iterator[Painted]:
        import torch

        from facegen.face import paste
        from facegen.images import to_tensor

        assert request.seed is not None
        plan = self._plan(request)
        person = self._person(request, plan)
        crop, seen = plan.crop, to_tensor(plan.crop.image)
        hole = crop.take(plan.mask)  # (1, S, S)
        steering = [*self._identity(request, plan, person), *conditions]
        soft = request.soft * max(plan.box[2] - plan.box[0], plan.box[3] - plan.box[1])
        for batch, made in self.repaint(request, seen, hole, steering, watch, indices):
            pasted: list[Image.Image] = []
            for one in made:
                if request.change == 0:  # even resizing there and back would change something
                    pasted.append(plan.canvas)
                    continue
                matched = paste.match_colours(one, seen, (hole == 0).float())
                if person is not None:
                    matched = self._in_their_skin(matched, seen, hole)
                pasted.append(paste.paste(plan.canvas, crop, matched, plan.mask, soft=soft))
            yield Painted(
                indices=batch,
                pixels=torch.stack([to_tensor(one) for one in pasted]),
                references=() if person is None else person.references,
                prompt=request.prompt,
                warnings=() if person is None else person.warnings,
                near=None if plan.face is None else cast("Box", tuple(plan.face.box.tolist())),
                measures=tuple(paste.measured(plan.canvas, one, plan.mask) for one in pasted),
            )

    def _in_their_skin(self, made: Tensor, seen: Tensor, hole: Tensor) -> Tensor:
        """What was made (3, S, S) with the skin tones of the photo (3, S, S) where skin lies in the hole (1, S, S)."""
        from facegen.face import tones

        try:
            return tones.same_skin(made, seen, hole, tones.skin(self.parser, made, seen))
        except WeightsMissing:  # no net can tell where skin is
            return made

    def _person(self, request: InpaintRequest, plan: _Plan) -> Person | None:
        if request.faces:
            return self.person(request.faces, request.select, request.adapters)
        if not request.adapters or plan.face is None:
            return None
        return self.person_at(plan.canvas, plan.face, request.adapters)

    def _identity(self, request: InpaintRequest, plan: _Plan, person: Person | None) -> list[Condition]:
        """The adapters' conditions, with the face where the photo has it."""
        size = (plan.crop.size, plan.crop.size)
        where: dict[str, Any] = {} if plan.face is None else {"points": plan.crop.points(plan.face.points)}
        return self.identity(person, request, size, **where)
