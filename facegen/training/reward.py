"""Rewards the model for what it paints by itself: the recogniser looks, and says whether it is the person.

The long lesson shows noised pictures, in which the right face is there already. Here the model walks from noise in a
few guided steps; at one of the places that it comes by, its estimate is decoded, the face aligned, and the recogniser's
cosine to the person asked for is the reward, through which gradients reach the weights in that one step (ReFL, Xu et
al., arXiv 2304.05977; an accurate identity loss on pictures of a few steps: PuLID, Guo et al., arXiv 2404.16022). A net
that tells the facts of a picture says in the same way how far it is from the prompt. The long lesson goes on beside it,
in each step, so that what pleases the recogniser stays a picture of this world. Two critics learn beside to tell what
is painted from true pictures, one by latents and one by what the net of facts sees of it and the recogniser of its
face, and their opinion of a walk's later places is a reward too (hinge loss, Lim & Ye, arXiv 1705.02894; on a few steps
of diffusion, by what a frozen net sees: Sauer et al., arXiv 2311.17042): a squared error alone leaves hair and grounds
in a haze. And what all nets see of painted pictures is drawn to where true ones lie as a whole. The judges of the
evaluation are other nets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.face.networks import AMOUNTS, AttributeJudge, DetectorNet, RecogniserNet, facts_among
from facegen.models.norms import quicken
from facegen.training.critics import Critic, Reaches, beholder_of, doubts, faces_seen, layers_of, unmoved, with_faces
from facegen.training.loop import Objective
from facegen.training.reader import SIZES, disobedience, shares, unnamed
from facegen.training.walks import LEVELS, guided, plain, rows_of, unasked, walk
from facegen.world.facts import FACTS
from facegen.world.parameters import EXPRESSION

if TYPE_CHECKING:
    from facegen.models.base import Model
    from facegen.training.diffusion import Batch, DiffusionObjective


@dataclass(frozen=True)
class RewardSettings:
    """lessons: batch of the lessons beside; painted: pictures that are painted in each step,
    nobody: how many of them of nobody.

    given: share of the steps in which InstantID gets the key points of the picture that conditions instead of those of
    the true picture, as it does where pictures are made: they fit neither the prompt nor quite the person.

    walks: how many steps a walk may have; guidance: theirs.
    likeness, obedience: weights of how unlike the person the recogniser finds the estimate, and of how far from the
    prompt the reader of latents and the teacher of attributes find it; look: of how untrue the critic of latents finds
    what comes of it; sight: of how untrue the critic finds it that looks through teacher and recogniser.
    uneven: weight of how much more often than true pictures the painted ones show something that nobody asked for, of
    the ``varied`` kinds of facts.
    spread: weight of how far moods and heads lie from where those of true pictures lie as a whole, unit by unit;
    whole: the same of what each layer of the critic's eyes sees.
    last: share of the rewards that are given at the walk's last place, where the estimate is the finished picture.
    judged: from which part of the walk on, 1 being its last place, the critics are asked.
    haze: noise that the critic looks through, so that it sees no more than eyes would.
    share: how far the finished weights go from those before towards the rewarded ones.
    """

    lessons: int = 16
    painted: int = 8
    nobody: int = 3
    given: float = 0.5
    walks: tuple[int, ...] = (5, 6, 8)
    guidance: float = 3.0
    likeness: float = 1.8
    obedience: float = 2.2
    look: float = 0.04
    sight: float = 1.5
    uneven: float = 2.0
    varied: tuple[str, ...] = ("looking", "tilt", "expression", "eyes", "mouth")
    spread: float = 6.0
    whole: float = 12.0
    last: float = 0.7
    judged: float = 0.5
    haze: float = 0.1
    share: float = 0.5


class Habits(nn.Module):
    """How often true and painted pictures show each value of the kinds of facts, where prompts leave it open.

    The likeness is easiest to see in a calm face that looks ahead, so that its reward alone leads to such faces only.
    """

    def __init__(self, memory: float = 0.98) -> None:
        super().__init__()
        self.memory = memory
        even = torch.cat([torch.full((size,), 1 / size) for size in SIZES])
        self.register_buffer("true", even.clone())
        self.register_buffer("painted", even.clone())

    @torch.no_grad()
    def see(self, name: str, seen: Tensor, unasked: Tensor) -> None:
        """Remember shares (B, values) where ``unasked`` (B, values); name: "true" or "painted"."""
        known = self.get_buffer(name)
        mean = (seen * unasked).sum(0) / unasked.sum(0).clamp_min(1)
        weight = (1 - self.memory) * (unasked.any(0))
        known.copy_(known.lerp(mean, weight))

    def uneven(self, seen: Tensor, unasked: Tensor, kinds: Sequence[str]) -> Tensor:
        """Shares (B, values) weighed by how much too often each is painted, mean over rows and kinds."""
        excess = (
            (self.get_buffer("painted").clamp_min(1e-3) / self.get_buffer("true").clamp_min(1e-3)).log().clamp(-2, 2)
        )
        counts = unasked & torch.tensor(
            [kind in kinds for kind, size in zip(FACTS, SIZES, strict=True) for _ in range(size)], device=seen.device
        )
        # A kind counts once, however many values it has.
        each = counts / torch.tensor([float(size) for size in SIZES for _ in range(size)], device=seen.device)
        return (seen * excess * counts).sum() / each.sum().clamp_min(1)


# What a judge of attributes says of moods and heads, in the units of the world.
UNITS = (*(unit.name for unit in EXPRESSION), "yaw", "pitch", "roll")


def units_of(answers: Mapping[str, Tensor]) -> Tensor:
    """:data:`UNITS` as a judge of attributes answers of B pictures, (B, units)."""
    return torch.stack([answers[name].sigmoid() if name in AMOUNTS else answers[name] for name in UNITS], 1)


def wholes_of(answers: Mapping[str, Tensor], layers: Sequence[Tensor]) -> Iterator[Tensor]:
    """What is said of pictures as wholes: :data:`UNITS`, (B, units), and each layer's mean over places, (B, C)."""
    yield units_of(answers)
    yield from (layer.float().mean((2, 3)) for layer in layers)


class RewardObjective(Objective):
    """The lessons of :class:`DiffusionObjective`, and beside them the reward of the model's own pictures."""

    name = "reward"
    model: Model

    def __init__(
        self,
        teaching: DiffusionObjective,
        recogniser: RecogniserNet,
        detector: DetectorNet,
        settings: RewardSettings = RewardSettings(),
        teacher: AttributeJudge | None = None,
    ) -> None:
        self.teaching, self.settings, self.teacher = teaching, settings, teacher
        self.model = teaching.model
        self.critic = Critic(teaching.lessons.latents.shape[1])
        self.habits, self.beholder = Habits(), beholder_of(teacher, recogniser)
        # Of the units, and of what each of the beholder's layers sees.
        self.reach = Reaches((len(UNITS), *self.beholder.channels))
        own = {"critic": self.critic, "habits": self.habits, "reach": self.reach, "beholder": self.beholder}
        self.module = nn.ModuleDict({**cast(nn.ModuleDict, teaching.module), **own})
        self.recogniser, self.detector = recogniser, detector
        quicken(teaching.model.vae)

    def helpers(self) -> Sequence[nn.Module]:
        nets = [*self.teaching.helpers(), self.recogniser, self.detector]
        return nets if self.teacher is None else [*nets, self.teacher]

    def points(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Five points (B, 5, 2) of pictures (B, 3, H, W) in [0, 1], and whether there is a face, (B,)."""
        from facegen.evaluation.judges import strongest

        return strongest(self.detector, images)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of the lessons; the critics learn faster, or they lag behind what they judge."""
        critics = [*self.critic.parameters(), *self.beholder.parameters()]
        return [*self.teaching.parameter_groups(), {"params": critics, "scale": 3.0}]

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        return self.teaching.batch(step, generator)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        losses = dict(self.teaching.loss(batch, step, generator))
        some = self._chosen(batch)
        if len(some.latents):
            said = self.reward(some, generator)
            settings = self.settings
            losses["loss"] = (
                losses["loss"]
                + settings.likeness * said["unlike"]
                + settings.obedience * said["amiss"]
                + settings.look * said["untrue"]
                + settings.sight * said["unreal"]
                + settings.uneven * said["uneven"]
                + settings.spread * said["narrow"]
                + settings.whole * said["astray"]
                + said["critic"]
            )
            losses |= {f"painted_{name}": value.detach() for name, value in said.items()}
        return losses

    def _chosen(self, batch: Batch) -> Batch:
        """The first rows that ask for somebody, and the first that ask for what a prompt says alone."""
        somebody, settings = (batch.who != 0).any(1), self.settings
        prompted = torch.tensor([bool(prompt) for prompt in batch.prompts], device=somebody.device)
        alone = (~somebody & prompted).nonzero()[: settings.nobody, 0]
        return rows_of(batch, torch.cat([somebody.nonzero()[: settings.painted - len(alone), 0], alone]))

    def reward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """What is said of the pictures that the model paints of a batch, each the smaller the better.

        unlike: the people (1 - cosine); amiss: what the prompts ask for; uneven: what they leave open; narrow: where
        moods and heads lie as a whole; astray: where all that is seen does; untrue, unreal: by the critic of latents
        and by the other. The last three are 0 at places before those that are judged. critic: their own loss.
        """
        settings, teaching = self.settings, self.teaching
        roll = torch.rand(4, generator=generator, device=generator.device).tolist()
        if batch.given is not None and roll[3] < settings.given:
            batch = replace(batch, control=batch.given)
        count = settings.walks[int(roll[0] * len(settings.walks))]
        noise = torch.randn(batch.latents.shape, generator=generator, device=generator.device)
        with torch.no_grad():
            low, lows = unasked(teaching, batch), list[Tensor]()

            def without(noisy: Tensor, steps: Tensor) -> Tensor:
                lows.append(low(noisy, steps))
                return lows[-1]

            way = guided(plain(teaching.model, teaching.conditions(batch)), without, settings.guidance)
            places, end = walk(way, teaching.velocity, noise, LEVELS, count)
            painted = teaching.model.decode(end)
            points, found = self.points(painted)
            # At the first there is only noise.
            chosen = count - 1 if roll[1] < settings.last else 1 + int(roll[2] * (count - 1))
            place = places[chosen]

        def with_all(noisy: Tensor, steps: Tensor) -> Tensor:
            return teaching.answered(lambda: teaching.conditions(batch), noisy, steps).float()

        velocity = guided(with_all, lambda noisy, steps: lows[chosen], settings.guidance)(place.noisy, place.steps)
        clean, certain = teaching.velocity.clean(velocity, place.noisy, place.steps)
        picture = teaching.model.decode(clean)
        faces = faces_seen(self.recogniser, picture, points)
        who = faces[-1][..., 0, 0].float()
        counts = certain * found * (batch.who != 0).any(1)
        said = {"unlike": (counts * (1 - F.cosine_similarity(who, batch.who))).sum() / counts.sum().clamp_min(1e-6)}
        said |= dict.fromkeys(("amiss", "untrue", "unreal", "uneven", "narrow", "astray"), torch.zeros(()))
        layers = with_faces(layers_of(self.teacher, picture), faces)
        answers = self._answers(layers)
        with torch.no_grad():
            # Without a teacher nobody looks at true pictures.
            true = teaching.model.decode(batch.latents) if self.teacher is not None else painted
            true_layers, end_layers = (
                with_faces(layers_of(self.teacher, one), faces_seen(self.recogniser, one, its))
                for one, its in ((true, self.points(true)[0]), (painted, points))
            )
            true_answers, end_answers = map(self._answers, (true_layers, end_layers))
        read = list(self._read(clean, answers))
        if read:
            told = [disobedience(one, batch.wanted) for one in read]
            said["amiss"] = (certain * torch.stack(told).mean(0)).mean()
            open_kinds = unnamed(batch.wanted)
            with torch.no_grad():
                for name, latents, told_of in (("true", batch.latents, true_answers), ("painted", end, end_answers)):
                    self.habits.see(name, shares(next(self._read(latents, told_of))), open_kinds)
            said["uneven"] = self.habits.uneven(shares(read[0]), open_kinds, settings.varied)
        hazes = settings.haze * torch.randn((2, *end.shape), generator=generator, device=generator.device)
        said["critic"] = doubts(self.critic(batch.latents + hazes[0]), self.critic(end + hazes[1]))
        judged = chosen >= settings.judged * (count - 1)
        if judged:
            said["untrue"] = -unmoved(self.critic, clean + hazes[1]).mean()
        if layers:
            said["critic"] = said["critic"] + doubts(self.beholder(true_layers), self.beholder(end_layers))
            self.reach.see("true", wholes_of(true_answers, true_layers))
            self.reach.see("painted", wholes_of(end_answers, end_layers))
            away = ((certain * one).mean() for one in self.reach.astray(wholes_of(answers, layers)))
            said["narrow"] = next(away)
            if judged:
                said["unreal"] = -unmoved(self.beholder, layers).mean()
                said["astray"] = torch.stack(list(away)).mean()
        return said

    def _answers(self, layers: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """What the teacher says by what its layers see, which come first; nothing without a teacher."""
        return {} if self.teacher is None else self.teacher.answers(layers[len(self.teacher.body) - 1])

    def _read(self, latents: Tensor, answers: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """What a picture shows, logits (B, values of all kinds), by each net that reads here, one after the other.

        The teacher of attributes, whose answers these are, comes first, for it reads pictures better than the other
        does latents.
        """
        if answers:
            yield torch.cat(list(facts_among(answers).values()), 1)
        if self.teaching.reader is not None:
            yield self.teaching.reader(latents.contiguous(memory_format=torch.channels_last))[1]

    def figures(self) -> dict[str, float]:
        return self.teaching.figures()
