"""What learns beside a training to tell what it paints from true pictures, one by one or as a whole.

The critics' loss is the hinge of Lim & Ye (arXiv 1705.02894): one says above 1 of what is true, below -1 of what is
painted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.face.networks import AttributeJudge, DetectorNet, RecogniserNet
from facegen.face.warp import aligned_crops
from facegen.models.norms import quicken
from facegen.training.loop import Objective
from facegen.training.objectives.reconstruction import mean_around

if TYPE_CHECKING:
    from facegen.models.base import Model


class Critic(nn.Module):
    """Latents (B, C, h, w) to an opinion of each part, (B, 1, h/4, w/4): above 0 true, below painted (Isola 2017)."""

    def __init__(self, channels: int, widths: tuple[int, int, int] = (64, 128, 192)) -> None:
        super().__init__()
        a, b, c = widths
        self.body = nn.Sequential(
            nn.Conv2d(channels, a, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(a, b, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(b, b, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(b, c, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(c, 1, 1),
        )  # fmt: skip

    def forward(self, latents: Tensor) -> Tensor:
        opinion: Tensor = self.body(latents)
        return opinion.float()


class PixelCritic(Critic):
    """Pictures (B, 3, H, W) in [-1, 1] to an opinion of each part, (B, 1, H/8, W/8): above 0 true, below painted.

    Strands, stubble and freckles differ by some hundredths from what is around them, colours by whole numbers: what is
    finer than three pixels is shown to it enlarged, beside the picture. After 100 steps it orders all pairs of a render
    and a decoded one right; without that, 400 steps taught it nothing.
    """

    def __init__(self, widths: tuple[int, int, int] = (64, 128, 192), enlarged: float = 12.0) -> None:
        super().__init__(2 * 3 * 2**2, widths)
        self.enlarged = enlarged

    def forward(self, pictures: Tensor) -> Tensor:
        fine = pictures - mean_around(pictures)
        seen = torch.cat([pictures, self.enlarged * fine], 1)
        return super().forward(F.pixel_unshuffle(seen, 2))


class Beholder(nn.Module):
    """A critic that sees pictures as a frozen net does: layers (B, C, h, w) to an opinion of each part of each layer.

    What it sees knows hair from ground already, so that small heads learn to judge within few steps. They look at each
    place and around it: after 300 steps they order 94 % of pairs right, by the place alone 79 %. Of eleven layers five
    are the recogniser's, of the face alone: in a whole picture an eye is too small to matter.
    """

    def __init__(self, channels: Sequence[int], width: int = 64) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(count, width, 3, 1, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, 2, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(width, 1, 1),
            )
            for count in channels
        )  # fmt: skip

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """(B, parts of all layers), above 0 true, below painted; every layer counts the same in its mean."""
        said = [head(layer).flatten(2).float() for head, layer in zip(self.heads, layers, strict=True)]
        most = max(one.shape[2] for one in said)
        return torch.cat([F.interpolate(one, size=most)[:, 0] for one in said], 1)


class Reach(nn.Module):
    """Where a net sees true pictures lie as a whole, and painted ones: mean and covariance of what it says of them.

    Kinds of facts are coarse (half a smile and a whole one are both "smiling"), and a picture that is true by itself
    may still be one of too many of its kind. What the net says of a painted picture is held beside where the map of
    least effort that carries the normal distribution of the painted ones to that of the true ones takes it. The effort
    is the Fréchet distance (Dowson & Landau 1982), which FID measures with another net.
    """

    def __init__(self, size: int, memory: int = 800, recent: int = 160, damping: float = 0.05) -> None:
        """memory: pictures, after which what was seen before counts by 1/e; recent: the same of the mean; damping: of
        the map, where pictures hardly differ, as a share of the mean variance.

        The mean is known by fewer pictures, and must be: a training that leans against where its pictures lay a hundred
        steps ago swings to the other side and stays there when it ends.
        """
        super().__init__()
        self.memory, self.recent, self.damping = memory, recent, damping
        for name in ("true", "painted"):
            self.register_buffer(f"{name}_count", torch.zeros(()))
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_covariance", torch.zeros(size, size))

    @torch.no_grad()
    def see(self, name: str, said: Tensor) -> None:
        """Remember what is said of pictures (B, size); name: "true" or "painted"."""
        said = said.double()
        count = self.get_buffer(f"{name}_count").add_(len(said)).clamp_(max=self.memory)
        mean, covariance = self.get_buffer(f"{name}_mean"), self.get_buffer(f"{name}_covariance")
        share, recent = ((len(said) / count.clamp(max=most)).clamp(max=1) for most in (self.memory, self.recent))
        mean.lerp_(said.mean(0).float(), recent)
        away = said - mean
        covariance.lerp_((away.T @ away / len(said)).float(), share)

    @torch.no_grad()
    def carried(self, said: Tensor) -> Tensor:
        """Where painted pictures (B, size) would lie if they lay together as true ones do."""
        from facegen.evaluation.frechet import root_of

        true, painted = (self.get_buffer(f"{name}_covariance").double() for name in ("true", "painted"))
        some = self.damping * true.diagonal().mean() * torch.eye(len(true), dtype=true.dtype, device=true.device)
        values, vectors = torch.linalg.eigh(painted + some)
        values = values.clamp_min(1e-12).sqrt()
        root, back = ((vectors * one) @ vectors.T for one in (values, 1 / values))
        across = back @ root_of(root @ (true + some) @ root) @ back
        away = said.double() - self.get_buffer("painted_mean").double()
        return (self.get_buffer("true_mean").double() + away @ across).to(said.dtype)

    def astray(self, said: Tensor) -> Tensor:
        """How far pictures (B, size) lie from there, squared, as a share of how true ones vary: (B,).

        0 until as many as it remembers have been seen: of fewer the covariance is not known.
        """
        seen = min(float(self.get_buffer(f"{name}_count")) for name in ("true", "painted"))
        if seen < self.memory:
            return said.new_zeros(len(said))
        width = self.get_buffer("true_covariance").trace().clamp_min(1e-9)
        return (said - self.carried(said)).square().sum(1) / width


class Reaches(nn.ModuleList):
    """A :class:`Reach` for each of several things that are said of the same pictures."""

    def __init__(self, sizes: Iterable[int]) -> None:
        super().__init__(map(Reach, sizes))

    def each(self) -> Iterator[Reach]:
        return cast("Iterator[Reach]", iter(self))

    def see(self, name: str, said: Iterable[Tensor]) -> None:
        """Remember what is said of pictures, (B, size) each; name: "true" or "painted"."""
        for reach, one in zip(self.each(), said, strict=True):
            reach.see(name, one)

    def astray(self, said: Iterable[Tensor]) -> Iterator[Tensor]:
        """By each, as it is asked for: how far pictures lie from where they would lie as true ones do, (B,)."""
        return (reach.astray(one) for reach, one in zip(self.each(), said, strict=True))


def beholder_of(net: AttributeJudge | None, recogniser: RecogniserNet | None = None) -> Beholder:
    """One that sees through this net, and faces through the recogniser, if given; of no heads without any net."""
    layers = layers_of(net, torch.zeros(1, 3, 128, 128))
    if recogniser is not None:
        layers = with_faces(layers, faces_seen(recogniser, torch.zeros(1, 3, 128, 128), torch.zeros(1, 5, 2)))
    return Beholder([layer.shape[1] for layer in layers])


def layers_of(net: AttributeJudge | None, pictures: Tensor) -> list[Tensor]:
    """What a net's layers see of pictures (B, 3, H, W) in [0, 1], (B, C, h, w) each; nothing without a net."""
    from facegen.evaluation.judges import resized

    return [] if net is None else net.seen(resized(pictures) * 2 - 1)


def faces_seen(recogniser: RecogniserNet, pictures: Tensor, points: Tensor) -> list[Tensor]:
    """What the recogniser's layers see of the faces at points (B, 5, 2) of pictures (B, 3, H, W) in [0, 1]; its
    embedding comes last, (B, D, 1, 1)."""
    return recogniser.seen(aligned_crops(pictures, points, recogniser.config["size"]) * 2 - 1)


def with_faces(layers: Sequence[Tensor], faces: Sequence[Tensor]) -> list[Tensor]:
    """A net's layers of pictures and the recogniser's of their faces, without who it is; none without a net."""
    return [*layers, *faces[:-1]] if layers else []


class BeholderObjective(Objective):
    """Teaches a beholder, before anything is rewarded for its opinion, to tell what a model paints from true pictures.

    Both are decoded latents, so that it sees what the model does and not what the decoder does.
    """

    name = "critic"
    model: Model

    def __init__(
        self,
        model: Model,
        teacher: AttributeJudge,
        recogniser: RecogniserNet,
        detector: DetectorNet,
        true: Tensor,
        painted: Tensor,
        batch: int = 8,
    ) -> None:
        """true, painted: latents (N, C, h, w) each; every tenth of the painted is kept for the figures."""
        self.model, self.teacher, self.true, self.painted, self.size = model, teacher, true, painted, batch
        self.recogniser, self.detector = recogniser, detector
        self.kept = max(1, len(painted) // 10)
        self.beholder = beholder_of(teacher, recogniser)
        self.module = nn.ModuleDict({"beholder": self.beholder})
        quicken(model.vae)

    def helpers(self) -> Sequence[nn.Module]:
        return [self.teacher, self.recogniser, self.detector]

    def batch(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """True and painted latents (B, C, h, w)."""
        return self._some(self.true[self.kept :], generator), self._some(self.painted[self.kept :], generator)

    def _some(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        return latents[torch.randint(len(latents), (self.size,), generator=generator)].float()

    def loss(self, batch: tuple[Tensor, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        true, painted = (self.beholder(self._layers(one)) for one in batch)
        return {"loss": doubts(true, painted), "true": true.mean(), "painted": painted.mean()}

    @torch.no_grad()
    def _layers(self, latents: Tensor) -> list[Tensor]:
        from facegen.evaluation.judges import strongest

        pictures = self.model.decode(latents)
        faces = faces_seen(self.recogniser, pictures, strongest(self.detector, pictures)[0])
        return with_faces(layers_of(self.teacher, pictures), faces)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """The share of pairs of a true and a painted picture, not learnt from, that it puts in the right order."""
        true, painted = (
            torch.cat([self.beholder(self._layers(part.float())).mean(1) for part in kept[: self.kept].split(16)])
            for kept in (self.true, self.painted)
        )
        return {"right_order": round(float((true[:, None] > painted).float().mean()), 4)}


def doubts(true: Tensor, painted: Tensor) -> Tensor:
    """A critic's loss by its opinions (hinge)."""
    return (1 - true).relu().mean() + (1 + painted).relu().mean()


def opinions(critic: nn.Module, true: Any, painted: Sequence[Any], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A critic's own loss, the mean over several ways of painting, and how painted it finds them, weighed.

    true, painted: what it sees, as it takes it. The loss moves nothing but the critic, the opinion everything else.
    """

    def still(seen: Any) -> Any:
        return seen.detach() if isinstance(seen, Tensor) else [one.detach() for one in seen]

    of_true = critic(still(true))
    own = torch.stack([doubts(of_true, critic(still(one))) for one in painted]).mean()
    parts = [-weight * unmoved(critic, one).mean() for weight, one in zip(weights, painted, strict=True)]
    return own, torch.stack(parts).sum()


def unmoved(critic: nn.Module, seen: Any) -> Tensor:
    """A critic's opinion, by which it is not itself moved."""
    frozen = {name: value.detach() for name, value in critic.named_parameters()}
    return cast(Tensor, torch.func.functional_call(critic, frozen, (seen,)))
