"""What every task shares: what is loaded, whose face it is, how pictures are judged, recorded and handed out.

A task is one file in pipelines/: its request (facegen.request) and a subclass of :class:`Pipeline` that turns a request
into pictures in :meth:`Pipeline.paint`. Nothing heavy is imported until a model is loaded.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pkgutil
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from facegen import __version__, examples, few_steps
from facegen.errors import Cancelled, WrongRequest
from facegen.loading import Loaded, Loading, Person, Worn, lora_path, weights_checksum
from facegen.request import (
    Curve,
    Photo,
    Request,
    Strengths,
    choice,
    from_json,
    integer,
    make,
    names,
    number,
    photos,
    specs,
    strengths,
    suggestion,
    switch,
    text,
    to_json,
)
from facegen.schedulers import NAMES

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from facegen import metadata
    from facegen.adapter import Adapter, AdapterRequest
    from facegen.conditions import Condition, LoraCondition, TextCondition
    from facegen.denoise import Step
    from facegen.face.analyze import FaceAnalyzer
    from facegen.face.fuse import Fused
    from facegen.face.landmarks import LandmarkFinder
    from facegen.face.parse import FaceParser
    from facegen.face.types import Face
    from facegen.models.base import Model
    from facegen.models.lora_blocks import Blocks
    from facegen.report import Judges, Report

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Request)
P = TypeVar("P", bound="Pipeline[Any]")


@dataclass(frozen=True, kw_only=True)
class PersonRequest(Request):
    """What every task asks that paints a person: who, what, how strongly, with which noise and how many steps."""

    faces: tuple[Photo, ...] = photos(
        "Photos of one person, or example:1 to example:999; several are fused into one likeness; none: anybody.",
        positional=True,
    )
    prompt: str = text("a portrait of a person", "What the picture shows.", lines=2)
    negative_prompt: str = text("", "What the picture should not show.", lines=2)
    adapters: tuple[str, ...] = names(
        (),
        "How the person is brought in: arc2face, instantid, ip_adapter_faceid, a folder or a file; several act as one."
        " face.bin=plusv2 says which variant a file is, where its keys leave that open.",
    )
    strength: Strengths | None = strengths(
        None, "How strongly: a number, a curve over the steps, or these by adapter; the adapter's own by default.",
        low=0, high=3, optional=True,
    )  # fmt: skip
    control_strength: Strengths | None = strengths(
        None, "InstantID: how closely the pose of the first photo is kept; the adapter's own choice by default.",
        low=0, high=3, optional=True, advanced=True,
    )  # fmt: skip
    structure: float = number(
        1.0, "FaceID-PlusV2: how much of the photo's look beyond the likeness is taken over.",
        low=0, high=3, slider=(0, 2, 0.1), advanced=True,
    )  # fmt: skip
    num_images_per_prompt: int = integer(1, "How many pictures.", low=1, high=10_000, slider=(1, 12, 1), alias="count")
    seed: int | None = integer(
        None, "Where the noise starts; picture i uses seed + i. Drawn by lot when not given.",
        low=0, high=2**53, optional=True,
    )  # fmt: skip
    tries: int = integer(
        1, "How often a picture is tried, with other seeds, until the judges find the person and all of the prompt in"
        " it; the best is kept.", low=1, high=100, slider=(1, 8, 1),
    )  # fmt: skip
    num_inference_steps: int = integer(
        30, "How many denoising steps.", low=1, high=1000, slider=(4, 60, 1), alias="steps"
    )
    guidance_scale: float = number(
        3.0, "How closely to follow the prompt: 3 suits mini, most adapters came with 3 to 7.5; 1 or less is none.",
        low=0, high=50, slider=(1, 15, 0.5), alias="guidance",
    )  # fmt: skip
    scheduler: str = choice(
        "model", "How the noise is removed; model: as the model was published.", NAMES, advanced=True
    )
    loras: Mapping[str, Curve | Blocks] = strengths(
        {},
        "LoRA files, each with a strength: style.safetensors=0.8, or one for each block of the UNet:"
        " style.safetensors=down:0.5,mid:1,up:0.3, as kohya's list =lbw:1,0,….",
        parts=True, advanced=True,
    )  # fmt: skip
    edits: Mapping[str, float] = strengths(
        {}, "Edits of the face's code, where an adapter knows them (wplus, precisecontrol): smile=1.5 age=-1.",
        low=-100, high=100, advanced=True,
    )  # fmt: skip
    manner: str | None = choice(
        None, "PuLID: for the likeness, for the prompt's style, or plainly added; the adapter's own choice by default.",
        ("fidelity", "style", "plain"), optional=True, advanced=True,
    )  # fmt: skip
    delay: float | None = number(
        None, "Which share of the run is left to the prompt before the person comes in; the adapter's own by default.",
        low=0, high=1, optional=True, advanced=True,
    )  # fmt: skip
    weighted: bool = switch(
        False, "Read (word:1.3), (word) and [word] in the prompts as more or less weight, at any length.", advanced=True
    )
    select: str = choice(
        "only", "Which face of a photo that shows several.", ("only", "largest", "central"), advanced=True
    )
    batch_size: int = integer(
        1, "How many pictures are made at once; with 1 each is the same to the last bit in any company.",
        low=1, high=256, advanced=True,
    )  # fmt: skip
    # No field of a form or a command line: a tensor (N, C, h, w) of unit variance, one row for each picture.
    latents: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def noise_of(self, places: Sequence[int]) -> torch.Tensor | None:
        """The given noise (B, C, h, w) of the pictures at these places; None where the seed draws it."""
        return None if self.latents is None else self.latents[list(places)]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a call is: `done` of `total` steps over all its pictures, and a preview of those being made.

    preview: decodes the pictures as this step sees them coming (a list of PIL pictures); None between steps.
    """

    stage: str
    done: int
    total: int
    preview: Callable[[], list[Image.Image]] | None = None

    @property
    def fraction(self) -> float:
        """0 to 1."""
        return self.done / max(self.total, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Watch:
    """Who is told of progress, and who may stop the call."""

    on_progress: Callable[[Progress], None] | None = None
    cancelled: Callable[[], bool] | None = None

    def tell(self, progress: Progress) -> None:
        """Raises :class:`Cancelled` when the call is to stop."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("Stopped; the pictures that were finished are whole, nothing else was written.")
        if self.on_progress is not None:
            self.on_progress(progress)

    def within(self, part: int, parts: int) -> Watch:
        """Who is told of a call that is the `part`-th, counted from 0, of `parts` equal ones."""

        def tell(now: Progress) -> None:
            self.tell(replace(now, done=part * now.total + now.done, total=parts * now.total))

        return Watch(on_progress=tell)


@dataclass(frozen=True, eq=False, kw_only=True)
class Painted:
    """One batch of pictures of a task: their places in the call and their pixels (B, 3, H, W) in [0, 1].

    references: whom the pictures should show, near the part `near` (x0, y0, x1, y1, pixels) where that is known.
    people: the faces of each of several people, homes: the parts meant for them. measures: for each picture what the
    task measured itself.
    """

    indices: tuple[int, ...]
    pixels: torch.Tensor
    references: tuple[Face, ...] = ()
    prompt: str = ""
    warnings: tuple[str, ...] = ()
    near: tuple[float, float, float, float] | None = None
    people: tuple[tuple[Face, ...], ...] = ()
    homes: tuple[tuple[float, float, float, float] | None, ...] = ()
    measures: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Output(Generic[R]):
    """What a call gives: pictures, a report on each, and the request with everything that was left open filled in."""

    images: list[metadata.Picture]
    reports: list[Report]
    request: R

    def save(self, folder: str | Path, stem: str = "picture") -> list[Path]:
        """Write every picture as PNG with its metadata: stem-1.png, stem-2.png, …"""
        paths = [Path(folder) / f"{stem}-{place}.png" for place in range(1, len(self.images) + 1)]
        for path, image in zip(paths, self.images, strict=True):
            image.save(path)
        return paths


class Pipeline(ABC, Generic[R]):
    """Base of all tasks; see facegen/pipelines/generate.py for the smallest one."""

    request_class: ClassVar[type[Request]]

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    # loading

    @classmethod
    def from_pretrained(cls: type[P], model: str | Path = "mini", **options: Any) -> P:
        """Load a base model: "mini", "sd15", "sdxl", a hub id, a diffusers folder or a single file.

        options: the other fields of :class:`Loading` (pack, device, dtype, memory, tiling, weights), dtype also as
        torch's; memory also as offload.
        """
        if "offload" in options:
            options["memory"] = options.pop("offload")
        dtype = options.get("dtype")
        if dtype is not None and not isinstance(dtype, str):
            options["dtype"] = str(dtype).removeprefix("torch.")
        device = options.pop("device", None)
        loading = make(Loading, {"model": str(model), **options, "device": None if device is None else str(device)})
        return cls.load(loading)

    @classmethod
    def load(cls: type[P], loading: Loading) -> P:
        """Load what a :class:`Loading` describes."""
        import torch

        from facegen import hub
        from facegen.attention.backends import backend_by_name
        from facegen.economy import preset
        from facegen.models.base import Model, locate
        from facegen.models.tiny import load_tiny

        if loading.commercial_only:
            for name in filter(None, (loading.model, loading.pack, loading.tiny_vae)):
                hub.check_commercial(name)
        model = Model.from_pretrained(
            loading.model,
            dtype=getattr(torch, loading.dtype) if loading.dtype else None,
            device=loading.device,
            offload=cast(Any, loading.memory),
            tiling=loading.tiling,
            weights=cast(Any, loading.weights),
        )
        model.economy = preset(loading.speed)
        model.backend = backend_by_name(loading.attention)
        if loading.tiny_vae is not None:
            model.tiny = load_tiny(loading.tiny_vae, model)
        loading.quicken([model.unet], [model.tiny or model.vae, *model.text_encoders().values()])
        return cls(Loaded(model, loading, weights_checksum(locate(loading.model)), hub.licence(loading.model)))

    @classmethod
    def from_pipe(cls: type[P], pipe: Pipeline[Any]) -> P:
        """Another task with the same loaded weights, adapters and judges; nothing is copied."""
        return cls(pipe.loaded)

    @property
    def model(self) -> Model:
        return self.loaded.model

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return tuple(self.loaded.adapters)

    def load_adapter(self, source: str | Path, name: str | None = None, *, variant: str | None = None) -> str:
        """Load an adapter by name, folder or file (its family is read off its keys) and return the name it goes by.

        name: for a second adapter of one family. variant: which one the file is, where its keys leave that open
        ("plusv2"); the source may say it too, "face.bin=plusv2", as adapters of a request and --adapters do.
        Raises WeightsMissing, CheckpointBroken, WrongAdapter or WrongBaseModel; WrongRequest for a variant that there
        is not; NotCommercial for a pipeline that was loaded with commercial_only.
        """
        from facegen import adapter as contract
        from facegen.models.control import controlnets

        source = contract.with_variant(source, variant)
        adapter, path = contract.load(source, self.model, commercial_only=self.loaded.loading.commercial_only)
        walked = [adapter.host(self.model).unet, *controlnets(adapter.modules())]
        self.loaded.loading.quicken(walked, [adapter.modules()])
        called = name or adapter.name
        if called in self.loaded.adapters and self.loaded.adapters[called].source != str(source):
            raise WrongRequest(f"An adapter called '{called}' is loaded already; give this one another name.")
        pack = self.loaded.pack or adapter.pack
        self.loaded.adapters[called] = Worn(
            adapter=adapter, source=str(source), sha256=weights_checksum(path), pack=pack
        )
        return called

    def load_recorded_adapters(self, record: metadata.Record) -> None:
        """Load the adapters that made a picture, from where they were and by the names they had."""
        for name, recorded in record.loaded.get("adapters", {}).items():
            self.load_adapter(recorded["source"], name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        if name not in self.loaded.adapters:
            raise WrongRequest(f"No adapter '{name}' is loaded{suggestion(name, self.loaded.adapters)}.")
        del self.loaded.adapters[name]

    def available_adapters(self) -> tuple[str, ...]:
        """The names of the adapters whose weights are on this machine and belong to this kind of model."""
        from facegen.adapter import find_adapters
        from facegen.errors import WeightsMissing
        from facegen.hub import resolve

        if self.loaded.assets is not None:
            beside = self.loaded.assets / "adapters"
            return tuple(name for name in find_adapters() if name != "expression" and (beside / name).is_dir())
        there = []
        for name in find_adapters():
            try:
                resolve(name)
            except WeightsMissing:
                continue
            there.append(name)
        return tuple(there)

    def analyzer(self, pack: str) -> FaceAnalyzer:
        """The face analysis of a pack, loaded once."""
        from facegen import hub
        from facegen.face.analyze import FaceAnalyzer

        if pack not in self.loaded.analyzers:
            if self.loaded.loading.commercial_only:
                hub.check_commercial(pack)
            self.loaded.analyzers[pack] = FaceAnalyzer.from_pretrained(pack)
        return self.loaded.analyzers[pack]

    # calling

    def __call__(
        self,
        request: R | None = None,
        *,
        conditions: Sequence[Condition] = (),
        latents: torch.Tensor | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        **fields: Any,
    ) -> Output[R]:
        """Make the pictures of a request, given whole or as keywords (which also override a given one's fields).

        conditions: more of your own, beside those that the request asks for. latents: noise to start from instead of
        the seed's, (N, C, h, w) of unit variance, one row for each picture. on_progress: told after each step.
        cancelled: asked after each step; when it says True the call ends in :class:`Cancelled`.
        """
        asked = self.resolve(self.request(request, fields, latents))
        made = list(self.stream(asked, conditions, Watch(on_progress=on_progress, cancelled=cancelled)))
        return Output([image for image, _ in made], [report for _, report in made], asked)

    def request(self, request: R | None, fields: Mapping[str, Any], latents: torch.Tensor | None = None) -> R:
        """One request from a given one and the fields that override it; latents: as of a call."""
        from facegen.given_noise import checked

        given = {} if request is None else {name: getattr(request, name) for name in specs(type(request))}
        made: Any = make(self.request_class, {**given, **fields})
        latents = getattr(request, "latents", None) if latents is None else latents
        if latents is not None:
            if not isinstance(made, PersonRequest):
                raise WrongRequest(f"{self.name} does not start from noise; leave latents out.")
            if made.tries > 1:
                raise WrongRequest("With given latents every try would be the same picture; leave tries out.")
            made = replace(made, latents=checked(latents, made.num_images_per_prompt))
        return cast(R, made)

    def stream(
        self,
        request: R,
        conditions: Sequence[Condition] = (),
        watch: Watch | None = None,
        indices: Sequence[int] | None = None,
    ) -> Iterator[tuple[metadata.Picture, Report]]:
        """The pictures one by one as they are finished, or only those at `indices`; `request` must be resolved."""
        from facegen import metadata
        from facegen.given_noise import told

        watch = watch or Watch()
        if getattr(request, "tries", 1) > 1:
            yield from self._best(request, conditions, watch, indices)
            return
        record = metadata.Record(
            pipeline=self.name,
            loaded=self._loaded_json(request),
            request=self._request_json(request),
            noise=told(getattr(request, "latents", None)),
        )
        began = time.perf_counter()
        for painted in self.paint(request, conditions, watch, indices):
            seconds = (time.perf_counter() - began) / len(painted.indices)
            for index, pixels in zip(painted.indices, painted.pixels, strict=True):
                if indices is not None and index not in indices:
                    continue
                picture = metadata.as_picture(pixels, replace(record, index=index))
                report = replace(self._report(picture, painted, request, index), seconds=round(seconds, 3))
                yield picture.with_report(report.to_json()), report
            began = time.perf_counter()

    def _best(
        self, request: Any, conditions: Sequence[Condition], watch: Watch, indices: Sequence[int] | None
    ) -> Iterator[tuple[metadata.Picture, Report]]:
        """The best of several tries of each picture; its record is that of a single one, with the seed that it had.

        The t-th try of picture i has the seed + 1000 t + i; of more than a thousand pictures N, seed + N t + i. So no
        two of them begin with the same noise, nor with that of calls with the next few seeds.
        """
        count, tries = request.num_images_per_prompt, request.tries
        apart = max(1000, count)
        for index in range(count) if indices is None else sorted(indices):
            made: list[tuple[metadata.Picture, Report]] = []
            while len(made) < tries and not (made and made[-1][1].faultless):
                once = replace(request, tries=1, batch_size=1, seed=request.seed + len(made) * apart)
                part = watch.within(index * tries + len(made), count * tries)
                made += self.stream(once, conditions, part, [index])
            picture, report = max(made, key=lambda one: one[1].merit)
            seconds = round(sum(one.seconds or 0.0 for _, one in made), 3)
            report = replace(report, seconds=seconds, measures={**report.measures, "tries": float(len(made))})
            yield picture.with_report(report.to_json()), report

    @abstractmethod
    def paint(
        self, request: R, conditions: Sequence[Condition], watch: Watch, indices: Sequence[int] | None
    ) -> Iterator[Painted]:
        """The task itself: batches of pixels."""

    # what tasks are made of

    @property
    def name(self) -> str:
        """The task's file in pipelines/, which is its verb on the command line."""
        return type(self).__module__.rpartition(".")[2]

    def resolve(self, request: R) -> R:
        """Fill in what the request leaves open, so that it can be repeated, and load what it names.

        The seed is drawn, the adapters named, functions become their values at the steps.
        """
        known = specs(type(request))
        values: dict[str, Any] = {}
        loras, few = few_steps.hurried(self.loaded.loading.speed, self.loaded.assets, getattr(request, "loras", None))
        if "loras" in known:
            request = replace(request, **{"loras": loras})  # noqa: PIE804 (R may lack the field)
        if "seed" in known and getattr(request, "seed", None) is None:
            values["seed"] = secrets.randbelow(2**31)
        if "adapters" in known:
            values["adapters"] = self._resolved_adapters(request)
        values |= self._few_steps(request, few)
        steps = values.get("num_inference_steps", getattr(request, "num_inference_steps", 1))
        for name, spec in known.items():
            if spec.kind == "strengths":
                value = getattr(request, name)
                if isinstance(value, Mapping):
                    values[name] = {key: _per_step(curve, steps) for key, curve in value.items()}
                else:
                    values[name] = _per_step(value, steps)
        resolved = replace(request, **values)
        self.worn_loras(getattr(resolved, "loras", {}))  # a file that cannot be worn is told of now
        return resolved

    def _few_steps(self, request: R, found: few_steps.FewSteps | None) -> dict[str, Any]:
        """Scheduler, steps and guidance as few steps want them, where the request has only their defaults."""
        if found is None:
            return {}
        known = specs(type(request))
        values = {
            name: value
            for name, value in found.fields().items()
            if name in known and getattr(request, name) == known[name].default
        }
        if values:
            said = ", ".join(f"{name} {value}" for name, value in values.items())
            log.info("Few steps: %s.", said)
        return values

    def _resolved_adapters(self, request: R) -> tuple[str, ...]:
        """The adapters that act: those asked for (loaded if need be), else all, else the model's own choice."""
        asked: tuple[str, ...] = getattr(request, "adapters", ())
        has_faces = bool(getattr(request, "faces", ()))
        if asked and not has_faces:
            raise WrongRequest(f"The adapter '{asked[0]}' needs a photo of the person; give one as faces.")
        if not has_faces:
            return ()
        if not asked and not self.loaded.adapters:
            asked = (self.default_adapter(),)
        return tuple(self._wear(name) for name in asked) if asked else self.adapters

    def _wear(self, name: str) -> str:
        from facegen.adapter import told_variant

        known = {told_variant(worn.source)[0]: called for called, worn in self.loaded.adapters.items()}
        known |= {worn.source: called for called, worn in self.loaded.adapters.items()}
        known |= {called: called for called in self.loaded.adapters}
        return known[name] if name in known else self.load_adapter(name)

    def control(self, name: str) -> Any:
        """The expression adapter, the geometry of a kind, or what restores, that belongs to the model; loaded once.

        They lie beside the base: adapters/expression, controls/restore, controls/landmarks … or, for every kind without
        a net of its own, controls/geometry. Raises WeightsMissing.
        """
        from facegen.adapters.expression import Expression
        from facegen.errors import WeightsMissing
        from facegen.models.alignment import Aligner
        from facegen.models.base import locate
        from facegen.models.geometry import ALL, Geometry
        from facegen.models.swap import Swap

        if name in self.loaded.controls:
            return self.loaded.controls[name]
        kind: Any = {"expression": Expression, "restore": Aligner, "swap": Swap}.get(name, Geometry)
        folder = locate(self.loaded.loading.model).parent / ("adapters" if kind is Expression else "controls")
        stage = ALL if kind is Geometry else name
        path = next((folder / one for one in (name, stage) if (folder / one).is_dir()), None)
        if path is None:
            raise WeightsMissing(
                f"The model has no control '{name}' ({folder / stage}); train it: facegen train mini --stages {stage}."
            )
        if path.name not in self.loaded.controls:
            self.loaded.controls[path.name] = kind.from_pretrained(path, self.model)
        return self.loaded.controls[path.name]

    def default_adapter(self) -> str:
        """The adapter that is used when faces are given and none is loaded."""
        if self.loaded.assets is not None:
            return "ip_adapter_faceid"  # the embedded one that carries the likeness furthest
        raise WrongRequest("No adapter is loaded, so the faces cannot be used; load one, such as 'instantid'.")

    def person(self, photos: Sequence[Photo], select: str, adapters: Sequence[str]) -> Person | None:
        """Find and fuse the faces of one person's photos; None for no photos.

        Raises BadImage, NoFaceFound, or SeveralFaces where `select` is "only".
        """
        from facegen import metadata

        if not photos:
            return None
        loaded = tuple(self.photo(one) for one in photos)
        packs = list(dict.fromkeys(self.loaded.adapters[name].pack for name in adapters)) or [self.reading_pack()]
        key = (select, *packs, *(metadata.photo_record(image)["sha256"] for image in loaded))
        if key not in self.loaded.people:
            if len(self.loaded.people) >= 16:  # a photo may have 16 megapixels
                self.loaded.people.clear()
            self.loaded.people[key] = self._meet(photos, loaded, packs, select)
        person = self.loaded.people[key]
        for warning in person.warnings:
            log.warning(warning)
        return person

    def _meet(
        self, photos: Sequence[Photo], loaded: tuple[Image.Image, ...], packs: Sequence[str], select: str
    ) -> Person:
        """Find the face of each photo with each pack, and fuse."""
        from facegen.face.fuse import fuse

        faces: dict[str, tuple[Face, ...]] = {}
        fused: dict[str, Fused] = {}
        for pack in packs:
            analyzer = self.analyzer(pack)
            faces[pack] = tuple(
                analyzer.face(image, select=cast(Any, select), what=_photo_name(photo))
                for image, photo in zip(loaded, photos, strict=True)
            )
            fused[pack] = fuse(faces[pack])
        warnings = tuple(dict.fromkeys(one.warning for one in fused.values() if one.warning))
        return Person(photos=loaded, faces=faces, fused=fused, warnings=warnings)

    def faces_in(self, photo: Image.Image, pack: str | None = None) -> tuple[Face, ...]:
        """All faces of a photo, by descending score; looked for once."""
        from facegen import metadata

        pack = pack or self.reading_pack()
        key = (pack, metadata.photo_record(photo)["sha256"])
        if key not in self.loaded.seen:
            if len(self.loaded.seen) >= 16:
                self.loaded.seen.clear()
            self.loaded.seen[key] = tuple(self.analyzer(pack).faces(photo))
        return self.loaded.seen[key]

    def one_face(self, photo: Image.Image, select: str, what: str = "the photo") -> Face:
        """The only, largest or most central face of a photo. Raises NoFaceFound, SeveralFaces."""
        from facegen.face.analyze import choose

        return choose(self.faces_in(photo), cast(Any, select), what)

    def person_at(self, photo: Image.Image, face: Face, adapters: Sequence[str]) -> Person:
        """The person of one face of a photo, as the adapters' packs see them."""
        from facegen.face.fuse import fuse

        packs = list(dict.fromkeys(self.loaded.adapters[name].pack for name in adapters)) or [self.reading_pack()]
        middle = (face.box[:2] + face.box[2:]) / 2

        def away(other: Face) -> float:
            return float(abs((other.box[:2] + other.box[2:]) / 2 - middle).sum())

        faces = {pack: (min(self.faces_in(photo, pack) or (face,), key=away),) for pack in packs}
        return Person(photos=(photo,), faces=faces, fused={pack: fuse(found) for pack, found in faces.items()})

    def photo(self, source: Photo) -> Image.Image:
        """A photo as RGB, or an example person's. Raises BadImage."""
        from facegen.images import load_rgb

        return examples.photo(source) if examples.is_example(source) else load_rgb(source)

    @property
    def parser(self) -> FaceParser:
        """The net that finds parts of faces: the model's own, else the embedded one. Raises WeightsMissing."""
        from facegen.face.parse import FaceParser

        if self.loaded.parser is None:
            self.loaded.parser = FaceParser.from_pretrained(self.loaded.assets)
        return self.loaded.parser

    @property
    def finder(self) -> LandmarkFinder:
        """The net that finds 68 points of a face: the model's own, else the embedded one. Raises WeightsMissing."""
        from facegen.face.landmarks import LandmarkFinder

        if self.loaded.finder is None:
            self.loaded.finder = LandmarkFinder.from_pretrained(self.loaded.assets)
        return self.loaded.finder

    def region(self, photo: Image.Image, name: str, select: str) -> torch.Tensor:
        """The mask (1, H, W) of a named part of the photo's only, largest or most central face.

        It is a little wider than the part, so that no rim of the old one stays around the new, but never reaches over
        a hand or a thing in front.
        Raises WrongRequest for an unknown name, NoFaceFound, SeveralFaces.
        """
        from facegen.face.paste import dilate

        everybody = name in ("person", "background")
        faces = self.faces_in(photo) if everybody else (self.one_face(photo, select),)
        mask = self.parser.region(photo, faces, name)
        mask = dilate(mask, round(0.03 * min(float(face.box[2] - face.box[0]) for face in faces)))
        if not everybody and name != "front":
            mask = mask * (1 - self.parser.before(photo, faces[0]))
        return mask

    def reading_pack(self) -> str:
        """The pack that finds faces where no adapter says which it wants."""
        return self.loaded.pack or "buffalo_l"

    def words(self, request: Any, loras: Sequence[LoraCondition] = ()) -> TextCondition:
        """The request's prompt, for the text encoders that wear these LoRAs."""
        return self.model.encode_text(
            [request.prompt], request.negative_prompt or None, loras=loras, weighted=request.weighted
        )

    def identity(
        self,
        person: Person | None,
        request: Any,
        size: tuple[int, int],
        names: Sequence[str] | None = None,
        **place: Any,
    ) -> list[Condition]:
        """The conditions of the request's adapters for this person; `size` is (height, width) of the picture.

        names: of its adapters these alone. place: more fields of an AdapterRequest: where in the picture the person is
        to be, and how strongly.
        """
        if person is None:
            return []
        conditions: list[Condition] = []
        for name, asked in self.wishes(request, size, **place).items():
            if names is not None and name not in names:
                continue
            worn = self.loaded.adapters[name]
            conditions += worn.adapter.conditions(person.kept(worn.pack), asked, self.model)
        return conditions

    def wishes(self, request: Any, size: tuple[int, int], **place: Any) -> dict[str, AdapterRequest]:
        """What the request asks of each of its adapters, by name; see `identity`.

        Raises WrongRequest for a strength of another adapter, and for what none of them knows.
        """
        from facegen.adapter import AdapterRequest

        given = request.strength
        if isinstance(given, Mapping):
            for name in given:
                if name not in request.adapters:
                    raise WrongRequest(
                        f"strength names '{name}', which does not act{suggestion(name, request.adapters)}."
                    )
        for what in ("edits", "manner"):
            if getattr(request, what) and not self.knowing(request.adapters, what):
                raise WrongRequest(f"None of the adapters that act ({', '.join(request.adapters)}) knows {what}.")
        nothing_said = request.prompt == specs(type(request))["prompt"].default
        wishes = {}
        for name in request.adapters:
            worn = self.loaded.adapters[name]
            asked = AdapterRequest(
                height=size[0],
                width=size[1],
                # An adapter that writes the prompt has a better one than our default, or understands no other.
                prompt="" if worn.adapter.writes_prompt and nothing_said else request.prompt,
                negative_prompt=request.negative_prompt,
                scale=given.get(name) if isinstance(given, Mapping) else given,
                control_scale=request.control_strength,
                structure=request.structure,
                guidance=request.guidance_scale > 1,
                edits=request.edits,
                manner=request.manner,
                span=None if request.delay is None else (request.delay, 1.0),
            )
            wishes[name] = replace(asked, **place)
        return wishes

    def controlnet(self, folder: str) -> Any:
        """A ControlNet in diffusers' folder format, loaded once. Raises WeightsMissing, WrongBaseModel."""
        from facegen.models.control import load_controlnet

        path = Path(folder).expanduser()
        if str(path) not in self.loaded.controls:
            net = load_controlnet(path, self.model.unet)
            net.to(self.model.device, self.model.dtype).requires_grad_(False).eval()
            self.model.memory.place(net)
            self.loaded.controls[str(path)] = net
        return self.loaded.controls[str(path)]

    def knowing(self, adapters: Sequence[str], what: str) -> list[Adapter]:
        """Those of the adapters that understand this field of an AdapterRequest."""
        acting = [self.loaded.adapters[name].adapter for name in adapters]
        return [one for one in acting if what in one.knows]

    def host(self, adapters: Sequence[str]) -> Model:
        """The model in which these adapters' conditions act: one of them may bring a UNet of its own."""
        hosts = {name: self.loaded.adapters[name].adapter.host(self.model) for name in adapters}
        foreign = {name: host for name, host in hosts.items() if host is not self.model}
        if len({id(host) for host in foreign.values()}) > 1:
            raise WrongRequest(f"{' and '.join(foreign)} each bring a UNet of their own, so only one of them can act.")
        return next(iter(foreign.values()), self.model)

    def lora_path(self, name: str) -> Path:
        """Where the file or folder of a LoRA lies, by its path or a name that the model or the hub knows."""
        return lora_path(name, self.loaded.assets)

    def worn_loras(self, loras: Mapping[str, Curve | Blocks]) -> list[LoraCondition]:
        """LoRA files, or names that the hub knows, with their strengths as conditions; a file is read once."""
        from facegen.models.lora import load_lora
        from facegen.models.lora_blocks import in_blocks

        worn: list[LoraCondition] = []
        for name, strength in loras.items():
            path = self.lora_path(name)
            key = (str(path), path.stat().st_mtime if path.exists() else 0.0)
            if key not in self.loaded.loras:
                self.loaded.loras[key] = load_lora(path, self.model)
            lora = self.loaded.loras[key]
            if isinstance(strength, Mapping):
                worn.append(in_blocks(lora, strength, self.model))
            else:
                worn.append(replace(lora, scale=strength))
        return worn

    def size(self, request: Any) -> tuple[int, int]:
        """(height, width) in pixels; the model's own where the request leaves it open."""
        height, width = self.model.default_size
        size = (request.height or height, request.width or width)
        self.model.latent_shape(*size)
        return size

    def batches(self, count: int, batch_size: int, indices: Sequence[int] | None) -> Iterator[tuple[int, ...]]:
        """The places of the pictures that are made together; with `indices` only the batches that hold one of them."""
        for start in range(0, count, batch_size):
            batch = tuple(range(start, min(start + batch_size, count)))
            if indices is None or not set(batch).isdisjoint(indices):
                yield batch

    def generators(self, seed: int, indices: Sequence[int]) -> list[torch.Generator]:
        """Picture i draws from seed + i alone, on the CPU: the same noise in every batch and on every device."""
        import torch

        return [torch.Generator().manual_seed(seed + index) for index in indices]

    def on_step(self, watch: Watch, done: int, now: int, total: int) -> Callable[[Step], None]:
        """The loop's callback: tells the watch, with a preview on demand.

        Of `total` pictures `done` are finished and `now` are being made.
        """

        def tell(step: Step) -> None:
            def preview() -> list[Image.Image]:
                from facegen.images import to_pil

                return [to_pil(one) for one in self.model.decode(step.predicted_x0)]

            progress = Progress(
                stage="painting",
                done=done * step.total + now * (step.index + 1),
                total=total * step.total,
                preview=preview,
            )
            watch.tell(progress)

        return tell

    def repaint(
        self,
        request: Any,
        picture: torch.Tensor,
        hole: torch.Tensor,
        conditions: Sequence[Condition],
        watch: Watch,
        indices: Sequence[int] | None = None,
        begin: torch.Tensor | None = None,
    ) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """The pictures of a request that change what lies in a hole (1, H, W) of a picture (3, H, W): in batches,
        (places, pixels (B, 3, H, W)). Its field `change` says how much; begin: as `facegen.patch.repaint` has it.
        """
        from facegen.denoise import Guidance
        from facegen.patch import Run, repaint

        loras = self.worn_loras(request.loras)
        prompt = self.words(request, loras)
        run = Run(request.scheduler, request.num_inference_steps, Guidance(request.guidance_scale), request.change)
        batches = list(self.batches(request.num_images_per_prompt, request.batch_size, indices))
        total, done = sum(map(len, batches)), 0
        for batch in batches:
            pixels = repaint(
                self.host(request.adapters),
                picture,
                hole,
                [prompt, *conditions, *loras],
                replace(run, noise=request.noise_of(batch)),
                self.generators(request.seed, batch),
                self.on_step(watch, done, len(batch), total),
                begin,
            )
            done += len(batch)
            yield batch, pixels.float().cpu()

    # judging and recording

    def judges(self, adapters: Sequence[str]) -> Judges:
        """Who judges pictures of these adapters: never the recogniser that conditioned them."""
        from facegen.report import judges_for

        packs = sorted({self.loaded.adapters[name].pack for name in adapters}) or [self.reading_pack()]
        key = " ".join(packs)
        if key not in self.loaded.judges:
            self.loaded.judges[key] = judges_for(packs, self.analyzer, self.loaded.assets)
        return self.loaded.judges[key]

    def _report(self, picture: Image.Image, painted: Painted, request: R, index: int) -> Report:
        from facegen.report import Provenance

        adapters: tuple[str, ...] = getattr(request, "adapters", ())
        seed = getattr(request, "seed", None)
        provenance = Provenance(
            facegen=__version__,
            model=self.loaded.loading.model,
            model_sha256=self.loaded.sha256,
            adapters={name: self.loaded.adapters[name].sha256 for name in adapters},
            licence=self.loaded.licence,
            seed=None if seed is None else seed + index,
        )
        judges = self.judges(adapters)
        report = judges.report(picture, painted.references, painted.prompt, provenance, painted.warnings, painted.near)
        measures = painted.measures[painted.indices.index(index)] if painted.measures else {}
        people = judges.people(picture, painted.people, painted.homes) if painted.people else ()
        return replace(report, people=people, measures=measures)

    def _loaded_json(self, request: R) -> dict[str, Any]:
        import torch

        adapters: tuple[str, ...] = getattr(request, "adapters", ())
        loras: Mapping[str, Any] = getattr(request, "loras", {})
        return {
            **to_json(self.loaded.loading),
            # Sums over threads end in other last bits with another number of them.
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "tiling": self.model.memory.tiling,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "sha256": self.loaded.sha256,
            "adapters": {
                name: {"source": self.loaded.adapters[name].source, "sha256": self.loaded.adapters[name].sha256}
                for name in adapters
            },
            "loras": {name: weights_checksum(self.lora_path(name)) for name in loras},
        }

    def _request_json(self, request: R) -> dict[str, Any]:
        from facegen import metadata

        return to_json(request, lambda photo: metadata.photo_record(photo, examples.photo))


def _per_step(curve: Curve | None, steps: int) -> Curve | None:
    """A function of progress becomes its values at the steps, which can be written down."""
    if not callable(curve):
        return curve
    return tuple(float(curve(index / max(steps - 1, 1))) for index in range(steps))


def _photo_name(photo: Photo) -> str:
    return f"photo {photo}" if isinstance(photo, (str, Path)) else "photo"


# finding tasks


def tasks() -> tuple[str, ...]:
    """The files of pipelines/, which are the verbs of the command line."""
    folder = importlib.import_module("facegen.pipelines")
    return tuple(sorted(one.name for one in pkgutil.iter_modules(folder.__path__) if not one.name.startswith("_")))


def task(name: str) -> type[Pipeline[Any]]:
    """The pipeline class of a file of pipelines/; raises :class:`WrongRequest` for a name that does not exist."""
    if name not in tasks():
        raise WrongRequest(f"There is no task '{name}'{suggestion(name, tasks())}.")
    module = importlib.import_module(f"facegen.pipelines.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Pipeline) and value.__module__ == module.__name__:
            return value
    raise AssertionError(f"facegen/pipelines/{name}.py defines no pipeline")


def rebuild(record: metadata.Record) -> tuple[Loading, Any]:
    """What was loaded and the request, from a picture's record.

    Raises WrongRequest when the record names a task or field that this version does not know.
    """
    from facegen import metadata

    names = {one.name for one in dataclasses.fields(Loading)}
    loading = make(Loading, {name: value for name, value in record.loaded.items() if name in names})
    return loading, from_json(task(record.pipeline).request_class, record.request, metadata.photo_read)
