"""Faces of a damaged photo made clear again, by the loaded model or by a published restoration network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from facegen.errors import WrongRequest
from facegen.loading import Loaded
from facegen.pipeline import Painted, PersonRequest, Pipeline, Progress, Watch
from facegen.request import Photo, Request, choice, integer, number, photo, photos, text

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from facegen.conditions import Condition
    from facegen.face.parsing_networks import Parser
    from facegen.face.paste import Box, Crop
    from facegen.face.types import Array, Face
    from facegen.loading import Person
    from facegen.models.alignment import Aligner
    from facegen.restoration.restorer import Restorer

DIFFUSION = "diffusion"
EVERYBODY = "all"
ALIGNER = "restore"  # what the model's aligner is called among its controls
_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the restored face, tried in turn until it is still the same person
_SAME = 0.3  # cosine, where a face pack does not say from which on two photos count as one person
_COARSE = 2  # latents a side whose mean must stay what it was in the damaged face
_KEPT = (64, 24)  # shares of a face's crop: finer than the first is always made anew, coarser than the second never
_SHARP, _BLURRED = 0.8, 2.0  # pixels of blur: up to the first the fine detail of a damaged face is kept, beyond not
_SOFT = 0.12  # of the face's width, over which a restored face fades in
# ParseNet's and BiSeNet's classes that are not taken from the restored face; the official helpers' choice.
_LEFT = ("background", "hat", "necklace", "neck", "cloth")


@dataclass(frozen=True, kw_only=True)
class _What(Request):
    """What is restored, by what, and how freely."""

    image: Photo = photo("The photo whose faces are restored.", positional=True)
    fidelity: float = number(
        0.8, "How close to stay to the damaged face: 0 the clearest, 1 the most faithful (diffusion changes nothing).",
        low=0, high=1, slider=(0, 1, 0.05),
    )  # fmt: skip
    restorer: str = text(
        DIFFUSION,
        "What restores: diffusion (the loaded model), codeformer, restoreformer, gfpgan, dfdnet, or the file of one.",
    )
    upscale: int = integer(1, "How many times larger the photo becomes.", low=1, high=4, slider=(1, 4, 1))


@dataclass(frozen=True, kw_only=True)
class RestoreRequest(PersonRequest, _What):
    """Everything that decides what the restored faces look like."""

    task: ClassVar[str] = "Make the faces of a blurred, noisy or small photo clear again; all else stays as it is."

    faces: tuple[Photo, ...] = photos("Better photos of the same person; none: the damaged face is all there is.")
    num_inference_steps: int = integer(
        30, "How many denoising steps, of which fidelity leaves out the first.",
        low=1, high=1000, slider=(4, 60, 1), alias="steps",
    )  # fmt: skip
    alignment: float = number(
        1.0, "How far the damaged face's latents go to where a clean one's lie before diffusion begins, by a model that"
        " has learnt it (mini has); 0 not at all.",
        low=0, high=1, slider=(0, 1, 0.05), advanced=True,
    )  # fmt: skip
    guidance_scale: float = number(
        2.0, "How closely to follow the prompt; 1 or less turns guidance off.",
        low=0, high=50, slider=(1, 15, 0.5), alias="guidance",
    )  # fmt: skip
    select: str = choice(
        EVERYBODY,
        "Which faces of a photo that shows several.",
        (EVERYBODY, "only", "largest", "central"),
        advanced=True,
    )
    least_likeness: float | None = number(
        None, "Cosine to the damaged face, or to your better photos, below which less of the restored face is taken; "
        "the face pack's own by default.",
        low=-1, high=1, optional=True, advanced=True,
    )  # fmt: skip
    parsing: str | None = text(
        cast(str, None), "A file of BiSeNet or ParseNet, to tell a face from its surroundings; else the embedded net.",
        optional=True, advanced=True,
    )  # fmt: skip

    @property
    def change(self) -> float:
        """How much of the run is walked: at least a step, unless nothing is to change."""
        if self.fidelity == 1.0:
            return 0.0
        return min(1.0, max(1.0 - self.fidelity, (1 + 1e-9) / self.num_inference_steps))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Job:
    """One face: the aligned crop, where it may change the photo (1, H, W), whom it must still show."""

    face: Face  # in the enlarged photo
    crop: Crop
    mask: Tensor
    person: Person  # whom the adapters see: the better photos', or the damaged face's
    target: Array  # (D,) unit: whom the restored face must be like
    better: bool  # whether better photos say who it is
    least: float  # cosine


@dataclass(eq=False)
class _Picture:
    """One picture in the making."""

    image: Image.Image
    shares: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)


class RestorePipeline(Pipeline[RestoreRequest]):
    """``pipe(image="old.jpg", faces=["better.jpg"], fidelity=0.6, seed=7)``"""

    request_class = RestoreRequest

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self._restorers: dict[str, Restorer] = {}
        self._parsers: dict[str, Parser] = {}

    def _resolved_adapters(self, request: RestoreRequest) -> tuple[str, ...]:
        """With diffusion those asked for, those loaded or the model's own; networks need none. Loads the networks."""
        if request.image is None:
            raise WrongRequest("Give the photo whose faces are to be restored, as image.")
        if request.parsing is not None:
            self._parser(request.parsing)
        if request.restorer != DIFFUSION:
            title = self._restorer(request.restorer).title
            if request.adapters:
                raise WrongRequest(f"{title} takes no adapter; leave '{request.adapters[0]}' out, or take diffusion.")
            if request.latents is not None:
                raise WrongRequest(f"{title} does not start from noise; leave latents out, or take diffusion.")
            return ()
        can_carry = bool(request.adapters or self.loaded.adapters) or self.loaded.assets is not None
        whose = request.faces or ((request.image,) if can_carry else ())
        return super()._resolved_adapters(replace(request, faces=whose))

    def _restorer(self, path: str) -> Restorer:
        from facegen.restoration.restorer import Restorer

        if path not in self._restorers:
            strict = self.loaded.loading.commercial_only
            restorer = Restorer.from_pretrained(path, commercial_only=strict)
            restorer.net.to(self.model.device)
            self._restorers[path] = restorer
        return self._restorers[path]

    def _parser(self, path: str) -> Parser:
        from facegen import hub
        from facegen.face.parsing_networks import Parser

        if path not in self._parsers:
            if self.loaded.loading.commercial_only:
                hub.check_commercial("parsenet")  # BiSeNet's terms are the same
            self._parsers[path] = Parser.from_file(path)
        return self._parsers[path]

    def paint(
        self, request: RestoreRequest, conditions: Sequence[Condition], watch: Watch, indices: Sequence[int] | None
    ) -> Iterator[Painted]:
        import torch

        from facegen.face.paste import measured
        from facegen.images import to_tensor

        assert request.seed is not None
        canvas, jobs, warnings = self._plan(request)
        mask = torch.stack([job.mask for job in jobs]).amax(0)
        main = max(jobs, key=lambda job: job.face.area)
        batches = list(self.batches(request.num_images_per_prompt, request.batch_size, indices))
        for turn, batch in enumerate(batches):
            made = {index: _Picture(canvas) for index in batch}
            for place, job in enumerate(jobs):
                part = _part(watch, turn * len(jobs) + place, len(batches) * len(jobs))
                for index, restored in self._restored(request, job, conditions, part, batch):
                    self._take(made[index], job, restored)
            yield Painted(
                indices=batch,
                pixels=torch.stack([to_tensor(made[index].image) for index in batch]),
                references=main.person.references,
                prompt=request.prompt if request.restorer == DIFFUSION else "",
                warnings=(*warnings, *(told for index in batch if (told := _refused(made[index])))),
                near=cast("Box", tuple(main.face.box.tolist())),
                people=() if len(jobs) == 1 else tuple(job.person.references for job in jobs),
                homes=() if len(jobs) == 1 else tuple(cast("Box", tuple(job.face.box.tolist())) for job in jobs),
                measures=tuple(
                    {
                        "faces restored": len(jobs),
                        "share of the restored face taken": min(made[index].shares),
                        "likeness to the damaged face or references": round(min(made[index].cosines), 3),
                        **measured(canvas, made[index].image, mask),
                    }
                    for index in batch
                ),
            )

    # what is to be done

    def _plan(self, request: RestoreRequest) -> tuple[Image.Image, list[_Job], tuple[str, ...]]:
        """The photo at its new size, and its faces. Raises NoFaceFound, SeveralFaces."""
        from PIL import Image

        before = self.photo(request.image)
        select = "largest" if request.select == EVERYBODY else request.select
        chosen = self.one_face(before, select)  # says so where there is none
        faces = self.faces_in(before) if request.select == EVERYBODY else (chosen,)
        better = self.person(request.faces, "only", request.adapters)
        size = (before.width * request.upscale, before.height * request.upscale)
        canvas = before if size == before.size else before.resize(size, Image.Resampling.LANCZOS)
        # Better photos are of one person: of several faces the one that is most like them.
        theirs = None if better is None else max(faces, key=lambda face: float(face.unit @ self._unit(better)))
        jobs = [self._job(request, canvas, before, face, better if face is theirs else None) for face in faces]
        return canvas, jobs, () if better is None else better.warnings

    def _unit(self, person: Person) -> Array:
        """The person of better photos as the reading pack sees them, (D,)."""
        import numpy as np

        from facegen.face.types import unit

        pack = self.reading_pack()
        kept = person.references
        if pack not in person.faces:
            kept = tuple(self.one_face(image, "largest") for image in person.photos)
        mean: Array = unit(np.stack([face.unit for face in kept]).mean(0))
        return mean

    def _job(
        self, request: RestoreRequest, canvas: Image.Image, before: Image.Image, face: Face, better: Person | None
    ) -> _Job:
        from facegen.face import paste
        from facegen.restoration import faces as aligned

        larger = request.upscale
        shift = (larger - 1) / 2  # a pixel's centre lies at whole numbers
        there = replace(face, box=face.box * larger + shift, points=face.points * larger + shift, image=canvas)
        if request.restorer == DIFFUSION:
            side = max(self.model.default_size)
            template = aligned.FFHQ_POINTS if self.loaded.assets is None else aligned.WORLD_POINTS
            crop = paste.cut_aligned(canvas, there.points, template * (side / aligned.SIDE), side)
        else:
            crop = aligned.cut_ffhq(canvas, there.points, self._restorer(request.restorer).side)
        target = face.unit if better is None else self._unit(better)
        measured = self.analyzer(self.reading_pack()).threshold
        wanted = request.least_likeness if request.least_likeness is not None else measured or _SAME
        return _Job(
            face=there,
            crop=crop,
            mask=self._mask(request, canvas, there, crop),
            person=better or self.person_at(before, face, request.adapters),
            target=target,
            better=better is not None,
            # A damaged face may itself be too unlike the better photos: then it must not become less like them.
            least=min(wanted, float(face.unit @ target)),
        )

    def _mask(self, request: RestoreRequest, canvas: Image.Image, face: Face, crop: Crop) -> Tensor:
        """Where a face may change the photo, (1, H, W) rising inwards: what parsing says, or else an ellipse."""
        import torch

        from facegen.face.parse import usual
        from facegen.face.paste import feather
        from facegen.images import to_tensor

        if request.parsing is not None:
            parser = self._parser(request.parsing)
            parts = [label for label in parser.labels if label not in _LEFT]
            mask = crop.back(parser.mask(to_tensor(crop.image)[None], parts)[0])
        else:
            mask = torch.maximum(usual("face", face.points, canvas.size), self.parser.region(canvas, (face,), "face"))
        return feather((mask > 0.5).float() * crop.reach(), _SOFT * float(face.box[2] - face.box[0]))

    # restoring one face

    def _restored(
        self,
        request: RestoreRequest,
        job: _Job,
        conditions: Sequence[Condition],
        watch: Watch,
        batch: tuple[int, ...],
    ) -> Iterator[tuple[int, Tensor]]:
        """The places of a batch with the restored face (3, S, S) of each."""
        from facegen.images import to_tensor
        from facegen.restoration.faces import gray, is_gray

        seen = to_tensor(job.crop.image)
        if request.restorer != DIFFUSION:
            made = self._by_network(request, job, seen, watch, batch)
        else:
            made = self._by_diffusion(request, job, seen, conditions, watch, batch)
        colourless = is_gray(job.crop.image)
        for index, face in made:
            yield index, gray(face, seen) if colourless else face

    def _by_network(
        self, request: RestoreRequest, job: _Job, seen: Tensor, watch: Watch, batch: tuple[int, ...]
    ) -> Iterator[tuple[int, Tensor]]:
        from facegen.restoration.restorer import Wish

        assert request.seed is not None
        restorer = self._restorer(request.restorer)
        points = job.crop.points(job.face.points)
        for done, (index, generator) in enumerate(zip(batch, self.generators(request.seed, batch), strict=True), 1):
            wish = Wish(fidelity=request.fidelity, points=points, generator=generator)
            yield index, restorer(seen.to(self.model.device), wish).cpu()
            watch.tell(Progress(stage="restoring", done=done, total=len(batch)))

    def _by_diffusion(
        self,
        request: RestoreRequest,
        job: _Job,
        seen: Tensor,
        conditions: Sequence[Condition],
        watch: Watch,
        batch: tuple[int, ...],
    ) -> Iterator[tuple[int, Tensor]]:
        import torch

        from facegen.restoration.faces import blur_width, with_coarse

        aligner = self._aligner(request)
        if request.change == 0 and aligner is None:
            yield from ((index, seen) for index in batch)
            return
        size = (job.crop.size, job.crop.size)
        own = self.model.encode_image(seen[None].to(self.model.device, self.model.dtype))
        start = own if aligner is None else self._aligned(request, job, seen, own, aligner)
        blur = blur_width(seen)
        # Twice the blur: noise and JPEG have spoilt what is only just larger, and make a face look sharper than it is.
        finest, coarsest = (job.crop.size / share for share in _KEPT)
        sigma = min(max(2 * blur, finest), coarsest)
        like, rest = seen, torch.zeros_like(seen)
        if aligner is not None:
            like, lost = (self.model.decode(one)[0].cpu() for one in (start, own))
            # What the autoencoder cannot show of a face that is hardly damaged is the photo's own, and stays.
            rest = (seen - lost) * min(max((_BLURRED - blur) / (_BLURRED - _SHARP), 0.0), 1.0)
        if request.change == 0:
            yield from ((index, (like + rest).clamp(0, 1)) for index in batch)
            return
        steering = [
            *self.identity(
                job.person if request.adapters else None, request, size, points=job.crop.points(job.face.points)
            ),
            _consistency(start),
            *conditions,
        ]
        everywhere = torch.ones(1, *size)
        for places, made in self.repaint(request, seen, everywhere, steering, watch, batch, begin=start):
            for index, one in zip(places, made, strict=True):
                if index in batch:
                    yield index, (with_coarse(one, like, sigma) + rest).clamp(0, 1)

    def _aligner(self, request: RestoreRequest) -> Aligner | None:
        """The model's own, if it has one and it is to act."""
        from facegen.errors import WeightsMissing

        if not request.alignment or request.restorer != DIFFUSION:
            return None
        try:
            return cast("Aligner", self.control(ALIGNER))
        except WeightsMissing:
            return None

    def _aligned(self, request: RestoreRequest, job: _Job, seen: Tensor, own: Tensor, aligner: Aligner) -> Tensor:
        """The latents (1, C, h, w) of a damaged face (3, S, S), moved as far as is asked for."""
        import torch

        # Only the pack that the model brings speaks of people as the aligner has learnt it.
        known = job.better and self.loaded.loading.pack is None
        who = torch.from_numpy(job.target)[None].float() if known else None
        return own.lerp(aligner(own, seen[None], who), request.alignment)

    def _take(self, picture: _Picture, job: _Job, restored: Tensor) -> None:
        """Paste as much of a restored face as still shows the same person."""
        import torch

        from facegen.face.paste import paste
        from facegen.images import to_bgr, to_tensor

        analyzer = self.analyzer(self.reading_pack())
        # Cut out and pasted back even the same face would not be the photo to the bit.
        same = torch.equal(restored, to_tensor(job.crop.image))
        for share in _SHARES:
            unchanged = same or not share
            image = picture.image if unchanged else paste(picture.image, job.crop, restored, job.mask * share)
            vector = analyzer.embed(to_bgr(image), job.face.points)
            cosine = float(vector @ job.target / max(float((vector @ vector) ** 0.5), 1e-12))
            if cosine >= job.least - 1e-6 or unchanged:
                picture.image = image
                picture.shares.append(share)
                picture.cosines.append(cosine)
                return

    def _loaded_json(self, request: RestoreRequest) -> dict[str, Any]:
        from facegen import metadata

        networks: dict[str, str] = {}
        if request.restorer != DIFFUSION:
            networks["restorer"] = metadata.file_checksum(self._restorer(request.restorer).path)
        if request.parsing is not None:
            networks["parsing"] = metadata.file_checksum(Path(request.parsing).expanduser())
        return {**super()._loaded_json(request), "networks": networks}


def _consistency(latents: Tensor) -> Condition:
    """Keeps what is coarse in the latents (1, C, h, w) of a face as it is there, step by step.

    The gradient of half the squared distance of two projections is the projection of the difference, so that at
    scale 1 each prediction gets exactly that face's coarse part (as ILVR, arXiv 2108.02938, in latents).
    """
    import torch.nn.functional as F

    from facegen.conditions import GuidanceCondition

    wanted = F.avg_pool2d(latents.float(), _COARSE)

    def loss(clean: Tensor, timestep: Tensor) -> Tensor:
        difference = F.avg_pool2d(clean, _COARSE) - wanted
        return 0.5 * _COARSE**2 * difference.square().sum((1, 2, 3))

    return GuidanceCondition(loss=loss)


def _part(watch: Watch, done: int, total: int) -> Watch:
    """A watch for one of `total` equal parts of the work, of which `done` are done."""

    def tell(progress: Progress) -> None:
        watch.tell(replace(progress, done=done * progress.total + progress.done, total=total * progress.total))

    return Watch(on_progress=tell, cancelled=watch.cancelled)


def _refused(picture: _Picture) -> str:
    """A sentence where less than all of a restored face was taken."""
    share = min(picture.shares)
    if share == 1:
        return ""
    return f"A restored face showed somebody else, so only {share:.0%} of it was taken."
