"""A portrait in the model's own style of whoever a photo shows: hair, skin, glasses, beard, mood and pose as there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from facegen.errors import WrongRequest
from facegen.pipeline import Painted, PersonRequest, Pipeline, Watch

if TYPE_CHECKING:
    from torch import Tensor

    from facegen.conditions import Condition
    from facegen.face.describe import Description
    from facegen.loading import Person

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AvatarRequest(PersonRequest):
    """The photo says what the prompt leaves open."""

    task: ClassVar[str] = (
        "Draw the person of a photo with the hair, skin, glasses, beard, mood and pose they have there."
    )


class AvatarPipeline(Pipeline[AvatarRequest]):
    """``pipe(faces=["me.jpg"], seed=7)``; the words of the prompt come before what the photo shows."""

    request_class = AvatarRequest

    def resolve(self, request: AvatarRequest) -> AvatarRequest:
        if not request.faces:
            raise WrongRequest("An avatar needs a photo of the person; give one as faces.")
        return super().resolve(request)

    def default_adapter(self) -> str:
        # It alone of those that the embedded model brings follows where a face is and how it is turned.
        return "instantid" if self.loaded.assets is not None else super().default_adapter()

    def paint(
        self, request: AvatarRequest, conditions: Sequence[Condition], watch: Watch, indices: Sequence[int] | None
    ) -> Iterator[Painted]:
        assert request.seed is not None
        size = self.model.default_size
        person = self.person(request.faces, request.select, request.adapters)
        assert person is not None
        shown = self._shown(person)
        request = replace(request, prompt=_worded(request.prompt, shown))
        log.info("The prompt and what the photo shows: %s", request.prompt)
        loras = self.worn_loras(request.loras)
        identity = self.identity(person, request, size, **self._posed(request, person, shown, size))
        everything = [self.words(request, loras), *identity, *loras, *conditions]
        batches = list(self.batches(request.num_images_per_prompt, request.batch_size, indices))
        total, done = sum(map(len, batches)), 0
        for batch in batches:
            latents = self._run(request, size, everything, batch, self.on_step(watch, done, len(batch), total))
            done += len(batch)
            yield Painted(
                indices=batch,
                pixels=self.model.decode(latents),
                references=person.references,
                prompt=request.prompt,
                warnings=person.warnings,
            )

    def _shown(self, person: Person) -> Description:
        """What the first photo shows of the person."""
        from facegen.face.describe import Describer

        face = person.references[0]
        return Describer.from_pretrained(self.loaded.assets).describe(face.image, face)

    def _posed(
        self, request: AvatarRequest, person: Person, shown: Description, size: tuple[int, int]
    ) -> dict[str, Any]:
        """The person's own head as it is turned in the photo, but framed as a portrait."""
        from facegen.face.head import fit
        from facegen.models.geometry import posed_points

        if not any(hasattr(self.loaded.adapters[name].adapter, "controlnet") for name in request.adapters):
            return {}
        face = person.references[0]
        return {"points": posed_points(shown.pose(), size, fit(self.finder.find(face.image, face)))}

    def _run(
        self,
        request: AvatarRequest,
        size: tuple[int, int],
        conditions: Sequence[Condition],
        batch: tuple[int, ...],
        on_step: Any,
    ) -> Tensor:
        """Latents (B, 4, h, w) of the pictures at these places."""
        from facegen import schedulers
        from facegen.denoise import Guidance, denoise, noise
        from facegen.given_noise import instead

        assert request.seed is not None
        generators = self.generators(request.seed, batch)
        scheduler = schedulers.build(
            request.scheduler, self.model.scheduler_config, request.num_inference_steps, device=self.model.device
        )
        drawn = noise(self.model.latent_shape(*size), generators, device=self.model.device, dtype=self.model.dtype)
        start = schedulers.start(scheduler, instead(drawn, request.noise_of(batch)))
        host: Any = self.host(request.adapters)
        return denoise(host, start, scheduler, conditions, Guidance(request.guidance_scale), generators, on_step)


def _worded(prompt: str, shown: Description) -> str:
    """The prompt, and what the photo shows of what it leaves open."""
    from facegen.world.words import parse_prompt

    told = shown.prompt(parse_prompt(prompt))
    return f"{prompt}, {told}" if prompt and told else prompt or told
