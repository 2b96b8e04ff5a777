"""Pictures of a person, made from their photos and a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from facegen.pipeline import Painted, Pipeline, Watch
from facegen.request import (
    Curve,
    Photo,
    Request,
    Strengths,
    choice,
    integer,
    names,
    number,
    photos,
    strengths,
    text,
)
from facegen.schedulers import NAMES

if TYPE_CHECKING:
    from facegen.conditions import Condition


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(Request):
    """Everything that decides what the pictures look like."""

    task: ClassVar[str] = "Make pictures of a person from their photos and a prompt."

    faces: tuple[Photo, ...] = photos(
        "Photos of one person, or example:1 to example:999; several are fused into one likeness; none: anybody.",
        positional=True,
    )
    prompt: str = text("a portrait of a person", "What the picture shows.", lines=2)
    negative_prompt: str = text("", "What the picture should not show.", lines=2)
    adapters: tuple[str, ...] = names(
        (),
        "How the person is brought in: arc2face, instantid, ip_adapter_faceid, a folder or a file; several act as one.",
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
    num_inference_steps: int = integer(
        30, "How many denoising steps.", low=1, high=1000, slider=(4, 60, 1), alias="steps"
    )
    guidance_scale: float = number(
        5.0, "How closely to follow the prompt; 1 or less turns guidance off.",
        low=0, high=50, slider=(1, 15, 0.5), alias="guidance",
    )  # fmt: skip
    scheduler: str = choice(
        "model", "How the noise is removed; model: as the model was published.", NAMES, advanced=True
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
    loras: Mapping[str, Curve] = strengths(
        {}, "LoRA files, each with a strength: style.safetensors=0.8.", advanced=True
    )
    select: str = choice(
        "only", "Which face of a photo that shows several.", ("only", "largest", "central"), advanced=True
    )
    batch_size: int = integer(
        1, "How many pictures are made at once; with 1 each is the same to the last bit in any company.",
        low=1, high=256, advanced=True,
    )  # fmt: skip


class GeneratePipeline(Pipeline[GenerateRequest]):
    """``pipe(faces=["me.jpg"], prompt="portrait, red hair", seed=7)``"""

    request_class = GenerateRequest

    def paint(
        self, request: GenerateRequest, conditions: Sequence[Condition], watch: Watch, indices: Sequence[int] | None
    ) -> Iterator[Painted]:
        from facegen import schedulers
        from facegen.denoise import Guidance, denoise, noise

        assert request.seed is not None
        size = self.size(request)
        person = self.person(request.faces, request.select, request.adapters)
        loras = self.worn_loras(request.loras)
        prompt = self.model.encode_text([request.prompt], request.negative_prompt or None, loras=loras)
        # An adapter that writes the prompt itself comes after the plain prompt, and the last one counts.
        everything = [prompt, *self.identity(person, request, size), *loras, *conditions]
        model = self.host(request.adapters)
        batches = list(self.batches(request.num_images_per_prompt, request.batch_size, indices))
        total, done = sum(map(len, batches)), 0
        for batch in batches:
            generators = self.generators(request.seed, batch)
            scheduler = schedulers.build(
                request.scheduler, self.model.scheduler_config, request.num_inference_steps, device=self.model.device
            )
            start = noise(self.model.latent_shape(*size), generators, device=self.model.device, dtype=self.model.dtype)
            latents = denoise(
                model,
                schedulers.start(scheduler, start),
                scheduler,
                everything,
                Guidance(request.guidance_scale),
                generators,
                self.on_step(watch, done, len(batch), total),
            )
            done += len(batch)
            yield Painted(
                indices=batch,
                pixels=self.model.decode(latents),
                references=() if person is None else person.references,
                prompt=request.prompt,
                warnings=() if person is None else person.warnings,
            )
