"""The autoencoder's and the diffusion's training, on a toy world and with tiny nets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from facegen.adapters.instantid import InstantID
from facegen.conditions import ControlCondition, TokenCondition
from facegen.errors import WrongRequest
from facegen.face.networks import AttributeJudge, DetectorNet, RecogniserNet
from facegen.training.cache import Cache
from facegen.training.critics import PixelCritic, doubts, unmoved
from facegen.training.diffusion import (
    SCHEDULER,
    SELDOM,
    DiffusionObjective,
    DiffusionSettings,
    Lessons,
    lend_words,
    new_adapters,
    new_model,
    save_base,
)
from facegen.training.loop import Budget, LoopSettings, run
from facegen.training.mini import STAGES, _begun_with, _mix, train
from facegen.training.objectives.denoising import another, face_weights
from facegen.training.objectives.velocity import VelocityObjective
from facegen.training.vae import (
    AutoencoderObjective,
    DecoderObjective,
    VAEObjective,
    VAESettings,
    detail_weights,
    encode_all,
    encodes_so,
    fold_statistics,
    new_vae,
)
from facegen.world.captions import parse_prompt
from facegen.world.facts import FACTS, accepted, labels
from facegen.world.render import PARSING

Learner = tuple[DecoderObjective, dict[str, torch.Tensor], torch.optim.Optimizer]
VAE = VAESettings(channels=(16, 16, 32, 32), latent_channels=4, batch=2, crop=64)
SIZES = DiffusionSettings(
    channels=(32, 64),
    text_width=128,
    text_layers=1,
    queries=2,
    resampler_depth=1,
    rank=2,
    batch=4,
    ways={"prompt": 0.5, "ip_adapter_faceid": 0.25, "instantid": 0.25},
)


@pytest.fixture(scope="module")
def pictures(draw_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(draw_cache(tmp_path_factory.mktemp("pictures"), people=4, pictures=3))


@pytest.fixture
def objective(pictures: Cache, tmp_path: Path) -> DiffusionObjective:
    from facegen.world.tokenizer import build_tokenizer

    torch.manual_seed(0)
    model = new_model(new_vae(VAE).requires_grad_(False), build_tokenizer(tmp_path / "tokenizer"), SIZES)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(pictures), 4, 16, 16, generator=generator).half()
    lessons = Lessons(pictures, latents, torch.randn(len(pictures), 128, generator=generator))
    return DiffusionObjective(model, new_adapters(model, 128, SIZES), lessons, SIZES)


def test_the_autoencoder_learns(pictures: Cache, tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective = VAEObjective(new_vae(VAE), pictures, pictures, VAE)
    before = objective.figures()["psnr"]
    measured = run(objective, tmp_path, Budget(steps=30), LoopSettings(learning_rate=2e-3, warmup=5, average=0.9))
    assert measured["psnr"] > before + 3


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (DecoderObjective, {"decoder", "post_quant_conv"}),
        (AutoencoderObjective, {"encoder", "quant_conv", "decoder", "post_quant_conv"}),
    ],
)
def test_a_finished_autoencoder_goes_on(
    kind: type[DecoderObjective], parts: set[str], pictures: Cache, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vae = new_vae(VAE)
    recogniser = RecogniserNet(16, widths=(8, 8, 8), size=32).eval().requires_grad_(False)
    latents = encode_all(vae, pictures)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    settings = replace(VAE, crop=pictures.whole("rgb").shape[1])
    objective = kind(vae, pictures, pictures, settings, recogniser, latents)
    worse = objective.figures()["psnr"]
    measured = run(objective, tmp_path, Budget(steps=30), LoopSettings(learning_rate=2e-3, warmup=5, average=0.9))
    assert measured["psnr"] > worse + 3
    changed = {name.split(".")[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == parts


def told_by_step(learner: Learner, parts: tuple[str, ...], steps: int) -> list[tuple[float, ...]]:
    """What an objective says of some parts of its loss, of one batch, while these alone are learnt from."""
    objective, batch, optimizer = learner
    said = []
    for _ in range(steps):
        losses = objective.loss(batch, 0, torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        torch.stack([losses[part] for part in parts]).sum().backward()
        optimizer.step()
        said.append(tuple(float(losses[part].detach()) for part in parts))
    return said


def test_a_decoder_learns_to_look_right_to_a_teacher_of_attributes(pictures: Cache) -> None:
    torch.manual_seed(0)
    vae = new_vae(VAE)
    recogniser = RecogniserNet(16, widths=(8, 8, 8), size=32).eval().requires_grad_(False)
    teacher = AttributeJudge(widths=(8, 8, 16, 16), hidden=16).requires_grad_(False)
    for _ in range(30):  # its normalisations must know pictures, or all look the same to it
        teacher(pictures.rgb(torch.arange(8)) * 2 - 1)
    teacher.eval()
    settings = replace(VAE, crop=pictures.whole("rgb").shape[1])
    objective = DecoderObjective(vae, pictures, None, settings, recogniser, encode_all(vae, pictures), teacher)
    generator = torch.Generator().manual_seed(1)
    batch = objective.batch(0, generator)
    optimizer = torch.optim.AdamW(objective.module.parameters(), lr=2e-3)
    said = told_by_step((objective, batch, optimizer), ("look", "facts"), 12)
    assert said[-1][0] < said[0][0]
    assert said[-1][1] < said[0][1]
    assert all(p.grad is None for p in teacher.parameters())
    images = torch.rand(2, 3, 128, 128, generator=generator) * 2 - 1
    told = objective.told(teacher, images, images, images[:0], batch["points"][:2])
    assert all(float(value) == pytest.approx(0, abs=1e-5) for value in told.values())


def test_a_decoder_learns_to_make_of_painted_latents_what_looks_true(pictures: Cache) -> None:
    torch.manual_seed(0)
    vae = new_vae(VAE)
    recogniser = RecogniserNet(16, widths=(8, 8, 8), size=32).eval().requires_grad_(False)
    teacher = AttributeJudge(widths=(8, 8, 16, 16), hidden=16).eval().requires_grad_(False)
    settings = replace(VAE, crop=pictures.whole("rgb").shape[1])
    latents = encode_all(vae, pictures)
    detector = DetectorNet(widths=(4, 4, 8, 8, 8), neck=8).eval().requires_grad_(False)
    painted = latents[:3] + 1
    objective = DecoderObjective(vae, pictures, None, settings, recogniser, latents, teacher, painted, detector)
    generator = torch.Generator().manual_seed(1)
    batch = objective.batch(0, generator)
    assert batch["painted"].shape == (settings.decoder_batch, 4, 16, 16)
    for reach in objective.reach.each():
        reach.memory = len(batch["painted"])  # else it says nothing of so few

    def moved(name: str) -> set[str]:
        objective.module.zero_grad()
        objective.loss(batch, 0, generator)[name].backward()
        return {part for part, one in objective.module.named_children() if any(_touched(one))}

    def _touched(one: torch.nn.Module) -> list[bool]:
        return [bool(weight.grad.any()) for weight in one.parameters() if weight.grad is not None]

    assert moved("critic") == {"critics"}
    assert moved("crisp") == moved("texture") == moved("astray") == {"decoder", "post_quant_conv"}
    optimizer = torch.optim.AdamW(objective.critics.parameters(), lr=3e-3)
    critic = told_by_step((objective, batch, optimizer), ("critic",), 12)
    assert critic[-1][0] < 0.9 * critic[0][0]
    crisp = told_by_step((objective, batch, torch.optim.AdamW(vae.decoder.parameters(), lr=2e-3)), ("crisp",), 6)
    assert crisp[-1][0] < crisp[0][0]
    # Whatever it learnt of these has moved them, coarsely too, and that is held against it.
    back = told_by_step((objective, batch, torch.optim.AdamW(vae.decoder.parameters(), lr=1e-4)), ("strayed",), 6)
    assert back[-1][0] < back[0][0]
    astray = told_by_step((objective, batch, torch.optim.AdamW(vae.decoder.parameters(), lr=2e-3)), ("astray",), 6)
    assert astray[-1][0] < astray[0][0]


def test_the_critic_of_pixels_tells_strands_from_their_mean() -> None:
    """What is finer than two pixels is all that differs: no mean over squares of them would show it."""
    torch.manual_seed(0)
    critic = PixelCritic(widths=(8, 8, 8))
    optimizer = torch.optim.AdamW(critic.parameters(), lr=5e-3)

    def surfaces() -> tuple[torch.Tensor, torch.Tensor]:
        flat = torch.rand(16, 3, 1, 1).expand(16, 3, 32, 32)
        return flat + 0.1 * (-1) ** torch.arange(32), flat

    for _ in range(150):
        loss = doubts(*map(critic, surfaces()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    strands, flat = surfaces()
    assert critic(strands).shape == (16, 1, 4, 4)
    assert (critic(strands).mean((1, 2, 3)) > critic(flat).mean((1, 2, 3)).max()).all()
    softened = flat.clone().requires_grad_()
    unmoved(critic, softened).mean().backward()
    assert softened.grad is not None
    assert all(weight.grad is not None for weight in critic.parameters())
    assert critic(flat + 0.1 * softened.grad.sign()).mean() > critic(flat).mean()  # and it says what would be truer


def test_eyes_weigh_most_and_every_picture_the_same(pictures: Cache) -> None:
    parsing = pictures.whole("parsing")[:6]
    weights = detail_weights(parsing)
    assert weights.shape == (6, 1, *parsing.shape[1:])
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(6))
    for row, one in enumerate(parsing):
        eyes = torch.isin(one, torch.tensor([PARSING.index("l_eye"), PARSING.index("r_eye")]).byte())
        assert eyes.any()
        assert (weights[row, 0][eyes] == weights[row].max()).all()
        assert weights[row].min() < 0.2 * weights[row].max()


def test_folding_statistics_changes_latents_but_no_picture(pictures: Cache) -> None:
    torch.manual_seed(0)
    vae = new_vae(VAE).eval()
    images = pictures.rgb(torch.arange(4)) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mode()).sample
        spread = (
            vae.encode(images).latent_dist.std / vae.encode(images).latent_dist.mode().std((0, 2, 3))[:, None, None]
        )
        fold_statistics(vae, [images])
        after = vae.decode(vae.encode(images).latent_dist.mode()).sample
    latents = encode_all(vae, pictures)[:4].float()
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert latents.mean((0, 2, 3)).abs().max() < 1e-2
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-2
    torch.testing.assert_close(vae.encode(images).latent_dist.std, spread, rtol=1e-3, atol=1e-4)


def test_kept_latents_are_known_again_and_another_encoder_s_are_not(pictures: Cache) -> None:
    torch.manual_seed(0)
    vae, other = new_vae(VAE).eval(), new_vae(VAE).eval()
    for one in (vae, other):
        fold_statistics(one, [pictures.rgb(torch.arange(4)) * 2 - 1])
    latents = encode_all(vae, pictures)
    assert encodes_so(vae, pictures, latents)
    assert encodes_so(vae.half().float(), pictures, latents)
    assert not encodes_so(other, pictures, latents)
    assert not encodes_so(vae, pictures, latents[:-1])


def test_velocity_of_a_perfect_prediction_is_zero_and_matches_diffusers() -> None:
    from diffusers import DDPMScheduler

    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=generator).unbind(0)
    timesteps = torch.tensor([0, 10, 500, 998, 999])
    velocity = VelocityObjective(SCHEDULER)
    reference = DDPMScheduler.from_config({k: v for k, v in SCHEDULER.items() if not k.startswith("_")})
    wanted = reference.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(
        velocity.noisy(latents, noise, timesteps), reference.add_noise(latents, noise, timesteps)
    )
    assert velocity.errors(wanted, latents, noise, timesteps).max() < 1e-10
    torch.testing.assert_close(velocity.errors(wanted + 1, latents, noise, timesteps), torch.ones(5, 8, 8))


@pytest.mark.parametrize("way", ["prompt", "instantid", "ip_adapter_faceid"])
def test_every_way_reaches_its_own_weights(objective: DiffusionObjective, way: str) -> None:
    generator = torch.Generator().manual_seed(3)
    batch = objective._gather(objective.lessons, torch.arange(4), way, generator)
    objective.loss(batch, 0, generator)["loss"].backward()

    def touched(module: torch.nn.Module) -> bool:
        return any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())

    assert touched(objective.model.unet)
    assert touched(objective.model.text_encoder)
    for name in ("instantid", "ip_adapter_faceid"):
        assert touched(objective.adapters[name].modules()) == (name == way)


def test_adapters_learn_at_the_strength_that_they_are_used_with(objective: DiffusionObjective) -> None:
    adapter = objective.adapters["instantid"]
    assert isinstance(adapter, InstantID)
    batches = (objective.batch(0, torch.Generator().manual_seed(seed)) for seed in range(99))
    batch = next(batch for batch in batches if batch.way == "instantid")
    strengths = [c.scale for c in objective.conditions(batch) if isinstance(c, TokenCondition | ControlCondition)]
    assert strengths == [adapter.strength] * 2


def test_what_is_seldom_told_is_shown_and_told_more_often(objective: DiffusionObjective) -> None:
    scenes = objective.lessons.pictures.scenes(torch.arange(len(objective.lessons.pictures)))
    shown = {kind: [FACTS[kind][one] if one >= 0 else "" for one in found] for kind, found in labels(scenes).items()}
    objective.settings = replace(objective.settings, seldom=1.0, free=0.0, batch=8)
    facts = set()
    for seed in range(20):
        batch = objective.batch(0, torch.Generator().manual_seed(seed))
        rows = [int((objective.lessons.latents == one.half()).flatten(1).all(1).nonzero()[0]) for one in batch.latents]
        for row, prompt in zip(rows, batch.prompts, strict=True):
            own = {(kind, shown[kind][row]) for kind, _ in SELDOM} & SELDOM.keys()
            named = {(fact.kind, value) for fact in parse_prompt(prompt) for value in accepted(fact)}
            kinds = {kind for kind, _ in named}
            facts |= own
            assert own
            # Hair may be told by its colour alone.
            assert own & named or ("hair_color" in kinds and "hair_style" in dict(own)) or not prompt, prompt
    assert len(facts) > 3
    objective.settings = replace(objective.settings, seldom=0.0)
    rows, told = objective._with_seldom(torch.arange(8), torch.Generator())
    assert (rows == torch.arange(8)).all()
    assert not any(told)


def test_faces_weigh_more(objective: DiffusionObjective) -> None:
    rows = torch.arange(3)
    weights = face_weights(objective.lessons, rows, objective.settings.face)
    assert weights.shape == (3, 16, 16)
    torch.testing.assert_close(weights.mean((1, 2)), torch.ones(3))
    skin = (objective.lessons.pictures.field("parsing", rows) == 1).float()
    inside = torch.nn.functional.adaptive_avg_pool2d(skin, 16) == 1
    assert inside.any()
    assert weights[inside].min() > 2 * weights.amin()
    parsing = objective.lessons.pictures.field("parsing", rows)
    eyes = torch.isin(parsing, torch.tensor([PARSING.index("l_eye"), PARSING.index("r_eye")]).byte()).float()
    beside = torch.nn.functional.adaptive_max_pool2d(eyes, 16) == 1
    finer = face_weights(objective.lessons, rows, objective.settings.face, small=6.0)
    torch.testing.assert_close(finer.mean((1, 2)), torch.ones(3))
    assert beside.any()
    assert finer[beside].min() > finer[inside & ~beside].max()


def test_without_the_base_only_the_adapter_learns(objective: DiffusionObjective) -> None:
    settings = replace(SIZES, ways={"instantid": 1.0}, base=False)
    adapters = new_adapters(objective.model, 128, settings)
    alone = DiffusionObjective(objective.model, adapters, objective.lessons, settings)
    assert set(alone.module) == {"instantid"}
    generator = torch.Generator().manual_seed(3)
    batch = alone.batch(0, generator)
    assert batch.way == "instantid"
    alone.loss(batch, 0, generator)["loss"].backward()
    assert all(p.grad is None for p in objective.model.unet.parameters())
    assert all(p.grad is None for p in objective.model.text_encoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in alone.module.parameters())


def test_the_face_comes_from_another_picture_of_the_same_person(objective: DiffusionObjective) -> None:
    rows = torch.arange(12)
    label = objective.lessons.pictures.label
    for seed in range(5):
        roll = torch.rand(12, generator=torch.Generator().manual_seed(seed))
        other = another(objective.lessons, rows, roll)
        assert torch.equal(label[other], label[rows])
        assert (other != rows).all()


def test_training_lowers_the_loss_and_what_is_written_loads_in_plain_diffusers(
    objective: DiffusionObjective, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    from facegen.adapter import load_adapter
    from facegen.models.base import Model

    settings = LoopSettings(learning_rate=2e-3, warmup=5, average=0.9)
    measured = run(objective, tmp_path / "run", Budget(steps=12), settings)
    assert measured["train_loss"] < 1.3
    objective.module.eval()
    save_base(objective.model, tmp_path / "base")
    for name, adapter in objective.adapters.items():
        adapter.save(tmp_path / "adapters" / name, dtype=torch.float16)

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red hair", num_inference_steps=2, height=128, width=128).images[0].size == (128, 128)
    model = Model.from_pretrained(tmp_path / "base")
    for name in objective.adapters:
        loaded = load_adapter(tmp_path / "adapters" / name, model)
        assert type(loaded) is type(objective.adapters[name])


def test_a_word_that_was_never_taught_is_lent_what_its_synonym_learnt(objective: DiffusionObjective) -> None:
    model = objective.model
    table = model.text_encoder.get_input_embeddings().weight
    before = table.detach().clone()
    copper, red, smiling = (
        model.tokenizer(one, add_special_tokens=False).input_ids[0] for one in ("copper", "red", "smiling")
    )
    lend_words(model, {"copper": "red", "many words": "red", "unheardof": "red"})
    assert torch.equal(table[copper], before[red])
    changed = (table != before).any(1).nonzero().flatten().tolist()
    assert changed == [copper]
    assert smiling not in changed


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    assert next(iter(STAGES)) == "pictures"
    with pytest.raises(WrongRequest, match="'vea'"):
        train(tmp_path, ["vea"], work=tmp_path)


def test_what_a_stage_began_with_is_kept_for_when_it_is_asked_for_again(pictures: Cache, tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective = VAEObjective(new_vae(VAE), pictures, None, VAE)
    began = {name: value.clone() for name, value in objective.module.state_dict().items()}
    _begun_with(objective, tmp_path / "decoder")
    with torch.no_grad():
        for weight in objective.module.parameters():
            weight += 1
    kept = _begun_with(objective, tmp_path / "decoder")
    assert kept.keys() == began.keys()
    assert all(torch.equal(kept[name], value) for name, value in began.items())
    _mix(objective, kept, 0.25)
    after = objective.module.state_dict()
    assert all(torch.allclose(after[name], value + 0.25) for name, value in began.items())
