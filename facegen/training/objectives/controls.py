"""Learning to be controlled beside a base model that stays as it is: expressions by numbers, geometry by pictures.

The picture that is to be painted gives the coefficients or the map; the person, where an identity adapter is given,
comes from another picture of theirs, which shows another expression and pose, so that neither can leak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from facegen.adapter import Adapter, AdapterRequest, halves
from facegen.attention.backends import for_training
from facegen.conditions import Condition, TextCondition
from facegen.models.geometry import Geometry, drawn
from facegen.training.cache import shuffled
from facegen.training.loop import Objective
from facegen.training.objectives.velocity import VelocityObjective
from facegen.world.captions import caption

if TYPE_CHECKING:
    from facegen.models.base import Model
    from facegen.training.diffusion import Lessons


@dataclass(frozen=True)
class ControlSettings:
    """left_out: share of rows without the control; with_person: of batches in which an adapter brings the person."""

    batch: int = 32
    left_out: float = 0.1
    with_person: float = 0.5
    size: int = 128  # pixels of the maps
    seed: int = 12


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows: clean latents, prompts, RAW embeddings of other pictures (None: prompt alone), control (B, …)."""

    latents: Tensor
    prompts: list[str]
    embeddings: Tensor | None
    control: Tensor


class ControlObjective(Objective):
    """Predict the velocity of noisy latents under a control; only the control learns."""

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
    ) -> None:
        self.model, self.control, self.lessons, self.settings = model, control, lessons, settings
        self.person, self.held_out = person, held_out
        self.velocity = VelocityObjective(model.scheduler_config)
        model.unet.requires_grad_(False)
        net = control.net if isinstance(control, Geometry) else control.modules()
        self.module = nn.ModuleDict({"control": net})

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        settings = self.settings
        rows = shuffled(len(self.lessons.pictures), settings.batch, step, settings.seed)
        roll = torch.rand(1 + len(rows), generator=generator)
        with_person = self.person is not None and float(roll[0]) < settings.with_person
        return self._gather(self.lessons, rows, roll[1:] >= settings.left_out, with_person, generator)

    def _gather(
        self, lessons: Lessons, rows: Tensor, kept: Tensor, with_person: bool, generator: torch.Generator
    ) -> Batch:
        scenes = lessons.pictures.scenes(rows)
        if isinstance(self.control, Geometry):
            control = self._maps(lessons, rows) * kept.view(-1, 1, 1, 1)
        else:
            control = scenes.expression * kept[:, None]
        embeddings = lessons.embeddings[_others(lessons, rows)].float() if with_person else None
        return Batch(lessons.latents[rows].float(), caption(scenes, generator), embeddings, control)

    def _maps(self, lessons: Lessons, rows: Tensor) -> Tensor:
        """(B, 3, size, size) drawn from the truth."""
        from facegen.models.geometry import draw_landmarks, draw_sketch
        from facegen.world.render import render

        assert isinstance(self.control, Geometry)
        kind, size = self.control.kind, self.settings.size
        if kind == "landmarks":
            points = lessons.pictures.field("landmarks68", rows).float().numpy()
            return torch.stack([draw_landmarks(one, (size, size)) for one in points])
        if kind == "sketch":
            return torch.stack([draw_sketch(one) for one in lessons.pictures.rgb(rows)])
        made = render(lessons.pictures.scenes(rows), size, supersample=1)
        return torch.stack([drawn(kind, made, row) for row in range(len(rows))])

    def conditions(self, batch: Batch) -> list[Condition]:
        """The same conditions that a picture is made under."""
        with torch.no_grad():
            embeds = self.model.text_encoder(self.model.tokenize(batch.prompts)).last_hidden_state
        made: list[Condition] = [TextCondition(embeds=halves(embeds, False))]
        if batch.embeddings is not None and self.person is not None:
            asked = AdapterRequest(guidance=False, scale=1.0, prompt=batch.prompts)
            made += self.person.conditions_from_embeddings(batch.embeddings, self.model, asked)
        if isinstance(self.control, Geometry):
            return [*made, self.control.condition(batch.control)]
        asked = AdapterRequest(guidance=False, scale=1.0)
        return [*made, *self.control.conditions_from_embeddings(batch.control, self.model, asked)]

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        timesteps = torch.randint(1000, (len(batch.latents),), generator=generator, device=generator.device)
        noise = torch.randn(batch.latents.shape, generator=generator, device=generator.device)
        return {"loss": self._error(batch, noise, timesteps)}

    def _error(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy = self.velocity.noisy(batch.latents, noise, timesteps)
        backend = for_training(noisy.device)
        prepared = self.model.prepare(self.conditions(batch), len(batch.latents), guidance=False, backend=backend)
        found = self.model.predict(noisy, timesteps, prepared.throughout())
        return self.velocity.errors(found, batch.latents, noise, timesteps).mean()

    def figures(self) -> dict[str, float]:
        """The velocity's error on held-out people with the control and without it, at evenly spread noise."""
        if self.held_out is None:
            return {}
        rows = torch.arange(min(64, len(self.held_out.pictures)))
        found = {}
        for name, share in (("with", 1.0), ("without", 0.0)):
            generator = torch.Generator().manual_seed(13)
            batch = self._gather(self.held_out, rows, torch.full((len(rows),), share), False, generator)
            noise = torch.randn(batch.latents.shape, generator=generator)
            found[f"held_out_{name}"] = round(
                float(self._error(batch, noise, torch.linspace(0, 999, len(rows)).long())), 4
            )
        return found


def _others(lessons: Lessons, rows: Tensor) -> Tensor:
    """For each row the next picture of the same person, around the end to the first; itself if it is the only one."""
    label = lessons.pictures.label
    order = torch.argsort(label, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    sizes = torch.bincount(label)
    starts = torch.cumsum(sizes, 0) - sizes
    own = label[rows]
    return order[starts[own] + (place[rows] - starts[own] + 1) % sizes[own]]
