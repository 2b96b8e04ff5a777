"""Learning a slider: a direction of low-rank weights in a UNet that stays as it is, without any labels.

From two prompts, what the UNet already knows as the difference between them becomes the direction; from pairs of
pictures, what turns the one into the other. Strengths 1 and -1 are learnt together, so that what both have in common
cancels out. Source: Gandikota et al. 2023, Concept Sliders (arXiv 2311.12092), equations 7, 8 and section 4.2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from facegen import schedulers
from facegen.attention.backends import for_training
from facegen.conditions import Condition, LoraCondition, LowRankWeights, TextCondition
from facegen.denoise import Guidance, denoise, noise
from facegen.errors import WrongRequest
from facegen.models.slid import DELAY
from facegen.training.loop import Objective, step_seed

if TYPE_CHECKING:
    from facegen.models.base import Model

_SIDES = (1.0, -1.0)


@dataclass(frozen=True)
class SliderSettings:
    """reach: how many times the difference of the two prompts strength 1 is to go (the paper's η); half the guidance is
    as far as if the words stood in the prompt. steps, guidance: of the runs in whose middle prompts are compared.
    rate: of learning, at its highest.
    """

    rank: int = 4
    batch: int = 4
    reach: float = 2.0
    steps: int = 10
    guidance: float = 3.0
    seed: int = 0
    rate: float = 5e-3


class SliderNet(nn.Module):
    """Low-rank additions to the attention and feed-forward layers of a UNet, zero at first."""

    def __init__(self, unet: nn.Module, rank: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers = {
            name: layer
            for name, layer in unet.named_modules()
            if isinstance(layer, nn.Linear) and ".transformer_blocks." in name
        }
        self.names = tuple(layers)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for layer in layers.values():
            own = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
            self.down.append(nn.Parameter(own.to(layer.weight.device)))
            self.up.append(nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device)))

    def layers(self) -> dict[str, LowRankWeights]:
        """The additions by the names of the UNet's layers."""
        pairs = zip(self.names, self.down, self.up, strict=True)
        return {name: LowRankWeights(down, up) for name, down, up in pairs}

    def condition(self, strength: float) -> LoraCondition:
        """The slider at a strength; differentiable."""
        return LoraCondition(layers=self.layers(), scale=strength)


class SliderObjective(Objective):
    """What both ways of learning a slider share: the frozen model and one call of it."""

    name = "slider"
    model: Model

    def __init__(self, model: Model, settings: SliderSettings) -> None:
        self.model, self.settings = model, settings
        model.unet.requires_grad_(False)
        self.net = SliderNet(model.unet, settings.rank, settings.seed)
        self.module = self.net

    def to(self, device: torch.device) -> None:
        """The model is where it was loaded, and so is what was made with it."""
        self.module.to(self.model.device)

    def predict(self, latents: Tensor, timesteps: Tensor, text: TextCondition, strength: float = 0.0) -> Tensor:
        """The model's output for noisy latents (B, C, h, w) at timesteps (B,), with the slider at this strength."""
        slid: list[Condition] = [self.net.condition(strength)] if strength else []
        # On a CPU the fused attention's backward pass is several times slower than plain matrix products.
        backend = for_training(latents.device)
        with self.model.prepare([text, *slid], len(latents), guidance=False, backend=backend) as prepared:
            return self.model.predict(latents, timesteps, prepared.throughout()).float()

    @abstractmethod
    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]: ...

    def compiled(self) -> Sequence[nn.Module]:
        return ()


@dataclass(frozen=True)
class Words:
    """The two ends of a slider in words, which come behind the prompt on which it acts; keep: what must not move with
    it, such as 'a man' and 'a woman' for an age.
    """

    more: str
    less: str
    prompt: str = "a portrait of a person"
    keep: tuple[str, ...] = ()


class TextSliderObjective(SliderObjective):
    """Under the plain prompt, answer as the UNet answers it, moved by the difference of its answers to two others."""

    def __init__(self, model: Model, words: Words, settings: SliderSettings = SliderSettings()) -> None:
        super().__init__(model, settings)
        texts = (words.prompt, f"{words.prompt}, {words.more}", f"{words.prompt}, {words.less}")
        self.words = [
            [model.encode_text([f"{text}, {kept}" if kept else text]) for text in texts] for kept in words.keep or ("",)
        ]
        self._run: tuple[int, Tensor, Tensor] | None = None

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Rows from different moments of one run: latents (B, C, h, w), timesteps (B,), words (): which are kept."""
        number, place = divmod(step, self.settings.steps)
        seen, times = self._seen(number)
        rows, first = torch.arange(seen.shape[1]), int(DELAY * len(times))  # earlier than that no slider acts
        moments = first + (place + rows * max(1, len(times) // len(rows))) % (len(times) - first)
        words = torch.randint(len(self.words), (), generator=generator)
        return {"latents": seen[moments, rows], "timesteps": times[moments], "words": words}

    @torch.no_grad()
    def _seen(self, number: int) -> tuple[Tensor, Tensor]:
        """What the plain model sees in a run from this number's noise: latents (T, B, C, h, w), timesteps (T,)."""
        if self._run is None or self._run[0] != number:
            model, settings = self.model, self.settings
            scheduler = schedulers.build("ddim", model.scheduler_config, settings.steps, device=model.device)
            seeds = [step_seed(settings.seed, number, row) for row in range(settings.batch)]
            begin = noise(
                model.latent_shape(*model.default_size), [torch.Generator().manual_seed(seed) for seed in seeds]
            )
            seen = [schedulers.start(scheduler, begin).to(model.device)]
            text = self.words[number % len(self.words)][0]
            guidance = Guidance(settings.guidance)
            denoise(model, seen[0], scheduler, [text], guidance, on_step=lambda step: seen.append(step.latents))
            self._run = number, torch.stack(seen[:-1]).float(), schedulers.walk(scheduler)
        return self._run[1:]

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """1 is a slider that does nothing yet; each row counts alike, for with much noise prompts differ more."""
        latents, timesteps = batch["latents"], batch["timesteps"]
        texts = self.words[int(batch["words"])]
        with torch.no_grad():
            plain, more, less = (self.predict(latents, timesteps, text) for text in texts)
        way = self.settings.reach * (more - less)
        size = way.square().mean((1, 2, 3)).clamp(min=1e-12)
        errors = [
            (self.predict(latents, timesteps, texts[0], side) - plain - side * way).square().mean((1, 2, 3)) / size
            for side in _SIDES
        ]
        return {"loss": torch.stack(errors).mean()}

    def figures(self) -> dict[str, float]:
        """The share of the way that is left, in runs that were not learnt from."""
        first = 2**20
        found = []
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            batch = self.batch((first + number) * self.settings.steps + number, generator)
            found.append(self.loss(batch, 0, generator)["loss"])
        return {"left": round(float(torch.stack(found).mean()), 4)}


class PairSliderObjective(SliderObjective):
    """Whatever lies between two twins: at strength 1 see the one that shows more in it, at -1 the one that shows less.

    What the plain model sees in the noisy picture is moved by the way from that picture to the twin. So all that it
    does not know of the picture, by far the most of a denoiser's error, is not learnt from, and few steps do.
    """

    def __init__(
        self, model: Model, pairs: tuple[Tensor, Tensor], prompt: str, settings: SliderSettings = SliderSettings()
    ) -> None:
        """pairs: latents (N, C, h, w) of the pictures with more and of those with less of it; WrongRequest for twins
        that are the same.
        """
        super().__init__(model, settings)
        from diffusers import DDPMScheduler

        self.more, self.less = (latents.float() for latents in pairs)
        if bool((self.more == self.less).all()):
            raise WrongRequest("The pictures of more and of less are the same, so there is nothing to learn from them.")
        self.text = model.encode_text([prompt])
        kept = {name: value for name, value in model.scheduler_config.items() if not name.startswith("_")}
        self.levels: Any = DDPMScheduler.from_config(kept)

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Pairs drawn by lot: rows (B,), noise (B, C, h, w), timesteps (B,), and where between less (0) and more (1)
        each picture lies, between (B, 1, 1, 1).
        """
        rows = torch.randint(len(self.more), (self.settings.batch,), generator=generator)
        drawn = torch.randn(len(rows), *self.more.shape[1:], generator=generator)
        timesteps = torch.randint(int(1000 * (1 - DELAY)), (len(rows),), generator=generator)
        between = torch.rand(len(rows), 1, 1, 1, generator=generator)
        found = {"rows": rows, "noise": drawn, "timesteps": timesteps, "between": between}
        return {name: value.to(self.more.device) for name, value in found.items()}

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """1 is a slider that does nothing yet; each pair and each amount of noise count alike."""
        return {"loss": self._error(batch, 1.0)}

    def _error(self, batch: Mapping[str, Tensor], strength: float) -> Tensor:
        rows, timesteps = batch["rows"], batch["timesteps"]
        more, less = self.more[rows], self.less[rows]
        latents = less.lerp(more, batch["between"])
        noisy = self.levels.add_noise(latents, batch["noise"], timesteps)
        with torch.no_grad():
            plain = self.predict(noisy, timesteps, self.text)
        # x = a·clean + s·noise: the clean picture goes by -s/a of what the noise goes, by -s of what the velocity goes.
        share = self.levels.alphas_cumprod.to(noisy)[timesteps].view(-1, 1, 1, 1)
        velocity = self.levels.config.prediction_type == "v_prediction"
        clean = -(1 - share).sqrt() / (1.0 if velocity else share.sqrt())
        whole = (more - less).square().mean((1, 2, 3)).clamp(min=1e-12)
        size = whole / 3  # of the way that is left, on average over the places between
        errors = [
            (clean * (self.predict(noisy, timesteps, self.text, side * strength) - plain) - (twin - latents))
            .square()
            .mean((1, 2, 3))
            / size
            for side, twin in zip(_SIDES, (more, less), strict=True)
        ]
        return torch.stack(errors).mean()

    def figures(self) -> dict[str, float]:
        """The share of the way that is left with the slider, and with it the wrong way round, on all pairs."""
        count = min(32, max(16, len(self.more)))
        rows = torch.arange(count) % len(self.more)
        generator = torch.Generator().manual_seed(self.settings.seed)
        drawn = torch.randn(count, *self.more.shape[1:], generator=generator)
        timesteps = torch.linspace(0, 999 * (1 - DELAY), count).long()[torch.randperm(count, generator=generator)]
        between = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
        found = {"rows": rows, "noise": drawn, "timesteps": timesteps, "between": between}
        batch = {name: value.to(self.more.device) for name, value in found.items()}
        with torch.no_grad():
            errors = {name: self._error(batch, one) for name, one in (("left", 1.0), ("left_reversed", -1.0))}
        return {name: round(float(error), 4) for name, error in errors.items()}
