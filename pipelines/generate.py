"""Pictures of a person, or of several, made from their photos and a prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from facegen.errors import WrongMask, WrongRequest
from facegen.pipeline import Painted, PersonRequest, Pipeline, Watch
from facegen.request import CONTROL_KINDS as KINDS
from facegen.request import Curve, Photo, choice, integer, number, people, photo, photos, specs, strengths, switch
from facegen.request import Person as Asked

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from facegen.adapter import Guest
    from facegen.conditions import Condition
    from facegen.face.head import Head
    from facegen.face.paste import Box
    from facegen.loading import Person
    from facegen.models.slid import Slide

log = logging.getLogger(__name__)
AUTO, WINDOWS, MASKS, NONE = "auto", "windows", "masks", "none"
LAYERS, PREDICTIONS = "layers", "predictions"  # ways to keep person and prompt apart
LANDMARKS = "landmarks"
_DRAFT = 0.3  # of the steps: enough to see where in a picture the face will be
SPACING = 0.75  # of the model's own side: how far apart people stand where the picture's size is left open


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(PersonRequest):
    """Everything that decides what the pictures look like."""

    task: ClassVar[str] = "Make pictures of a person from their photos and a prompt."

    sliders: Mapping[str, float] = strengths(
        {},
        "Changes by degrees, such as smile=0.6 age=-1, words of your own: 'freckled|pale'=1, or the file of a slider"
        " that was learnt: mine.safetensors=0.7.",
        low=-5,
        high=5,
    )
    expression: Mapping[str, float] = strengths(
        {}, "An expression by numbers, such as smile=0.8 brow_raise=0.5, or arc2face's own: jaw_0=0.3; else at rest.",
        low=-10, high=10, advanced=True,
    )  # fmt: skip
    expression_from: Photo = photo("A photo, of anybody, whose expression is copied.", advanced=True)
    expression_strength: float = number(
        1.0, "How strongly that expression acts.", low=0, high=3, slider=(0, 2, 0.1), advanced=True
    )
    pose: Mapping[str, float] = strengths(
        {},
        "Where the head is, for an adapter that follows keypoints or for landmarks: yaw, pitch, roll, shift_x, shift_y,"
        " zoom.",
        low=-1, high=2, advanced=True,
    )  # fmt: skip
    geometry: Photo = photo(
        "A picture whose geometry is followed: a photo for a sketch or landmarks, else a map.", advanced=True
    )
    geometry_kind: str = choice("sketch", "What that picture shows.", KINDS, advanced=True)
    geometry_strength: float = number(
        1.0, "How closely it is followed.", low=0, high=3, slider=(0, 2, 0.1), advanced=True
    )
    controlnets: Mapping[str, Curve] = strengths(
        {}, "Further ControlNets, folders in diffusers' format, each with a strength: depth=0.5.",
        low=0, high=3, advanced=True,
    )  # fmt: skip
    control_images: tuple[Photo, ...] = photos("What these ControlNets follow, a picture each.", advanced=True)
    image: Photo = photo("A picture to begin with instead of noise alone.", advanced=True)
    change: float = number(
        0.85, "How much of that picture goes: 1 all but its layout, near 0 hardly any.",
        low=0.01, high=1, slider=(0.05, 1, 0.05), advanced=True,
    )  # fmt: skip
    where: Photo = photo("A picture, white where the person's adapters act; everywhere by default.", advanced=True)
    light_from: Photo = photo("A photo, of anybody, from whose side of the face the light is to come.", advanced=True)
    light_strength: float = number(
        0.1, "How far each step goes towards that light.", low=0, high=5, slider=(0, 0.5, 0.01), advanced=True
    )
    people: tuple[Asked, ...] = people(
        "Several people instead of faces: the photos of each and, if you like, the part of the picture they are in."
    )
    isolation: str = choice(
        AUTO, "How several people are kept apart: masks in the attention, windows of the model's own size, or none.",
        (AUTO, MASKS, WINDOWS, NONE), advanced=True,
    )  # fmt: skip
    character: Photo = photo(
        "A picture whose character, with hair and clothes, is kept: it is looked at while painting.", advanced=True
    )
    character_strength: float = number(
        1.0, "How much that picture weighs against the one that is made.", low=0, high=5, slider=(0, 2, 0.1),
        advanced=True,
    )  # fmt: skip
    apart: str = choice(
        NONE, "Keep person and prompt apart: the person acts in the face alone and not where the prompt asks for"
        " something there; layers: within the attention, predictions: by two predictions a step.",
        (NONE, LAYERS, PREDICTIONS), advanced=True,
    )  # fmt: skip
    repair: bool = switch(
        False, "Where the person has overruled the prompt (hair, glasses, hat …), let the base model paint that part."
    )
    height: int | None = integer(
        None,
        "Height in pixels; the model's own by default.",
        low=8,
        high=4096,
        multiple=8,
        optional=True,
        advanced=True,
    )
    width: int | None = integer(
        None, "Width in pixels; the model's own by default.", low=8, high=4096, multiple=8, optional=True, advanced=True
    )

    def check(self) -> None:
        if self.people and self.faces:
            raise WrongRequest("faces are the photos of one person and people are several; give one of the two.")
        if self.people and self.light_from is not None:
            raise WrongRequest("light_from is for a portrait of one person; leave it out, or give faces, not people.")
        if len(self.controlnets) != len(self.control_images):
            raise WrongRequest(
                f"There are {len(self.controlnets)} controlnets but {len(self.control_images)} control_images; give"
                " each its picture, in the same order."
            )
        if self.apart != NONE and self.people:
            raise WrongRequest("People are kept apart by isolation; leave out apart, which is for one person.")
        if self.where is not None and self.people:
            raise WrongRequest("Several people have a box or a mask each; leave out where.")
        for field in ("sliders", "expression", "pose", "edits"):
            for name, strength in getattr(self, field).items():
                if not isinstance(strength, (int, float)):
                    raise WrongRequest(f"{name} of {field} takes one number, not a curve.")
        if self.expression and self.expression_from is not None:
            raise WrongRequest("Give an expression by numbers or a photo to copy it from, not both.")


@dataclass(frozen=True, eq=False)
class _Cast:
    """Who is in the pictures, where, and the conditions that bring them there; `windows` is empty without windows."""

    everyone: tuple[Person, ...]
    homes: tuple[Box | None, ...] = ()
    conditions: tuple[Condition, ...] = ()
    windows: tuple[Any, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(warning for one in self.everyone for warning in one.warnings))


class GeneratePipeline(Pipeline[GenerateRequest]):
    """``pipe(faces=["me.jpg"], prompt="portrait, red hair", seed=7)``"""

    request_class = GenerateRequest

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        from facegen.models.sliders import files

        self.worn_loras(files(request.sliders, self.loaded.assets))  # a file that cannot be worn is told of now
        return super().resolve(request)

    def _loaded_json(self, request: GenerateRequest) -> dict[str, Any]:
        from facegen.models.sliders import files

        learnt = files(request.sliders, self.loaded.assets)
        return super()._loaded_json(replace(request, loras={**request.loras, **learnt}))

    def paint(
        self, request: GenerateRequest, conditions: Sequence[Condition], watch: Watch, indices: Sequence[int] | None
    ) -> Iterator[Painted]:
        from facegen.models.sliders import asked
        from facegen.models.windows import Windows

        assert request.seed is not None
        size = self.size(request)
        who = self._cast(request, size)
        loras = self.worn_loras(request.loras)
        prompt = self.words(request, loras)
        # An adapter that writes the prompt itself comes after the plain prompt, and the last one counts.
        shaped = [
            *self._expression(request, size),
            *self._geometry(request, who, size),
            *self._controlled(request, size),
        ]
        shaped += self._light(request, size)
        everything = [prompt, *who.conditions, *shaped, *loras, *conditions]
        wanted = self._wanted_expression(request)
        model: Any = self.host(request.adapters)
        model = Windows(model, who.windows) if who.windows else model
        batches = list(self.batches(request.num_images_per_prompt, request.batch_size, indices))
        total, done = sum(map(len, batches)), 0
        for batch in batches:
            on_step = self.on_step(watch, done, len(batch), total)
            if request.apart == NONE or not who.conditions:
                latents = self._run(model, request, size, everything, batch, on_step)
            else:
                latents = self._run_apart(model, request, size, (who, everything), batch, on_step)
            pixels, measures = self.model.decode(latents), tuple[Mapping[str, float], ...]()
            if request.repair and who.everyone and not request.people:
                pixels, measures = self._repaired(request, who, everything, batch, pixels)
            if wanted:
                measures = self._with_expression(request, wanted, pixels, measures)
            done += len(batch)
            yield Painted(
                indices=batch,
                pixels=pixels,
                references=who.everyone[0].references if len(who.everyone) == 1 else (),
                prompt=asked(request.prompt, request.sliders, self.loaded.assets),
                warnings=who.warnings,
                people=tuple(one.references for one in who.everyone) if request.people else (),
                homes=who.homes,
                measures=measures,
            )

    def _run(
        self,
        model: Any,
        request: GenerateRequest,
        size: tuple[int, int],
        conditions: Sequence[Condition],
        batch: tuple[int, ...],
        on_step: Any = None,
    ) -> Tensor:
        """Latents (B, 4, h, w) of the pictures at these places."""
        from facegen import schedulers
        from facegen.denoise import Guidance, noise
        from facegen.given_noise import instead
        from facegen.sliding import denoise_slid

        assert request.seed is not None
        generators = self.generators(request.seed, batch)
        photo, change = None, 1.0
        if request.image is not None:
            change = request.change
            if int(request.num_inference_steps * change) < 1:
                raise WrongRequest(
                    f"A change of {change:g} in {request.num_inference_steps} steps leaves no step; raise one of them."
                )
            photo = self.model.encode_image(self._fitted(request.image, size))
        scheduler = schedulers.build(
            request.scheduler,
            self.model.scheduler_config,
            request.num_inference_steps,
            strength=change,
            device=self.model.device,
        )
        drawn = noise(self.model.latent_shape(*size), generators, device=self.model.device, dtype=self.model.dtype)
        start = instead(drawn, request.noise_of(batch))
        acting = [*conditions, *self._character(request, size, conditions, start)]
        begin = schedulers.start(scheduler, start, None if photo is None else photo.expand_as(start))
        guidance = Guidance(request.guidance_scale)
        slides = self._slides(request, conditions)
        return denoise_slid(model, slides, begin, scheduler, acting, guidance, generators, on_step)

    def _run_apart(
        self,
        model: Any,
        request: GenerateRequest,
        size: tuple[int, int],
        asked: tuple[_Cast, Sequence[Condition]],
        batch: tuple[int, ...],
        on_step: Any = None,
    ) -> Tensor:
        """As `_run`, the person's conditions acting only in the face of each picture; asked: who, all conditions."""
        import torch

        from facegen import repair
        from facegen.models.decoupled import Decoupled

        who, everything = asked
        if request.where is None:
            masks = self._face_masks(model, request, size, everything, batch)
        else:
            masks = _drawn(self.photo(request.where), size, "where").expand(len(batch), 1, -1, -1)
        if request.apart == PREDICTIONS:
            shared = [one for one in everything if one not in who.conditions]
            both = Decoupled(model, masks, who.conditions)
            return self._run(both, request, size, shared, batch, on_step)
        made = [
            self._run(model, request, size, repair.confined(everything, who.conditions, mask), (place,), on_step)
            for place, mask in zip(batch, masks, strict=True)
        ]
        return torch.cat(made)

    def _face_masks(
        self,
        model: Any,
        request: GenerateRequest,
        size: tuple[int, int],
        everything: Sequence[Condition],
        batch: tuple[int, ...],
    ) -> Tensor:
        """Where the person may act in each picture, (B, 1, H, W): a draft of few steps from the same noise tells."""
        import torch

        from facegen import repair
        from facegen.images import to_pil

        steps = request.num_inference_steps
        if request.image is None:  # else there may be no step to spare
            steps = min(steps, max(4, round(steps * _DRAFT)))
        draft = replace(request, num_inference_steps=steps, character=None)
        pictures = self.model.decode(self._run(model, draft, size, everything, batch))
        shown = list(map(to_pil, pictures))
        return torch.stack([repair.visual(self.parser, request.prompt, one, self.faces_in(one)) for one in shown])

    # who

    def size(self, request: Any) -> tuple[int, int]:
        """As ever; several people stand side by side where the width is left open."""
        beside = request.people and not self._together(request)
        if not beside or request.width is not None or request.isolation in (MASKS, NONE):
            return super().size(request)
        tall, wide = self.model.default_size
        grid = self.model.vae_factor * 2 ** (len(self.model.unet.config["block_out_channels"]) - 1)
        across = math.ceil(wide * (1 + SPACING * (len(request.people) - 1)) / grid) * grid
        return super().size(replace(request, width=max(across, wide), height=request.height or tall))

    def _resolved_adapters(self, request: GenerateRequest) -> tuple[str, ...]:
        if not request.people:
            return super()._resolved_adapters(request)
        names = super()._resolved_adapters(replace(request, people=(), faces=request.people[0].photos))
        for name in names:
            adapter = self.loaded.adapters[name].adapter
            if adapter.writes_prompt and len(request.people) > adapter.together:
                most = "one person" if adapter.together == 1 else f"{adapter.together} people"
                raise WrongRequest(f"{name} writes the prompt, so it brings in {most} only; use another adapter.")
        return names

    def _cast(self, request: GenerateRequest, size: tuple[int, int]) -> _Cast:
        if not request.people:
            person = self.person(request.faces, request.select, request.adapters)
            where = {**self._pose(request, person, size), **self._parts(request, size)}
            if request.where is not None:
                where["mask"] = _drawn(self.photo(request.where), size, "where")
            return _Cast(
                () if person is None else (person,), conditions=tuple(self.identity(person, request, size, **where))
            )
        everyone = tuple(
            cast("Person", self.person(one.photos, request.select, request.adapters)) for one in request.people
        )
        masks = [_mask(request.people, place, size, self.photo) for place in range(len(request.people))]
        homes = tuple(_home(mask) for mask in masks)
        own = self.model.default_size
        together = self._together(request)
        wide = request.isolation == AUTO and not together and (size[0] > own[0] or size[1] > own[1])
        if request.isolation == WINDOWS or wide:
            return self._in_windows(request, size, everyone, homes)
        conditions: list[Condition] = []
        for asked, person, mask, home in zip(request.people, everyone, masks, homes, strict=True):
            place = _placed(asked, person, home)
            if request.isolation != NONE:
                place["mask"] = mask
            alone = tuple(name for name in request.adapters if name not in together)
            conditions += self.identity(person, request, size, alone, **place)
        for name in together:
            worn = self.loaded.adapters[name]
            guests = [self._guest(one, who, worn.pack) for one, who in zip(request.people, everyone, strict=True)]
            wish = self.wishes(request, size)[name]
            conditions += worn.adapter.conditions_together(guests, wish, self.model)
        return _Cast(everyone, homes, tuple(conditions))

    def _together(self, request: GenerateRequest) -> tuple[str, ...]:
        """Those of the adapters that bring in several people as one."""
        loaded = self.loaded.adapters
        return tuple(name for name in request.adapters if name in loaded and loaded[name].adapter.together > 1)

    def _guest(self, asked: Asked, person: Person, pack: str) -> Guest:
        from facegen.adapter import Guest
        from facegen.images import load_mask

        faces = person.kept(pack)
        body = None if asked.body is None else load_mask(asked.body, person.photos[0].size)
        return Guest(faces=faces, body=body, clothes=None if asked.clothes is None else self.photo(asked.clothes))

    def _in_windows(
        self, request: GenerateRequest, size: tuple[int, int], everyone: tuple[Person, ...], homes: tuple[Box, ...]
    ) -> _Cast:
        from facegen.models.windows import Window, spread

        factor, own = self.model.vae_factor, self.model.default_size
        middles = [((box[0] + box[2]) / 2 / factor, (box[1] + box[3]) / 2 / factor) for box in homes]
        side = (own[0] // factor, own[1] // factor)
        boxes = spread(size[0] // factor, size[1] // factor, side, middles)
        windows = []
        for place, box in enumerate(boxes):
            conditions: list[Condition] = []
            if place < len(everyone):
                small = ((box[3] - box[1]) * factor, (box[2] - box[0]) * factor)
                where = _placed(request.people[place], everyone[place], (0, 0, small[1], small[0]))
                conditions = self.identity(everyone[place], request, small, **where)
            windows.append(Window(box, tuple(conditions)))
        return _Cast(everyone, homes, windows=tuple(windows))

    # what else steers

    def _pose(self, request: GenerateRequest, person: Person | None, size: tuple[int, int]) -> dict[str, Any]:
        """Where the keypoints go when a pose is asked for: the person's own head turned, not the photo's drawing."""
        from facegen.models.geometry import posed_points

        if not request.pose:
            return {}
        if any(hasattr(self.loaded.adapters[name].adapter, "controlnet") for name in request.adapters):
            return {"points": posed_points(dict(request.pose), size, self._head(person))}
        if request.geometry_kind == LANDMARKS and (person is not None or request.geometry is not None):
            return {}
        raise WrongRequest(
            "A pose needs photos of a person and an adapter that follows keypoints, like instantid, or the geometry"
            " kind landmarks."
        )

    def _head(self, person: Person | None) -> Head | None:
        """The person's own head; None, which stands for the average one, without the net that finds 68 points."""
        from facegen.errors import WeightsMissing
        from facegen.face.head import fit

        if person is None:
            return None
        face = person.references[0]
        try:
            return fit(self.finder.find(face.image, face))
        except WeightsMissing as missing:
            log.info("The average head is turned: %s", missing)
            return None

    def _parts(self, request: GenerateRequest, size: tuple[int, int]) -> dict[str, Any]:
        """What an adapter with parts of its own (Arc2Face) takes over: expression, a map of normals, a character."""
        given: dict[str, Any] = {}
        parts: dict[str, float] = {}

        def take(part: str, field: str, value: Any) -> None:
            given[part], strength = value, getattr(request, f"{field}_strength")
            if strength != specs(type(request))[f"{field}_strength"].default:
                parts["pose" if part == "normals" else part] = strength

        if request.expression and (known := self.knowing(request.adapters, "expression")):
            take("expression", "expression", known[0].expression_of(request.expression))
        if request.geometry is not None and self._own_normals(request):
            take("normals", "geometry", self._fitted(request.geometry, size))
        if request.character is not None and self.knowing(request.adapters, "reference"):
            take("reference", "character", self._fitted(request.character, size))
        return {**given, "parts": parts} if given else {}

    def _own_normals(self, request: GenerateRequest) -> bool:
        return request.geometry_kind == "normals" and bool(self.knowing(request.adapters, "normals"))

    def _fitted(self, picture: Photo, size: tuple[int, int]) -> Tensor:
        """A picture cut to the shape of the made one, (1, 3, H, W) in [0, 1]."""
        from PIL import ImageOps

        from facegen.images import to_tensor

        return to_tensor(ImageOps.fit(self.photo(picture), (size[1], size[0])))[None]

    def _controlled(self, request: GenerateRequest, size: tuple[int, int]) -> list[Condition]:
        from facegen.conditions import ControlCondition

        pairs = zip(request.controlnets.items(), request.control_images, strict=True)
        return [
            ControlCondition(controlnet=self.controlnet(name), image=self._fitted(picture, size), scale=strength)
            for (name, strength), picture in pairs
        ]

    def _expression(self, request: GenerateRequest, size: tuple[int, int]) -> list[Condition]:
        from facegen.adapter import AdapterRequest
        from facegen.adapters.expression import Expression, coefficients

        if not (request.expression or request.expression_from is not None) or not request.expression_strength:
            return []
        if request.expression and self.knowing(request.adapters, "expression"):
            return []
        adapter = cast(Expression, self.control("expression"))
        if request.expression_from is None:
            row = coefficients(request.expression)
        else:
            row = adapter.gather([self.one_face(self.photo(request.expression_from), request.select, "that photo")])
        asked = AdapterRequest(
            height=size[0], width=size[1], scale=request.expression_strength, guidance=request.guidance_scale > 1
        )
        return adapter.conditions_from_embeddings(row, self.model, asked)

    def _wanted_expression(self, request: GenerateRequest) -> Mapping[str, float]:
        """The coefficients that are asked for; none where nothing can tell whether they were reached."""
        from facegen.face.parse import portrait

        asked = request.expression or request.expression_from is not None
        if not asked or request.people or not request.expression_strength:
            return {}
        shape = self.judges(request.adapters).shape
        if shape is None:
            return {}
        if request.expression_from is None:
            return request.expression
        photo = self.photo(request.expression_from)
        return shape.expression(portrait(photo, self.one_face(photo, request.select, "that photo").points))

    def _with_expression(
        self,
        request: GenerateRequest,
        wanted: Mapping[str, float],
        pixels: Tensor,
        measures: Sequence[Mapping[str, float]],
    ) -> tuple[Mapping[str, float], ...]:
        """The measures of the pictures (B, 3, H, W) with how far each is from the coefficients that were wanted."""
        from facegen.images import to_pil

        shape = self.judges(request.adapters).shape
        assert shape is not None
        told = []
        for one, known in zip(pixels, measures or [{}] * len(pixels), strict=True):
            found = shape.expression(to_pil(one))
            missed = [abs(found[name] - value) for name, value in wanted.items() if name in found]
            told.append({**known, "expression error": round(sum(missed) / len(missed), 4)} if missed else known)
        return tuple(told)

    def _geometry(self, request: GenerateRequest, who: _Cast, size: tuple[int, int]) -> list[Condition]:
        from facegen.models.geometry import Geometry, read

        kind = request.geometry_kind
        own = kind == LANDMARKS and bool(request.pose) and len(who.everyone) == 1  # the person's own head, turned
        if not request.geometry_strength or (request.geometry is None and not own) or self._own_normals(request):
            return []
        control = cast(Geometry, self.control(kind))
        picture = self._landmarks(request, who, size) if kind == LANDMARKS else None
        if picture is None:
            picture = read(kind, self.photo(request.geometry), size)
        return [control.condition(picture, scale=request.geometry_strength)]

    def _landmarks(self, request: GenerateRequest, who: _Cast, size: tuple[int, int]) -> Tensor | None:
        """The 68 points of the face in the photo (without one: of the person), in the pose that is asked for, drawn:
        (1, 3, H, W); None for a map, which is drawn already.
        """
        from facegen.face.head import fit
        from facegen.models.geometry import draw_landmarks, is_map

        if request.geometry is None:
            face = who.everyone[0].references[0]
            photo = face.image
        else:
            photo = self.photo(request.geometry)
            if is_map(photo):
                if request.pose:
                    raise WrongRequest("A drawn map cannot be turned to a pose; give the photo as geometry.")
                return None
            face = self.one_face(photo, request.select, "the geometry photo")
        points = self.finder.find(photo, face)
        if request.pose:
            points = fit(points).seen(dict(request.pose), size)
        else:
            points = (points + 0.5) * [size[1] / photo.width, size[0] / photo.height] - 0.5
        return draw_landmarks(points, (size[1], size[0]))[None]

    def _light(self, request: GenerateRequest, size: tuple[int, int]) -> list[Condition]:
        """What leads the light to the side from which it comes in the query photo, where a portrait's face is."""
        if request.light_from is None or not request.light_strength:
            return []
        import torch

        from facegen.face.light import side
        from facegen.models.geometry import posed_points
        from facegen.steering import light_guidance

        photo = self.photo(request.light_from)
        found = side(photo, self.one_face(photo, request.select, "the photo of the light"))
        points = torch.from_numpy(posed_points(dict(request.pose), size)).float()
        return [light_guidance(self.model, found, points, scale=request.light_strength)]

    def _slides(self, request: GenerateRequest, conditions: Sequence[Condition]) -> list[Slide]:
        """What the sliders do in a run under these conditions."""
        from facegen.conditions import LoraCondition, TextCondition
        from facegen.models.sliders import by_pairs, files, slides

        last = [one for one in conditions if isinstance(one, TextCondition)][-1]
        loras = [one for one in conditions if isinstance(one, LoraCondition)]
        names = files(request.sliders, self.loaded.assets)
        learnt = dict(zip(names, self.worn_loras(names), strict=True))
        return slides(
            lambda prompt: self.words(replace(request, prompt=prompt), loras),
            request.prompt,
            last,
            request.sliders,
            learnt,
            [name for name in names if by_pairs(self.lora_path(name))],
        )

    def _character(
        self, request: GenerateRequest, size: tuple[int, int], conditions: Sequence[Condition], start: Tensor
    ) -> list[Condition]:
        """What lets the run look at another picture of the character."""
        own = self.knowing(request.adapters, "reference")
        if request.character is None or request.character_strength == 0 or own:
            return []
        latents = self.model.encode_image(self._fitted(request.character, size))
        return self._look(request, latents, conditions, start, request.character_strength)

    def _look(
        self,
        request: GenerateRequest,
        latents: Tensor,
        conditions: Sequence[Condition],
        start: Tensor,
        scale: float,
        mask: Tensor | None = None,
    ) -> list[Condition]:
        from facegen import schedulers
        from facegen.conditions import TextCondition
        from facegen.models.references import look_at

        text = next(one for one in conditions if isinstance(one, TextCondition))
        scheduler = schedulers.build(
            request.scheduler, self.model.scheduler_config, request.num_inference_steps, device=self.model.device
        )
        return [*look_at(self.model, latents, text, scheduler, start[:1], scale=scale, mask=mask)]

    # repair

    def _repaired(
        self,
        request: GenerateRequest,
        who: _Cast,
        conditions: Sequence[Condition],
        batch: tuple[int, ...],
        pixels: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[Mapping[str, float], ...]]:
        """The pictures (B, 3, H, W), each with what it lacks borrowed from the base model, and what that changed."""
        import torch

        made, told = [], []
        for place, one in zip(batch, pixels, strict=True):
            picture, measures = self._mended(request, who, conditions, place, one)
            made.append(picture)
            told.append(measures)
        return torch.stack(made), tuple(told)

    def _mended(
        self,
        request: GenerateRequest,
        who: _Cast,
        conditions: Sequence[Condition],
        place: int,
        pixels: torch.Tensor,
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        """One picture (3, H, W) repaired, if the judges find that it became better and stayed the same person."""
        from facegen import repair
        from facegen.images import to_pil
        from facegen.models.sliders import asked

        assert request.seed is not None
        judges = self.judges(request.adapters)
        if judges.prompt is None:
            return pixels, {}
        before, wish = to_pil(pixels), asked(request.prompt, request.sliders, self.loaded.assets)
        obedience = judges.prompt.obedience(wish, before)
        parts = repair.parts_of(repair.missed(wish, obedience))
        if not parts:
            return pixels, {}
        size, (prompt, *rest) = (pixels.shape[-2], pixels.shape[-1]), conditions
        plain = [one for one in rest if one not in who.conditions]
        # The base model's own answer, from the same noise, knows where the thing asked for would be.
        answer = self._run(self.model, replace(request, character=None), size, [prompt, *plain], (place,))
        shown = [(one, self.faces_in(one)) for one in (before, to_pil(self.model.decode(answer)[0]))]
        mask = repair.region(self.parser, parts, shown)
        if not bool(mask.any()):
            return pixels, {}
        left = repair.SHARED if set(parts) <= repair.INSIDE else 0.0
        person = repair.without(who.conditions, (1 - left) * mask)
        mended = self._borrowed(request, [prompt, *person, *plain], (pixels, answer, mask), place)
        after = to_pil(mended)
        now = judges.prompt.obedience(wish, after)
        likeness = [self._likeness(request, who, one) for one in (before, after)]
        lost = max(0.0, likeness[0] - likeness[1])
        better = len(now.hit) > len(obedience.hit) and lost <= 0.1
        measures = {
            "prompt before repair": float(len(obedience.hit)),
            "prompt after repair": float(len(now.hit)),
            "likeness lost by repair": round(lost, 4),
            "repaired": float(better),
        }
        return (mended if better else pixels), measures

    def _borrowed(
        self,
        request: GenerateRequest,
        conditions: Sequence[Condition],
        painted: tuple[torch.Tensor, Tensor, Tensor],
        place: int,
    ) -> torch.Tensor:
        """painted: the picture (3, H, W), the base's latents (1, 4, h, w), the part (1, H, W) → the picture with the
        part painted anew, where it may look at the base's answer.
        """
        from facegen.denoise import Guidance, noise
        from facegen.face.paste import blend, feather
        from facegen.given_noise import instead
        from facegen.images import to_pil, to_tensor
        from facegen.patch import Run, repaint

        assert request.seed is not None
        pixels, answer, mask = painted
        shape = self.model.latent_shape(pixels.shape[-2], pixels.shape[-1])
        drawn = noise(shape, self.generators(request.seed, (place,)), device=self.model.device, dtype=self.model.dtype)
        start = instead(drawn, request.noise_of((place,)))
        looks = self._look(request, answer, conditions, start, 1.0, mask)
        run = Run(
            request.scheduler,
            request.num_inference_steps,
            Guidance(request.guidance_scale),
            noise=start,
            slides=tuple(self._slides(request, conditions)),
        )
        generators = self.generators(request.seed, (place,))
        made = repaint(self.model, pixels.float().cpu(), mask, [*conditions, *looks], run, generators)[0]
        soft = feather(mask, 0.015 * max(pixels.shape[-2:]))
        return to_tensor(blend(to_pil(pixels), made.cpu(), soft)).to(pixels)

    def _likeness(self, request: GenerateRequest, who: _Cast, picture: Any) -> float:
        """Cosine to the person by the judge; 0 where it cannot be told."""
        judges = self.judges(request.adapters)
        faces = self.faces_in(picture)
        if judges.likeness is None or not faces:
            return 0.0
        return judges.likeness.cosine(max(faces, key=lambda face: face.area), who.everyone[0].references)


def _mask(everyone: Sequence[Asked], place: int, size: tuple[int, int], read: Any) -> Tensor:
    """The part (1, H, W) of a picture of this size (height, width) that is meant for a person."""
    import torch

    one, (height, width) = everyone[place], size
    if one.mask is not None:
        return _drawn(read(one.mask), size, f"the mask of person {place + 1}")
    x0, y0, x1, y1 = one.box or (place / len(everyone), 0.0, (place + 1) / len(everyone), 1.0)
    mask = torch.zeros(1, height, width)
    mask[:, round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = 1
    return mask


def _drawn(picture: Image.Image, size: tuple[int, int], what: str) -> Tensor:
    """A drawn mask at the size (height, width) of the picture that is made, (1, H, W)."""
    import torch.nn.functional as F

    from facegen.images import to_tensor

    drawn = to_tensor(picture).mean(0, keepdim=True)
    mask = (F.interpolate(drawn[None], size)[0] > 0.5).float()
    if not bool(mask.any()):
        raise WrongMask(f"{what[0].upper()}{what[1:]} is empty; mark that part of the picture in white.")
    return mask


def _home(mask: Tensor) -> Box:
    from facegen.face.paste import mask_box

    return mask_box(mask)


def _placed(asked: Asked, person: Person, home: Box) -> dict[str, Any]:
    """Where in the picture a person's points go: as a portrait in their part of it; and how strongly they act."""
    import numpy as np

    from facegen.face.align import ARCFACE_POINTS, similarity

    points = person.references[0].points
    side = 0.55 * min(home[2] - home[0], home[3] - home[1])
    middle = np.array([(home[0] + home[2]) / 2, home[1] + 0.47 * (home[3] - home[1])])
    target = (ARCFACE_POINTS - 56) * (side / 112) + middle
    matrix = similarity(points, target)
    place: dict[str, Any] = {"points": (points @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)}
    if asked.strength is not None:
        place["scale"] = asked.strength
    return place
