"""Learning to be controlled beside a base model that stays as it is: expressions by numbers, geometry by pictures.

The picture that is to be painted gives the coefficients or the map; the person, where an identity adapter is given,
comes from another picture of theirs, which shows another expression and pose, so that neither can leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from facegen.adapter import Adapter, AdapterRequest, halves
from facegen.conditions import Condition, TextCondition
from facegen.models.base import Model
from facegen.models.geometry import ALL, KINDS, Geometry, draw_landmarks, draw_sketch
from facegen.models.norms import quicken
from facegen.training.cache import shuffled
from facegen.training.diffusion import Lessons
from facegen.training.maps import MAPPED, Maps, draw_maps
from facegen.training.objectives.denoising import DenoisingObjective, another, face_weights, noise_levels
from facegen.training.shapes import ShapeReader, apart, points_of
from facegen.world.captions import caption


@dataclass(frozen=True)
class ControlSettings:
    """left_out, no_prompt: share of rows without the control, without words; with_person: of batches in which an
    adapter brings the person; taught: weight of what the teacher says."""

    batch: int = 32
    left_out: float = 0.1
    no_prompt: float = 0.2
    with_person: float = 0.5
    face: float = 4.0
    taught: float = 0.3
    seed: int = 12


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows: clean latents, prompts, RAW embeddings of other pictures (None: prompt alone), control (B, …), whether it
    acts (B,), what the teacher should read (B, …), and how much each place weighs (B, h, w)."""

    latents: Tensor
    prompts: list[str]
    embeddings: Tensor | None
    control: Tensor
    acts: Tensor
    shown: Tensor
    weights: Tensor


class ControlObjective(DenoisingObjective):
    """Predict the velocity of noisy latents under a control; only the control learns.

    With ``teacher`` the clean estimate must also show the expression, or have its points where the map has them, the
    more the less noise there is. A geometry of all kinds draws a kind for each row.
    """

    name = "control"

    def __init__(
        self,
        model: Model,
        control: Adapter | Geometry,
        lessons: Lessons,
        settings: ControlSettings = ControlSettings(),
        *,
        person: Adapter | None = None,
        held_out: Lessons | None = None,
        teacher: ShapeReader | None = None,
        maps: Maps | None = None,
    ) -> None:
        super().__init__(model, lessons, held_out, model.scheduler_config)
        self.control, self.settings = control, settings
        self.person, self.teacher, self.maps = person, teacher, maps
        self.kinds: tuple[str, ...] = ()
        if isinstance(control, Geometry):
            self.kinds = KINDS if control.kind == ALL else (control.kind,)
        model.unet.requires_grad_(False)
        # A ControlNet goes by its name: parameter_groups knows it.
        self.module = nn.ModuleDict(
            {"controlnet": control.net} if isinstance(control, Geometry) else {"control": control.modules()}
        )
        for part in (model.unet, self.module):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            quicken(part)

    def helpers(self) -> Sequence[nn.Module]:
        person = [] if self.person is None else [self.person.modules()]
        return person if self.teacher is None else [*person, self.teacher]

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        settings = self.settings
        rows = shuffled(len(self.lessons.pictures), settings.batch, step, settings.seed)
        roll = torch.rand(2, len(rows), generator=generator)
        with_person = self.person is not None and float(torch.rand((), generator=generator)) < settings.with_person
        kinds = [self.kinds[int(one * len(self.kinds))] for one in roll[1]] if self.kinds else []
        if self.maps is not None:
            mapped = torch.tensor([kind in MAPPED for kind in kinds])
            drawn = self.maps.rows[shuffled(len(self.maps.rows), settings.batch, step, settings.seed + 1)]
            rows = torch.where(mapped, drawn, rows)
        return self._gather(self.lessons, rows, (roll[0] >= settings.left_out, kinds), with_person, generator)

    def _gather(
        self,
        lessons: Lessons,
        rows: Tensor,
        how: tuple[Tensor, list[str]],
        with_person: bool,
        generator: torch.Generator,
    ) -> Batch:
        """how: whether the control acts in each row, and of which kind it is."""
        acts, kinds = how
        scenes = lessons.pictures.scenes(rows)
        if kinds:
            control, shown = self._maps(lessons, rows, kinds), points_of(lessons.pictures, rows)
        else:
            control = shown = scenes.expression
        roll = torch.rand(2, len(rows), generator=generator)
        prompts = [
            "" if drop else text
            for text, drop in zip(caption(scenes, generator), (roll[0] < self.settings.no_prompt).tolist(), strict=True)
        ]
        return Batch(
            lessons.latents[rows].float(),
            prompts,
            lessons.embeddings[another(lessons, rows, roll[1])].float() if with_person else None,
            control * acts.view(-1, *[1] * (control.ndim - 1)),
            acts,
            shown,
            face_weights(lessons, rows, self.settings.face),
        )

    def _maps(self, lessons: Lessons, rows: Tensor, kinds: list[str]) -> Tensor:
        """(B, 3, H, W) drawn from the truth, as large as the pictures."""
        pictures = lessons.pictures
        size = pictures.field("rgb", rows[:1]).shape[1]
        found = torch.zeros(len(rows), 3, size, size)
        chosen = {kind: torch.tensor([one == kind for one in kinds]).nonzero()[:, 0] for kind in KINDS}
        points = (
            pictures.field("landmarks68", rows[chosen["landmarks"]]).float().numpy() if "landmarks" in kinds else ()
        )
        for place, one in zip(chosen["landmarks"].tolist(), points, strict=True):
            found[place] = draw_landmarks(one, (size, size))
        if "sketch" in kinds:
            for place, photo in zip(chosen["sketch"].tolist(), pictures.rgb(rows[chosen["sketch"]]), strict=True):
                found[place] = draw_sketch(photo)
        for kind in MAPPED:
            own = rows[chosen[kind]]
            if len(own):
                known = self.maps is not None and lessons is self.lessons
                maps = self.maps if known and self.maps is not None else draw_maps(pictures, own.sort().values, size)
                found[chosen[kind]] = maps.of(kind, own, size)
        return found

    def conditions(self, batch: Batch) -> list[Condition]:
        """The same conditions that a picture is made under."""
        with torch.no_grad():
            embeds = self.model.text_encoder(self.model.tokenize(batch.prompts)).last_hidden_state
        made: list[Condition] = [TextCondition(embeds=halves(embeds, False))]
        if batch.embeddings is not None and self.person is not None:
            asked = AdapterRequest(guidance=False, scale=1.0, prompt=batch.prompts)
            made += self.person.conditions_from_embeddings(batch.embeddings, self.model, asked)
        if isinstance(self.control, Geometry):
            return [*made, self.control.condition(batch.control.contiguous(memory_format=torch.channels_last))]
        asked = AdapterRequest(guidance=False, scale=1.0)
        return [*made, *self.control.conditions_from_embeddings(batch.control, self.model, asked)]

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        timesteps = noise_levels(len(batch.latents), generator)
        noise = torch.randn(batch.latents.shape, generator=generator, device=generator.device)
        return self._loss(batch, noise, timesteps)

    def _loss(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        found, noisy = self.predicted(lambda: self.conditions(batch), batch.latents, noise, timesteps)
        error = (batch.weights * self.velocity.errors(found, batch.latents, noise, timesteps)).mean()
        if self.teacher is None:
            return {"loss": error}
        clean, certain = self.velocity.clean(found, noisy, timesteps)
        units, points = self.teacher(clean.contiguous(memory_format=torch.channels_last))
        off = apart(points, batch.shown) if self.kinds else self.teacher.unlike(units, batch.shown)
        weight = certain * batch.acts
        amiss = (weight * off).sum() / weight.sum().clamp(min=1e-6)
        return {"loss": error + self.settings.taught * amiss, "error": error, "amiss": amiss}

    def figures(self) -> dict[str, float]:
        """On held-out people, at evenly spread noise, with the control and without it: the velocity's error, and what
        the teacher finds amiss. Each kind by itself."""
        if self.held_out is None:
            return {}
        rows = torch.arange(min(64, len(self.held_out.pictures)))
        found = {}
        for kind in self.kinds or ("",):
            generator = torch.Generator().manual_seed(13)
            how = (torch.full((len(rows),), True), [kind] * len(rows) if kind else [])
            batch = self._gather(self.held_out, rows, how, False, generator)
            noise = torch.randn(batch.latents.shape, generator=generator)
            timesteps = torch.linspace(0, 999, len(rows)).long()
            without = replace(batch, control=torch.zeros_like(batch.control))
            for name, one in (("with", batch), ("without", without)):
                losses = self._loss(one, noise, timesteps)
                for part, value in losses.items():
                    if part != "loss" or self.teacher is None:
                        found["_".join(filter(None, ("held_out", kind, part, name)))] = round(float(value), 4)
        return found
