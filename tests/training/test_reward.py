"""The reward of a model's own pictures: gradients come through decoder and recogniser, and the lessons go on beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from facegen.conditions import Condition
from facegen.evaluation.frechet import fid
from facegen.face.networks import AttributeJudge, DetectorNet, RecogniserNet
from facegen.training.critics import BeholderObjective, Reach, faces_seen, layers_of, with_faces
from facegen.training.diffusion import Batch, DiffusionObjective, DiffusionSettings
from facegen.training.loop import Budget, LoopSettings, run, wear_average
from facegen.training.mini import Workshop, _wear
from facegen.training.reader import _PLACES, asked, shares
from facegen.training.reader import SIZES as READER_SIZES
from facegen.training.reward import Habits, RewardObjective, RewardSettings
from facegen.world.facts import FACTS

SIZES = DiffusionSettings(
    channels=(32, 64), text_width=128, text_layers=1, queries=2, resampler_depth=1, rank=2, batch=6,
    ways={"prompt": 0.5, "ip_adapter_faceid": 0.5},
)  # fmt: skip


@pytest.fixture(scope="module")
def objective(tiny_teaching: Callable[[DiffusionSettings], DiffusionObjective]) -> RewardObjective:
    teaching = tiny_teaching(SIZES)
    recogniser = RecogniserNet(widths=(8, 8, 16)).eval().requires_grad_(False)
    detector = DetectorNet(widths=(4, 4, 8, 8, 8), neck=8).eval().requires_grad_(False)
    torch.nn.init.constant_(detector.score.bias, 4.0)  # untrained it sees no faces; now it sees them anywhere
    return RewardObjective(
        teaching, recogniser, detector, RewardSettings(painted=3, nobody=2, walks=(2,), guidance=2.0)
    )


def _batch(objective: RewardObjective, way: str) -> object:
    generator = torch.Generator().manual_seed(2)
    return objective.teaching._gather(objective.teaching.lessons, torch.arange(6), way, generator)


@pytest.mark.parametrize("way", ["prompt", "ip_adapter_faceid"])
def test_the_reward_alone_teaches_to_paint_the_person(objective: RewardObjective, way: str) -> None:
    some = objective._chosen(_batch(objective, way))  # type: ignore[arg-type]
    assert 1 <= len(some.latents) <= 3
    before = {name: value.clone() for name, value in objective.module.state_dict().items()}
    optimizer = torch.optim.AdamW(objective.module.parameters(), lr=1e-3)
    said = []
    for _ in range(5):
        unlike = objective.reward(some, torch.Generator().manual_seed(4))["unlike"]
        optimizer.zero_grad()
        unlike.backward()
        optimizer.step()
        said.append(float(unlike.detach()))
    assert said[-1] < said[0]
    assert all(p.grad is None for p in objective.recogniser.parameters())
    objective.module.load_state_dict(before)


def test_the_lessons_go_on_beside_it(objective: RewardObjective) -> None:
    batch = _batch(objective, "ip_adapter_faceid")
    generator = torch.Generator().manual_seed(5)
    lesson = objective.teaching.loss(batch, 0, generator)  # type: ignore[arg-type]
    both = objective.loss(batch, 0, torch.Generator().manual_seed(5))  # type: ignore[arg-type]
    assert both["loss_ip_adapter_faceid"] == lesson["loss_ip_adapter_faceid"]
    gap = float(both["loss"].detach() - lesson["loss"].detach())
    settings = objective.settings
    liking = settings.likeness * both["painted_unlike"] + settings.look * both["painted_untrue"]
    said = float(both["painted_critic"] + liking)
    assert both["painted_uneven"] == 0  # nobody reads latents here
    assert gap == pytest.approx(said, rel=1e-4)


def test_some_of_the_painted_are_asked_for_by_the_prompt_alone(objective: RewardObjective) -> None:
    batch = replace(_batch(objective, "prompt"), prompts=["smiling"] * 6)  # type: ignore[type-var]
    somebody = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])[:, None]
    batch = replace(batch, who=torch.nn.functional.normalize(batch.who + 1, dim=1) * somebody)
    chosen = objective._chosen(batch)
    assert (chosen.who != 0).any(1).tolist() == [True, False, False]
    # Nobody's likeness is asked of them.
    nobody = replace(chosen, who=torch.zeros_like(chosen.who))
    assert objective.reward(nobody, torch.Generator().manual_seed(4))["unlike"] == 0


@pytest.mark.parametrize("given", [0.0, 1.0])
def test_instantid_is_also_rewarded_with_the_points_of_the_picture_that_conditions(
    tiny_teaching: Callable[[DiffusionSettings], DiffusionObjective],
    objective: RewardObjective,
    given: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teaching = tiny_teaching(replace(SIZES, ways={"instantid": 1.0}, no_points=0.0))
    settings = replace(objective.settings, given=given)
    rewarded = RewardObjective(teaching, objective.recogniser, objective.detector, settings)
    batch = teaching._gather(teaching.lessons, torch.arange(6), "instantid", torch.Generator().manual_seed(2))
    assert batch.control is not None
    assert batch.given is not None
    # Both show the same people's points, each in another picture.
    every = teaching._control(teaching.lessons, torch.arange(9), torch.ones(9))
    for row, one in enumerate(batch.given):
        mates = [mate for mate in range(9) if mate // 3 == row // 3 and mate != row]
        assert any(torch.equal(one, every[mate]) for mate in mates)
    some, seen = rewarded._chosen(batch), []
    conditions = teaching.conditions

    def noted(asked: Batch) -> list[Condition]:
        seen.append(asked.control)
        return conditions(asked)

    monkeypatch.setattr(teaching, "conditions", noted)
    rewarded.reward(some, torch.Generator().manual_seed(4))
    wanted = some.given if given else some.control
    assert len(seen) >= 2
    assert all(control is not None and torch.equal(control, wanted) for control in seen)


@pytest.fixture
def taught(objective: RewardObjective) -> RewardObjective:
    """With a net that tells facts."""
    torch.manual_seed(1)
    teacher = AttributeJudge(widths=(8, 8, 16, 16), hidden=16).eval().requires_grad_(False)
    detector = DetectorNet(widths=(4, 4, 8, 8, 8), neck=8).eval()
    return RewardObjective(objective.teaching, objective.recogniser, detector, objective.settings, teacher)


def test_a_teacher_of_attributes_rewards_what_the_prompt_asks_for(taught: RewardObjective) -> None:
    batch = replace(_batch(taught, "prompt"), prompts=["smiling, black hair"] * 6)  # type: ignore[type-var]
    some = taught._chosen(replace(batch, wanted=asked(batch.prompts)))
    before = {name: value.clone() for name, value in taught.module.state_dict().items()}
    optimizer = torch.optim.AdamW(taught.module.parameters(), lr=1e-3)
    said = []
    for _ in range(5):
        heard = taught.reward(some, torch.Generator().manual_seed(4))
        optimizer.zero_grad()
        heard["amiss"].backward()
        optimizer.step()
        said.append(float(heard["amiss"].detach()))
    assert said[-1] < said[0]
    assert taught.teacher is not None
    assert all(p.grad is None for p in taught.teacher.parameters())
    # It has seen what true and painted pictures show where nothing was asked for, and only there.
    habits = (taught.habits.get_buffer(name) for name in ("true", "painted"))
    even = torch.cat([torch.full((size,), 1 / size) for size in READER_SIZES])
    for seen in habits:
        smile = _PLACES["expression", "smiling"]
        assert seen[smile] == even[smile]
        assert seen[_PLACES["looking", "ahead"]] != even[_PLACES["looking", "ahead"]]
    taught.module.load_state_dict(before)


def test_what_is_painted_too_often_is_held_against_it() -> None:
    habits, place = Habits(memory=0.5), _PLACES["looking", "ahead"]
    true = torch.cat([torch.full((8, size), 1 / size) for size in READER_SIZES], 1)
    painted = true.clone()
    start = place - FACTS["looking"].index("ahead")
    painted[:, start : start + 3] = torch.tensor([0.05, 0.9, 0.05])
    everything = torch.ones_like(true, dtype=torch.bool)
    for _ in range(12):
        habits.see("true", true, everything)
        habits.see("painted", painted, everything)
    logits = torch.zeros_like(true, requires_grad=True)
    habits.uneven(shares(logits), everything, ("looking",)).backward()
    assert logits.grad is not None
    pushed = logits.grad[0, start : start + 3]
    assert pushed[1] > 0 > pushed[0]
    assert pushed[0] == pytest.approx(float(pushed[2]), rel=1e-4)
    assert logits.grad[:, :start].abs().max() == 0  # the other kinds are not meant
    # What was asked for is no habit.
    asked = everything.clone()
    asked[:, start : start + 3] = False
    assert habits.uneven(painted, asked, ("looking",)) == 0
    before = habits.get_buffer("painted").clone()
    habits.see("painted", true, torch.zeros_like(everything))
    assert torch.equal(before, habits.get_buffer("painted"))


def test_painted_pictures_are_pushed_to_where_true_ones_lie_as_a_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    reach = Reach(3, memory=4000, recent=4000, damping=1e-6)
    mix = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.7, 0.0], [0.0, 0.0, 0.3]])
    true = torch.randn((4000, 3), generator=generator) @ mix.T + torch.tensor([1.0, -2.0, 0.0])
    painted = torch.randn((4000, 3), generator=generator) * torch.tensor([0.5, 2.0, 0.3])
    reach.see("true", true[:3999])
    reach.see("painted", painted)
    assert not reach.astray(painted).any()  # too few are known yet
    reach.see("true", true[3999:])
    reach.see("true", true)
    carried = reach.carried(painted)
    torch.testing.assert_close(carried.mean(0), true.mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(carried.T.cov(), true.T.cov(), atol=1e-2, rtol=1e-2)
    # Its cost is FID's, as a share of how much true pictures vary, and steps against the gradient lower FID.
    wanted = fid(painted, true) / float(true.var(0).sum())
    assert float(reach.astray(painted).mean()) == pytest.approx(wanted, rel=0.02)
    moved = painted.clone().requires_grad_()
    (found,) = torch.autograd.grad(reach.astray(moved).sum(), moved)
    assert fid(painted - 0.1 * found, true) < 0.9 * fid(painted, true)
    assert fid(carried, true) < 0.01 * fid(painted, true)


def test_where_pictures_lie_is_known_sooner_than_how_they_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    reach = Reach(4, memory=800, recent=80)
    for step in range(300):
        reach.see("painted", torch.randn((8, 4), generator=generator) + (step >= 200))
    mean, covariance = (reach.get_buffer(f"painted_{name}") for name in ("mean", "covariance"))
    torch.testing.assert_close(mean, torch.ones(4), atol=0.5, rtol=0)
    # Nor does it take the way from the one place to the other for a spread.
    assert covariance.diagonal().mean() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("part", ["narrow", "astray"])
def test_the_teacher_sees_how_alike_pictures_are(taught: RewardObjective, part: str) -> None:
    some = taught._chosen(_batch(taught, "prompt"))  # type: ignore[arg-type]
    taught.settings = replace(taught.settings, last=1.0)  # at the walk's last place all is judged
    assert taught.reward(some, torch.Generator().manual_seed(4))[part] == 0  # few have been seen
    for reach in taught.reach.each():
        size = len(reach.get_buffer("true_mean"))
        for name, spread in (("true", 1.0), ("painted", 0.5)):
            reach.see(name, spread * torch.randn((reach.memory, size), generator=torch.Generator().manual_seed(1)))
    said = taught.reward(some, torch.Generator().manual_seed(4))
    assert said[part] > 0
    own = [weight for weight in taught.teaching.module.parameters() if weight.requires_grad]
    found = torch.autograd.grad(said[part], own, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in found)


@pytest.mark.parametrize(("which", "opinion"), [("critic", "untrue"), ("beholder", "unreal")])
def test_a_critic_learns_and_is_not_moved_by_whom_it_judges(taught: RewardObjective, which: str, opinion: str) -> None:
    some = taught._chosen(_batch(taught, "prompt"))  # type: ignore[arg-type]
    taught.settings = replace(taught.settings, last=1.0)
    said = taught.reward(some, torch.Generator().manual_seed(4))
    own = list(taught.module.get_submodule(which).parameters())
    others = list(taught.teaching.module.parameters())
    assert all(g is None for g in torch.autograd.grad(said[opinion], own, retain_graph=True, allow_unused=True))
    assert any(g is not None for g in torch.autograd.grad(said[opinion], others, retain_graph=True, allow_unused=True))
    assert all(g is None for g in torch.autograd.grad(said["critic"], others, retain_graph=True, allow_unused=True))
    optimizer = torch.optim.AdamW(own, lr=2e-3)
    losses = []
    for _ in range(12):
        loss = taught.reward(some, torch.Generator().manual_seed(4))["critic"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_critic_learns_to_tell_painted_from_true_before_it_is_asked(taught: RewardObjective, tmp_path: Path) -> None:
    assert taught.teacher is not None
    generator = torch.Generator().manual_seed(3)
    true = torch.randn(24, 4, 16, 16, generator=generator)
    painted = true + 2
    critic = BeholderObjective(
        taught.teaching.model, taught.teacher, taught.recogniser, taught.detector, true, painted.half(), batch=6
    )
    first = critic.loss(critic.batch(0, generator), 0, generator)["loss"].item()
    measured = run(critic, tmp_path, Budget(steps=25), LoopSettings(learning_rate=3e-3, warmup=2, average=0.5))
    assert measured["train_loss"] < first
    assert measured["right_order"] == 1
    # What it knows is where the reward begins.
    wear_average(taught.module, tmp_path, only="beholder.")
    assert torch.equal(taught.beholder.heads[0][0].weight, critic.beholder.heads[0][0].weight)  # type: ignore[index]


def test_the_critics_are_asked_from_a_part_of_the_walk_on(taught: RewardObjective) -> None:
    some = taught._chosen(_batch(taught, "prompt"))  # type: ignore[arg-type]
    heard = {}
    for judged in (1.0, 0.3):
        # Of four places the second or third is chosen.
        taught.settings = replace(taught.settings, walks=(4,), last=0.0, judged=judged)
        said = taught.reward(some, torch.Generator().manual_seed(4))
        heard[judged] = (bool(said["untrue"]), bool(said["unreal"]))
    assert heard == {1.0: (False, False), 0.3: (True, True)}


def test_the_critic_sees_faces_beside_whole_pictures(taught: RewardObjective) -> None:
    assert taught.teacher is not None
    pictures = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    points = torch.tensor([[[50.0, 50.0], [78.0, 50.0], [64.0, 66.0], [52.0, 84.0], [76.0, 84.0]]])
    layers = layers_of(taught.teacher, pictures)
    seen = with_faces(layers, faces_seen(taught.recogniser, pictures, points))
    assert len(seen) == len(layers) + len(taught.recogniser.body)
    assert len(taught.beholder.heads) == len(seen)
    beside, inside = pictures.clone(), pictures.clone()
    beside[..., :6, :6] = 0
    inside[..., 60:66, 60:66] = 0
    for changed, moves in ((beside, False), (inside, True)):
        now = with_faces(layers, faces_seen(taught.recogniser, changed, points))[len(layers) :]
        before = seen[len(layers) :]
        assert any(not torch.equal(one, other) for one, other in zip(now, before, strict=True)) == moves
    assert with_faces([], seen) == []
    # Every layer has the same part in the opinion, however many places it has.
    said = taught.beholder(seen)
    assert said.shape[1] % len(seen) == 0
    for place, head in enumerate(taught.beholder.heads):
        torch.nn.init.zeros_(head[-1].weight)  # type: ignore[index, arg-type]
        torch.nn.init.constant_(head[-1].bias, float(place))  # type: ignore[index, arg-type]
    assert taught.beholder(seen).mean().item() == pytest.approx((len(seen) - 1) / 2)


def test_without_anything_asked_for_there_is_the_lesson_alone(objective: RewardObjective) -> None:
    batch = _batch(objective, "prompt")
    nobody = replace(batch, who=torch.zeros(6, 128), embeddings=torch.zeros(6, 128), prompts=[""] * 6)  # type: ignore[type-var]
    lesson = objective.teaching.loss(nobody, 0, torch.Generator().manual_seed(5))
    both = objective.loss(nobody, 0, torch.Generator().manual_seed(5))
    assert both["loss"] == lesson["loss"]


def test_the_finished_weights_lie_between_those_before_and_the_rewarded_ones(
    objective: RewardObjective, tmp_path: Path
) -> None:
    teaching, settings = objective.teaching, LoopSettings(learning_rate=1e-2, warmup=1)
    shop = Workshop(tmp_path, output=tmp_path / "mini")
    run(teaching, shop.work / "diffusion", Budget(1), settings)
    lessons = {name: value.clone() for name, value in teaching.module.state_dict().items()}
    run(objective, shop.work / "reward", Budget(1), settings)
    rewarded = {name: value.clone() for name, value in teaching.module.state_dict().items()}
    _wear(teaching, shop, "diffusion", rewarded=False)
    name = "unet.conv_in.weight"
    assert torch.equal(teaching.module.state_dict()[name], lessons[name])
    _wear(teaching, shop, "diffusion")
    assert not torch.equal(rewarded[name], lessons[name])
    between = lessons[name].lerp(rewarded[name], objective.settings.share)
    torch.testing.assert_close(teaching.module.state_dict()[name], between)
