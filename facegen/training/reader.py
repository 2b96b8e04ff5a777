"""Two short lessons before the diffusion's long one: reading latents, and reading prompts.

A velocity error over the whole picture hardly weighs what tells two people apart, and a text encoder that starts from
nothing says nothing for a long while. So a small net learns first to read people and facts from latents
(:class:`LatentReader`: the diffusion is then also told who and what its clean estimate shows), and the text encoder
learns to keep what prompts ask for and whose face they carry, as CLIP's had learnt before Stable Diffusion began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.adapter import AdapterRequest
from facegen.conditions import TextCondition
from facegen.face.networks import PlainBlock
from facegen.training.cache import shuffled
from facegen.training.loop import Objective
from facegen.training.muon import muon_groups
from facegen.training.objectives.reconstruction import mean_around
from facegen.world.captions import UNKNOWN, caption, parse_prompt
from facegen.world.facts import FACTS, accepted, labels
from facegen.world.parameters import Scenes

if TYPE_CHECKING:
    from facegen.adapters.arc2face import Arc2Face
    from facegen.models.base import Model
    from facegen.training.diffusion import Lessons

SIZES: tuple[int, ...] = tuple(len(values) for values in FACTS.values())
_PLACES: Mapping[tuple[str, str], int] = {
    pair: place for place, pair in enumerate((kind, value) for kind, values in FACTS.items() for value in values)
}
_STARTS: Mapping[str, int] = {kind: _PLACES[kind, values[0]] for kind, values in FACTS.items()}


def asked(prompts: Sequence[str]) -> Tensor:
    """Which values the prompts leave open, (B, values of all kinds) bool: all of a kind that goes unnamed."""
    table = torch.ones(len(prompts), sum(SIZES), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        for fact in parse_prompt(prompt):
            start = _STARTS[fact.kind]
            table[row, start : start + len(FACTS[fact.kind])] = False
            for value in accepted(fact):
                table[row, _PLACES[fact.kind, value]] = True
    return table


def disobedience(answers: Tensor, wanted: Tensor) -> Tensor:
    """-log of the probability that what was asked is shown, mean over the named kinds of each row: (B,).

    answers: logits (B, values of all kinds); wanted: as :func:`asked` gives it.
    """
    total = named = answers.new_zeros(len(answers), dtype=torch.float32)
    for part, open_values in zip(answers.float().split(SIZES, 1), wanted.split(SIZES, 1), strict=True):
        chance = part.log_softmax(1).masked_fill(~open_values, float("-inf")).logsumexp(1)
        counts = ~open_values.all(1) & open_values.any(1)
        total = total - torch.where(counts, chance, 0.0)
        named = named + counts
    return total / named.clamp_min(1)


def shares(answers: Tensor) -> Tensor:
    """The probability of each value of each kind, (B, values of all kinds), from logits of the same shape."""
    return torch.cat([part.softmax(1) for part in answers.float().split(SIZES, 1)], 1)


def unnamed(wanted: Tensor) -> Tensor:
    """Which values belong to kinds that the prompts leave wholly open, (B, values of all kinds) bool."""
    return torch.cat([part.all(1, keepdim=True).expand_as(part) for part in wanted.split(SIZES, 1)], 1)


class LatentNet(nn.Module):
    """Latents (B, C, 16, 16) to answers (B, outputs).

    A mood or the colour of eyes lies in one or two places of the latents: the first blocks keep them apart.
    """

    def __init__(self, channels: int, outputs: int, widths: Sequence[int] = (128, 160, 224), hidden: int = 448) -> None:
        super().__init__()
        a, b, c = widths
        self.body = nn.Sequential(
            nn.Conv2d(channels, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU(),
            PlainBlock(a, b),
            PlainBlock(b, c, 2), PlainBlock(c, c),
            nn.Conv2d(c, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        )  # fmt: skip
        self.mix = nn.Sequential(nn.Linear(48 * 64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(hidden, outputs)

    def answers(self, latents: Tensor) -> Tensor:
        found: Tensor = self.head(self.mix(self.body(latents).flatten(1)))
        return found.float()


class LatentReader(LatentNet):
    """Latents (B, C, 16, 16) to whose face it is (B, D) and to logits of every value of every kind of fact."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__(channels, dim + sum(SIZES))
        self.dim = dim

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        answers = self.answers(latents)
        return answers[:, : self.dim], answers[:, self.dim :]


def person_means(lessons: Lessons) -> Tensor:
    """The mean unit embedding of each picture's person, normalised, (N, D)."""
    unit = F.normalize(lessons.embeddings.float(), dim=1)
    label = lessons.pictures.label
    total = torch.zeros(int(label.max()) + 1, unit.shape[1]).index_add_(0, label, unit)
    return F.normalize(total, dim=1)[label]


def _classes(scenes: Scenes) -> Tensor:
    """(N, kinds) int64, UNKNOWN where a picture does not settle it."""
    return torch.stack(list(labels(scenes).values()), 1)


@dataclass(frozen=True)
class ReaderSettings:
    batch: int = 64
    noise: float = 0.7  # at most, beside the latents' unit deviation
    blur: float = 0.8
    seed: int = 9


def worn(latents: Tensor, settings: ReaderSettings, generator: torch.Generator) -> Tensor:
    """Blurred and noisy: estimates from noise are no clean latents."""
    roll = torch.rand(2, len(latents), 1, 1, 1, generator=generator, device=generator.device)
    latents = latents.lerp(mean_around(latents), roll[0].square() * settings.blur)
    noise = torch.randn(latents.shape, generator=generator, device=generator.device)
    return (latents + roll[1].square() * settings.noise * noise).contiguous(memory_format=torch.channels_last)


class LatentReaderObjective(Objective):
    """Learn to read people (as the recogniser sees them) and facts from latents, also noisy and blurred ones."""

    name = "reader"

    def __init__(
        self, reader: LatentReader, lessons: Lessons, held_out: Lessons | None, settings: ReaderSettings
    ) -> None:
        self.reader, self.lessons, self.held_out, self.settings = reader, lessons, held_out, settings
        self.module = nn.ModuleDict({"reader": reader})
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.who = person_means(lessons)
        self.what = _classes(lessons.pictures.scenes(torch.arange(len(lessons.pictures))))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Muon moves what lies between the first layer and the answers."""
        return muon_groups(self.module, ("reader.body.0", "reader.head"))

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = shuffled(len(self.lessons.pictures), self.settings.batch, step, self.settings.seed)
        return {"latents": self.lessons.latents[rows].float(), "who": self.who[rows], "what": self.what[rows]}

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        latents = worn(batch["latents"], self.settings, generator)
        who, what = self.reader(latents)
        unlike = 1 - F.cosine_similarity(who, batch["who"])
        parts = zip(what.split(SIZES, 1), batch["what"].unbind(1), strict=True)
        errors = [F.cross_entropy(part, label, ignore_index=UNKNOWN, reduction="sum") for part, label in parts]
        facts = torch.stack(errors).sum() / (batch["what"] != UNKNOWN).sum()
        return {"loss": 2 * unlike.mean() + facts, "unlike": unlike.mean(), "facts": facts}

    def figures(self) -> dict[str, float]:
        """On clean held-out latents: cosine to the person's own mean and to another's, share of facts read right."""
        if self.held_out is None:
            return {}
        means = person_means(self.held_out)
        classes = _classes(self.held_out.pictures.scenes(torch.arange(len(self.held_out.pictures))))
        who, what = (
            torch.cat(part)
            for part in zip(*(self.reader(rows.float()) for rows in self.held_out.latents.split(64)), strict=True)
        )
        chosen = torch.stack([part.argmax(1) for part in what.split(SIZES, 1)], 1)
        found = {
            "same_cosine": F.cosine_similarity(who, means).mean(),
            "other_cosine": F.cosine_similarity(who, means.roll(len(means) // 2, 0)).mean(),
            "right": (chosen == classes)[classes != UNKNOWN].float().mean(),
        }
        return {name: round(float(value), 4) for name, value in found.items()}


class PromptReader(nn.Module):
    """What cross-attention can find in a prompt's tokens (B, L, C): the values left open, and whose face."""

    def __init__(self, width: int, dim: int, queries: int = 8) -> None:
        super().__init__()
        self.queries = nn.Parameter(width**-0.5 * torch.randn(1, queries, width))
        self.attention = nn.MultiheadAttention(width, max(1, width // 64), batch_first=True)
        self.head = nn.Sequential(nn.Linear(queries * width, 256), nn.GELU(), nn.Linear(256, dim + sum(SIZES)))
        self.dim = dim

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        found, _ = self.attention(self.queries.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        answers = self.head(found.flatten(1)).float()
        return answers[:, : self.dim], answers[:, self.dim :]


class WordsObjective(Objective):
    """Teach the text encoder to keep what prompts ask for and, with Arc2Face's token, whose face they carry."""

    name = "words"
    model: Model

    def __init__(self, model: Model, arc2face: Arc2Face, lessons: Lessons, batch: int = 64, seed: int = 10) -> None:
        self.model, self.arc2face, self.lessons = model, arc2face, lessons
        self.size, self.seed = batch, seed
        width, dim = model.text_width, lessons.embeddings.shape[1]
        self.reader = PromptReader(width, dim)
        self.module = nn.ModuleDict({"text_encoder": model.text_encoder, "prompt_reader": self.reader})
        self.module.requires_grad_(True)
        self.scenes = lessons.pictures.scenes(torch.arange(len(lessons.pictures)))

    def batch(self, step: int, generator: torch.Generator) -> tuple[list[str], Tensor, Tensor]:
        """Prompts (B), embeddings (B, D; zero: nobody), and what the prompts leave open (B, values of all kinds)."""
        rows = shuffled(len(self.lessons.pictures), self.size, step, self.seed)
        with_face = torch.rand(len(rows), generator=generator) < 0.5
        scenes = self.scenes[rows]
        plain = caption(scenes, generator, free=0.5)
        named = caption(scenes, generator, subject="id person", free=0.5)
        prompts = [b if face else a for a, b, face in zip(plain, named, with_face.tolist(), strict=True)]
        return prompts, self.lessons.embeddings[rows].float() * with_face[:, None], asked(prompts)

    def loss(self, batch: tuple[list[str], Tensor, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        prompts, embeddings, wanted = batch
        request = AdapterRequest(prompt=prompts, guidance=False, scale=None)
        condition = self.arc2face.conditions_from_embeddings(embeddings, self.model, request)[0]
        who, what = self.reader(cast(TextCondition, condition).embeds[1])
        present = (embeddings != 0).any(1)
        unlike = ((1 - F.cosine_similarity(who, embeddings)) * present).sum() / present.sum().clamp_min(1)
        # A kind that is named counts like all that are not: prompts name a few of them only.
        named = (~unnamed(wanted)).float()
        errors = F.binary_cross_entropy_with_logits(what, wanted.float(), reduction="none")
        facts = (errors * named).sum() / named.sum().clamp_min(1) + (errors * (1 - named)).sum() / (1 - named).sum()
        return {"loss": unlike + facts, "unlike": unlike, "facts": facts}
