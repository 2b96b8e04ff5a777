"""Makes the embedded model from nothing, stage by stage: ``facegen train mini``.

Each stage reads what earlier ones left in the work folder, goes on from its own checkpoint, and does nothing when it
is done. What was measured goes into ``mini.json`` beside the weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from facegen.errors import WeightsMissing, WrongRequest
from facegen.training.cache import Cache, CachePlan, fill_cache
from facegen.training.controls import STAGES as CONTROLS
from facegen.training.loop import STATE, Budget, LoopSettings, Objective, run, training_device, use_device, wear_average
from facegen.training.record import MINI, record
from facegen.world.sampling import HELD_OUT_FROM

if TYPE_CHECKING:
    from facegen.adapter import Adapter
    from facegen.adapters.arc2face import Arc2Face
    from facegen.adapters.instantid import InstantID
    from facegen.adapters.ip_adapter_faceid import IPAdapterFaceID
    from facegen.face.networks import AttributeJudge, DetectorNet, RecogniserNet
    from facegen.models.base import Model
    from facegen.models.sd15 import SD15Model
    from facegen.training.diffusion import DiffusionObjective, DiffusionSettings, Lessons
    from facegen.training.reader import LatentReader

logger = logging.getLogger(__name__)

# The full recipe: pictures to learn from, and steps of each stage, about what the shipped model has had.
PEOPLE, PICTURES, HELD_OUT_PEOPLE, HELD_OUT_PICTURES = 4800, 8, 200, 6
STEPS: Mapping[str, int] = {
    "recogniser": 4000,
    "judge": 4000,
    "attributes": 12000,
    "parsing": 9000,
    "detector": 2500,
    "points": 1500,
    "points68": 1000,
    "vae": 12000,
    "decoder": 7600,
    "autoencoder": 12000,
    "teacher": 6800,
    "reader": 6600,
    "words": 1600,
    "diffusion": 29600,
    "critic": 600,
    "reward": 8000,
    "tokens": 1400,
    "instantid": 4700,
    "instantid reward": 1400,
}

PAINTED = 1600  # pictures of the model's own that critics and the decoder learn from

PERCEPTION = ("recogniser", "judge", "attributes", "parsing", "detector", "points")
VAE_SETTINGS = LoopSettings(
    learning_rate=1.5e-3, warmup=100, weight_decay=1e-4, average=0.998, bfloat16=True, seed=8
)  # fmt: skip
READER_SETTINGS = LoopSettings(learning_rate=2e-3, weight_decay=0.05, bfloat16=True, seed=9)
WORDS_SETTINGS = LoopSettings(learning_rate=1e-3, weight_decay=0.01, bfloat16=True, seed=10)
DIFFUSION_SETTINGS = LoopSettings(
    learning_rate=8e-4, warmup=150, weight_decay=0.01, average=0.998, bfloat16=True, seed=7
)
TOKENS_SETTINGS = LoopSettings(
    learning_rate=1.5e-3, warmup=100, weight_decay=1e-3, final_rate=0.02, average=0.99, seed=12
)
CRITIC_SETTINGS = LoopSettings(learning_rate=1e-3, warmup=20, final_rate=0.2, average=0.99, seed=40)
REWARD_SETTINGS = replace(DIFFUSION_SETTINGS, learning_rate=3e-4, warmup=40, average=0.99, seed=41)


@dataclass(frozen=True)
class Workshop:
    """Where the work is kept, where the finished model goes, and what share of the full recipe is done."""

    work: Path
    output: Path = MINI
    budget: float = 1.0
    seed: int = 0
    device: str | None = None
    start: Path | None = None  # a finished model to begin the diffusion with, and whose autoencoder to use

    @property
    def pictures(self) -> Path:
        return self.work / "pictures"

    @property
    def held_out(self) -> Path:
        return self.work / "held_out"

    def steps(self, stage: str) -> int:
        return max(1, round(STEPS[stage] * self.budget))


def draw_pictures(shop: Workshop) -> None:
    """People to learn from and, under other numbers, people to measure on."""
    people = max(20, round(PEOPLE * min(1.0, shop.budget * 2)))
    fill_cache(shop.pictures, CachePlan(0, people, PICTURES, shop.seed))
    held_out = max(20, round(HELD_OUT_PEOPLE * min(1.0, shop.budget * 4)))
    fill_cache(shop.held_out, CachePlan(HELD_OUT_FROM, held_out, HELD_OUT_PICTURES, shop.seed))


def train_perception(name: str) -> Callable[[Workshop], None]:
    """The stage of one small net."""

    def stage(shop: Workshop) -> None:
        from facegen.training.perception import Places, train

        places = Places(shop.pictures, shop.held_out, shop.work / name, shop.output)
        train(name, places, Budget(shop.steps(name)))

    return stage


def train_vae(shop: Workshop) -> None:
    """The autoencoder."""
    from facegen.training.vae import VAEObjective, VAESettings, new_vae

    settings = VAESettings()
    torch.manual_seed(VAE_SETTINGS.seed)
    recogniser = _recogniser(shop)
    objective = VAEObjective(new_vae(settings), Cache(shop.pictures), Cache(shop.held_out), settings, recogniser)
    measured = run(objective, shop.work / "vae", Budget(shop.steps("vae")), VAE_SETTINGS)
    record("vae", measured, shop.output / "mini.json")


def go_on_with(part: Literal["decoder", "autoencoder"]) -> Callable[[Workshop], None]:
    """The stage in which the finished model's decoder goes on, alone or with its encoder.

    Alone, the latents and all that was learnt from them stay valid; else they are encoded anew by the next stage.
    """

    def stage(shop: Workshop) -> None:
        from facegen.training.diffusion import save_vae
        from facegen.training.vae import AutoencoderObjective, DecoderObjective, VAESettings

        vae = _finished(shop.start or shop.output).vae
        lessons = learn_from(shop, shop.pictures, vae)
        kind, settings = DecoderObjective if part == "decoder" else AutoencoderObjective, VAESettings()
        objective = kind(
            vae, lessons.pictures, Cache(shop.held_out), settings, _recogniser(shop), lessons.latents,
            finished_teacher(shop), _painted_by_the_finished(shop) if part == "decoder" else None,
            _detector(shop),
        )  # fmt: skip
        before = _begun_with(objective, shop.work / part) if part == "decoder" else None
        measured = run(objective, shop.work / part, Budget(shop.steps(part)), VAE_SETTINGS)
        if before is not None:
            _mix(objective, before, settings.share)
        save_vae(vae, shop.output / "base" / "vae")
        record(part, measured, shop.output / "mini.json")

    return stage


def _painted_by_the_finished(shop: Workshop) -> Tensor:
    return _painted(_diffusion_objective(replace(shop, start=shop.start or shop.output)), shop)


def _painted(objective: DiffusionObjective, shop: Workshop) -> Tensor:
    """Latents that the model paints, kept in the work folder until others have painted some."""
    from facegen.training.checkpoint import load_tensors, save_tensors
    from facegen.training.walks import painted

    digest = hashlib.sha256()
    for value in objective.model.unet.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    path, weights = shop.work / "latents_painted.safetensors", digest.hexdigest()
    kept = load_tensors(path) if path.exists() else None
    if kept is None or kept.facts["weights"] != weights:
        found = painted(objective, max(20, round(PAINTED * min(1.0, shop.budget * 4))))
        save_tensors({"latents": found}, path, {"weights": weights})
        return found
    return kept.tensors["latents"]


def _recogniser(shop: Workshop) -> RecogniserNet:
    from facegen.evaluation.judges import load_network

    return cast("RecogniserNet", load_network(shop.output / "pack" / "rec"))


def _detector(shop: Workshop) -> DetectorNet:
    from facegen.evaluation.judges import load_network

    return cast("DetectorNet", load_network(shop.output / "pack" / "det"))


def finished_vae(shop: Workshop, samples: int = 512) -> Any:
    """The autoencoder with its averaged weights, and latents made zero-mean and unit-variance; the same every time."""
    from facegen.training.vae import VAESettings, fold_statistics, new_vae

    if shop.start is not None:
        return _finished(shop.start).vae
    vae = new_vae(VAESettings())
    wear_average(torch.nn.ModuleDict({"vae": vae}), shop.work / "vae", only="vae.")
    pictures = Cache(shop.pictures)
    rows = torch.arange(0, len(pictures), max(1, len(pictures) // samples))
    fold_statistics(vae, [pictures.rgb(part) * 2 - 1 for part in rows.split(32)])
    return vae.eval().requires_grad_(False)


def encode_pictures(shop: Workshop) -> None:
    """Latents and embeddings of all pictures, computed once; a whole file is renamed into place."""
    vae = finished_vae(shop)
    for place in (shop.pictures, shop.held_out):
        learn_from(shop, place, vae)


def learn_from(shop: Workshop, place: Path, vae: Any = None) -> Lessons:
    """What the diffusion learns from: latents (kept in the work folder) and embeddings of the pictures in ``place``."""
    from safetensors.torch import load_file

    from facegen.lending import lent
    from facegen.training.checkpoint import save_tensors
    from facegen.training.diffusion import Lessons
    from facegen.training.recogniser import embeddings_of
    from facegen.training.vae import encode_all, encodes_so

    pictures = Cache(place)
    path = shop.work / f"latents_{place.name}.safetensors"
    kept: dict[str, Tensor] = load_file(path) if path.exists() else {}
    vae = vae or finished_vae(shop)
    if not kept or not encodes_so(vae, pictures, kept["latents"]):
        recogniser, place_of_work = _recogniser(shop), training_device()
        with lent(vae, place_of_work), lent(recogniser, place_of_work):
            kept = {"latents": encode_all(vae, pictures), "embeddings": embeddings_of(recogniser, pictures)}
        save_tensors(kept, path, {"pictures": len(pictures)})
    return Lessons(pictures, kept["latents"], kept["embeddings"])


def opened(shop: Workshop) -> tuple[Model, Lessons, Lessons]:
    """For what is learnt beside the finished model in the output folder: that, the lessons, and the held-out ones."""
    from facegen.models.base import Model

    model = Model.from_pretrained(shop.output, dtype=torch.float32, device="cpu")
    return model, learn_from(shop, shop.pictures, model.vae), learn_from(shop, shop.held_out, model.vae)


def _diffusion_objective(shop: Workshop) -> DiffusionObjective:
    """The base model and the adapters that learn together with it, as they are before their own run."""
    from facegen.training.diffusion import DiffusionObjective, DiffusionSettings, new_adapters, new_model
    from facegen.world.tokenizer import build_tokenizer

    lessons, held_out = learn_from(shop, shop.pictures), learn_from(shop, shop.held_out)
    settings = DiffusionSettings()
    torch.manual_seed(DIFFUSION_SETTINGS.seed)
    model = new_model(finished_vae(shop), build_tokenizer(shop.work / "tokenizer"), settings)
    adapters = new_adapters(model, lessons.embeddings.shape[1], settings)
    objective = DiffusionObjective(model, adapters, lessons, settings, held_out, finished_reader(shop, lessons))
    if shop.start is not None:
        _begin_with(objective, shop.start)
    else:
        parts = torch.nn.ModuleDict({"text_encoder": model.text_encoder})
        wear_average(parts, shop.work / "words", only="text_encoder.")
    return objective


def _with_instantid(shop: Workshop) -> tuple[DiffusionObjective, DiffusionSettings, dict[str, Adapter]]:
    """What the last stage made, and InstantID beside it, untaught, with the settings of its lessons."""
    from facegen.training.diffusion import new_adapters

    before = _diffusion_objective(shop)
    _wear(before, shop, "diffusion")
    settings = replace(before.settings, ways={"instantid": 1.0}, base=False)
    return before, settings, new_adapters(before.model, before.lessons.embeddings.shape[1], settings)


def _instantid_objective(shop: Workshop) -> DiffusionObjective:
    """InstantID beside the base model of the last stage, whose UNet its IdentityNet begins as a copy of."""
    from facegen.training.diffusion import DiffusionObjective

    before, settings, adapters = _with_instantid(shop)
    objective = DiffusionObjective(before.model, adapters, before.lessons, settings, before.held_out, before.reader)
    if (shop.work / "tokens" / STATE).exists():
        wear_average(objective.module, shop.work / "tokens", only="instantid.")
        # What IP-Adapter-FaceID has learnt together with the base is better than what can be learnt beside it.
        pupil = cast("InstantID", objective.adapters["instantid"])
        pupil.projector.requires_grad_(False)
        pupil.streams.requires_grad_(False)
    return objective


def finished_reader(shop: Workshop, lessons: Lessons) -> LatentReader:
    """The reader of latents with its averaged weights."""
    reader = _new_reader(lessons)
    wear_average(torch.nn.ModuleDict({"reader": reader}), shop.work / "reader", only="reader.")
    return reader.eval().requires_grad_(False)


def finished_teacher(shop: Workshop) -> AttributeJudge:
    """The teacher of attributes with its averaged weights."""
    from facegen.face.networks import network
    from facegen.training.perception import STAGES as NETS

    teacher = cast("AttributeJudge", network(NETS["teacher"].net))
    wear_average(teacher, shop.work / "teacher")
    return teacher.eval().requires_grad_(False)


def _new_reader(lessons: Lessons) -> LatentReader:
    from facegen.training.reader import LatentReader

    return LatentReader(lessons.latents.shape[1], lessons.embeddings.shape[1])


def train_reader(shop: Workshop) -> None:
    """The small net that tells the diffusion whom and what its clean estimates show; not part of the model."""
    from facegen.training.reader import LatentReaderObjective, ReaderSettings

    lessons, held_out = learn_from(shop, shop.pictures), learn_from(shop, shop.held_out)
    torch.manual_seed(READER_SETTINGS.seed)
    objective = LatentReaderObjective(_new_reader(lessons), lessons, held_out, ReaderSettings())
    measured = run(objective, shop.work / "reader", Budget(shop.steps("reader")), READER_SETTINGS)
    record("reader", measured, shop.output / "mini.json")


def train_words(shop: Workshop) -> None:
    """The text encoder's first lesson: to keep what prompts ask for."""
    from facegen.training.diffusion import DiffusionSettings, new_adapters, new_model
    from facegen.training.reader import WordsObjective
    from facegen.world.tokenizer import build_tokenizer

    lessons, settings = learn_from(shop, shop.pictures), DiffusionSettings()
    torch.manual_seed(WORDS_SETTINGS.seed)
    model = new_model(finished_vae(shop), build_tokenizer(shop.work / "tokenizer"), settings)
    arc2face = new_adapters(model, lessons.embeddings.shape[1], settings)["arc2face"]
    objective = WordsObjective(model, cast("Arc2Face", arc2face), lessons)
    measured = run(objective, shop.work / "words", Budget(shop.steps("words")), WORDS_SETTINGS)
    record("words", measured, shop.output / "mini.json")


def _finished(folder: Path) -> SD15Model:
    from facegen.models.sd15 import SD15Model

    model = SD15Model.from_pretrained(folder / "base", dtype=torch.float32, device="cpu")
    return cast("SD15Model", model)


def _begin_with(objective: DiffusionObjective, folder: Path) -> None:
    """Give the objective the weights of a finished model of the same sizes."""
    from facegen.adapter import load_adapter

    before = _finished(folder)
    parts = {"unet": before.unet, "text_encoder": before.text_encoder}
    parts |= {
        name: load_adapter(folder / "adapters" / name, before).modules()
        for name in objective.adapters
        if name != "arc2face"  # its encoder is the text encoder
    }
    for name, part in parts.items():
        objective.module.get_submodule(name).load_state_dict(part.state_dict())


def train_diffusion(shop: Workshop) -> None:
    """Text encoder, UNet, Arc2Face and IP-Adapter-FaceID, together; then written in their official formats."""
    objective = _diffusion_objective(shop)
    measured = run(objective, shop.work / "diffusion", Budget(shop.steps("diffusion")), DIFFUSION_SETTINGS)
    _write(objective, shop)
    record("diffusion", measured, shop.output / "mini.json")


def train_critic(shop: Workshop) -> None:
    """The critic of the rewards, before them: what the model paints so far, and what is true."""
    from facegen.training.critics import BeholderObjective

    objective = _diffusion_objective(shop)
    _wear(objective, shop, "diffusion", rewarded=False)
    painted, teacher = _painted(objective, shop), finished_teacher(shop)
    torch.manual_seed(CRITIC_SETTINGS.seed)
    critic = BeholderObjective(
        objective.model, teacher, _recogniser(shop), _detector(shop), objective.lessons.latents, painted
    )
    measured = run(critic, shop.work / "critic", Budget(shop.steps("critic")), CRITIC_SETTINGS)
    record("critic", measured, shop.output / "mini.json")


def train_reward(shop: Workshop) -> None:
    """Text encoder, UNet and the adapters that learn with it go on, rewarded for their own pictures; then written."""
    objective = _diffusion_objective(shop)
    _wear(objective, shop, "diffusion", rewarded=False)
    _rewarded(objective, shop, "diffusion")


def train_tokens(shop: Workshop) -> None:
    """InstantID takes over what IP-Adapter-FaceID has learnt to say of faces."""
    from facegen.training.tokens import TokensObjective

    before, _, adapters = _with_instantid(shop)
    objective = TokensObjective(
        cast("InstantID", adapters["instantid"]),
        cast("IPAdapterFaceID", before.adapters["ip_adapter_faceid"]),
        before.lessons.embeddings,
        None if before.held_out is None else before.held_out.embeddings,
    )
    measured = run(objective, shop.work / "tokens", Budget(shop.steps("tokens")), TOKENS_SETTINGS)
    record("tokens", measured, shop.output / "mini.json")


def train_instantid(shop: Workshop) -> None:
    """InstantID's IdentityNet, all else staying as it is: its lessons, then the reward of its own pictures; then
    written."""
    objective = _instantid_objective(shop)
    measured = run(objective, shop.work / "instantid", Budget(shop.steps("instantid")), DIFFUSION_SETTINGS)
    record("instantid", measured, shop.output / "mini.json")
    _rewarded(objective, shop, "instantid")


REWARDS = {"diffusion": "reward", "instantid": "instantid reward"}  # which follows which


def _rewarded(objective: DiffusionObjective, shop: Workshop, stage: str) -> None:
    from facegen.training.reward import RewardObjective, RewardSettings

    settings = RewardSettings()
    if stage == "instantid":
        # It has less of the person than is asked for, and its points leave less of the picture open.
        settings = RewardSettings(likeness=4.0, obedience=1.4, sight=0.6, spread=4.0, whole=8.0)
    objective.settings = replace(objective.settings, batch=settings.lessons)
    reward = RewardObjective(objective, _recogniser(shop), _detector(shop), settings, finished_teacher(shop))
    wear_average(reward.module, shop.work / "critic", only="beholder.")
    before, name = _copied(objective), REWARDS[stage]
    measured = run(reward, shop.work / name, Budget(shop.steps(name)), REWARD_SETTINGS)
    _mix(objective, before, settings.share)
    _write(objective, shop)
    record(name, measured, shop.output / "mini.json")


def _wear(objective: DiffusionObjective, shop: Workshop, stage: str, rewarded: bool = True) -> None:
    """The averaged weights of a stage, or those of a finished model, and what came of the reward that followed."""
    from facegen.training.reward import RewardSettings

    own = tuple(f"{name}." for name, _ in objective.module.named_children())  # not the reward's critic
    if shop.start is None or (shop.work / stage / STATE).exists():
        wear_average(objective.module, shop.work / stage, only=own)
    reward = shop.work / REWARDS[stage]
    if rewarded and (reward / STATE).exists():
        before = _copied(objective)
        wear_average(objective.module, reward, only=own)
        _mix(objective, before, RewardSettings().share)


def _copied(objective: Objective) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in objective.module.state_dict().items()}


def _begun_with(objective: Objective, folder: Path) -> Mapping[str, Tensor]:
    """The weights that a stage began with, kept beside its checkpoint: what it started from may be overwritten by what
    came of it when the stage is asked for again."""
    from facegen.training.checkpoint import load_tensors, save_tensors

    path = folder / "before.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(_copied(objective), path, {})
    return load_tensors(path).tensors


def _mix(objective: Objective, before: Mapping[str, Tensor], share: float) -> None:
    """Go back towards the weights before: between the two lie models better than both (WiSE-FT, arXiv 2109.01903)."""
    for name, value in objective.module.state_dict().items():
        if value.is_floating_point():
            value.copy_(before[name].lerp(value, share))


def write_model(shop: Workshop) -> None:
    """The model as it is so far: the averaged weights of the last checkpoints, in their official formats."""
    objective = _diffusion_objective(shop)
    _wear(objective, shop, "diffusion")
    _write(objective, shop)
    if (shop.work / "instantid" / STATE).exists():
        objective = _instantid_objective(shop)
        _wear(objective, shop, "instantid")
        _write(objective, shop)


def _write(objective: DiffusionObjective, shop: Workshop) -> None:
    from facegen.training.diffusion import lend_words, save_base
    from facegen.world.captions import taught_words
    from facegen.world.wordings import synonyms

    objective.module.eval()
    if objective.settings.base:
        lend_words(objective.model, synonyms(taught_words()))
        save_base(cast("SD15Model", objective.model), shop.output / "base")
    for name, adapter in objective.adapters.items():
        adapter.save(shop.output / "adapters" / name, dtype=torch.float16)


def shapes(shop: Workshop) -> None:
    """The controls' teacher, only on demand."""
    from facegen.training.controls import train_shapes

    train_shapes(shop)


def teach_control(name: str) -> Callable[[Workshop], None]:
    """The stage of one control beside the finished base model, only on demand."""

    def stage(shop: Workshop) -> None:
        from facegen.training.controls import train_control

        train_control(name, shop)

    return stage


def restore(shop: Workshop) -> None:
    """What moves the latents of damaged faces to those of clean ones, only on demand."""
    from facegen.training.restore import train_restore

    train_restore(shop)


def distil(shop: Workshop) -> None:
    """Four steps instead of many, as a LoRA beside the finished base model, only on demand."""
    from facegen.training.distil import train_distil

    train_distil(shop)


def swap(shop: Workshop) -> None:
    """A face for another in a photo, learnt from twins, only on demand."""
    from facegen.training.swap import train_swap

    train_swap(shop)


STAGES: Mapping[str, Callable[[Workshop], None]] = {
    "pictures": draw_pictures,
    **{name: train_perception(name) for name in PERCEPTION},
    "vae": train_vae,
    "latents": encode_pictures,
    "teacher": train_perception("teacher"),
    "reader": train_reader,
    "words": train_words,
    "diffusion": train_diffusion,
    "critic": train_critic,
    "reward": train_reward,
    "tokens": train_tokens,
    "instantid": train_instantid,
}
EXTRA: Mapping[str, Callable[[Workshop], None]] = {
    "write": write_model,
    "decoder": go_on_with("decoder"),
    "autoencoder": go_on_with("autoencoder"),
    "distil": distil,
    "swap": swap,
    "restore": restore,
    "points68": train_perception("points68"),
    "shapes": shapes,
    **{name: teach_control(name) for name in CONTROLS},
}


def train(
    output: Path = MINI,
    stages: Sequence[str] = (),
    device: str | None = None,
    budget: float = 1.0,
    seed: int = 0,
    work: Path = Path("runs") / "mini",
    start: Path | None = None,
) -> None:
    """Run the named stages, all of them when none is named, in their order.

    ``budget`` is the share of the full recipe's steps and pictures; it must stay the same when a run goes on. The
    stage "write", only on demand, writes the diffusion model of the last checkpoint without waiting for the end; the
    stages of the controls ("shapes", their teacher, then "expression", "geometry" or one of its kinds), "distil" (a
    LoRA that paints in four steps) and "restore" (the aligner of damaged faces) learn beside the finished model in
    ``output``, "points68" the net that finds 68 points in a photo.
    Raises :class:`WrongRequest` for an unknown stage, :class:`WeightsMissing` where an earlier one is missing, and
    :class:`facegen.errors.Cancelled` on Ctrl-C; the same call goes on. ``start`` is a finished model (such as the
    embedded one) with which the diffusion begins instead of from nothing; its autoencoder is kept.
    """
    known = {**STAGES, **EXTRA}
    unknown = [name for name in stages if name not in known]
    if unknown:
        raise WrongRequest(f"There is no stage '{unknown[0]}'; the stages are: {', '.join(known)}.")
    if not 0 < budget <= 100:
        raise WrongRequest(f"budget is a share of the full recipe, above 0 and at most 100, not {budget}.")
    use_device(device)
    torch.set_flush_denormal(True)
    shop = Workshop(work, output, budget, seed, device, start)
    for name in [name for name in known if name in stages] or list(STAGES):
        logger.info("stage %s", name)
        try:
            known[name](shop)
        except FileNotFoundError as error:
            raise WeightsMissing(f"The stage '{name}' needs an earlier one that has not run yet: {error}.") from error
