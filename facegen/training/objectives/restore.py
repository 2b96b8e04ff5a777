"""Learning to align the latents of damaged faces, the autoencoder staying as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.images import to_pil, to_tensor
from facegen.restoration.degrade import LEVELS, NONE, Damage, between, degrade
from facegen.training.cache import shuffled
from facegen.training.loop import Objective
from facegen.training.objectives.denoising import face_weights
from facegen.training.objectives.reconstruction import reconstruction_loss

if TYPE_CHECKING:
    from facegen.models.alignment import Aligner
    from facegen.models.base import Model
    from facegen.training.diffusion import Lessons
    from facegen.training.reader import LatentReader


@dataclass(frozen=True)
class RestoreSettings:
    """clean: share of pictures that are not damaged; referenced: of those with better photos of the person, up to
    `photos`; zoom: how many times larger, at most, the damaged photo was than what is cut from it; face: how much more
    the face counts; shown: weight of what latents do to pixels to first order; pixels: pictures of a batch that are
    truly decoded and compared; likeness: weight of what the reader of latents says.
    """

    batch: int = 16
    clean: float = 0.05
    kind: float = 0.9  # probability of each kind of damage
    referenced: float = 0.5
    photos: int = 3
    zoom: float = 2.5
    face: float = 4.0
    shown: float = 1.0
    pixels: int = 1
    rebuilt: float = 0.25
    likeness: float = 0.3
    codebook: float = 0.1
    seed: int = 13


@dataclass(frozen=True, eq=False)
class Batch:
    """Damaged pictures (B, 3, H, W) in [0, 1], and of the clean ones: pictures, latents, weights (B, h, w), whose face
    it is (B, D, unit; RAW `who` are those of better photos, zero without any)."""

    damaged: Tensor
    pictures: Tensor
    latents: Tensor
    weights: Tensor
    who: Tensor
    person: Tensor


class RestoreObjective(Objective):
    """Tell the clean latents from the damaged picture; only the aligner learns."""

    name = "restore"
    model: Model

    def __init__(
        self,
        model: Model,
        aligner: Aligner,
        lessons: Lessons,
        settings: RestoreSettings = RestoreSettings(),
        *,
        reader: LatentReader | None = None,
        held_out: Lessons | None = None,
    ) -> None:
        from facegen.training.reader import person_means

        self.model, self.aligner, self.lessons, self.settings = model, aligner, lessons, settings
        self.reader, self.held_out = reader, held_out
        model.vae.requires_grad_(False).eval()
        self.module = nn.ModuleDict({"aligner": aligner.net})
        for part in (self.module, model.vae):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._first_order = first_order(lessons, model.vae_factor)
        self._means = {id(one): person_means(one) for one in (lessons, held_out) if one is not None}
        self._others = {id(one): _rows_by_person(one) for one in (lessons, held_out) if one is not None}

    def helpers(self) -> Sequence[nn.Module]:
        return [] if self.reader is None else [self.reader]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Muon moves the matrices between the features; what leads in and out, gains and codes go AdamW's way."""
        inside = ("before", "down", "up", "inside", "look", "after")
        groups: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, weight in self.module.named_parameters():
            groups[name.split(".")[1] in inside and weight.ndim > 1].append(weight)
        return [{"params": weights, "muon": muon} for muon, weights in groups.items()]

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        settings = self.settings
        rows = shuffled(len(self.lessons.pictures), settings.batch, step, settings.seed)
        roll = torch.rand(len(rows), 4, generator=generator)
        damages = []
        for clean, degree, zoom, _ in roll.tolist():
            # The worse it is, the more there is to learn from it.
            damage = seen_from_near(between(degree**0.5), 1 + (settings.zoom - 1) * zoom)
            often = settings.kind
            damage = replace(damage, blur=often, shrink=often, noise=often, jpeg=often)
            damages.append(NONE if clean < settings.clean else damage)
        counts = torch.where(roll[:, 3] < settings.referenced, settings.photos, 0)
        return self._gather(self.lessons, rows, damages, counts.tolist(), generator)

    def _gather(
        self,
        lessons: Lessons,
        rows: Tensor,
        damages: Sequence[Damage],
        counts: Sequence[int],
        generator: torch.Generator,
    ) -> Batch:
        """counts: of each row, from how many better photos at most the person is known."""
        pictures = lessons.pictures.rgb(rows)
        damaged = torch.stack(
            [to_tensor(degrade(to_pil(one), damage, generator)) for one, damage in zip(pictures, damages, strict=True)]
        )
        who = torch.stack(
            [self._known(lessons, row, count, generator) for row, count in zip(rows.tolist(), counts, strict=True)]
        )
        return Batch(
            damaged=damaged,
            pictures=pictures,
            latents=lessons.latents[rows].float(),
            weights=face_weights(lessons, rows, self.settings.face),
            who=who,
            person=self._means[id(lessons)][rows],
        )

    def _known(self, lessons: Lessons, row: int, count: int, generator: torch.Generator) -> Tensor:
        """The mean embedding (D,) of one to `count` other pictures of a row's person; zero for none."""
        others = self._others[id(lessons)][int(lessons.pictures.label[row])]
        others = others[others != row]
        if not count or not len(others):
            return torch.zeros(lessons.embeddings.shape[1])
        order = torch.randperm(len(others), generator=generator)
        taken = order[: 1 + int(torch.randint(count, (1,), generator=generator))]
        return F.normalize(lessons.embeddings[others[taken]].float(), dim=1).mean(0)

    def encoded(self, pictures: Tensor) -> Tensor:
        """Latents of pictures (B, 3, H, W) in [0, 1]; nothing learns from them."""
        with torch.no_grad():
            return self.model.encode_image(pictures.contiguous(memory_format=torch.channels_last)).float()

    def _shown(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as pixels (B, 3, H, W), to first order: an error's size there, at hardly any cost."""
        padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
        return F.pixel_shuffle(F.conv2d(padded, self._first_order.to(latents)), self.model.vae_factor)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        settings = self.settings
        found, codebook = self.aligner.net(self.encoded(batch.damaged), batch.damaged * 2 - 1, batch.who)
        found = found.float()
        error = (found - batch.latents).abs() + (found - batch.latents).square()
        losses = {"latents": (batch.weights * error.mean(1)).mean(), "codebook": codebook}
        losses["shown"] = reconstruction_loss(self._shown(found), self._shown(batch.latents))
        loss = losses["latents"] + settings.codebook * codebook + settings.shown * losses["shown"]
        if self.reader is not None:
            own, _ = self.reader(found.contiguous(memory_format=torch.channels_last))
            with torch.no_grad():
                true, _ = self.reader(batch.latents.contiguous(memory_format=torch.channels_last))
            unlike = 1 - 0.5 * (F.cosine_similarity(own, true) + F.cosine_similarity(own, batch.person))
            losses["unlike"] = unlike.mean()
            loss = loss + settings.likeness * losses["unlike"]
        if settings.pixels:
            some = found[: settings.pixels] / self.model.vae.config["scaling_factor"]
            rebuilt = self.model.vae.decode(some.contiguous(memory_format=torch.channels_last)).sample.float()
            losses["rebuilt"] = reconstruction_loss(rebuilt, batch.pictures[: settings.pixels] * 2 - 1)
            loss = loss + settings.rebuilt * losses["rebuilt"]
        return {"loss": loss, **losses}

    def figures(self) -> dict[str, float]:
        """On held-out people, for each degree: the latents' mean absolute error as they are, aligned, and aligned with
        better photos; and how much of the codebook is used."""
        if self.held_out is None:
            return {}
        count = min(96, len(self.held_out.pictures))
        rows = torch.arange(count) * (len(self.held_out.pictures) // count)
        measured: dict[str, float] = {}
        for degree, damage in LEVELS.items():
            errors: dict[str, list[Tensor]] = {}
            for part in rows.split(16):
                generator = torch.Generator().manual_seed(int(part[0]))
                near = [seen_from_near(damage, 2.0)] * len(part)
                batch = self._gather(self.held_out, part, near, [self.settings.photos] * len(part), generator)
                latents, picture = self.encoded(batch.damaged), batch.damaged * 2 - 1
                ways = {
                    "damaged": latents,
                    "aligned": self.aligner.net(latents, picture, torch.zeros_like(batch.who))[0],
                    "referenced": self.aligner.net(latents, picture, batch.who)[0],
                }
                for name, found in ways.items():
                    errors.setdefault(name, []).append((batch.weights * (found - batch.latents).abs().mean(1)).mean())
            for name, found in errors.items():
                measured[f"{degree}_{name}"] = round(float(torch.stack(found).mean()), 4)
        return measured


def first_order(lessons: Lessons, factor: int, samples: int = 512) -> Tensor:
    """The convolution (3·factor², C, 3, 3) of latents that, in least squares, comes nearest to pictures in [-1, 1]."""
    rows = torch.arange(0, len(lessons.pictures), max(1, len(lessons.pictures) // samples))
    latents = lessons.latents[rows].float()
    patches = F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).flatten(0, 1)
    blocks = F.pixel_unshuffle(lessons.pictures.rgb(rows) * 2 - 1, factor).flatten(2).transpose(1, 2).flatten(0, 1)
    known = torch.cat([patches, torch.ones(len(patches), 1)], 1)  # their mean is no effect of the latents
    square = known.T @ known + 1e-3 * len(known) * torch.eye(known.shape[1])
    found = torch.linalg.solve(square, known.T @ blocks)[:-1]
    return found.T.reshape(blocks.shape[1], latents.shape[1], 3, 3).contiguous()


def seen_from_near(damage: Damage, zoom: float) -> Damage:
    """The damage of a photo as a crop shows it that has `zoom` times fewer pixels than the photo."""
    low, high = (max(1.0, factor / zoom) for factor in damage.factor)
    return replace(damage, factor=(low, high))


def _rows_by_person(lessons: Lessons) -> list[Tensor]:
    label = lessons.pictures.label
    return list(torch.argsort(label, stable=True).split(torch.bincount(label).tolist()))
