"""Learning to swap: everything from the photo in hand, the person from another one.

The ControlNet sees a twin (the scene of a picture with somebody else's face), the adapter's tokens come from another
picture of the person, and what is to be painted is the picture itself. Rows without a person show the net the picture
itself, so that guidance has the photo as it is to lean on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.adapter import Adapter, AdapterRequest, halves
from facegen.conditions import Condition, TextCondition
from facegen.models.base import Model
from facegen.models.norms import quicken
from facegen.models.swap import Swap
from facegen.training.cache import Cache, shuffled
from facegen.training.diffusion import Lessons
from facegen.training.objectives.denoising import DenoisingObjective, another, face_weights, noise_levels
from facegen.training.reader import LatentReader, asked, disobedience, person_means
from facegen.training.shapes import ShapeReader, apart, points_of
from facegen.world.captions import caption


@dataclass(frozen=True)
class SwapSettings:
    """Shares of rows: same: the net sees the picture itself, not a twin; no_face: nobody is brought in, and it sees the
    picture itself; no_photo: it sees nothing; no_prompt: there is no caption.
    """

    batch: int = 32
    same: float = 0.1
    no_face: float = 0.08
    no_photo: float = 0.04
    no_prompt: float = 0.5
    likeness: float = 0.3  # weights of what the reader of latents says about the clean estimate: who …
    obedience: float = 0.2  # … and what it shows
    shape: float = 0.15  # weight of what another one says about expression and points
    seed: int = 14


@dataclass(frozen=True, eq=False)
class TwinLessons:
    """Pictures, and twins of some of them."""

    lessons: Lessons
    twins: Tensor  # latents (T, C, h, w)
    rows: Tensor  # (T,) int64, whose twins they are
    people: Tensor  # unit vectors (N, D) of the people of all pictures

    @classmethod
    def of(cls, lessons: Lessons, twins: Cache, latents: Tensor) -> TwinLessons:
        """twins: as `facegen.training.twins.render_twins` draws them, with their latents."""
        return cls(lessons, latents, twins.whole("row"), person_means(lessons))


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows: clean latents, prompts, RAW embeddings of other pictures (zero: nobody), latents of photos (zero: none).

    Besides who is to be seen (zero: not asked), what the prompts or the photo leave open, whether there is a photo,
    the expression and the points that it shows, and weights (B, h, w) of the error.
    """

    latents: Tensor
    prompts: list[str]
    embeddings: Tensor
    photos: Tensor
    who: Tensor
    wanted: Tensor
    seen: Tensor
    expression: Tensor
    points: Tensor
    weights: Tensor


class SwapObjective(DenoisingObjective):
    """Predict the velocity of the true picture's noisy latents; only the ControlNet learns.

    The clean estimate must also show the person and what is said of the picture (``reader``), and the photo's
    expression and points (``shapes``), the more the less noise there is.
    """

    name = "swap"

    def __init__(
        self,
        model: Model,
        swap: Swap,
        person: Adapter,
        lessons: TwinLessons,
        settings: SwapSettings = SwapSettings(),
        *,
        held_out: TwinLessons | None = None,
        reader: LatentReader | None = None,
        shapes: ShapeReader | None = None,
    ) -> None:
        plain = None if held_out is None else held_out.lessons
        super().__init__(model, lessons.lessons, plain, model.scheduler_config)
        self.swap, self.person, self.settings = swap, person, settings
        self.reader, self.shapes = reader, shapes
        self.learnt, self.measured = lessons, held_out
        self.module = nn.ModuleDict({"controlnet": swap.net})
        for part in (model.unet, model.text_encoder, person.modules()):
            part.requires_grad_(False)
        for part in (model.unet, swap.net):
            part.to(memory_format=torch.channels_last)
            quicken(part)

    def helpers(self) -> Sequence[nn.Module]:
        readers = [net for net in (self.reader, self.shapes) if net is not None]
        return [self.person.modules(), *readers]

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        places = shuffled(len(self.learnt.twins), self.settings.batch, step, self.settings.seed)
        return self._gather(self.learnt, places, torch.rand(5, len(places), generator=generator), generator)

    def _gather(self, learnt: TwinLessons, places: Tensor, roll: Tensor, generator: torch.Generator) -> Batch:
        """roll: (5, B) in [0, 1), by which it is decided what each row lacks and from which photo the person comes."""
        settings, lessons, rows = self.settings, learnt.lessons, learnt.rows[places]
        share = torch.tensor([settings.no_face, settings.no_photo, settings.same]).cumsum(0)
        no_face, no_photo = roll[0] < share[0], (roll[0] >= share[0]) & (roll[0] < share[1])
        same = no_face | (roll[0] >= share[1]) & (roll[0] < share[2])
        itself = same.view(-1, 1, 1, 1)
        photos = torch.where(itself, lessons.latents[rows], learnt.twins[places]).float()
        photos = photos * ~no_photo.view(-1, 1, 1, 1)
        captions = caption(lessons.pictures.scenes(rows), generator)
        silent = (roll[1] < settings.no_prompt).tolist()
        told = ["" if drop else text for text, drop in zip(captions, silent, strict=True)]
        # The photo shows what the caption says; where there is no photo, the prompt alone asks for it.
        shown = [b if blind else a for a, b, blind in zip(captions, told, no_photo.tolist(), strict=True)]
        face = ~no_face[:, None]
        return Batch(
            lessons.latents[rows].float(),
            told,
            lessons.embeddings[another(lessons, rows, roll[2])].float() * face,
            photos.contiguous(memory_format=torch.channels_last),
            learnt.people[rows] * face,
            asked(shown),
            ~no_photo,
            lessons.pictures.field("expression", rows).float(),
            points_of(lessons.pictures, rows),
            face_weights(lessons, rows),
        )

    def conditions(self, batch: Batch) -> list[Condition]:
        """The same conditions that a swap is made under."""
        with torch.no_grad():
            embeds = self.model.text_encoder(self.model.tokenize(batch.prompts)).last_hidden_state
            request = AdapterRequest(guidance=False, scale=1.0)
            identity = self.person.conditions_from_embeddings(batch.embeddings, self.model, request)
        return [TextCondition(embeds=halves(embeds, False)), *identity, self.swap.beside(identity, batch.photos)]

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        timesteps = noise_levels(len(batch.latents), generator)
        noise = torch.randn(batch.latents.shape, generator=generator, device=generator.device)
        return self._loss(batch, noise, timesteps)

    def _loss(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        settings = self.settings
        found, noisy = self.predicted(lambda: self.conditions(batch), batch.latents, noise, timesteps)
        error = (batch.weights * self.velocity.errors(found, batch.latents, noise, timesteps)).mean()
        losses = {"loss": error, "error": error}
        clean, certain = self.velocity.clean(found, noisy, timesteps)
        clean = clean.contiguous(memory_format=torch.channels_last)
        if self.reader is not None:
            who, what = self.reader(clean)
            unlike = _mean(1 - F.cosine_similarity(who, batch.who), certain * (batch.who != 0).any(1))
            amiss = (certain * disobedience(what, batch.wanted)).mean()
            losses["loss"] = losses["loss"] + settings.likeness * unlike + settings.obedience * amiss
            losses |= {"unlike": unlike, "amiss": amiss}
        if self.shapes is not None:
            units, points = self.shapes(clean)
            off = self.shapes.unlike(units, batch.expression) + apart(points, batch.points)
            shape = _mean(off, certain * batch.seen)
            losses["loss"] = losses["loss"] + settings.shape * shape
            losses["shape"] = shape
        return losses

    def figures(self) -> dict[str, float]:
        """The error on held-out people's true pictures, from their twins and from nothing, at evenly spread noise."""
        if self.measured is None:
            return {}
        found: dict[str, float] = {}
        places = torch.arange(min(64, len(self.measured.twins)))
        # No row is of a rare kind, all have a caption; or none has a photo.
        for name, kind in (("twin", 1.0), ("nothing", self.settings.no_face)):
            generator = torch.Generator().manual_seed(15)
            roll = torch.rand(5, len(places), generator=generator)
            roll[0], roll[1] = kind, 1.0
            batch = self._gather(self.measured, places, roll, generator)
            noise = torch.randn(batch.latents.shape, generator=generator)
            loss = self._loss(batch, noise, torch.linspace(0, 999, len(places)).long())
            found |= {f"held_out_from_{name}_{part}": round(float(value), 4) for part, value in loss.items()}
        return found


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Of rows (B,), by weights (B,): those of weight 0 do not count."""
    return (values * weights).sum() / weights.sum().clamp_min(1e-6)
