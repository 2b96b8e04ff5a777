"""Trains mini's text encoder and UNet together with its three identity adapters, from nothing.

Each batch teaches one way of saying who it is: the prompt alone or with Arc2Face's token (both in one batch, row by
row), IP-Adapter-FaceID's tokens, or InstantID's tokens with IdentityNet. InstantID comes in a run of its own beside
the finished base model, for its IdentityNet begins as a copy of the UNet that the first run has taught. The face that
conditions is always another picture of the same person, so that only what two pictures share (the identity) can be
carried over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.adapter import Adapter, AdapterRequest, halves
from facegen.adapters.arc2face import Arc2Face
from facegen.adapters.instantid import InstantID, draw
from facegen.adapters.ip_adapter_faceid import IPAdapterFaceID
from facegen.conditions import Condition, TextCondition
from facegen.files import write_json
from facegen.memory import MemoryPlan
from facegen.models.base import Model
from facegen.models.norms import quicken
from facegen.models.projections import FaceProjection, ProjectionSizes
from facegen.models.resampler import PerceiverSizes
from facegen.models.sd15 import SD15Model
from facegen.training.cache import Cache, shuffled
from facegen.training.objectives.denoising import DenoisingObjective, another, face_weights, noise_levels
from facegen.training.reader import LatentReader, asked, disobedience, person_means
from facegen.world.captions import caption
from facegen.world.facts import FACTS, labels

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    # With a last step of pure noise the model learns the overall colour too (Lin et al. 2024).
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,  # not read with this spacing; another value makes diffusers warn
}


# What a model obeys least, for captions seldom tell of it: of the facts that prompts ask for a thirtieth are colours of
# eyes, a hundredth are earrings. How often each is taught, against the others.
SELDOM: Mapping[tuple[str, str], float] = {
    ("earrings", "yes"): 3.0, ("eyes", "winking"): 3.0, ("eyes", "closed"): 1.0, ("eye_color", "hazel"): 2.0,
    ("eye_color", "green"): 2.0, ("eye_color", "blue"): 1.0, ("eye_color", "gray"): 2.0, ("looking", "ahead"): 3.0,
    ("looking", "left"): 0.5, ("looking", "right"): 0.5, ("tilt", "up"): 0.5, ("tilt", "down"): 0.5,
    ("hair_style", "side part"): 1.0, ("hair_style", "buzz cut"): 1.0, ("glasses", "round"): 1.0,
    ("skin", "light"): 1.0, ("skin", "dark"): 1.0, ("freckles", "yes"): 1.0, ("hat", "beanie"): 0.5,
    ("goatee", "yes"): 0.5, ("stubble", "yes"): 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class DiffusionSettings:
    """Sizes of UNet, text encoder and adapters, and what a batch is made of.

    ways: share of the batches that teach each way; faces: share of rows with a face in a "prompt" batch;
    no_prompt, no_face: share of rows whose prompt or face is left out, so that guidance has something to lean on.
    free: share of the prompts that are worded as people type them.
    seldom: share of the rows that show, and tell of, what few pictures or captions do (:data:`SELDOM`).
    """

    channels: tuple[int, ...] = (64, 128, 192)
    head_width: int = 32
    text_width: int = 192
    text_layers: int = 2
    queries: int = 8
    resampler_depth: int = 2
    rank: int = 8
    batch: int = 32
    ways: Mapping[str, float] = field(default_factory=lambda: {"prompt": 0.55, "ip_adapter_faceid": 0.45})
    base: bool = True  # whether UNet and text encoder learn; else the adapters of ``ways`` alone
    faces: float = 0.6
    no_prompt: float = 0.1
    no_face: float = 0.1
    no_points: float = 0.1
    free: float = 0.5
    seldom: float = 0.35
    steering: float = 2.0  # factor on the learning rate of what listens to prompts and faces
    likeness: float = 0.4  # weights of what the reader of latents says about the clean estimate: who …
    obedience: float = 0.3  # … and what it shows
    face: float = 4.0  # how much more an error inside the face weighs than one beside it
    small: float = 6.0  # and how much more still where there are eyes or earrings
    even: float = 0.25  # share of noise levels drawn evenly; the others are drawn around the middle
    seed: int = 7


def new_model(vae: nn.Module, tokenizer: Any, settings: DiffusionSettings, sample_size: int = 16) -> SD15Model:
    """An untrained model of Stable Diffusion's topology around a trained autoencoder."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    count = len(settings.channels)
    latent_channels = cast(Any, vae).config.latent_channels
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=settings.channels,
        layers_per_block=1,
        down_block_types=(*("CrossAttnDownBlock2D",) * (count - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (count - 1)),
        cross_attention_dim=settings.text_width,
        # diffusers calls the number of heads so.
        attention_head_dim=tuple(width // settings.head_width for width in settings.channels),
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.text_width,
            intermediate_size=4 * settings.text_width,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=settings.text_width // 64,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet.to(memory_format=torch.channels_last)
    plan = MemoryPlan(torch.device("cpu"))
    return SD15Model(unet, cast(Any, vae), text_encoder, tokenizer, SCHEDULER, memory=plan)


def new_adapters(model: Model, embedding_dim: int, settings: DiffusionSettings) -> dict[str, Adapter]:
    """The adapters that ``settings.ways`` needs, untrained. Arc2Face's encoder is the model's own text encoder."""
    width = settings.text_width
    adapters: dict[str, Adapter] = {
        "arc2face": Arc2Face.fresh(model, embedding_dim, encoder=model.text_encoder),
    }
    if "ip_adapter_faceid" in settings.ways:
        projector = FaceProjection(ProjectionSizes(embedding_dim, 2 * width, 4, width))
        own = IPAdapterFaceID.fresh(model, embedding_dim, projector=projector, rank=settings.rank)
        adapters["ip_adapter_faceid"] = own
    if "instantid" in settings.ways:
        sizes = PerceiverSizes(embedding_dim, width, width, depth=settings.resampler_depth, heads=width // 64)
        adapters["instantid"] = InstantID.fresh(model, embedding_dim, sizes=sizes, queries=settings.queries)
    return adapters


@dataclass(frozen=True, eq=False)
class Lessons:
    """What is learnt from, in memory: latents (N, C, h, w) and embeddings (N, D) of the pictures of a cache."""

    pictures: Cache
    latents: Tensor
    embeddings: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one way: clean latents, prompts, RAW embeddings (zero: no face), and drawn keypoints for InstantID."""

    way: str
    latents: Tensor
    prompts: list[str]
    embeddings: Tensor
    control: Tensor | None
    who: Tensor  # unit vectors (B, D) of the people in the latents; zero where no face conditions
    wanted: Tensor  # what the prompts leave open, as in facegen.training.reader.asked
    weights: Tensor  # of the error at each place, (B, h, w), 1 on average
    given: Tensor | None = None  # as control, of the pictures that condition: what InstantID gets where nobody poses


class DiffusionObjective(DenoisingObjective):
    """Predict the velocity of noisy latents under prompts and faces.

    With ``reader`` the clean estimate must also show whom and what it was asked for, the more the less noise there is.
    """

    name = "diffusion"

    def __init__(
        self,
        model: Model,
        adapters: Mapping[str, Adapter],
        lessons: Lessons,
        settings: DiffusionSettings,
        held_out: Lessons | None = None,
        reader: LatentReader | None = None,
    ) -> None:
        super().__init__(model, lessons, held_out, SCHEDULER)
        self.adapters, self.settings, self.reader = adapters, settings, reader
        self.steering = settings.steering
        base = {"unet": model.unet, "text_encoder": model.text_encoder}
        own = {name: adapter.modules() for name, adapter in adapters.items() if name in settings.ways}
        self.module = nn.ModuleDict({**base, **own} if settings.base else own)
        for part in base.values():
            part.requires_grad_(settings.base)
        self._scenes = {id(one): one.pictures.scenes(torch.arange(len(one.pictures))) for one in self._all()}
        self._points = {id(one): one.pictures.whole("landmarks5").float() for one in self._all()}
        self._people = {id(one): person_means(one) for one in self._all()}
        shown = labels(self._scenes[id(lessons)])
        pools = {(kind, value): (shown[kind] == FACTS[kind].index(value)).nonzero()[:, 0] for kind, value in SELDOM}
        self._seldom = {fact: rows for fact, rows in pools.items() if len(rows)}
        for part in (*base.values(), *own.values()):
            quicken(part)

    def _all(self) -> list[Lessons]:
        return [self.lessons] if self.held_out is None else [self.lessons, self.held_out]

    def helpers(self) -> Sequence[nn.Module]:
        nets: list[nn.Module] = [adapter.modules() for adapter in self.adapters.values()]
        return nets if self.reader is None else [*nets, self.reader]

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        settings = self.settings
        ways = list(settings.ways)
        weights = torch.tensor([settings.ways[way] for way in ways])
        way = ways[int(torch.multinomial(weights, 1, generator=generator))]
        rows = shuffled(len(self.lessons.pictures), settings.batch, step, settings.seed)
        rows, told = self._with_seldom(rows, generator)
        return self._gather(self.lessons, rows, way, generator, told)

    def _with_seldom(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, list[str | None]]:
        """Some of the rows (B,) exchanged for ones that show what is seldom told, and which kind that is."""
        rows, told = rows.clone(), list[str | None]([None] * len(rows))
        facts, chances = list(self._seldom), torch.tensor([SELDOM[fact] for fact in self._seldom])
        chosen = torch.rand(len(rows), generator=generator) < self.settings.seldom
        for place in chosen.nonzero()[:, 0].tolist() if facts else []:
            fact = facts[int(torch.multinomial(chances, 1, generator=generator))]
            pool = self._seldom[fact]
            rows[place] = pool[int(torch.randint(len(pool), (1,), generator=generator))]
            told[place] = "hair" if fact[0] == "hair_style" else fact[0]
        return rows, told

    def _gather(
        self,
        lessons: Lessons,
        rows: Tensor,
        way: str,
        generator: torch.Generator,
        told: Sequence[str | None] | None = None,
    ) -> Batch:
        settings, count = self.settings, len(rows)
        roll = torch.rand(4, count, generator=generator)
        with_face = roll[0] < (settings.faces if way == "prompt" else 1 - settings.no_face)
        scenes = self._scenes[id(lessons)][rows]
        free = settings.free
        plain = caption(scenes, generator, free=free, told=told)
        named = caption(scenes, generator, subject="id person", free=free, told=told) if way == "prompt" else plain
        prompts = [
            "" if drop and not (face and way == "prompt") else (b if face else a)
            for a, b, face, drop in zip(
                plain, named, with_face.tolist(), (roll[1] < settings.no_prompt).tolist(), strict=True
            )
        ]
        others = another(lessons, rows, roll[2])
        embeddings = lessons.embeddings[others] * with_face[:, None]
        control = given = None
        if way == "instantid":
            kept = roll[3] >= settings.no_points
            control, given = (self._control(lessons, one, kept) for one in (rows, others))
        who = self._people[id(lessons)][rows] * with_face[:, None]
        return Batch(
            way,
            lessons.latents[rows].float(),
            prompts,
            embeddings,
            control,
            who,
            asked(prompts),
            face_weights(lessons, rows, settings.face, settings.small),
            given,
        )

    def _control(self, lessons: Lessons, rows: Tensor, kept: Tensor) -> Tensor:
        """Drawn keypoints (B, 3, H, W) in [0, 1]; black where they are left out."""
        size = lessons.pictures.field("rgb", rows[:1]).shape[1]
        points = self._points[id(lessons)][rows].numpy()
        drawn = torch.stack([torch.from_numpy(draw(one, (size, size))) for one in points])
        return drawn.permute(0, 3, 1, 2).float() / 255 * kept[:, None, None, None]

    def conditions(self, batch: Batch) -> list[Condition]:
        """The same conditions that a picture is made under, adapters at the strength that they have by default."""
        request = AdapterRequest(prompt=batch.prompts, guidance=False, control=batch.control)
        if batch.way == "prompt":
            return self.adapters["arc2face"].conditions_from_embeddings(batch.embeddings, self.model, request)
        embeds = self.model.text_encoder(self.model.tokenize(batch.prompts)).last_hidden_state
        adapter = self.adapters[batch.way]
        return [
            TextCondition(embeds=halves(embeds, False)),
            *adapter.conditions_from_embeddings(batch.embeddings, self.model, request),
        ]

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        timesteps = noise_levels(len(batch.latents), generator, self.settings.even)
        noise = torch.randn(batch.latents.shape, generator=generator, device=generator.device)
        return self._loss(batch, noise, timesteps)

    def _loss(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        found, noisy = self.predicted(lambda: self.conditions(batch), batch.latents, noise, timesteps)
        error = (batch.weights * self.velocity.errors(found, batch.latents, noise, timesteps)).mean()
        losses = {"loss": error, f"loss_{batch.way}": error}
        if self.reader is not None:
            settings = self.settings
            clean, certain = self.velocity.clean(found, noisy, timesteps)
            who, what = self.reader(clean.contiguous(memory_format=torch.channels_last))
            faces = (batch.who != 0).any(1)
            unlike = (certain * (1 - F.cosine_similarity(who, batch.who)) * faces).sum() / faces.sum().clamp_min(1)
            amiss = (certain * disobedience(what, batch.wanted)).mean()
            losses["loss"] = error + settings.likeness * unlike + settings.obedience * amiss
            losses |= {f"unlike_{batch.way}": unlike, "amiss": amiss}
        return losses

    def figures(self) -> dict[str, float]:
        """The velocity's mean squared error on held-out people, each way, at evenly spread noise."""
        if self.held_out is None:
            return {}
        found = {}
        rows = torch.arange(min(256, len(self.held_out.pictures)))
        for way in self.settings.ways:
            generator = torch.Generator().manual_seed(11)
            total = []
            for part in rows.split(32):
                batch = self._gather(self.held_out, part, way, generator)
                timesteps = torch.linspace(0, 999, len(part)).long()
                noise = torch.randn(batch.latents.shape, generator=generator)
                total.append(self._loss(batch, noise, timesteps)[f"loss_{way}"])
            found[f"held_out_loss_{way}"] = round(float(torch.stack(total).mean()), 4)
        return found


@torch.no_grad()
def lend_words(model: Model, words: Mapping[str, str]) -> None:
    """Give words that were never taught the token embedding of a word of the same meaning.

    words: the usual word for each (``wordings.synonyms``). Those that are no single token are passed over.
    """
    table = model.text_encoder.get_input_embeddings().weight
    for word, usual in words.items():
        (own, other) = (model.tokenizer(one, add_special_tokens=False).input_ids for one in (word, usual))
        if len(own) == len(other) == 1:
            table[own[0]] = table[other[0]]


@torch.no_grad()
def save_base(model: Model, folder: Path) -> None:
    """The base model as a diffusers folder in float16, files of at most 15 MB, that plain diffusers loads."""
    import copy

    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(model.vae).half().to(memory_format=torch.contiguous_format),
        text_encoder=copy.deepcopy(model.text_encoder).half(),
        tokenizer=cast(Any, model.tokenizer),
        unet=_plain(model).half().to(memory_format=torch.contiguous_format),
        scheduler=cast(Any, DDIMScheduler.from_config(SCHEDULER)),
        safety_checker=cast(Any, None),
        feature_extractor=cast(Any, None),
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, max_shard_size="15MB")
    for path in folder.glob("*/config.json"):
        _forget_origin(path)


@torch.no_grad()
def save_vae(vae: Any, folder: Path) -> None:
    """The autoencoder as `save_base` writes it."""
    import copy

    copy.deepcopy(vae).half().to(memory_format=torch.contiguous_format).save_pretrained(folder)
    _forget_origin(folder / "config.json")


def _forget_origin(path: Path) -> None:
    """Where its parts were loaded from is nobody's business."""
    config = json.loads(path.read_text("utf-8"))
    write_json(path, {name: value for name, value in config.items() if name != "_name_or_path"})


def _plain(model: Model) -> Any:
    """A copy of the UNet with diffusers' own attention processors."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(model.unet.config)
    unet.load_state_dict(model.unet.state_dict())
    return unet
