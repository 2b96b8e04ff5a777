"""Distils guidance and few steps into a LoRA: the finished base model then paints in four steps, one half each.

Guidance asks a model twice in each step, with the prompt and the face and without. The student learns to say at once
what comes of both (Meng et al., arXiv 2210.03142), at the places where a walk of few steps comes by. Its target is
the frozen teacher's answer at the same place, never its own, so that nothing can drift or collapse, as it can where a
student foresees what it foresaw a little later (latent consistency, arXiv 2310.04378). The adapters take part, each in
its share of the batches, so that the LoRA serves them all. The file is written as the published LCM-LoRAs are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.conditions import Condition, LoraCondition, LowRankWeights
from facegen.models.norms import quicken
from facegen.training.loop import Budget, LoopSettings, Objective, run
from facegen.training.reader import disobedience
from facegen.training.record import record
from facegen.training.walks import LEVELS, Velocity, guided, plain, rows_of, unasked, walk

if TYPE_CHECKING:
    from facegen.models.base import Model
    from facegen.training.diffusion import Batch, DiffusionObjective
    from facegen.training.mini import Workshop

STEPS = 1000
SETTINGS = LoopSettings(learning_rate=1e-3, warmup=30, weight_decay=0.0, average=0.99, bfloat16=True, seed=14)
FILE = Path("loras") / "few.safetensors"
# The layers that the published LCM-LoRAs change.
_CHANGED = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass(frozen=True)
class DistilSettings:
    """guidance: the teacher's, which the student learns to do without; walks: how many steps a walk may have.

    rank: what is learnt; kept: what is written, the nearest of that rank, half as large.
    batch: the places of all walks of a training step; each divides by every number of steps.
    drawn: share of the training steps whose walks begin at a noised picture, as image-to-image does, not at noise;
    fresh: share whose walks take new noise between their steps, as the scheduler "lcm" does.
    ways: share of the batches that each way of saying who it is takes.
    likeness, obedience: weights of what the reader of latents says about the clean estimate.
    """

    rank: int = 16
    kept: int = 8
    batch: int = 24
    guidance: float = 3.0
    walks: tuple[int, ...] = (3, 4, 4, 6)
    drawn: float = 0.2
    fresh: float = 0.3
    ways: Mapping[str, float] = field(
        default_factory=lambda: {"prompt": 0.35, "ip_adapter_faceid": 0.3, "instantid": 0.35}
    )
    likeness: float = 0.05
    obedience: float = 0.05
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

    def tensors(self, rank: int | None = None) -> dict[str, Tensor]:
        """Under the names of the published files, in half precision; of a lower rank if so asked."""
        found: dict[str, Tensor] = {}
        kept = self.rank if rank is None else min(rank, self.rank)
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            key = "lora_unet_" + name.replace(".", "_")
            if kept < self.rank:
                down, up = nearest(down.detach(), up.detach(), kept)
            found[f"{key}.lora_down.weight"] = down.detach().half()
            found[f"{key}.lora_up.weight"] = up.detach().half()
            found[f"{key}.alpha"] = torch.tensor(float(kept))
        return found


def nearest(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product (out, r, …) x (r, in, …) as nearly as a lower rank allows (Eckart & Young 1936), each part as large.

    The rank is at most that of `down`. Scale stays 1: an alpha that equals the rank.
    """
    # Of the wide product U S Vᵀ only the small middle is decomposed.
    q, r = torch.linalg.qr(up.flatten(1))  # (out, k), (k, r)
    u, size, v = torch.linalg.svd(r @ down.flatten(1), full_matrices=False)
    root = size[:rank].sqrt()
    new_up = (q @ u[:, :rank]) * root
    new_down = root[:, None] * v[:rank]
    return new_down.view(rank, *down.shape[1:]), new_up.view(up.shape[0], rank, *up.shape[2:])


class DistilObjective(Objective):
    """The student says by itself what the guided teacher says, at the places of a short walk; only the LoRA learns."""

    name = "distil"
    model: Model

    def __init__(self, teaching: DiffusionObjective, settings: DistilSettings = DistilSettings()) -> None:
        self.model, self.teaching, self.settings = teaching.model, teaching, settings
        self.velocity = teaching.velocity
        teaching.module.requires_grad_(False).eval()
        self.model.unet.requires_grad_(False).eval()
        quicken(self.model.unet)
        generator = torch.Generator().manual_seed(settings.seed)
        self.module = LowRankSet(self.model.unet, settings.rank, generator)

    def helpers(self) -> Sequence[nn.Module]:
        return self.teaching.helpers()

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        return self.teaching.batch(step, generator)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        settings = self.settings
        roll = torch.rand(3, generator=generator, device=generator.device).tolist()
        count = settings.walks[int(roll[0] * len(settings.walks))]
        few = rows_of(batch, torch.arange(len(batch.latents) // count))
        begin = LEVELS if roll[1] >= settings.drawn else int(LEVELS * (0.3 + 0.7 * roll[1] / settings.drawn))
        noise = torch.randn(few.latents.shape, generator=generator, device=generator.device)
        first = self.velocity.noisy(few.latents, noise, torch.full((len(noise),), begin - 1, device=noise.device))
        with torch.no_grad():
            anew = generator if roll[2] < settings.fresh else None
            places, _ = walk(self.taught(few), self.velocity, first, begin, count, anew)
        rows = torch.arange(len(noise)).repeat(count)
        noisy, steps, target = (
            torch.cat([getattr(place, name) for place in places]) for name in ("noisy", "steps", "found")
        )
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        all_rows = rows_of(few, rows)
        found = self.student(self.teaching.conditions(all_rows))(noisy, steps)
        gap = (all_rows.weights * (found - target).square().mean(1)).mean()
        losses = {"loss": gap, "gap": gap.detach(), f"gap_{batch.way}": gap.detach()}
        if self.teaching.reader is not None:
            unlike, amiss = self._read(all_rows, *self.velocity.clean(found, noisy, steps))
            losses["loss"] = gap + settings.likeness * unlike + settings.obedience * amiss
            losses |= {"unlike": unlike.detach(), "amiss": amiss.detach()}
        return losses

    def student(self, asked: Sequence[Condition]) -> Velocity:
        """What the model with the LoRA says, without guidance."""
        lora = LoraCondition(layers=self.module.layers())  # type: ignore[operator]
        return plain(self.model, [*asked, lora])

    def taught(self, batch: Batch) -> Velocity:
        """What the model says by itself with guidance."""
        with_all = plain(self.model, self.teaching.conditions(batch))
        return guided(with_all, unasked(self.teaching, batch), self.settings.guidance)

    def _read(self, batch: Batch, clean: Tensor, certain: Tensor) -> tuple[Tensor, Tensor]:
        """How unlike the person asked for, and how far from the prompt, clean latents are; the certain ones count."""
        assert self.teaching.reader is not None
        who, what = self.teaching.reader(clean.contiguous(memory_format=torch.channels_last))
        faces = (batch.who != 0).any(1)
        unlike = (certain * (1 - F.cosine_similarity(who, batch.who)) * faces).sum() / faces.sum().clamp_min(1)
        return unlike, (certain * disobedience(what, batch.wanted)).mean()

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Held-out people in four steps: how far the student ends from the guided teacher, and the plain model does.

        Mean squared distance of the latents, which have unit variance; with a reader also how unlike and how
        disobedient (lower is better) the ends are by its reading: of the student, the plain model and the teacher.
        """
        held_out = self.teaching.held_out
        if held_out is None:
            return {}
        rows = torch.arange(0, len(held_out.pictures), max(1, len(held_out.pictures) // 64))
        generator = torch.Generator().manual_seed(15)
        way = list(self.settings.ways)[-1]
        batch = self.teaching._gather(held_out, rows, way, generator)
        asked = self.teaching.conditions(batch)
        noise = torch.randn(batch.latents.shape, generator=generator)
        sides = {"with": self.student(asked), "without": plain(self.model, asked), "teacher": self.taught(batch)}
        ends = {name: walk(side, self.velocity, noise, LEVELS, 4)[1] for name, side in sides.items()}
        found = {
            f"held_out_{name}": float((end - ends["teacher"]).square().mean())
            for name, end in ends.items()
            if name != "teacher"
        }
        if self.teaching.reader is not None:
            for name, end in ends.items():
                unlike, amiss = self._read(batch, end, torch.ones(len(end)))
                found |= {f"unlike_{name}": float(unlike), f"amiss_{name}": float(amiss)}
        return {name: round(value, 4) for name, value in found.items()}


def train_distil(shop: Workshop) -> None:
    """The LoRA beside the finished model in the output folder; written to loras/few.safetensors there."""
    from facegen.adapter import Adapter, load_adapter
    from facegen.training.checkpoint import save_tensors
    from facegen.training.diffusion import DiffusionObjective, DiffusionSettings
    from facegen.training.mini import finished_reader, opened

    settings = DistilSettings()
    model, lessons, held_out = opened(shop)
    folder = shop.output / "adapters"
    adapters: dict[str, Adapter] = {
        name: load_adapter(folder / name, model) for name in ("arc2face", "ip_adapter_faceid", "instantid")
    }
    asked = DiffusionSettings(ways=settings.ways, batch=settings.batch, base=False, seed=settings.seed)
    reader = finished_reader(shop, lessons)
    objective = DistilObjective(DiffusionObjective(model, adapters, lessons, asked, held_out, reader), settings)
    measured: dict[str, Any] = run(
        objective, shop.work / "distil", Budget(max(1, round(STEPS * shop.budget))), SETTINGS
    )
    lora: Any = objective.module
    path = shop.output / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(lora.tensors(settings.kept), path, {"kind": "few steps", "steps": "4", "guidance": "1.0"})
    record("distil", measured, shop.output / "mini.json")
