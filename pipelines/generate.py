"""Pictures of a person, made from their photos and a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from facegen.pipeline import Painted, PersonRequest, Pipeline, Watch
from facegen.request import integer

if TYPE_CHECKING:
    from facegen.conditions import Condition


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(PersonRequest):
    """Everything that decides what the pictures look like."""

    task: ClassVar[str] = "Make pictures of a person from their photos and a prompt."

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
