"""Trains the autoencoder of mini: pictures to latents of one eighth of their size, and back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from facegen.face.networks import AttributeJudge, DetectorNet, RecogniserNet
from facegen.face.warp import aligned_crops
from facegen.models.norms import quicken
from facegen.training.cache import Cache, shuffled
from facegen.training.critics import (
    Beholder,
    PixelCritic,
    Reaches,
    beholder_of,
    faces_seen,
    opinions,
    with_faces,
)
from facegen.training.loop import Objective
from facegen.training.objectives.reconstruction import feature_loss, reconstruction_loss
from facegen.world.shading import PARSING

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VAESettings:
    """Sizes of the autoencoder and of its training batches."""

    channels: tuple[int, ...] = (48, 32, 64, 96)  # widest where pixels are painted
    latent_channels: int = 8
    groups: int = 1  # more groups normalise a picture's overall colour away
    batch: int = 4
    crop: int = 128  # pixels; normalisation sees the whole crop, so parts alone would teach wrong colours
    kl: float = 2e-5
    color: float = 1.0
    face: float = 0.2  # weight of what the recogniser sees in the aligned face, where there is a recogniser
    decoder_batch: int = 8  # pictures, where a finished autoencoder goes on
    decoder_face: float = 0.5
    look: float = 2.0  # weight of what the teacher of attributes sees, where there is one
    facts: float = 0.6  # weight of how differently it tells what is shown
    crisp: float = 0.03  # weight of how painted a critic finds what is decoded, where there are painted latents, …
    crisp_painted: float = 0.015  # … and of these alone
    texture: float = 0.08  # weight of how painted the critic of pixels finds what is rebuilt, …
    texture_painted: float = 0.04  # … and what is decoded of painted latents
    held: float = 1.0  # weight of how far this goes, but for what is fine, from what the decoder made of them before
    whole: float = 0.25  # weight of how far what is decoded of them lies from where true pictures lie as a whole
    share: float = 0.85  # how far a decoder that goes on alone goes towards what it has learnt from its critic
    moved: float = 0.05  # weight of how far latents of a finished encoder move, where it goes on
    seed: int = 8


# How much more an error counts where it lies on or beside these: what prompts ask for and people are told apart by
# is a few pixels each. What is not named counts 1.
DETAILS: Mapping[str, float] = {
    "l_eye": 12.0, "r_eye": 12.0, "eye_g": 10.0, "ear_r": 10.0, "mouth": 7.0, "u_lip": 7.0, "l_lip": 7.0,
    "beard": 6.0, "l_brow": 5.0, "r_brow": 5.0, "nose": 3.0, "skin": 2.5, "l_ear": 1.5, "r_ear": 1.5,
}  # fmt: skip


def detail_weights(parsing: Tensor, reach: int = 2) -> Tensor:
    """Weights of the error at each pixel, (B, 1, H, W), 1 on average over each picture, from labels (B, H, W).

    reach: pixels around a region that count like it, for it is seen by its edge.
    """
    table = torch.tensor([DETAILS.get(name, 1.0) for name in PARSING], device=parsing.device)
    weights = F.max_pool2d(table[parsing.long()][:, None], 2 * reach + 1, 1, reach)
    return weights / weights.mean((1, 2, 3), keepdim=True)


def new_vae(settings: VAESettings) -> AutoencoderKL:
    """An untrained autoencoder; without attention in its middle, so that crops and whole pictures look alike to it."""
    count = len(settings.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=settings.latent_channels,
        block_out_channels=settings.channels,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        layers_per_block=1,
        norm_num_groups=settings.groups,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
    )


def divergence(posterior: Any) -> Tensor:
    """From the unit Gaussian, mean over all numbers of the latents (Kingma & Welling 2014, appendix B)."""
    mean, variance = posterior.mean.float(), posterior.var.float()
    return cast(Tensor, 0.5 * (mean.square() + variance - 1 - variance.log()).mean())


class VAEObjective(Objective):
    """Reconstruct crops through noisy latents, the latents kept near the unit Gaussian (Kingma & Welling 2014).

    A linear map from latents to the pooled picture must also exist (``color``): narrow nets with group
    normalisation lose the overall colour otherwise. With ``recogniser`` the face must also look the same to it: what
    tells people apart is a few pixels, which an error over the whole picture hardly weighs. Whole pictures only.
    """

    name = "vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        pictures: Cache,
        held_out: Cache | None,
        settings: VAESettings,
        recogniser: RecogniserNet | None = None,
    ) -> None:
        self.settings, self.vae = settings, vae
        self.rgb = pictures.whole("rgb")  # (N, H, W, 3) uint8
        self.points = pictures.whole("landmarks5").float()  # (N, 5, 2)
        self.recogniser = recogniser
        assert recogniser is None or settings.crop == self.rgb.shape[1]
        self.held_out = held_out
        self.factor = 2 ** (len(settings.channels) - 1)
        self.color = nn.Conv2d(settings.latent_channels, 3, 1)
        self.module = nn.ModuleDict({"vae": vae, "color": self.color})
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def helpers(self) -> Sequence[nn.Module]:
        return [] if self.recogniser is None else [self.recogniser]

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Crops (B, 3, crop, crop) uint8, some mirrored, and the face's points in them (B, 5, 2)."""

        def draw(high: int, count: int = 1) -> list[int]:
            return torch.randint(high, (count,), generator=generator).tolist()

        crop = self.settings.crop
        room = self.rgb.shape[1] - crop + 1
        parts, points = [], []
        for row in draw(len(self.rgb), self.settings.batch):
            # Two of three crops lie on the face: eyes, mouth and glasses are what must become crisp.
            y, x = (
                draw(room, 2) if draw(3)[0] == 0 else [min(room - 1, room // 4 + v) for v in draw(max(1, room // 2), 2)]
            )
            part, own = self.rgb[row, y : y + crop, x : x + crop], self.points[row] - torch.tensor([x, y])
            if draw(2)[0]:
                own = torch.stack([crop - 1 - own[:, 0], own[:, 1]], 1)[[1, 0, 2, 4, 3]]
                part = part.flip(1)
            parts.append(part)
            points.append(own)
        return {"pictures": torch.stack(parts).permute(0, 3, 1, 2), "points": torch.stack(points)}

    @staticmethod
    def images(batch: Mapping[str, Tensor]) -> Tensor:
        """A batch's pictures (B, 3, H, W) in [-1, 1]."""
        return (batch["pictures"].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        settings = self.settings
        images = self.images(batch)
        posterior = self.vae.encode(images).latent_dist
        found = self.vae.decode(posterior.sample(generator)).sample.float()
        rebuilt = reconstruction_loss(found, images)
        kl = divergence(posterior)
        color = F.mse_loss(self.color(posterior.mean).float(), F.avg_pool2d(images, self.factor))
        losses = {"rebuilt": rebuilt, "kl": kl, "color": color}
        loss = rebuilt + settings.kl * settings.latent_channels * kl + settings.color * color
        if self.recogniser is not None:
            losses["face"] = self.unlike(self.recogniser, found, images, batch["points"])
            loss = loss + settings.face * losses["face"]
        return {"loss": loss, **losses}

    @staticmethod
    def unlike(recogniser: RecogniserNet, found: Tensor, images: Tensor, points: Tensor) -> Tensor:
        """How differently the recogniser sees the faces at these points (B, 5, 2), in pictures found and wanted."""
        crops = aligned_crops(torch.cat([found, images]), points.repeat(2, 1, 1), recogniser.config["size"])
        return feature_loss(recogniser.seen(crops))

    def figures(self) -> dict[str, float]:
        """PSNR in dB over whole held-out pictures (mean of each picture's)."""
        if self.held_out is None:
            return {}
        total: list[Tensor] = []
        for rows in torch.arange(min(200, len(self.held_out))).split(20):
            images = self.held_out.rgb(rows)
            found = (self.vae.decode(self.vae.encode(images * 2 - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)
            total.append(-10 * (found - images).square().mean((1, 2, 3)).log10())
        return {"psnr": round(float(torch.cat(total).mean()), 2)}


class DecoderObjective(VAEObjective):
    """The decoder goes on alone, from latents that are kept: all that was learnt from them stays valid.

    What is small and matters weighs more than in the first lesson (:data:`DETAILS`). With ``teacher`` the rebuilt
    picture must also look the same, and show the same facts, to a net that has learnt to tell them (perceptual loss,
    Johnson et al. 2016): an error alone leaves a moustache half there. With ``painted``, latents (N, C, h, w) of the
    finished model's own pictures, two critics learn beside: one sees through the teacher, and faces (which the detector
    finds) through the recogniser, the other the pixels. What is decoded of them and of the kept latents must look true
    to both, and lie as a whole where true pictures do: what a model paints is never quite what the encoder would have
    said. But for what is fine it must stay as it was decoded before.
    """

    name = "decoder"
    parts: ClassVar[tuple[str, ...]] = ("decoder", "post_quant_conv")

    def __init__(
        self,
        vae: AutoencoderKL,
        pictures: Cache,
        held_out: Cache | None,
        settings: VAESettings,
        recogniser: RecogniserNet,
        latents: Tensor,
        teacher: AttributeJudge | None = None,
        painted: Tensor | None = None,
        detector: DetectorNet | None = None,
    ) -> None:
        super().__init__(vae, pictures, held_out, settings, recogniser)
        assert painted is None or (teacher is not None and detector is not None)
        self.teacher, self.painted, self.detector = teacher, painted, detector
        self.latents = latents  # (N, C, h, w)
        self.parsing = pictures.whole("parsing")  # (N, H, W) uint8
        self.module = nn.ModuleDict({name: vae.get_submodule(name) for name in self.parts})
        vae.requires_grad_(False)
        self.before = None if painted is None else copy.deepcopy(vae).eval()
        self.module.requires_grad_(True)
        quicken(self.module)
        if self.before is not None:
            quicken(self.before)
        # Strands, stubble and freckles are finer than what other nets' layers keep: pixels have a critic of their own.
        beholder = Beholder(()) if painted is None else beholder_of(teacher, recogniser)
        self.reach = Reaches(beholder.channels)
        self.critics = nn.ModuleDict({} if painted is None else {"layers": beholder, "pixels": PixelCritic()})
        self.module.update({"critics": self.critics, "reach": self.reach})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Muon moves the convolutions between blocks; what leads in and out, and all vectors, AdamW."""
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, weight in self.module.named_parameters():
            if not name.startswith("critics."):
                inside = weight.ndim > 1 and "_block" in name
                groups[inside].append(weight)
        own = [{"params": weights, "muon": inside} for inside, weights in groups.items()]
        critic = list(self.critics.parameters())
        return [*own, {"params": critic, "scale": 3.0}] if critic else own

    def helpers(self) -> Sequence[nn.Module]:
        some = (self.teacher, self.detector, self.before)
        return [self.vae, *super().helpers(), *(net for net in some if net is not None)]

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) uint8, the face's points (B, 5, 2), what each pixel shows (B, H, W), and latents."""
        rows = shuffled(len(self.rgb), self.settings.decoder_batch, step, self.settings.seed)
        kept = {"pictures": self.rgb, "points": self.points, "parsing": self.parsing, "latents": self.latents}
        batch = {name: whole[rows] for name, whole in kept.items()}
        batch["pictures"] = batch["pictures"].permute(0, 3, 1, 2)
        if self.painted is not None:
            batch["painted"] = self.painted[torch.randint(len(self.painted), (len(rows),), generator=generator)]
        return batch

    def loss(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        assert self.recogniser is not None
        images = self.images(batch)
        latents, said = self.seen(batch["latents"].float(), images, generator)
        found = cast(Any, self.vae).decode(latents).sample.float()
        rebuilt = reconstruction_loss(found, images, weights=detail_weights(batch["parsing"]))
        face = self.unlike(self.recogniser, found, images, batch["points"])
        loss = rebuilt + self.settings.decoder_face * face
        if self.teacher is not None:
            made = found[:0]
            if self.painted is not None:
                painted = batch["painted"].float()
                made = cast(Any, self.vae).decode(painted).sample.float()
                with torch.no_grad():
                    were = cast(Any, self.before).decode(painted).sample.float()
                # No error holds these, and a decoder scribbles to please: only what is fine is free.
                said["strayed"] = self.settings.held * F.l1_loss(F.avg_pool2d(made, 4), F.avg_pool2d(were, 4))
            said |= self.told(self.teacher, found, images, made, batch["points"])
        return {"loss": loss + sum(said.values()), "rebuilt": rebuilt, "face": face, **said}

    def told(
        self, teacher: AttributeJudge, found: Tensor, images: Tensor, made: Tensor, points: Tensor
    ) -> dict[str, Tensor]:
        """How differently the teacher sees pictures (B, 3, H, W) in [-1, 1] with faces at points (B, 5, 2), and what it
        tells of them, weighed.

        made: pictures (P, 3, H, W) that are not to be like any other, only as critic and reaches want them.
        """
        from facegen.evaluation.judges import resized, strongest

        every = torch.cat([found, images, made])
        layers = teacher.seen(resized(every))
        count = 2 * len(found)
        answers = teacher.facts_of(layers[-1][:count]).values()
        told = [one.log_softmax(1).chunk(2) for one in answers]
        unlike = [F.kl_div(a, b.detach(), reduction="batchmean", log_target=True) for a, b in told]
        settings = self.settings
        said = {
            "look": settings.look * feature_loss([one[:count] for one in layers]),
            "facts": settings.facts * torch.stack(unlike).mean(),
        }
        if len(made):
            assert self.recogniser is not None
            assert self.detector is not None
            with torch.no_grad():
                points = torch.cat([points, points, strongest(self.detector, (made / 2 + 0.5).clamp(0, 1))[0]])
            layers = with_faces(layers, faces_seen(self.recogniser, every / 2 + 0.5, points))
            parts = [len(found), len(found), len(made)]
            rebuilt, true, painted = ([one.split(parts)[part] for one in layers] for part in range(3))
            of_layers, crisp = opinions(
                self.critics["layers"], true, (rebuilt, painted), (settings.crisp, settings.crisp_painted)
            )
            of_pixels, texture = opinions(
                self.critics["pixels"], images, (found, made), (settings.texture, settings.texture_painted)
            )
            said |= {"critic": of_layers + of_pixels, "crisp": crisp, "texture": texture}
            wholes = [one.mean((2, 3)) for one in painted]
            self.reach.see("true", [one.mean((2, 3)) for one in true])
            self.reach.see("painted", wholes)
            said["astray"] = settings.whole * torch.stack([one.mean() for one in self.reach.astray(wholes)]).mean()
        return said

    def seen(self, latents: Tensor, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """What the decoder is given of pictures (B, 3, H, W) and their kept latents, and what else is to be paid."""
        return latents, {}


class AutoencoderObjective(DecoderObjective):
    """Encoder and decoder go on together; latents change, by no more than they gain."""

    name = "autoencoder"
    parts: ClassVar[tuple[str, ...]] = ("encoder", "quant_conv", "decoder", "post_quant_conv")

    def seen(self, latents: Tensor, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.settings
        posterior = cast(Any, self.vae).encode(images).latent_dist
        moved = F.mse_loss(posterior.mean.float(), latents)
        said = {"kl": settings.kl * settings.latent_channels * divergence(posterior), "moved": settings.moved * moved}
        return posterior.sample(generator), said


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Make each latent channel zero-mean and unit-variance over ``images`` (batches in [-1, 1]), in place.

    The scale and shift go into the 1 x 1 convolutions around the latents, so that pictures come out as before and
    the format needs nothing but ``scaling_factor`` 1. Returns what was folded in: mean and deviation, (C,) each.
    """
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in images])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    count = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant is not None
    assert post is not None
    quant.weight[:count] /= deviation[:, None, None, None]
    quant.bias[:count] = (quant.bias[:count] - mean) / deviation
    quant.bias[count:] -= 2 * deviation.log()
    post.bias += (post.weight[:, :, 0, 0] @ mean[:, None])[:, 0]
    post.weight *= deviation[None, :, None, None]
    return mean, deviation


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Cache, batch: int = 32) -> Tensor:
    """Latents of all pictures, (N, C, h, w) float16, wherever the autoencoder is."""
    from tqdm import tqdm

    found = []
    device = next(vae.parameters()).device
    for rows in tqdm(torch.arange(len(pictures)).split(batch), desc="latents", mininterval=20.0, leave=False):
        images = (pictures.rgb(rows) * 2 - 1).to(device, memory_format=torch.channels_last)
        found.append(vae.encode(images).latent_dist.mode().half().cpu())
    return torch.cat(found)


@torch.no_grad()
def encodes_so(vae: AutoencoderKL, pictures: Cache, latents: Tensor) -> bool:
    """Whether latents (N, C, h, w) are this autoencoder's of these pictures, up to half precision; tries two."""
    if len(latents) != len(pictures):
        return False
    rows = torch.tensor([0, len(pictures) - 1])
    found = vae.encode(pictures.rgb(rows) * 2 - 1).latent_dist.mode()
    return found.shape == latents[rows].shape and torch.allclose(found.float(), latents[rows].float(), atol=0.05)
