"""Distils the finished base model into a LoRA that paints in four steps without guidance.

Latent consistency distillation (Luo et al., arXiv 2310.04378) into low-rank weights (LCM-LoRA, arXiv 2311.05556): at
neighbouring points of the teacher's path, which is guided, the student must foresee the same end. The adapters take
part, each in its share of the batches, so that the LoRA serves them all. The file is written as the published LCM-LoRAs
are, and works with the scheduler "lcm".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from facegen.attention.backends import for_training
from facegen.conditions import Condition, LoraCondition, LowRankWeights
from facegen.models.norms import quicken
from facegen.training.loop import Budget, LoopSettings, Objective, run
from facegen.training.record import record

if TYPE_CHECKING:
    from facegen.training.diffusion import Batch, DiffusionObjective
    from facegen.training.mini import Workshop

STEPS = 1000
SETTINGS = LoopSettings(learning_rate=5e-4, warmup=50, weight_decay=0.0, average=0.99, bfloat16=True, seed=14)
FILE = Path("loras") / "lcm.safetensors"
# The layers that the published LCM-LoRAs change.
_CHANGED = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass(frozen=True)
class DistilSettings:
    """guidance: the teacher's, which the student learns to do without; grid: levels of noise at which it learns.

    stride: how many of these levels the teacher goes at once. Published distillations take one of fifty; what is known
    at the end of the path then reaches its begin only after very many steps, which a short run does not have.
    ways: share of the batches that each way of saying who it is takes; huber: where the loss turns from square to
    linear, as published; sigma, scaling: of the boundary condition, as in diffusers' LCMScheduler.
    """

    rank: int = 16
    batch: int = 24
    guidance: float = 3.0
    grid: int = 50
    stride: int = 5
    ways: Mapping[str, float] = field(
        default_factory=lambda: {"prompt": 0.4, "ip_adapter_faceid": 0.35, "instantid": 0.25}
    )
    huber: float = 1e-3
    sigma: float = 0.5
    scaling: float = 10.0
    seed: int = 14


class LowRankSet(nn.Module):
    """Trainable low-rank weights at each layer of a UNet that LCM-LoRAs change; at first they change nothing."""

    def __init__(self, unet: nn.Module, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.rank = rank
        self.names = tuple(
            name
            for name, part in unet.named_modules()
            if name.endswith(_CHANGED) and isinstance(part, (nn.Linear, nn.Conv2d))
        )
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name in self.names:
            weight = unet.get_submodule(name).get_parameter("weight")
            shape = (rank, *weight.shape[1:])
            down = torch.randn(shape, generator=generator) * weight[0].numel() ** -0.5
            self.down.append(nn.Parameter(down))
            self.up.append(nn.Parameter(torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2))))

    def layers(self) -> dict[str, LowRankWeights]:
        """What a LoraCondition wears; gradients reach the parameters through it."""
        return {name: LowRankWeights(*pair) for name, *pair in zip(self.names, self.down, self.up, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """Under the names of the published files, in half precision."""
        found: dict[str, Tensor] = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            key = "lora_unet_" + name.replace(".", "_")
            found[f"{key}.lora_down.weight"] = down.detach().half()
            found[f"{key}.lora_up.weight"] = up.detach().half()
            found[f"{key}.alpha"] = torch.tensor(float(self.rank))
        return found


class DistilObjective(Objective):
    """The student's end of the path must be the same from two neighbouring points of it; only the LoRA learns."""

    name = "distil"

    def __init__(self, teaching: DiffusionObjective, settings: DistilSettings = DistilSettings()) -> None:
        self.model, self.teaching, self.settings = teaching.model, teaching, settings
        self.velocity = teaching.velocity
        teaching.module.requires_grad_(False).eval()
        self.model.unet.requires_grad_(False).eval()
        quicken(self.model.unet)
        generator = torch.Generator().manual_seed(settings.seed)
        self.module = LowRankSet(self.model.unet, settings.rank, generator)

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        return self.teaching.batch(step, generator)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        settings = self.settings
        every = 1000 // settings.grid
        place = torch.randint(settings.grid, (len(batch.latents),), generator=generator, device=generator.device)
        later = (place + 1) * every - 1  # LCMScheduler's own grid
        earlier = (later - every * settings.stride).clamp(min=0)
        noise = torch.randn(batch.latents.shape, generator=generator, device=generator.device)
        noisy = self.velocity.noisy(batch.latents, noise, later).contiguous(memory_format=torch.channels_last)
        asked = self.teaching.conditions(batch)
        with torch.no_grad():
            before = self._taught(batch, asked, noisy, later, earlier)
            target = self.foreseen(asked, before, earlier)
        gap = self.foreseen(asked, noisy, later) - target
        huber = (gap.square() + settings.huber**2).sqrt() - settings.huber
        return {"loss": huber.mean(), "gap": gap.detach().square().mean()}

    def foreseen(self, asked: Sequence[Condition], noisy: Tensor, steps: Tensor) -> Tensor:
        """The student's clean latents (B, C, h, w) from noisy ones at timesteps (B,)."""
        lora = LoraCondition(layers=self.module.layers())  # type: ignore[operator]
        clean = self.velocity.clean(self._predicted([*asked, lora], noisy, steps), noisy, steps)[0]
        # At no noise at all the end is where it stands; one step earlier this is nearly the clean estimate alone.
        scaled = (steps * self.settings.scaling).to(noisy).view(-1, 1, 1, 1)
        total = scaled.square() + self.settings.sigma**2
        return self.settings.sigma**2 / total * noisy + scaled / total.sqrt() * clean

    def _taught(
        self, batch: Batch, asked: Sequence[Condition], noisy: Tensor, later: Tensor, earlier: Tensor
    ) -> Tensor:
        """The latents one step earlier on the guided teacher's path (DDIM)."""
        blank = replace(batch, prompts=[""] * len(batch.prompts), embeddings=torch.zeros_like(batch.embeddings))
        cond = self._predicted(asked, noisy, later)
        uncond = self._predicted(self.teaching.conditions(blank), noisy, later)
        guided = uncond + self.settings.guidance * (cond - uncond)
        clean = self.velocity.clean(guided, noisy, later)[0]
        signal, rest = self.velocity.levels(later, noisy)
        noise = rest * noisy + signal * guided
        return self.velocity.noisy(clean, noise, earlier).contiguous(memory_format=torch.channels_last)

    def _predicted(self, conditions: Sequence[Condition], noisy: Tensor, steps: Tensor) -> Tensor:
        backend = for_training(noisy.device)
        with self.model.prepare(conditions, len(noisy), guidance=False, backend=backend) as prepared:
            return self.model.predict(noisy, steps, prepared.throughout()).float()

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Held-out people: how far from the end of the teacher's guided path the student ends, from places along it.

        Mean squared distance of the latents, which have unit variance, with the LoRA and without it.
        """
        held_out = self.teaching.held_out
        if held_out is None:
            return {}
        rows = torch.arange(min(16, len(held_out.pictures)))
        generator = torch.Generator().manual_seed(15)
        batch = self.teaching._gather(held_out, rows, "ip_adapter_faceid", generator)
        asked = self.teaching.conditions(batch)
        path = list(self._path(batch, asked, torch.randn(batch.latents.shape, generator=generator)))
        end = path[-1][0]
        found = {"with": 0.0, "without": 0.0}
        for x, steps in path[:-1:2]:
            plain = self.velocity.clean(self._predicted(asked, x, steps), x, steps)[0]
            for name, guess in (("with", self.foreseen(asked, x, steps)), ("without", plain)):
                found[name] += float((guess - end).square().mean()) / len(path[:-1:2])
        return {f"held_out_{name}": round(value, 4) for name, value in found.items()}

    def _path(self, batch: Batch, asked: Sequence[Condition], noise: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The teacher's latents and their timesteps (B,), from noise to the end, where there is no noise."""
        every = 1000 // self.settings.grid
        x, steps = noise, torch.full((len(noise),), 999)
        while int(steps[0]) > 0:
            yield x, steps
            earlier = (steps - every * self.settings.stride).clamp(min=0)
            x, steps = self._taught(batch, asked, x, steps, earlier), earlier
        yield x, steps


def train_distil(shop: Workshop) -> None:
    """The LoRA beside the finished model in the output folder; written to loras/lcm.safetensors there."""
    from facegen.adapter import Adapter, load_adapter
    from facegen.models.base import Model
    from facegen.training.checkpoint import save_tensors
    from facegen.training.diffusion import DiffusionObjective, DiffusionSettings
    from facegen.training.mini import learn_from

    settings = DistilSettings()
    model = Model.from_pretrained(shop.output, dtype=torch.float32, device="cpu")
    folder = shop.output / "adapters"
    adapters: dict[str, Adapter] = {
        name: load_adapter(folder / name, model) for name in ("arc2face", "ip_adapter_faceid", "instantid")
    }
    lessons, held_out = (learn_from(shop, place, model.vae) for place in (shop.pictures, shop.held_out))
    asked = DiffusionSettings(ways=settings.ways, batch=settings.batch, base=False, seed=settings.seed)
    objective = DistilObjective(DiffusionObjective(model, adapters, lessons, asked, held_out), settings)
    measured: dict[str, Any] = run(
        objective, shop.work / "distil", Budget(max(1, round(STEPS * shop.budget))), SETTINGS
    )
    lora: Any = objective.module
    path = shop.output / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(lora.tensors(), path, {"kind": "lcm", "steps": "4", "guidance": "1.0"})
    record("distil", measured, shop.output / "mini.json")
